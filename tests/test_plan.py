"""The global batch is the unit: how it divides, what a resumed run may change, and what is refused
by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from limner.config import toml
from limner.config.schema import SETTINGS, Config
from limner.errors import InputError, IntegrityError
from limner.json_types import Plain
from limner.storage.run_state import RunState
from limner.training import batch_plan, resume
from limner.training.batch_plan import BatchPlan

ON_REQUEST = [n for n, one in SETTINGS.items() if one.declaration.resume == "on request"]


def recipe(**train: Any) -> Config:
    return toml.build(
        Config,
        {"model": {"base": "b"}, "data": {"folder": "f"}, "train": {"steps": 100, **train}},
    )


def saved_of(cfg: Config, made: BatchPlan, data: str = "d", base: str = "m") -> RunState:
    """What a checkpoint of this run says, through JSON."""
    plain = json.loads(json.dumps(resume.make_run_state(cfg, made, data, base).to_plain()))
    return RunState.from_plain(plain, Path("checkpoint-1"))


@pytest.mark.parametrize(
    ("train", "world", "expected"),
    [
        ({"batch_size": 16}, 1, (16, 16, 1)),
        ({"batch_size": 16}, 4, (16, 4, 1)),
        ({"batch_size": 16, "micro_batch_size": 2}, 1, (16, 2, 8)),
        ({"batch_size": 16, "micro_batch_size": 2}, 4, (16, 2, 2)),
        ({"batch_size": 16, "micro_batch_size": 99}, 2, (16, 8, 1)),
        ({"micro_batch_size": 3}, 1, (3, 3, 1)),
        ({"micro_batch_size": 3, "accumulation_steps": 4}, 2, (24, 3, 4)),
        ({"micro_batch_size": 1, "accumulation_steps": 1}, 8, (8, 1, 1)),
    ],
)
def test_arithmetic(train: dict, world: int, expected: tuple[int, int, int]) -> None:
    made = batch_plan.make_plan(recipe(**train), world, 100, None, 5)
    assert (made.batch_size, made.micro_batch_size, made.accumulation_steps) == expected
    assert made.batch_size == made.micro_batch_size * made.accumulation_steps * world and (
        made.world_size,
        made.seed,
        made.records,
        made.steps,
    ) == (world, 5, 100, 100)


@pytest.mark.parametrize(
    ("train", "world", "message"),
    [
        ({"batch_size": 10}, 4, "a global batch of 10 cannot be divided among 4 processes"),
        ({"batch_size": 2}, 4, "a global batch of 2 cannot be divided among 4 processes"),
        (
            {"batch_size": 16, "micro_batch_size": 3},
            2,
            "train.micro_batch_size: each of 2 processes has 8 of the 16 examples of a step, which "
            "micro-batches of 3 do not divide; use a divisor of 8",
        ),
    ],
)
def test_what_does_not_divide_is_refused(train: dict, world: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        batch_plan.make_plan(recipe(**train), world, 100, None, 0)


@pytest.mark.parametrize(
    ("epochs", "records", "batch", "steps"),
    [(1, 100, 10, 10), (1, 101, 10, 11), (0.5, 100, 10, 5), (3, 7, 4, 6), (0.001, 10, 10, 1)],
)
def test_epochs_become_steps(epochs: float, records: int, batch: int, steps: int) -> None:
    made = batch_plan.make_plan(
        recipe(steps=None, epochs=epochs, batch_size=batch), 1, records, None, 0
    )
    assert made.steps == steps and made.steps_per_epoch == records / batch


def test_intervals() -> None:
    made = batch_plan.make_plan(recipe(batch_size=10), 1, 95, None, 0)
    assert (
        made.to_steps(7, None),
        made.to_steps(None, 1.0),
        made.to_steps(None, 0.01),
        made.to_steps(None, None),
    ) == (7, 10, 1, None)


def resumed(first: dict, then: dict, world: int = 1, then_world: int = 1) -> BatchPlan:
    """The plan of a run that was begun as ``first`` and is gone on with as ``then``."""
    cfg = recipe(**first)
    begun = batch_plan.make_plan(cfg, world, 100, None, 7)
    return batch_plan.make_plan(recipe(**then), then_world, 100, saved_of(cfg, begun), 7)


@pytest.mark.parametrize(
    ("first", "then", "world", "then_world", "expected"),
    [
        ({"batch_size": 8}, {"batch_size": 8}, 1, 2, (8, 4, 1)),
        (
            {"batch_size": 8, "micro_batch_size": 2},
            {"batch_size": 8, "micro_batch_size": 2},
            1,
            4,
            (8, 2, 1),
        ),
        (
            {"batch_size": 8, "micro_batch_size": 2},
            {"batch_size": 8, "micro_batch_size": 1},
            1,
            1,
            (8, 1, 8),
        ),
        ({"micro_batch_size": 2}, {"micro_batch_size": 2}, 4, 2, (8, 2, 2)),
        (
            {"micro_batch_size": 2, "accumulation_steps": 2},
            {"micro_batch_size": 2, "accumulation_steps": 2},
            1,
            2,
            (4, 2, 1),
        ),
        (
            {"micro_batch_size": 2, "accumulation_steps": 4},
            {"micro_batch_size": 4, "accumulation_steps": 2},
            1,
            1,
            (8, 4, 2),
        ),
        ({"micro_batch_size": 2, "accumulation_steps": 4}, {"batch_size": 8}, 1, 1, (8, 8, 1)),
        ({"micro_batch_size": 4}, {"micro_batch_size": 4}, 1, 2, (4, 2, 1)),
    ],
)
def test_the_checkpoint_s_batch_holds(
    first: dict, then: dict, world: int, then_world: int, expected: tuple
) -> None:
    """Another number of processes changes the accumulation, never what a step sees."""
    made = resumed(first, then, world, then_world)
    assert (made.batch_size, made.micro_batch_size, made.accumulation_steps, made.seed) == (
        *expected,
        7,
    )


def test_number_of_processes_may_change_again_and_again() -> None:
    """micro * accumulate * processes no longer gives the batch, and still nothing has been asked
    for but to go on."""
    cfg = recipe(micro_batch_size=2)
    made = batch_plan.make_plan(cfg, 4, 100, None, 0)
    for world in (1, 1, 2, 2, 4, 1):
        made = batch_plan.make_plan(cfg, world, 100, saved_of(cfg, made), 0)
        assert (made.batch_size, made.world_size) == (8, world)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (
            {"batch_size": 8},
            {"batch_size": 16},
            "train.batch_size: this run was begun with a global batch of 8, 16 is asked for",
        ),
        (
            {"micro_batch_size": 2},
            {"micro_batch_size": 3},
            "begun with a global batch of 2, 3 is asked for",
        ),
        (
            {"batch_size": 8, "micro_batch_size": 2},
            {"micro_batch_size": 2},
            "begun with a global batch of 8, 2 is asked for",
        ),
        (
            {"micro_batch_size": 2, "accumulation_steps": 2},
            {"micro_batch_size": 2},
            "begun with a global batch of 4, 2 is asked for",
        ),
        (
            {"batch_size": 8, "seed": 7},
            {"batch_size": 8, "seed": 8},
            "train.seed: this run was begun with seed 7, 8 is asked for",
        ),
    ],
)
def test_another_batch_or_seed_is_refused(first: dict, then: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resumed(first, then)


def test_processes_that_do_not_divide_the_checkpoint_s_batch_are_refused() -> None:
    with pytest.raises(InputError, match="a global batch of 8 cannot be divided among 3 processes"):
        resumed({"batch_size": 8}, {"batch_size": 8}, 1, 3)
    with pytest.raises(InputError, match="a global batch of 4 cannot be divided among 3 processes"):
        resumed({"micro_batch_size": 4}, {"micro_batch_size": 4}, 1, 3)


def test_a_run_without_seed_keeps_the_one_it_drew() -> None:
    assert (
        resumed({"batch_size": 8}, {"batch_size": 8, "steps": 500}).seed == 7
        and resumed({"batch_size": 8}, {"batch_size": 8, "steps": 500}).steps == 500
    )
    seeds = {batch_plan.draw_seed() for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**31 for seed in seeds)


def matched(
    changes: dict[str, Any], data: str = "d", base: str = "m", allow: tuple[str, ...] = ()
) -> list[str]:
    """Go on from a run of a plain recipe with some settings changed."""
    raw = toml.to_plain(recipe(batch_size=4, seed=1))
    saved = saved_of(
        toml.build(Config, raw), batch_plan.make_plan(recipe(batch_size=4), 1, 50, None, 1)
    )
    for name, value in changes.items():
        section, key = name.split(".")
        raw[section][key] = value
    raw["checkpoint"]["allow_changes"] = list(allow)
    now = toml.build(Config, raw)
    return resume.check_unchanged(
        saved,
        resume.make_run_state(
            now,
            batch_plan.make_plan(recipe(batch_size=4), 1, 40 if data != "d" else 50, None, 1),
            data,
            base,
        ),
        30,
    )


def test_the_same_run_goes_on() -> None:
    assert matched({}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.steps", 900),
        ("train.micro_batch_size", 2),
        ("log.every", 3),
        ("preview.prompts", ["x"]),
        ("checkpoint.every", 5),
        ("checkpoint.keep", 1),
        ("data.threads", 9),
        ("data.cache", "off"),
        ("data.folder", "moved"),
        ("engine.gradient_checkpointing", True),
        ("validation.every", 9),
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
        ("adapter.kind", "lora", "adapter.kind: was 'full', now 'lora'"),
        ("engine.precision", "bf16", "engine.precision: was None, now 'bf16'"),
        ("objective.min_snr", 5.0, "objective.min_snr: was None, now 5.0"),
        (
            "objective.timestep_bias",
            {"portion": 0.5},
            "objective.timestep_bias.portion: was None, now 0.5",
        ),
        ("validation.hold_out", 3, "validation.hold_out: was 0, now 3"),
    ],
)
def test_another_setting_is_refused_unless_allowed(name: str, value: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        matched({name: value})
    message = str(caught.value)
    assert message.startswith("checkpoint-30 cannot be resumed") and words in message
    assert (f'checkpoint.allow_changes=["{name}"]' in message) == (name in ON_REQUEST)
    if name in ON_REQUEST:
        assert matched({name: value}, allow=(name,)) == [f"from step 30 on, {words}"]
        with pytest.raises(InputError):
            matched({name: value}, allow=("optim.warmup",))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"adapter": {"rank": 8, "alpha": 2.0}}, {}),
        ({"optim": {"warmup": 10, "cycles": 2}}, {}),
        ({"engine": {"fsdp": 2}}, {"optim": {"warmup": 3}}),
        ({}, {"adapter": {"rank": 16}, "optim": {"ema_offload": True}}),
    ],
)
def test_a_setting_that_does_nothing_may_change(before: Plain, now: Plain) -> None:
    """As one that an earlier build took, and that is refused today."""
    plan = batch_plan.make_plan(recipe(batch_size=4), 1, 50, None, 1)
    plain = toml.to_plain(recipe(batch_size=4, seed=1))

    def change(sections: Plain) -> Config:
        return toml.build(Config, plain | {n: plain[n] | sections[n] for n in sections})

    saved = saved_of(change(before), plan)
    assert resume.check_unchanged(saved, saved_of(change(now), plan), 30) == []
    lora = {"adapter": {"kind": "lora", "rank": 8}}
    with pytest.raises(InputError, match=r"adapter\.rank: was 8, now 4"):
        resume.check_unchanged(
            saved_of(change(lora), plan), saved_of(change({"adapter": {"kind": "lora"}}), plan), 30
        )


def test_everything_that_changed_is_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.vae": "v"}, "was b, now b, model.vae was None, now 'v', and the weights"),
        (
            {"model.revision": "r"},
            "was b, now b, model.revision was None, now 'r', and the weights",
        ),
        (
            {"model.base": "n", "model.variant": "fp16", "model.other_stage": "o"},
            "was b, now n, model.variant was None, now 'fp16', model.other_stage was None, now 'o'",
        ),
        ({"model.trained_revision": "t"}, "model.trained_revision was None, now 't', and"),
        ({"model.cache_dir": "c"}, "was b, now b, and the weights"),
    ],
)
def test_what_names_another_base_is_named(changes: dict[str, Any], words: str) -> None:
    """Where the weights are the same, all of it may change."""
    assert matched(changes) == []
    with pytest.raises(InputError, match="the base model: was") as caught:
        matched(changes, base="other")
    assert words in str(caught.value)


def test_other_random_numbers_are_refused() -> None:
    saved = saved_of(
        recipe(batch_size=4), batch_plan.make_plan(recipe(batch_size=4), 1, 50, None, 1)
    )
    now = saved
    saved = replace(saved, random_digest="other", numpy_version="9.9")
    with pytest.raises(
        InputError,
        match=r"random numbers: numpy 9\.9 drew others than numpy .*; install numpy 9\.9",
    ):
        resume.check_unchanged(saved, now, 1)
    assert resume.digest_random_numbers(1) == resume.digest_random_numbers(1)
    assert resume.digest_random_numbers(1) != resume.digest_random_numbers(2)


def test_a_run_of_another_build_is_refused_in_words() -> None:
    begun = saved_of(
        recipe(batch_size=4), batch_plan.make_plan(recipe(batch_size=4), 1, 50, None, 1)
    )
    plain = begun.to_plain()
    assert RunState.from_plain(plain, Path("c")) == begun
    for version, words in ((None, "an earlier build"), (0, "an earlier"), (9, "a later build")):
        with pytest.raises(InputError, match=f"begun with {words}.*begin a new run in another"):
            RunState.from_plain({**plain, "version": version}, Path("checkpoint-7"))
    del plain["seed"]
    with pytest.raises(IntegrityError, match="seed is missing"):
        RunState.from_plain(plain, Path("checkpoint-7"))
