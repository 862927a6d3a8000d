"""The stream of training examples: example number p is a pure function of (seed, p), whoever asks,
in whatever order, on however many processes."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from limner import rng
from limner.config.schema import DataSettings, ObjectiveSettings
from limner.data import buckets, image
from limner.data.geometry import Geometry, center_square, count_crops, place_crop
from limner.data.image import Undecodable
from limner.data.index import Entry
from limner.data.order import PADDING, Order
from limner.data.source import BadRecord, Source
from limner.diffusion.objective import Objective
from limner.errors import InputError
from limner.families.family import Family
from limner.families.text import zero_dropped
from limner.features.encoder import FeatureEncoder, ImageRequest
from limner.protocols import Batch, Configs


@dataclass(frozen=True)
class Draw:
    """All chance about one example, decided before a byte is read; ``position`` is also the address
    of its noise."""

    position: int
    entry: Entry
    geometry: Geometry
    caption: str
    dropped: bool  # its caption is left out
    counts: bool  # False: it fills a bucket's last batch, with weight 0
    u: float  # where on the noise schedule, in [0, 1)


@dataclass(frozen=True)
class Stream:
    """Batches by step number. The global batch is the unit; a process takes its contiguous share of
    it."""

    entries: tuple[Entry, ...]
    order: Order
    source: Source
    data: DataSettings
    noise: ObjectiveSettings
    objective: Objective
    family: Family
    configs: Configs
    features: FeatureEncoder
    seed: int
    batch_size: int  # global
    text_encoders: bool = (
        False  # whether they learn: batches then have token ids in place of text features
    )

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of process ``rank`` in the batch of optimizer step ``step`` (from 0)."""
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        return self.assemble([self.make_draw(p) for p in range(first, first + share)], "")

    def record_names(self, step: int) -> list[str]:
        """The records of a whole batch, by key."""
        draws = [
            self.make_draw(p) for p in range(step * self.batch_size, (step + 1) * self.batch_size)
        ]
        return [draw.entry.key for draw in draws if draw.counts]

    def make_draw(self, position: int) -> Draw:
        """The ticket at ``position``. Each decision has its own address, so that adding one never
        moves another."""
        number = self.order.entry(position)
        counts = number != PADDING
        entry = self.entries[
            number if counts else self.order.entry(position - position % self.batch_size)
        ]
        chance = functools.partial(rng.uniform, self.seed)
        flip = self.data.flip and chance("flip", position) < 0.5
        crop = (
            None
            if self.data.crop_variants is None
            else int(chance("crops", position) * self.data.crop_variants)
        )
        caption = entry.captions[int(chance("caption", position) * len(entry.captions))]
        dropped = bool(self.data.drop_caption) and chance("drop", position) < self.data.drop_caption
        cut = self.geometry(entry, position, crop, flip)
        return Draw(
            position,
            entry,
            cut,
            "" if dropped else caption,
            dropped,
            counts,
            chance("timestep", position),
        )

    def geometry(self, entry: Entry, position: int, crop: int | None, flip: bool) -> Geometry:
        """Where the picture is cut: at the centre, at one of ``data.crop_variants`` fixed places,
        or at a new one for every position."""
        if "crop" not in self.family.image_views:
            return self.center_square(entry, flip)
        top, left = rng.at(
            self.seed,
            "crop",
            position if crop is None else entry.row,
            0 if crop is None else crop + 1,
        ).random(2)
        return place_crop(
            entry.size, buckets.choose_shape(entry.size, self.data), top, left, flip, self.data.crop
        )

    def variants(self, entry: Entry) -> list[Geometry] | None:
        """All the ways in which a picture is cut, or None where there is no end of them."""
        probe = self.geometry(entry, 0, None, False)
        if (
            "crop" not in self.family.image_views
            or self.data.crop == "center"
            or count_crops(probe) == 1
        ):
            crops: list[Geometry] = [probe]
        elif self.data.crop_variants is not None:
            crops = [self.geometry(entry, 0, k, False) for k in range(self.data.crop_variants)]
        else:
            return None
        return list(
            dict.fromkeys(
                replace(g, flip=flip)
                for g in crops
                for flip in ((False, True) if self.data.flip else (False,))
            )
        )

    def validation_crop(self, entry: Entry) -> Geometry:
        """Where a held-out picture is cut: the same centre, however the run crops and flips what it
        learns."""
        if "crop" not in self.family.image_views:
            return self.center_square(entry, False)
        return place_crop(entry.size, buckets.choose_shape(entry.size, self.data))

    def center_square(self, entry: Entry, flip: bool) -> Geometry:
        """How the family's image encoder sees a picture."""
        return center_square(entry.size, self.family.clip_image_size(self.configs), flip)

    def image_request(self, entry: Entry, geometry: Geometry, cached: bool = True) -> ImageRequest:
        """The request for one picture's views, of which ``geometry`` is the first: a key that says
        all they depend on, and what loads them."""
        resample = {"crop": self.data.resample, "center_square": "bicubic"}
        views = [
            (geometry if i == 0 else self.center_square(entry, geometry.flip), resample[view])
            for i, view in enumerate(self.family.image_views)
        ]

        def load() -> list[np.ndarray]:
            try:
                found = self.source[entry.row].image
                found = found.read_bytes() if isinstance(found, Path) else found
                if isinstance(found, bytes) and xxhash.xxh3_128(found).hexdigest() != entry.digest:
                    raise BadRecord(
                        entry.key, "the picture is another than when the run began"
                    )  # its features would be cached as the old one's
                return image.load_views(
                    found, views, background=self.data.background, max_pixels=self.data.max_pixels
                )
            except (Undecodable, BadRecord, OSError) as error:
                reason = getattr(error, "reason", error)
                raise InputError(
                    f"{entry.key}: {reason}. It was good when the run began; put it back and run "
                    "the same command again."
                ) from error

        seen = " ".join(f"{shape} {filtered}" for shape, filtered in views)
        key = f"{entry.digest} {seen} {self.data.background}"
        return ImageRequest(key if cached else None, geometry.shape, load)

    def assemble(self, draws: list[Draw], kind: str) -> Batch:
        """Features, clean latents, noise and the objective's numbers for some draws; ``kind`` sets
        its noise apart from training's."""
        pictures = self.features.image_features(
            [
                self.image_request(
                    d.entry, d.geometry, bool(kind) or self.variants(d.entry) is not None
                )
                for d in draws
            ]
        )
        shape = pictures[self.family.latent_features[0]].shape[1:]

        def normal(purpose: str, shape: tuple[int, ...] = shape) -> np.ndarray:
            return np.stack(
                [
                    rng.at(self.seed, kind + purpose, d.position).standard_normal(shape, np.float32)
                    for d in draws
                ]
            )

        noise = normal("noise")
        if self.noise.noise_offset:
            noise += np.float32(self.noise.noise_offset) * normal(
                "offset", (shape[0],) + (1,) * (len(shape) - 1)
            )
        batch = {
            "x0": self.family.clean_latents(pictures, self.configs, normal("posterior")),
            "noise": noise,
        }
        batch |= vars(self.objective.at(np.array([d.u for d in draws])))
        if self.noise.input_perturbation and not kind:
            batch["input_noise"] = noise + np.float32(self.noise.input_perturbation) * normal(
                "perturbation"
            )
        batch["weight"] = batch["weight"] * np.array([d.counts for d in draws], np.float32)
        batch["size_and_crop"] = np.array(
            [(*d.entry.size, *d.geometry.corner, *d.geometry.shape) for d in draws], np.float32
        )
        batch |= {
            name: array
            for name, array in pictures.items()
            if name not in self.family.latent_features
        }
        return batch | self.text_features(draws)

    def text_features(self, draws: list[Draw]) -> Batch:
        """Text features of some draws; where text encoders learn, their token ids, and ``keep``, 0
        where the features are to be zeros."""
        captions, keep = (
            [d.caption for d in draws],
            np.array([not (d.dropped and self.drops_to_zeros) for d in draws], np.float32),
        )
        if self.text_encoders:
            return self.features.token_ids(captions) | (
                {"keep": keep} if self.drops_to_zeros else {}
            )
        features = self.features.text_features(captions)
        return features if keep.all() else zero_dropped(features, keep)

    @property
    def drops_to_zeros(self) -> bool:
        """Whether a dropped caption is zeros, not an encoded empty text."""
        return self.data.empty_caption == "zeros" or (
            self.data.empty_caption == "base" and self.family.zeros_for_empty_prompt(self.configs)
        )

    def validation_batches(
        self, entries: tuple[Entry, ...], timesteps: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Batch]]:
        """Batches for validation: each record at evenly spread timesteps, always the same crop,
        caption and noise. Yields (rows that count, batch).

        Every process gets batches of its share's size, the last ones filled up with rows that do
        not count.
        """
        draws = []
        for i, entry in enumerate(entries):
            for k in range(timesteps):
                draws.append(
                    Draw(
                        i * timesteps + k,
                        entry,
                        self.validation_crop(entry),
                        entry.captions[0],
                        False,
                        True,
                        (k + 0.5) / timesteps,
                    )
                )
        share = self.batch_size // world
        for shape in sorted({d.geometry.shape for d in draws}):
            alike = [d for d in draws if d.geometry.shape == shape]
            for start in range(0, len(alike), self.batch_size):
                mine = alike[start + rank * share : start + (rank + 1) * share]
                yield len(mine), self.assemble((mine + [alike[0]] * share)[:share], "watch ")
