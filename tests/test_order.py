"""Every record as often in each epoch as the recipe says, in an order that is a pure function of
(seed, position)."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from limner import rng
from limner.data.order import PADDING, Order, divide
from limner.errors import InputError

WIDE, TALL = (64, 128), (128, 64)


def order(
    shapes: str, sets: str = "", batch: int = 4, repeats=(1,), weights=(), whole=True, seed: int = 3
) -> Order:
    """One letter per entry: w(ide) or t(all); one digit per entry: its data set."""
    return Order(
        seed,
        batch,
        [{"w": WIDE, "t": TALL}[c] for c in shapes],
        [int(c) for c in sets or "0" * len(shapes)],
        repeats,
        weights,
        whole,
    )


def epoch(made: Order, number: int) -> np.ndarray:
    return np.array([made.entry(number * made.length + i) for i in range(made.length)])


def test_one_set_without_buckets_is_one_permutation_after_the_other():
    made = order("w" * 10, whole=False, seed=5)
    assert (
        made.length == 10
        and made.steps_per_epoch == 2.5
        and [made.steps(e) for e in (0.1, 1, 2, 3)] == [1, 3, 5, 8]
    )
    for number in range(3):
        assert epoch(made, number).tolist() == rng.at(5, "order", number).permutation(10).tolist()


def test_every_picture_once_per_epoch_no_batch_mixes_and_remainders_are_filled():
    shapes = "wwtwtwwwwtwww"  # 10 wide, 3 tall: batches of 4, 4, 2 and 3
    made = order(shapes)
    assert (
        made.length == 16
        and made.steps(2) == 8
        and made.count_batches() == [(WIDE, 10, 3, 2), (TALL, 3, 1, 1)]
    )
    orders = []
    for number in range(4):
        seen = epoch(made, number)
        assert sorted(seen[seen != PADDING]) == list(range(13))
        for batch in seen.reshape(-1, 4):
            assert len({shapes[i] for i in batch if i != PADDING}) == 1 and batch[0] != PADDING
            assert not np.any(np.diff((batch == PADDING).astype(int)) < 0)  # empty rows come last
        orders.append(seen.tolist())
    assert len({str(o) for o in orders}) == 4
    assert Counter(shapes[o[0]] for o in (epoch(made, e) for e in range(200)))[
        "t"
    ] == pytest.approx(50, abs=20)  # batches are shuffled too


def test_it_is_pure_in_any_order_and_in_threads():
    made, again = (
        order("wtwwtwwt", "00110101", repeats=(2, 1)),
        order("wtwwtwwt", "00110101", repeats=(2, 1)),
    )
    positions = np.random.default_rng(0).permutation(20 * made.length)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(positions, pool.map(made.entry, positions), strict=True))
    assert [again.entry(p) for p in range(20 * made.length)] == [
        found[p] for p in range(20 * made.length)
    ]
    assert [order("w" * 8, seed=s, whole=False).entry(0) for s in range(6)].count(found[0]) < 6


def test_repeats():
    made = order("w" * 7, "0001111", repeats=(3, 1), whole=False)
    assert made.length == 13
    for number in range(3):
        assert Counter(epoch(made, number).tolist()) == {0: 3, 1: 3, 2: 3, 3: 1, 4: 1, 5: 1, 6: 1}
    assert epoch(made, 0).tolist() != sorted(epoch(made, 0).tolist())


@pytest.mark.parametrize("whole", [False, True])
def test_weights_are_exact_in_every_epoch_and_fair_over_all(whole):
    made = order("wt" * 10, "0" * 5 + "1" * 15, weights=(3.0, 1.0), whole=whole, repeats=(1, 1))
    seen, position = [], 0
    for _ in range(6):
        one = []
        while len([i for i in one if i != PADDING]) < 20:
            one.append(made.entry(position))
            position += 1
        while whole and position % 4:
            assert made.entry(position) == PADDING
            position += 1
        real = [i for i in one if i != PADDING]
        assert sum(i < 5 for i in real) == 15
        seen += real
    counts = Counter(seen)
    assert {counts[i] for i in range(5)} == {18} and {counts[i] for i in range(5, 20)} == {2}
    assert made.steps(6) == position // 4 or not whole


def test_a_set_may_have_shapes_that_come_and_go_and_steps_are_counted_to_the_end():
    made = order(
        "wwwwwwwt" + "w" * 8, "0" * 8 + "1" * 8, weights=(1.0, 7.0), repeats=(1, 1), batch=2
    )  # 2 of the first 8 in each epoch
    lengths = np.diff([0, *(made.steps(e) for e in range(1, 9))])
    assert set(lengths) <= {8, 9} and len(set(lengths)) == 2
    rows = np.array([[made.entry(2 * s + r) for r in range(2)] for s in range(made.steps(4))])
    assert Counter(rows[(rows >= 0) & (rows < 8)].tolist()) == Counter(
        range(8)
    )  # one lap of the first set in four epochs
    assert sorted(Counter((rows == 7).sum(1).tolist()).items()) == [(0, len(rows) - 1), (1, 1)]


def test_an_empty_set_and_a_weight_for_nothing_are_refused():
    with pytest.raises(InputError, match=r"data.sets\[1\]: no record"):
        order("ww", "00", repeats=(1, 1))
    with pytest.raises(
        InputError, match=r"data.sets\[0\].weight: 0.001 is so small that an epoch of 4 examples"
    ):
        order("wwww", "0011", repeats=(1, 1), weights=(0.001, 1.0))


def test_divided_is_exact():
    assert (
        divide(10, [1, 1, 1]) == [4, 3, 3]
        and divide(7, [0.1, 0.2, 0.7]) == [1, 1, 5]
        and divide(100, [0.1, 0.2, 0.7]) == [10, 20, 70]
    )


def test_golden():
    made = order("wtwwtwwt", "00110101", repeats=(2, 1))
    assert [made.entry(p) for p in range(16)] == GOLDEN


GOLDEN = [1, 4, 4, 7, 0, 5, 6, 0, 6, 3, 2, -1, 1, -1, -1, -1]
