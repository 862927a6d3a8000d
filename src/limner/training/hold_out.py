"""Which records are held out for validation: never one whose picture is trained on."""

from collections import defaultdict

import numpy as np

from limner import rng
from limner.data.index import Entry, Index
from limner.errors import InputError
from limner.protocols import Report

Sides = tuple[tuple[Entry, ...], tuple[Entry, ...]]  # to train on, and held out


def hold_out_records(index: Index, count: int, seed: int, apart: bool, report: Report) -> Sides:
    """Return the records to train on, and those held out, drawn by the seed.

    Args:
        count: how many to hold out; others are where no groups of pictures make as many.
        apart: whether pictures that are the same, or look alike, stay on one side. A run that an
            earlier build began keeps its sides.

    Raises:
        InputError: when all pictures look alike.
    """
    order = rng.at(seed, "hold out", 0).permutation(len(index.entries))
    drawn = {int(i) for i in order[:count]}
    if not drawn:
        return index.entries, ()
    groups = index.group_alike()
    chosen = choose_groups(order, groups, count)
    if not apart:
        trained = {groups[i] for i in range(len(groups)) if i not in drawn}
        shared = sum(groups[i] in trained for i in drawn)
        if shared:
            report(
                f"{shared} of {count} held-out records have a picture that is trained on too, or "
                "looks like one that is: this run was begun by an earlier build, and goes on as it "
                "was"
            )
        chosen = drawn
    elif chosen != drawn:
        asked = "" if len(chosen) == count else f", where {count} are asked for"
        report(
            f"{len(chosen ^ drawn)} records have changed sides, so that none is held out whose "
            f"picture is trained on, or one that looks like it; {len(chosen)} are held out{asked}"
        )
    training = tuple(entry for i, entry in enumerate(index.entries) if i not in chosen)
    return training, tuple(index.entries[i] for i in sorted(chosen))


def choose_groups(order: np.ndarray, groups: list[int], count: int) -> set[int]:
    """Return the records to hold out, group by group as the order has them: at most ``count``, or
    the smallest group where all are larger.

    Args:
        order: record numbers, as they are drawn.
        groups: the group of each record.

    Raises:
        InputError: when nothing would be left to train on.
    """
    members: dict[int, set[int]] = defaultdict(set)
    for number in order:
        members[groups[number]].add(int(number))
    chosen: set[int] = set()
    for group in members.values():
        if len(chosen) + len(group) <= count:
            chosen |= group
    if not chosen:
        chosen = min(members.values(), key=len)
    if len(chosen) == len(groups):
        raise InputError(
            f"validation.hold_out: the pictures of all {len(groups)} records are the same or look "
            "alike, so that none can be held out that is not trained on. Add others, or hold out "
            "none"
        )
    return chosen
