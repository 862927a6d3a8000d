"""The order of examples: the record at each position of the stream.

It is a pure function of (seed, position), and gives every record as often in each epoch as the
recipe says.
"""

import bisect
import functools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from limner import rng
from limner.data.buckets import Shape
from limner.errors import InputError

MOST_EXAMPLES = 10**8  # of an epoch, whose order is held in memory
PADDING = -1


class BucketCount(NamedTuple):
    """What the first epoch holds of one shape."""

    shape: Shape
    records: int
    batches: int
    empty_rows: int


class Order:
    """The order of a run, as tables of epochs.

    Without buckets the epochs follow each other without a gap, so that a batch may span two of
    them. With buckets no batch mixes shapes: the last batch of a shape is filled with ``PADDING``
    positions, and an epoch is a whole number of batches.

    Args:
        batch_size: rows of a global batch.
        shapes: of each entry.
        sets: the number of each entry's data set, from 0.
        repeats: for each data set, how often an epoch has each of its records.
        weights: for each data set, its share of an epoch; empty: ``repeats`` decide. An epoch then
            has as many examples as there are records, divided exactly (the largest remainders are
            rounded up). A set whose share is no multiple of its records goes on in the next epoch
            from its place in this one: all of its records come equally often.

    Raises:
        InputError: when a data set has no record, or so small a weight that an epoch has no place
            for it.
    """

    def __init__(
        self,
        seed: int,
        batch_size: int,
        shapes: Sequence[Shape],
        sets: Sequence[int],
        repeats: Sequence[int],
        weights: Sequence[float],
        with_buckets: bool,
    ):
        self.seed = seed
        self.batch_size = batch_size
        self.with_buckets = with_buckets
        self.shapes = sorted(set(shapes))
        shape_numbers = {shape: number for number, shape in enumerate(self.shapes)}
        self.shape_numbers = np.array([shape_numbers[shape] for shape in shapes])
        self.entries_of_sets = [
            np.flatnonzero(np.asarray(sets) == number) for number in range(len(repeats))
        ]
        sizes = [len(entries) for entries in self.entries_of_sets]
        self.examples_per_set = divide_epoch(sizes, repeats, weights)
        # With buckets, a set that does not end with the epoch gives each epoch other shapes, and so
        # another amount of padding.
        self.equal_epochs = not with_buckets or all(
            count % size == 0 for count, size in zip(self.examples_per_set, sizes, strict=True)
        )
        # Threads that load ahead cross from one epoch into the next.
        self.table = functools.lru_cache(maxsize=3)(self.make_table)
        self.epoch_starts = [0]
        self.epoch_starts_lock = threading.Lock()

    @functools.cached_property
    def length(self) -> int:
        """Positions of the first epoch, padding included."""
        return len(self.table(0)) if self.with_buckets else sum(self.examples_per_set)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps of the first epoch."""
        return self.length / self.batch_size

    def steps(self, epochs: float) -> int:
        """Return the optimizer steps of some epochs, rounded up; at least 1."""
        if self.equal_epochs:
            positions = epochs * self.length
        else:
            last = int(epochs)
            start = self.find_start(last)
            positions = start + (epochs - last) * (self.find_start(last + 1) - start)
        return max(1, math.ceil(positions / self.batch_size))

    def entry(self, position: int) -> int:
        """Return the number of the entry at a position, or ``PADDING``. Safe in threads."""
        if self.equal_epochs:
            epoch, place = divmod(position, self.length)
        else:
            while self.epoch_starts[-1] <= position:
                self.find_start(len(self.epoch_starts))
            epoch = bisect.bisect_right(self.epoch_starts, position) - 1
            place = position - self.epoch_starts[epoch]
        return int(self.table(epoch)[place])

    def find_start(self, epoch: int) -> int:
        """Return the first position of an epoch, by the lengths of all epochs before."""
        with self.epoch_starts_lock:
            while len(self.epoch_starts) <= epoch:
                length = len(self.table(len(self.epoch_starts) - 1))
                self.epoch_starts.append(self.epoch_starts[-1] + length)
        return self.epoch_starts[epoch]

    def make_table(self, epoch: int) -> np.ndarray:
        """Return the entries of an epoch in order; with buckets, whole batches of one shape."""
        sets = range(len(self.entries_of_sets))
        entries = np.concatenate([self.order_set(number, epoch) for number in sets])
        if len(self.entries_of_sets) > 1:
            entries = entries[rng.at(self.seed, "mixture", epoch).permutation(len(entries))]
        if not self.with_buckets:
            return entries
        shapes = self.shape_numbers[entries]
        batches = np.concatenate(
            [self.fill_batches(entries[shapes == number]) for number in range(len(self.shapes))]
        )
        order = rng.at(self.seed, "batches", epoch).permutation(len(batches))
        return batches[order].reshape(-1)

    def order_set(self, number: int, epoch: int) -> np.ndarray:
        """Return a data set's entries in an epoch.

        They are laps over all of them, each in random order, from where the last epoch ended.
        """
        entries = self.entries_of_sets[number]
        count = self.examples_per_set[number]
        first = epoch * count
        laps = range(first // len(entries), (first + count - 1) // len(entries) + 1)
        order = np.concatenate(
            [rng.at(self.seed, "order", lap, number).permutation(len(entries)) for lap in laps]
        )
        start = first - laps[0] * len(entries)
        return entries[order[start : start + count]]

    def fill_batches(self, entries: np.ndarray) -> np.ndarray:
        """Return entries in batches [n, batch_size], the last one filled with ``PADDING``."""
        padding = np.full(-len(entries) % self.batch_size, PADDING)
        return np.concatenate([entries, padding]).reshape(-1, self.batch_size)

    def count_batches(self) -> list[BucketCount]:
        """Count the first epoch's records, batches and empty rows by shape.

        Without buckets the last batch may span epochs.
        """
        table = self.table(0)
        examples = self.shape_numbers[table[table != PADDING]]
        counts = []
        for number, shape in enumerate(self.shapes):
            records = int(np.count_nonzero(self.shape_numbers == number))
            count = int(np.count_nonzero(examples == number))
            empty_rows = -count % self.batch_size if self.with_buckets else 0
            counts.append(BucketCount(shape, records, -(-count // self.batch_size), empty_rows))
        return counts


def divide_epoch(
    sizes: Sequence[int], repeats: Sequence[int], weights: Sequence[float]
) -> list[int]:
    """Return the examples of each data set in an epoch; arguments are those of ``Order``."""
    if 0 in sizes:
        raise InputError(
            f"data.sets[{sizes.index(0)}]: no record of it is left to train on; give it more "
            "records, or leave it out"
        )
    if not weights:
        counts = [count * size for count, size in zip(repeats, sizes, strict=True)]
        if sum(counts) > MOST_EXAMPLES:
            raise InputError(
                f"data.sets: an epoch would have {sum(counts):,} examples, {MOST_EXAMPLES:,} are "
                "possible; give fewer repeats"
            )
        return counts
    examples = divide(sum(sizes), weights)
    if 0 in examples:
        number = examples.index(0)
        raise InputError(
            f"data.sets[{number}].weight: {weights[number]} is so small that an epoch of "
            f"{sum(sizes)} examples has no place for it"
        )
    return examples


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """Divide ``total`` in proportion to ``weights``, in whole numbers.

    They are rounded down, and the largest remainders up until the sum is right.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    # A whole number that arithmetic makes a little too small is not rounded to the one below.
    parts = [int(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
