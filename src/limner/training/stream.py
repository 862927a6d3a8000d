"""The stream of training examples.

Example number p is a pure function of (seed, p), whoever asks, in whatever order, on however many
processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from limner import rng
from limner.config.schema import DataSettings, ObjectiveSettings
from limner.data.geometry import Geometry
from limner.data.index import Entry
from limner.data.order import PADDING, Order
from limner.data.source import Source
from limner.diffusion.objective import Objective
from limner.families.family import Family
from limner.families.text import zero_dropped
from limner.features.encoder import FeatureEncoder
from limner.protocols import BaseConfigs, Batch
from limner.training.captions import Captions
from limner.training.crops import Crops


@dataclass(frozen=True)
class Draw:
    """All chance about one example, decided before a byte is read.

    ``position`` is also the address of its noise.
    """

    position: int
    entry: Entry
    geometry: Geometry
    caption: str
    dropped: bool  # its caption is left out
    counts: bool  # False: it fills a bucket's last batch, with weight 0
    u: float  # where on the noise schedule, in [0, 1)


@dataclass(frozen=True)
class Stream:
    """Batches by step number. The global batch is the unit; a process takes its contiguous
    share."""

    entries: tuple[Entry, ...]
    order: Order
    source: Source
    data: DataSettings
    noise: ObjectiveSettings
    objective: Objective
    family: Family
    configs: BaseConfigs
    features: FeatureEncoder
    seed: int
    batch_size: int  # global
    # Whether text encoders learn. Batches then have token ids in place of text features.
    text_encoders: bool = False

    @property
    def crops(self) -> Crops:
        """How the pictures are cropped."""
        return Crops(self.source, self.data, self.family, self.configs, self.seed)

    @property
    def captions(self) -> Captions:
        """Which caption an example gets."""
        return Captions(self.data, self.seed)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of process ``rank`` in the batch of optimizer step ``step`` (from 0)."""
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        return self.assemble([self.make_draw(p) for p in range(first, first + share)], "")

    def record_names(self, step: int) -> list[str]:
        """The records of a whole batch, by key."""
        first = step * self.batch_size
        draws = [self.make_draw(p) for p in range(first, first + self.batch_size)]
        return [draw.entry.key for draw in draws if draw.counts]

    def make_draw(self, position: int) -> Draw:
        """Decide all chance about the example at ``position``.

        Each decision has an address of its own, so that adding one never moves another.
        """
        number = self.order.entry(position)
        counts = number != PADDING
        if not counts:
            # A row of padding repeats the first example of its batch, with weight 0.
            number = self.order.entry(position - position % self.batch_size)
        entry = self.entries[number]
        caption, dropped = self.captions.draw(entry, position)
        return Draw(
            position=position,
            entry=entry,
            geometry=self.crops.draw(entry, position),
            caption=caption,
            dropped=dropped,
            counts=counts,
            u=rng.uniform(self.seed, "timestep", position),
        )

    def assemble(self, draws: list[Draw], purpose_prefix: str) -> Batch:
        """Features, clean latents, noise and the objective's numbers for some draws.

        Args:
            purpose_prefix: sets the noise of validation apart from that of training, which has
                none.
        """
        training = not purpose_prefix
        requests = []
        for draw in draws:
            cached = not training or self.crops.list_variants(draw.entry) is not None
            requests.append(self.crops.make_request(draw.entry, draw.geometry, cached))
        pictures = self.features.image_features(requests)
        latent_features = self.family.images.latent_features
        shape = pictures[latent_features[0]].shape[1:]

        def normal(purpose: str, shape: tuple[int, ...] = shape) -> np.ndarray:
            generators = [rng.at(self.seed, purpose_prefix + purpose, d.position) for d in draws]
            return np.stack([one.standard_normal(shape, np.float32) for one in generators])

        noise = normal("noise")
        if self.noise.noise_offset:
            one_per_channel = (shape[0],) + (1,) * (len(shape) - 1)
            noise += np.float32(self.noise.noise_offset) * normal("offset", one_per_channel)
        batch = {
            "x0": self.family.images.clean_latents(pictures, self.configs, normal("posterior")),
            "noise": noise,
            "position": np.array([draw.position for draw in draws], np.int64),
        }
        batch |= vars(self.objective.at(np.array([draw.u for draw in draws]), shape))
        if self.noise.input_perturbation and training:
            perturbation = np.float32(self.noise.input_perturbation) * normal("perturbation")
            batch["input_noise"] = noise + perturbation
        batch["weight"] = batch["weight"] * np.array([d.counts for d in draws], np.float32)
        batch["size_and_crop"] = np.array(
            [(*d.entry.size, *d.geometry.corner, *d.geometry.shape) for d in draws], np.float32
        )
        batch |= {name: x for name, x in pictures.items() if name not in latent_features}
        return batch | self.text_features(draws)

    def text_features(self, draws: list[Draw]) -> Batch:
        """Text features of some draws. Where text encoders learn: token ids, and ``keep``, 0 for
        examples whose features are to be zeros."""
        captions = [draw.caption for draw in draws]
        zeros = [draw.dropped and self.drops_to_zeros for draw in draws]
        keep = 1 - np.array(zeros, np.float32)
        if self.text_encoders:
            tokens = self.features.token_ids(captions)
            return tokens | {"keep": keep} if self.drops_to_zeros else tokens
        features = self.features.text_features(captions)
        return zero_dropped(features, keep) if any(zeros) else features

    @property
    def drops_to_zeros(self) -> bool:
        """Whether a dropped caption is zeros, not an encoded empty text."""
        if self.data.empty_caption == "base":
            return self.family.text.zeros_for_empty_prompt(self.configs)
        return self.data.empty_caption == "zeros"

    def validation_batches(
        self, entries: tuple[Entry, ...], timesteps: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[int, Batch]]:
        """Batches for validation: each record at evenly spread timesteps, always the same crop,
        caption and noise.

        Yields:
            Rows that count, and the batch. Every process gets batches of its share's size, the last
            ones filled up with rows that do not count.
        """
        draws = [
            Draw(
                position=i * timesteps + k,
                entry=entry,
                geometry=self.crops.place_for_validation(entry),
                caption=entry.captions[0],
                dropped=False,
                counts=True,
                u=(k + 0.5) / timesteps,
            )
            for i, entry in enumerate(entries)
            for k in range(timesteps)
        ]
        share = self.batch_size // world
        for shape in sorted({draw.geometry.shape for draw in draws}):
            alike = [draw for draw in draws if draw.geometry.shape == shape]
            for start in range(0, len(alike), self.batch_size):
                first = start + rank * share
                mine = alike[first : first + share]
                padding = [alike[0]] * (share - len(mine))
                yield len(mine), self.assemble(mine + padding, "watch ")
