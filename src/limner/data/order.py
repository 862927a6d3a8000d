"""Which record a position of the stream has: a pure function of (seed, position), every record as
often in each epoch as the recipe says."""

import bisect
import functools
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np

from limner import rng
from limner.data.buckets import Shape
from limner.errors import InputError

PADDING = -1


class Order:
    """The order of a run, as tables of epochs.

    Without buckets the epochs follow each other without a gap, so that a batch may span two of
    them. With buckets no batch mixes shapes: the last batch of a shape is filled with ``PADDING``
    positions, and an epoch is a whole number of batches.

    Args:
        batch: rows of a global batch.
        shapes: of each entry.
        sets: the number of each entry's data set, from 0.
        repeats: for each data set, how often an epoch has each of its records.
        weights: for each data set, its share of an epoch; empty: ``repeats`` decide. An epoch then
            has as many examples as there are records, divided exactly (the largest remainders are
            rounded up). A set whose share is no multiple of its records goes on in the next epoch
            where it ended in this one, so that all of its records come equally often.
        whole: with buckets.

    Raises:
        InputError: when a data set has no record, or so small a weight that an epoch has no place
            for it.
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        shapes: Sequence[Shape],
        sets: Sequence[int],
        repeats: Sequence[int],
        weights: Sequence[float],
        whole: bool,
    ):
        self.seed, self.batch, self.with_buckets = seed, batch, whole
        self.shapes = sorted(set(shapes))
        numbers = {shape: i for i, shape in enumerate(self.shapes)}
        self.shape_of = np.array([numbers[shape] for shape in shapes])
        self.members = [np.flatnonzero(np.asarray(sets) == i) for i in range(len(repeats))]
        sizes = [len(entries) for entries in self.members]
        if 0 in sizes:
            raise InputError(
                f"data.sets[{sizes.index(0)}]: no record of it is left to train on; give it more "
                "records, or leave it out"
            )
        self.places = (
            divide(sum(sizes), weights)
            if weights
            else [r * n for r, n in zip(repeats, sizes, strict=True)]
        )
        if 0 in self.places:
            i = self.places.index(0)
            raise InputError(
                f"data.sets[{i}].weight: {weights[i]} is so small that an epoch of {sum(sizes)} "
                "examples has no place for it"
            )
        self.constant = not whole or all(
            p % n == 0 for p, n in zip(self.places, sizes, strict=True)
        )  # whether all epochs are equally long
        self.table = functools.lru_cache(maxsize=3)(self.make_table)
        self.starts, self.growing = [0], threading.Lock()

    @functools.cached_property
    def length(self) -> int:
        """Positions of the first epoch, empty ones included."""
        return len(self.table(0)) if self.with_buckets else sum(self.places)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of the first epoch."""
        return self.length / self.batch

    def steps(self, epochs: float) -> int:
        """Optimizer steps of so many epochs, a step that is begun included; at least 1."""
        if self.constant:
            return max(1, math.ceil(epochs * self.length / self.batch))
        last = int(epochs)
        self.grow(lambda: len(self.starts) > last + 1)
        return max(
            1,
            math.ceil(
                (self.starts[last] + (epochs - last) * (self.starts[last + 1] - self.starts[last]))
                / self.batch
            ),
        )

    def entry(self, position: int) -> int:
        """The number of the entry at a position, or ``PADDING``. Safe in threads."""
        if self.constant:
            epoch, slot = divmod(position, self.length)
        else:
            self.grow(lambda: self.starts[-1] > position)
            epoch = bisect.bisect_right(self.starts, position) - 1
            slot = position - self.starts[epoch]
        return int(self.table(epoch)[slot])

    def grow(self, enough: Callable[[], bool]) -> None:
        """Find where further epochs begin, one after the other."""
        with self.growing:
            while not enough():
                self.starts.append(self.starts[-1] + len(self.table(len(self.starts) - 1)))

    def make_table(self, epoch: int) -> np.ndarray:
        """The entries of an epoch in their order, with buckets in whole batches of one shape
        each."""
        order = np.concatenate([self.entries_of_set(i, epoch) for i in range(len(self.members))])
        if len(self.members) > 1:
            order = order[rng.at(self.seed, "mixture", epoch).permutation(len(order))]
        if not self.with_buckets:
            return order
        parts = [order[self.shape_of[order] == i] for i in range(len(self.shapes))]
        filled = np.concatenate(
            [
                np.concatenate([part, np.full(-len(part) % self.batch, PADDING)]).reshape(
                    -1, self.batch
                )
                for part in parts
            ]
        )
        return filled[rng.at(self.seed, "batches", epoch).permutation(len(filled))].reshape(-1)

    def entries_of_set(self, number: int, epoch: int) -> np.ndarray:
        """A data set's entries in an epoch: laps of all of them in random order, from where the
        last epoch ended."""
        entries, first = self.members[number], epoch * self.places[number]
        laps = range(first // len(entries), (first + self.places[number] - 1) // len(entries) + 1)
        order = np.concatenate(
            [rng.at(self.seed, "order", lap, number).permutation(len(entries)) for lap in laps]
        )
        return entries[order[first - laps[0] * len(entries) :][: self.places[number]]]

    def count_batches(self) -> list[tuple[Shape, int, int, int]]:
        """For each shape: records, batches and empty rows in the first epoch; without buckets all
        batches are counted, of which one may span epochs."""
        table, out = self.table(0), []
        for i, shape in enumerate(self.shapes):
            places = int(np.count_nonzero(self.shape_of[table[table != PADDING]] == i))
            out.append(
                (
                    shape,
                    int(np.count_nonzero(self.shape_of == i)),
                    -(-places // self.batch),
                    -places % self.batch if self.with_buckets else 0,
                )
            )
        return out


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` in proportion to ``weights``, in whole numbers: rounded down, and the largest
    remainders up until the sum is right."""
    exact = [total * w / sum(weights) for w in weights]
    out = [int(x + 1e-9) for x in exact]
    for i in sorted(range(len(out)), key=lambda i: (out[i] - exact[i], i))[: total - sum(out)]:
        out[i] += 1
    return out
