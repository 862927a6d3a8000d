"""How a picture is resized, cropped and mirrored: numbers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Resize to height x width, take the crop_height x crop_width part at (top, left), then mirror
    left and right if ``flip``."""

    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int
    flip: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what is cut."""
        return self.crop_height, self.crop_width

    @property
    def corner(self) -> tuple[int, int]:
        """Top and left of the crop in the resized picture as the network sees it: mirrored, where
        the crop is mirrored."""
        return self.top, self.width - self.left - self.crop_width if self.flip else self.left


def covering_size(original: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the smallest picture of the original's proportions that covers ``shape``
    (height, width).

    The side that fits has exactly its length; the other is rounded down, as torchvision's
    ``Resize`` does for a square.
    """
    (height, width), (tall, wide) = original, shape
    return (
        (tall, tall * width // height)
        if tall * width >= wide * height
        else (wide * height // width, wide)
    )


def place_crop(
    original: tuple[int, int],
    shape: tuple[int, int],
    u_top: float = 0.0,
    u_left: float = 0.0,
    flip: bool = False,
    crop: str = "center",
) -> Geometry:
    """How a picture of ``original`` (height, width) becomes one of ``shape`` (height, width).

    Args:
        u_top, u_left: where a random crop lies, in [0, 1); a centre crop does not look at them.
        crop: ``"center"`` or ``"random"``.
    """
    height, width = covering_size(original, shape)
    spare = (height - shape[0], width - shape[1])
    if crop == "random":
        top, left = (int(u * (room + 1)) for u, room in zip((u_top, u_left), spare, strict=True))
    else:
        top, left = (round(room / 2) for room in spare)
    return Geometry(height, width, top, left, *shape, flip)


def center_square(original: tuple[int, int], side: int, flip: bool = False) -> Geometry:
    """How CLIP sees a picture: the shorter side resized to ``side``, and the middle square of that,
    as its image processor cuts it."""
    height, width = covering_size(original, (side, side))
    return Geometry(height, width, (height - side) // 2, (width - side) // 2, side, side, flip)


def count_crops(shape: Geometry) -> int:
    """How many different parts of that size can be cut from the resized picture: 1 when it has the
    same proportions."""
    return (shape.height - shape.crop_height + 1) * (shape.width - shape.crop_width + 1)
