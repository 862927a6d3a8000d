"""The global batch is the unit: how it divides, what a resumed run may change, and what is refused
by name."""

import json
from typing import Any, get_args

import pytest

from limner import config, plan
from limner.faults import InputFault


def recipe(**train: Any) -> config.Config:
    return config.build(
        config.Config,
        {"model": {"base": "b"}, "data": {"folder": "f"}, "train": {"steps": 100, **train}},
    )


def saved_of(
    cfg: config.Config, made: plan.Plan, data: str = "d", base: str = "m"
) -> dict[str, Any]:
    """What a checkpoint of this run says, through JSON."""
    return json.loads(json.dumps(plan.identity(cfg, made, data, base)))


@pytest.mark.parametrize(
    ("train", "world", "expected"),
    [
        ({"batch": 16}, 1, (16, 16, 1)),
        ({"batch": 16}, 4, (16, 4, 1)),
        ({"batch": 16, "micro": 2}, 1, (16, 2, 8)),
        ({"batch": 16, "micro": 2}, 4, (16, 2, 2)),
        ({"batch": 16, "micro": 99}, 2, (16, 8, 1)),
        ({"micro": 3}, 1, (3, 3, 1)),
        ({"micro": 3, "accumulate": 4}, 2, (24, 3, 4)),
        ({"micro": 1, "accumulate": 1}, 8, (8, 1, 1)),
    ],
)
def test_arithmetic(train: dict, world: int, expected: tuple[int, int, int]) -> None:
    made = plan.make(recipe(**train), world, 100, None, 5)
    assert (made.batch, made.micro, made.accumulate) == expected
    assert made.batch == made.micro * made.accumulate * world and (
        made.world,
        made.seed,
        made.records,
        made.steps,
    ) == (world, 5, 100, 100)


@pytest.mark.parametrize(
    ("train", "world", "message"),
    [
        ({"batch": 10}, 4, "a global batch of 10 cannot be divided among 4 processes"),
        ({"batch": 2}, 4, "a global batch of 2 cannot be divided among 4 processes"),
        (
            {"batch": 16, "micro": 3},
            2,
            "train.micro: each of 2 processes has 8 of the 16 examples of a step, which "
            "micro-batches of 3 do not divide; use a divisor of 8",
        ),
    ],
)
def test_what_does_not_divide_is_refused(train: dict, world: int, message: str) -> None:
    with pytest.raises(InputFault, match=message):
        plan.make(recipe(**train), world, 100, None, 0)


@pytest.mark.parametrize(
    ("epochs", "records", "batch", "steps"),
    [(1, 100, 10, 10), (1, 101, 10, 11), (0.5, 100, 10, 5), (3, 7, 4, 6), (0.001, 10, 10, 1)],
)
def test_epochs_become_steps(epochs: float, records: int, batch: int, steps: int) -> None:
    made = plan.make(recipe(steps=None, epochs=epochs, batch=batch), 1, records, None, 0)
    assert made.steps == steps and made.steps_per_epoch == records / batch


def test_intervals() -> None:
    made = plan.make(recipe(batch=10), 1, 95, None, 0)
    assert (
        made.every(7, None),
        made.every(None, 1.0),
        made.every(None, 0.01),
        made.every(None, None),
    ) == (7, 10, 1, None)


def resumed(first: dict, then: dict, world: int = 1, then_world: int = 1) -> plan.Plan:
    """The plan of a run that was begun as ``first`` and is gone on with as ``then``."""
    cfg = recipe(**first)
    begun = plan.make(cfg, world, 100, None, 7)
    return plan.make(recipe(**then), then_world, 100, saved_of(cfg, begun), 7)


@pytest.mark.parametrize(
    ("first", "then", "world", "then_world", "expected"),
    [
        ({"batch": 8}, {"batch": 8}, 1, 2, (8, 4, 1)),
        ({"batch": 8, "micro": 2}, {"batch": 8, "micro": 2}, 1, 4, (8, 2, 1)),
        ({"batch": 8, "micro": 2}, {"batch": 8, "micro": 1}, 1, 1, (8, 1, 8)),
        ({"micro": 2}, {"micro": 2}, 4, 2, (8, 2, 2)),
        ({"micro": 2, "accumulate": 2}, {"micro": 2, "accumulate": 2}, 1, 2, (4, 2, 1)),
        ({"micro": 2, "accumulate": 4}, {"micro": 4, "accumulate": 2}, 1, 1, (8, 4, 2)),
        ({"micro": 2, "accumulate": 4}, {"batch": 8}, 1, 1, (8, 8, 1)),
        ({"micro": 4}, {"micro": 4}, 1, 2, (4, 2, 1)),
    ],
)
def test_the_checkpoint_s_batch_holds(
    first: dict, then: dict, world: int, then_world: int, expected: tuple
) -> None:
    """Another number of processes changes the accumulation, never what a step sees."""
    made = resumed(first, then, world, then_world)
    assert (made.batch, made.micro, made.accumulate, made.seed) == (*expected, 7)


def test_number_of_processes_may_change_again_and_again() -> None:
    """micro * accumulate * processes no longer gives the batch, and still nothing has been asked
    for but to go on."""
    cfg = recipe(micro=2)
    made = plan.make(cfg, 4, 100, None, 0)
    for world in (1, 1, 2, 2, 4, 1):
        made = plan.make(cfg, world, 100, saved_of(cfg, made), 0)
        assert (made.batch, made.world) == (8, world)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            {"batch": 8},
            {"batch": 16},
            "train.batch: this run was begun with a global batch of 8, 16 is asked for",
        ),
        ({"micro": 2}, {"micro": 3}, "begun with a global batch of 2, 3 is asked for"),
        ({"batch": 8, "micro": 2}, {"micro": 2}, "begun with a global batch of 8, 2 is asked for"),
        (
            {"micro": 2, "accumulate": 2},
            {"micro": 2},
            "begun with a global batch of 4, 2 is asked for",
        ),
        (
            {"batch": 8, "seed": 7},
            {"batch": 8, "seed": 8},
            "train.seed: this run was begun with seed 7, 8 is asked for",
        ),
    ],
)
def test_another_batch_or_seed_is_refused(first: dict, then: dict, message: str) -> None:
    with pytest.raises(InputFault, match=message):
        resumed(first, then)


def test_processes_that_do_not_divide_the_checkpoint_s_batch_are_refused() -> None:
    with pytest.raises(InputFault, match="a global batch of 8 cannot be divided among 3 processes"):
        resumed({"batch": 8}, {"batch": 8}, 1, 3)
    with pytest.raises(InputFault, match="a global batch of 4 cannot be divided among 3 processes"):
        resumed({"micro": 4}, {"micro": 4}, 1, 3)


def test_a_run_without_seed_keeps_the_one_it_drew() -> None:
    assert (
        resumed({"batch": 8}, {"batch": 8, "steps": 500}).seed == 7
        and resumed({"batch": 8}, {"batch": 8, "steps": 500}).steps == 500
    )
    seeds = {plan.drawn_seed() for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**31 for seed in seeds)


def matched(
    changes: dict[str, Any], data: str = "d", base: str = "m", allow: tuple[str, ...] = ()
) -> list[str]:
    """Go on from a run of a plain recipe with some settings changed."""
    raw = config.plain(recipe(batch=4, seed=1))
    saved = saved_of(config.build(config.Config, raw), plan.make(recipe(batch=4), 1, 50, None, 1))
    for name, value in changes.items():
        section, key = name.split(".")
        raw[section][key] = value
    raw["checkpoint"]["allow"] = list(allow)
    now = config.build(config.Config, raw)
    return plan.must_match(
        saved,
        plan.identity(
            now, plan.make(recipe(batch=4), 1, 40 if data != "d" else 50, None, 1), data, base
        ),
        30,
    )


def test_the_same_run_goes_on() -> None:
    assert matched({}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.steps", 900),
        ("train.micro", 2),
        ("log.every", 3),
        ("preview.prompts", ["x"]),
        ("checkpoint.every", 5),
        ("checkpoint.keep", 1),
        ("data.threads", 9),
        ("data.cache", "off"),
        ("data.folder", "moved"),
        ("engine.gradient_checkpointing", True),
        ("watch.every", 9),
        ("export.hub", "me/model"),
        ("model.base", "moved"),
    ],
)
def test_what_moves_no_example_may_change(name: str, value: Any) -> None:
    matched({name: value})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("optim.learning_rate", 1e-5, "optim.learning_rate: was 0.0001, now 1e-05"),
        ("optim.ema", 0.9, "optim.ema: was None, now 0.9"),
        ("data.size", 256, "data.size: was 512, now 256"),
        ("data.flip", True, "data.flip: was False, now True"),
        ("data.drop_caption", 0.1, "data.drop_caption: was 0.0, now 0.1"),
        ("adapt.kind", "lora", "adapt.kind: was 'full', now 'lora'"),
        ("engine.precision", "bf16", "engine.precision: was None, now 'bf16'"),
        ("objective.min_snr", 5.0, "objective.min_snr: was None, now 5.0"),
        (
            "objective.timestep_bias",
            {"portion": 0.5},
            "objective.timestep_bias.portion: was None, now 0.5",
        ),
        ("watch.hold_out", 3, "watch.hold_out: was 0, now 3"),
    ],
)
def test_another_setting_is_refused_unless_allowed(name: str, value: Any, words: str) -> None:
    with pytest.raises(InputFault) as caught:
        matched({name: value})
    message = str(caught.value)
    assert message.startswith("checkpoint-30 cannot be gone on from") and words in message
    assert (f'checkpoint.allow=["{name}"]' in message) == (name in get_args(config.Allowable))
    if name in get_args(config.Allowable):
        assert matched({name: value}, allow=(name,)) == [f"from step 30 on, {words}"]
        with pytest.raises(InputFault):
            matched({name: value}, allow=("optim.warmup",))


def test_everything_that_changed_is_named_at_once() -> None:
    with pytest.raises(InputFault) as caught:
        matched(
            {"optim.learning_rate": 1.0, "data.size": 64, "data.folder": "g", "model.base": "n"},
            data="other",
            base="other",
        )
    message = str(caught.value)
    assert "optim.learning_rate" in message and "data.size" in message
    assert (
        "the data set: was 50 records of f, now 40 records of g, and the pictures or captions are "
        "not the same" in message
    )
    assert (
        "the base model: was b, now n, and the weights or configuration are not the same" in message
    )


def test_other_random_numbers_are_refused() -> None:
    saved = saved_of(recipe(batch=4), plan.make(recipe(batch=4), 1, 50, None, 1))
    now = json.loads(json.dumps(saved))
    saved |= {"draws": "other", "numpy": "9.9"}
    with pytest.raises(
        InputFault,
        match=r"random numbers: numpy 9\.9 drew others than numpy .*; install numpy 9\.9",
    ):
        plan.must_match(saved, now, 1)
    assert plan.draws(1) == plan.draws(1) != plan.draws(2)
