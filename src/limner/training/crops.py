"""How each picture is cropped and mirrored, and what is asked of its encoders."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from limner import rng
from limner.config.schema import DataSettings
from limner.data import buckets, image
from limner.data.geometry import Geometry, center_square, count_crops, place_crop
from limner.data.index import Entry, digest_file_content, explain_want_of_memory
from limner.data.picture_file import Undecodable, read_file
from limner.data.source import BadRecord, Source
from limner.errors import InputError
from limner.families.family import Family
from limner.features.encoder import ImageRequest
from limner.protocols import BaseConfigs


@dataclass(frozen=True)
class Crops:
    """The crops of a run's pictures: those that it learns, those that it may ask for, those that it
    is validated on."""

    source: Source
    data: DataSettings
    family: Family
    configs: BaseConfigs
    seed: int

    def draw(self, entry: Entry, position: int) -> Geometry:
        """Decide how the picture of the example at ``position`` in the stream is cropped and
        mirrored."""
        flip = self.data.flip and rng.uniform(self.seed, "flip", position) < 0.5
        variant = None
        if self.data.crop_variants is not None:
            variant = int(rng.uniform(self.seed, "crops", position) * self.data.crop_variants)
        return self.place(entry, position, variant, flip)

    def place(self, entry: Entry, position: int, variant: int | None, flip: bool) -> Geometry:
        """Where the picture is cropped: at the centre, at one of ``data.crop_variants`` fixed
        places, or at a new one for every position."""
        if not self.follows_recipe:
            return self.place_center_square(entry, flip)
        if variant is None:
            generator = rng.at(self.seed, "crop", position, 0)
        else:
            generator = rng.at(self.seed, "crop", entry.row, variant + 1)
        top, left = generator.random(2)
        shape = buckets.choose_shape(entry.size, self.data)
        return place_crop(entry.size, shape, top, left, flip, self.data.crop)

    def list_variants(self, entry: Entry) -> list[Geometry] | None:
        """All the ways in which a picture is cropped and mirrored; None: there is no end of
        them."""
        first = self.place(entry, 0, None, False)
        if not self.follows_recipe or self.data.crop == "center" or count_crops(first) == 1:
            crops = [first]
        elif self.data.crop_variants is not None:
            crops = [self.place(entry, 0, k, False) for k in range(self.data.crop_variants)]
        else:
            return None
        flips = (False, True) if self.data.flip else (False,)
        # Several variants may be the same crop.
        return list(dict.fromkeys(replace(crop, flip=flip) for crop in crops for flip in flips))

    def place_for_validation(self, entry: Entry) -> Geometry:
        """The centre, however the run crops and flips what it learns."""
        if not self.follows_recipe:
            return self.place_center_square(entry, False)
        return place_crop(entry.size, buckets.choose_shape(entry.size, self.data))

    def place_center_square(self, entry: Entry, flip: bool) -> Geometry:
        """How the family's image encoder sees a picture."""
        return center_square(entry.size, self.family.images.clip_size(self.configs), flip)

    @property
    def follows_recipe(self) -> bool:
        """Whether the family sees pictures as the recipe crops them."""
        return "crop" in self.family.images.views

    def make_request(self, entry: Entry, geometry: Geometry, cached: bool = True) -> ImageRequest:
        """The request for one picture's views, of which ``geometry`` is the first: a key that says
        all they depend on, and what loads them."""
        resample = {"crop": self.data.resample, "center_square": "bicubic"}
        views: list[tuple[Geometry, str]] = []
        for i, view in enumerate(self.family.images.views):
            crop = geometry if i == 0 else self.place_center_square(entry, geometry.flip)
            views.append((crop, resample[view]))
        names = " ".join(f"{crop} {filter_name}" for crop, filter_name in views)
        key = f"{entry.digest} {names} {self.data.background}"

        def load() -> list[np.ndarray]:
            return self.load_views(entry, views)

        return ImageRequest(key if cached else None, geometry.shape, load)

    def load_views(self, entry: Entry, views: list[tuple[Geometry, str]]) -> list[np.ndarray]:
        """Read and crop a picture; each view is uint8 [height, width, 3].

        Raises:
            InputError: when it is not the picture that it was when the run began.
        """
        data = self.data
        try:
            picture = self.source[entry.row].image
            if isinstance(picture, Path):
                picture = read_file(picture)
            # Its features would be cached as the old picture's.
            if isinstance(picture, bytes) and digest_file_content(picture) != entry.digest:
                raise BadRecord(entry.key, "the picture is another than when the run began")
            return image.load_views(
                picture, views, background=data.background, max_pixels=data.max_pixels
            )
        except MemoryError as error:
            raise InputError(explain_want_of_memory(entry.key)) from error
        except (Undecodable, BadRecord, OSError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"{entry.key}: {reason}. It was good when the run began; put it back and run "
                "the same command again."
            ) from error
