"""Which records are held out for validation: never one whose picture is trained on."""

from collections import defaultdict

import numpy as np

from limner import rng
from limner.data.index import Entry, Index
from limner.errors import InputError, say_count
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
    if not apart:
        trained = {groups[i] for i in range(len(groups)) if i not in drawn}
        shared = sum(groups[i] in trained for i in drawn)
        if shared:
            total = f"of {count} held-out records"
            report(
                f"{say_count(shared, f'{total} has', f'{total} have')} a picture that is trained "
                "on too, or looks like one that is: this run was begun by an earlier build, and "
                "goes on as it was"
            )
        chosen = drawn
    else:
        chosen = choose_groups(order, groups, count)
        report_exchanged(drawn, chosen, report)
    training = tuple(entry for i, entry in enumerate(index.entries) if i not in chosen)
    return training, tuple(index.entries[i] for i in sorted(chosen))


def report_exchanged(drawn: set[int], chosen: set[int], report: Report) -> None:
    """Say how many of the records drawn are not held out, or how many others are."""
    if chosen == drawn:
        return
    if drawn - chosen:
        total = f"of the {len(drawn)} records drawn"
        change = f"{say_count(len(drawn - chosen), f'{total} is', f'{total} are')} exchanged"
    else:
        change = f"{say_count(len(chosen - drawn), 'other is', 'others are')} held out too"
    asked = ""
    if len(chosen) != len(drawn):
        asked = f", where {say_count(len(drawn), 'is', 'are')} asked for"
    report(
        f"{change}, so that none is held out whose picture is trained on, or one that looks like "
        f"it; {say_count(len(chosen), 'is', 'are')} held out{asked}"
    )


def choose_groups(order: np.ndarray, groups: list[int], count: int) -> set[int]:
    """Return the records to hold out, group by group as the order has them: at most ``count``, or
    the smallest group where all are larger.

    Args:
        order: record numbers, as they are drawn.
        groups: the group of each record.

    Raises:
        InputError: when nothing would be left to train on, or when half of the records or more
            would be held out, and more than twice as many as are asked for.
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
    if len(chosen) > 2 * count and len(chosen) >= len(groups) / 2:
        raise InputError(
            f"validation.hold_out: {count} of {len(groups)} records are asked for, and the "
            "smallest group of pictures that are the same or look alike has "
            f"{len(chosen)}. Add others, hold out {len(chosen)}, or hold out none"
        )
    return chosen
