"""Resizing, cropping and mirroring of a picture as numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A resize to height x width, a crop at (top, left), and whether left and right are mirrored.

    The crop is crop_height x crop_width, in pixels of the resized picture.
    """

    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int
    flip: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the crop."""
        return self.crop_height, self.crop_width

    @property
    def corner(self) -> tuple[int, int]:
        """Top and left of the crop in the resized picture, both mirrored if ``flip``."""
        if self.flip:
            return self.top, self.width - self.left - self.crop_width
        return self.top, self.left


def covering_size(original: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest size of the original's proportions that covers ``shape``.

    All sizes are (height, width). The side that fits has exactly its length; the other one is
    rounded down, as torchvision's ``Resize`` does for a square.
    """
    height, width = original
    shape_height, shape_width = shape
    if shape_height * width >= shape_width * height:
        return shape_height, shape_height * width // height
    return shape_width * height // width, shape_width


def place_crop(
    original: tuple[int, int],
    shape: tuple[int, int],
    u_top: float = 0.0,
    u_left: float = 0.0,
    flip: bool = False,
    crop: str = "center",
) -> Geometry:
    """Return the geometry that takes a picture from ``original`` to ``shape`` (height, width).

    Args:
        u_top, u_left: uniform numbers in [0, 1) that place a random crop.
        crop: ``"center"`` or ``"random"``.
    """
    height, width = covering_size(original, shape)
    spare_height = height - shape[0]
    spare_width = width - shape[1]
    if crop == "random":
        top = int(u_top * (spare_height + 1))
        left = int(u_left * (spare_width + 1))
    else:
        top = round(spare_height / 2)
        left = round(spare_width / 2)
    return Geometry(height, width, top, left, *shape, flip)


def center_square(original: tuple[int, int], side: int, flip: bool = False) -> Geometry:
    """Return CLIP's view of a picture: the shorter side resized to ``side``, then the middle."""
    height, width = covering_size(original, (side, side))
    # Rounded down, as CLIP's image processor does.
    top = (height - side) // 2
    left = (width - side) // 2
    return Geometry(height, width, top, left, side, side, flip)


def count_crops(geometry: Geometry) -> int:
    """Return the number of places of the crop; 1 where the proportions are the same."""
    rows = geometry.height - geometry.crop_height + 1
    columns = geometry.width - geometry.crop_width + 1
    return rows * columns
