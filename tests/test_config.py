"""A recipe is typed and complete; strangers and values of another kind are refused in words, at
second zero."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from limner.commands import show
from limner.config.rules import check_config, describe_idle_settings, list_idle_settings
from limner.config.schema import SETTINGS, Config, TimestepBiasSettings
from limner.config.toml import RENAMED, apply_overrides, build, flatten, load_recipe, to_plain
from limner.errors import InputError

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
GOOD: dict[str, Any] = {
    "model": {"base": "b"},
    "data": {"folder": "f"},
    "train": {"steps": 1, "batch_size": 1},
}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        build(Config, raw)
    return str(caught.value)


def wrong(*overrides: str, raw: dict[str, Any] = GOOD, own_records: bool = False) -> str:
    """What ``check`` says about a good recipe with some settings changed."""
    with pytest.raises(InputError) as caught:
        check_config(given(*overrides, raw=raw), own_records=own_records)
    return str(caught.value)


def given(*overrides: str, raw: dict[str, Any] = GOOD) -> Config:
    """A good recipe with some settings changed."""
    config: Config = build(Config, apply_overrides(json.loads(json.dumps(raw)), overrides))
    return config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"trian": {}}, "trian: no such setting; did you mean train?"),
        (
            {"optim": {"learningrate": 1.0}},
            "optim.learningrate: no such setting; did you mean optim.learning_rate?",
        ),
        (
            {"objective": {"timestep_bias": {"portoin": 0.5}}},
            "objective.timestep_bias.portoin: no such setting; did you mean "
            "objective.timestep_bias.portion?",
        ),
        (
            {"validation": {"zzz": 1}},
            "validation.zzz: no such setting; known here: hold_out, every, timesteps",
        ),
    ],
)
def test_unknown_keys(raw: dict, message: str) -> None:
    assert refusal(raw) == message


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_says_the_new_one(old: str, tmp_path: Path) -> None:
    new = RENAMED[old]
    Config()[new]  # a setting or a section
    if "." not in old:
        old, new = f"{old}.every", f"{new}.every"
    section, key = old.split(".")
    assert refusal({section: {key: 1}}) == f"{old}: renamed to {new}"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("")
    with pytest.raises(InputError, match=f"^{re.escape(old)}: renamed to {re.escape(new)}$"):
        load_recipe(recipe, [f"{old}=1"])


def test_all_old_names_are_said_at_once() -> None:
    lines = refusal({"watch": {"hold_out": 4, "every": 5}}).splitlines()
    assert lines == [
        "watch.hold_out: renamed to validation.hold_out",
        "watch.every: renamed to validation.every",
    ]
    assert refusal({"train": {"batch": 1, "micro": 1}}).count("renamed to") == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train": {"steps": "many"}}, "train.steps: 'many' was given, a whole number is expected"),
        ({"train": {"steps": 1.5}}, "train.steps: 1.5 was given, a whole number is expected"),
        ({"train": {"steps": True}}, "train.steps: True was given, a whole number is expected"),
        ({"data": {"flip": 1}}, "data.flip: 1 was given, true or false is expected"),
        (
            {"data": {"drop_caption": False}},
            "data.drop_caption: False was given, a number is expected",
        ),
        (
            {"optim": {"learning_rate": float("nan")}},
            "optim.learning_rate: nan was given, a number is expected",
        ),
        (
            {"optim": {"max_grad_norm": float("inf")}},
            "optim.max_grad_norm: inf was given, a number is expected",
        ),
        ({"optim": {"eps": 10**400}}, f"optim.eps: {10**400} was given, a number is expected"),
        ({"run": 5}, "run: 5 was given, a text is expected"),
        (
            {"data": {"crop": "middle"}},
            "data.crop: 'middle' was given, one of 'center', 'random' is expected",
        ),
        (
            {"engine": {"precision": "fp8"}},
            "engine.precision: 'fp8' was given, one of 'no', 'fp16', 'bf16' is expected",
        ),
        (
            {"optim": {"betas": [0.9]}},
            "optim.betas: [0.9] was given, a list of 2, each a number is expected",
        ),
        ({"optim": {"betas": [0.9, "x"]}}, "optim.betas[1]: 'x' was given, a number is expected"),
        (
            {"preview": {"prompts": "[a cat]"}},
            'preview.prompts: \'[a cat]\' was given, a list, each a text, such as ["a", "b"] is '
            "expected",
        ),
        ({"preview": {"prompts": [1]}}, "preview.prompts[0]: 1 was given, a text is expected"),
        (
            {"log": {"to": ["tensorbord"]}},
            "log.to[0]: 'tensorbord' was given, one of 'tensorboard', 'wandb', 'comet_ml' is "
            "expected",
        ),
        (
            {"train": 5},
            "train: 5 was given, a table with steps, epochs, batch_size, micro_batch_size, "
            "accumulation_steps, seed is expected",
        ),
        (
            {"objective": {"timestep_bias": "later"}},
            "a table with strategy, multiplier, portion, begin, end is expected",
        ),
    ],
)
def test_types(raw: dict, message: str) -> None:
    assert message in refusal(raw)


def test_one_text_is_a_list_of_one() -> None:
    raw = {"preview": {"prompts": "a cat"}, "log": {"to": "wandb"}, "adapter": {"targets": "to_q"}}
    cfg = build(Config, raw)
    assert (cfg.preview.prompts, cfg.log.to) == (("a cat",), ("wandb",))
    assert cfg.adapter.targets == ("to_q",)
    assert "log.to[0]: 'tb' was given, one of 'tensorboard'" in refusal({"log": {"to": "tb"}})


def test_values_take_their_declared_type() -> None:
    cfg = build(
        Config,
        {
            "optim": {"learning_rate": 1, "betas": [0, 0.5]},
            "preview": {"prompts": ["a", "b"]},
            "objective": {"timestep_bias": {"strategy": "range"}},
        },
    )
    assert (
        type(cfg.optim.learning_rate) is float
        and cfg.optim.betas == (0.0, 0.5)
        and cfg.preview.prompts == ("a", "b")
    )
    assert cfg.objective.timestep_bias == TimestepBiasSettings(strategy="range")
    assert cfg["objective.timestep_bias.end"] == 1000 and cfg["train.steps"] is None


def test_overrides() -> None:
    wanted = [
        "train.steps=7",
        "optim.learning_rate=3e-5",
        "data.flip=true",
        "train.seed=none",
        'preview.prompts=["a, b", "c=d"]',
        "log.to=[]",
        "data.folder=my/pictures",
    ]
    wanted += [
        "model.base=stable-diffusion-v1-5/stable-diffusion-v1-5",
        "run=2024-01-01",
        "objective.timestep_bias.multiplier=2",
        'data.caption="true"',
        "data.background=#ffffff",
    ]
    cfg = build(
        Config, apply_overrides({"train": {"steps": 1, "seed": 3}, "data": {"flip": False}}, wanted)
    )
    assert (cfg.train.steps, cfg.train.seed, cfg.optim.learning_rate, cfg.data.flip) == (
        7,
        None,
        3e-5,
        True,
    )
    assert (cfg.preview.prompts, cfg.log.to, cfg.data.folder, cfg.run) == (
        ("a, b", "c=d"),
        (),
        "my/pictures",
        "2024-01-01",
    )
    assert (cfg.model.base, cfg.data.caption, cfg.data.background) == (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "true",
        "#ffffff",
    )
    assert cfg.objective.timestep_bias == TimestepBiasSettings(multiplier=2.0)


def test_overrides_of_a_table_that_is_not_set() -> None:
    """``plain`` says null for it."""
    again = build(
        Config, apply_overrides(to_plain(Config()), ["objective.timestep_bias.portion=0.5"])
    )
    assert again.objective.timestep_bias == TimestepBiasSettings(portion=0.5)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.steps", "train.steps: not a setting; write section.key=value"),
        ("run.x=1", "run.x: run is a value, it has no settings below it"),
        ("train.stepz=1", "did you mean train.steps?"),
        ("=1", "no such setting"),
        ("train.steps=", "train.steps: '' was given, a whole number is expected"),
    ],
)
def test_wrong_overrides(item: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(Config, apply_overrides({"run": "r"}, [item]))


def test_plain_and_build_are_inverse() -> None:
    cfg = build(
        Config,
        {
            **GOOD,
            "objective": {"timestep_bias": {"portion": 0.5}},
            "checkpoint": {"allow_changes": ["optim.warmup"]},
            "optim": {"ema": 0.99},
        },
    )
    again = json.loads(json.dumps(to_plain(cfg)))
    assert build(Config, again) == cfg
    assert to_plain(build(Config, to_plain(Config()))) == to_plain(Config())
    names = flatten(again)
    assert (
        names["optim.ema"] == 0.99
        and names["objective.timestep_bias.portion"] == 0.5
        and names["checkpoint.allow_changes"] == ["optim.warmup"]
    )


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.base="], "model.base: give a folder or a Hub repository"),
        (
            ["data.hub=x/y"],
            "give exactly one of data.folder, data.hub and data.sets; data.folder=none takes the "
            "recipe's away",
        ),
        (
            ["data.folder=mine", "run=./mine/"],
            "run: ./mine/ is the folder of the pictures, and previews would be trained on; give "
            "another folder",
        ),
        (["data.folder=none"], "give exactly one of data.folder, data.hub and data.sets"),
        (["train.steps=none"], "give exactly one of train.steps and train.epochs"),
        (["train.epochs=2"], "give exactly one of train.steps and train.epochs"),
        (
            ["train.accumulation_steps=2"],
            "give train.batch_size (global) or train.accumulation_steps, not both",
        ),
        (
            ["train.batch_size=none"],
            "give train.batch_size (global: what one optimizer step sees), or "
            "train.micro_batch_size",
        ),
        (["data.crop_variants=2"], "data.crop_variants: only a random crop comes in several"),
        (["train.seed=-1"], "train.seed: -1 is not within 0 to 2**63 - 1"),
        ([f"train.seed={2**63}"], f"train.seed: {2**63} is not within"),
        (["data.drop_caption=1.5"], "data.drop_caption: 1.5 is not a probability"),
        (["optim.ema=1.0"], "optim.ema: 1.0 is not a decay"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas: (0.9, 1.0) are not both"),
        (["objective.min_snr=0"], "objective.min_snr: 0.0 is not above 0"),
        (["adapter.dropout=1.0"], "adapter.dropout: 1.0 is not within 0 to below 1"),
        (
            ["preview.every=1", "preview.every_epochs=1"],
            "give preview.every (steps) or preview.every_epochs",
        ),
        (["train.steps=0"], "train.steps: 0 is not above 0"),
        (["optim.learning_rate=-1e-4"], "optim.learning_rate: -0.0001 is not above 0"),
        (["checkpoint.keep=0"], "checkpoint.keep: 0 is not above 0"),
        (["engine.patience=1.0"], "engine.patience: 1.0 is below 5"),
        (["optim.warmup=-1"], "optim.warmup: -1 is below 0"),
        (["objective.noise_offset=-0.1"], "objective.noise_offset: -0.1 is below 0"),
        (["objective.dream=-1"], "objective.dream: -1.0 is below 0"),
    ],
)
def test_ranges(overrides: list[str], message: str) -> None:
    assert message in wrong(*overrides)


IDLE = {
    "optim.warmup=100": 'a schedule that has a warm-up, such as optim.schedule="constant_with_w',
    "optim.cycles=2": 'optim.schedule="cosine_with_restarts"',
    "data.image=photo": "a data set of the Hub (hub)",
    "data.hub_config=small": "a data set of the Hub (hub)",
    "data.hub_revision=v2": "a data set of the Hub (hub)",
    "data.hub_files=part": "a data set of the Hub (hub)",
    "adapter.rank=8": 'adapter.kind="lora"',
    "adapter.alpha=8": 'adapter.kind="lora"',
    "adapter.dropout=0.1": 'adapter.kind="lora"',
    "adapter.targets=to_q": 'adapter.kind="lora"',
    "engine.devices=2": 'engine.kind="jax"',
    "engine.fsdp=2": 'engine.kind="jax"',
    "objective.timestep_bias.begin=5": 'the strategy "range"',
    "objective.timestep_bias.end=5": 'the strategy "range"',
    "objective.timestep_bias={strategy='range', portion=0.5}": 'the strategy "later" or',
    "objective.flow.mode_scale=1.0": 'the density "mode"',
    "objective.flow={density='mode', logit_std=0.5}": 'the density "logit_normal"',
    "objective.flow={density='uniform', logit_mean=0.5}": 'the density "logit_normal"',
}


@pytest.mark.parametrize("override", IDLE)
def test_a_setting_that_does_nothing_alone_is_refused_where_another_run_was_meant(
    override: str,
) -> None:
    said = wrong(override)
    assert f" does nothing without {IDLE[override]}" in said and said.count("\n") == 0
    [name] = [one.place for one in list_idle_settings(given(override))]
    assert said.startswith(f"{name}: ") and f"or leave {name} at its default, " in said


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.warmup=9", "optim.schedule=linear"),
        ("optim.cycles=2", "optim.schedule=cosine_with_restarts", "optim.warmup=2"),
        ("adapter.rank=8", "adapter.kind=lora", "adapter.targets=to_q", "adapter.alpha=2"),
        ("engine.devices=2", "engine.kind=jax", "engine.compile_cache=off"),
        ("data.hub=me/set", "data.folder=none", "data.image=photo", "data.cache_dir=here"),
        ("objective.timestep_bias={strategy='range', begin=5, end=9}",),
        ("preview.captions=1", "preview.steps=9"),
        ("preview.prompts=a cat", "preview.every=9", "preview.safety_checker=false"),
        ("validation.hold_out=0.1", "validation.every=9"),
        # What equals the default is no wish.
        ("optim.warmup=0", "adapter.rank=4", "data.image=image", "engine.fsdp=1"),
    ],
)
def test_a_setting_beside_what_it_needs_is_taken(overrides: tuple[str, ...]) -> None:
    config = given(*overrides)
    check_config(config)
    assert describe_idle_settings(config) == []


def test_a_setting_of_one_data_set_is_looked_at_beside_its_own() -> None:
    sets = 'data.sets=[{folder="a", image="photo"}, {hub="b/c", image="photo"}]'
    said = wrong("data.folder=none", sets, "data.split=test")
    assert said == (
        'data.split: "test" does nothing without data.folder or data.hub; sets have their own. '
        'Give that, or leave data.split at its default, "train"\n'
        'data.sets[0].image: "photo" does nothing without a data set of the Hub (hub). '
        'Give that, or leave data.sets[0].image at its default, "image"'
    )


def test_records_of_the_caller_stand_in_for_a_data_set_of_the_recipe() -> None:
    check_config(given("data.folder=none", "data.image=photo"), own_records=True)


def test_a_setting_that_harms_nobody_is_said() -> None:
    config = given(
        *("optim.ema_offload=true", "export.private=true", "data.cache_dir=here"),
        *("preview.steps=9", "preview.count=2", "validation.every=5", "log.project=mine"),
        *("engine.compile_cache=off", "data.empty_caption=zeros"),
        *("data.drop_caption=0.1", "data.caption=none"),
    )
    check_config(config)
    assert describe_idle_settings(config) == [
        "data.cache_dir: does nothing without data.hub",
        "data.drop_caption: does nothing without data.caption",
        "optim.ema_offload: does nothing without optim.ema",
        'engine.compile_cache: does nothing without engine.kind="jax"',
        "preview.count, preview.steps: do nothing without preview.prompts or preview.captions",
        "validation.every: does nothing without validation.hold_out",
        "log.project: does nothing without log.to",
        "export.private: does nothing without export.hub",
    ]
    shown = show.format_settings(
        given("data.folder=none", "data.hub=a/b", "optim.ema_offload=true")
    )
    assert shown.endswith("\n# optim.ema_offload: does nothing without optim.ema")


@pytest.mark.parametrize(
    "name", [name for name, one in SETTINGS.items() if one.declaration.path and one.default != ""]
)
def test_an_empty_text_is_no_path(name: str) -> None:
    """``run=$UNSET`` would write into the current folder."""
    place, override = name, f"{name}="
    if name.startswith("data.sets."):
        place = name.replace("sets.", "sets[0].")
        override = f"data.sets=[{{{name.removeprefix('data.sets.')} = ''}}]"
    assert f"{place}: '' is no path; give one" in wrong(override)


def test_all_that_is_wrong_is_said_at_once() -> None:
    assert wrong("train.steps=0", "optim.warmup=-1", "data.drop_caption=2").count("\n") == 2


def test_good_recipes_pass() -> None:
    check_config(build(Config, GOOD))
    raw = {
        "model": {"base": "b"},
        "train": {"epochs": 0.5, "micro_batch_size": 2, "accumulation_steps": 4},
    }
    check_config(build(Config, raw), own_records=True)


def test_a_missing_recipe_and_one_that_is_not_toml(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"none\.toml: No such file or directory\. Give the path of a recipe"
    ):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(InputError, match="Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "bad.toml").write_text("[train\nsteps = 1")
    with pytest.raises(InputError, match=r"bad\.toml: not a TOML file: .*line 1"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "picture.toml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InputError, match=r"picture\.toml: not a TOML file"):
        load_recipe(tmp_path / "picture.toml")


def test_overrides_beat_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('run = "a"\n[train]\nsteps = 1\nbatch_size = 2\n')
    cfg = load_recipe(tmp_path / "recipe.toml", ["train.steps=9"])
    assert (cfg.run, cfg.train.steps, cfg.train.batch_size) == ("a", 9, 2)


def test_there_are_recipes() -> None:
    assert {"sd15-full.toml", "sd15-lora.toml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    """It holds for what its header says: command, hardware, time, memory and loss are all spoken
    of."""
    check_config(load_recipe(path))
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(f"# {word}:" in header for word in ("command", "hardware", "time", "memory", "loss"))


@pytest.mark.parametrize("name", [n for n, one in SETTINGS.items() if one.declaration.range])
def test_a_declared_range_is_enforced(name: str) -> None:
    """With the first of some values that the range does not contain."""
    setting = SETTINGS[name]
    range_ = setting.declaration.range
    assert range_ is not None
    candidates: list[Any] = [0, -1, 2, 2**63]
    if isinstance(setting.default, tuple):
        candidates = [[0.9, 1.0]]
    value = next(c for c in candidates if not range_.contains(c))
    given = float(value) if isinstance(setting.default, float) else value
    assert f"{name}: " in wrong(f"{name}={json.dumps(given)}")
    if setting.default is not None:
        assert range_.contains(setting.default)


@pytest.mark.parametrize("name", [n for n, one in SETTINGS.items() if one.declaration.path])
def test_the_home_of_the_user_stands_for_a_tilde(name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    *sections, key = name.split(".")
    raw: dict[str, Any] = {key: "~/x"}
    for section in reversed(sections):
        raw = {section: [raw] if section == "sets" else raw}
    assert "/home/somebody/x" in json.dumps(to_plain(build(Config, raw)))


def test_every_setting_says_what_it_is() -> None:
    assert all(one.declaration.about for one in SETTINGS.values())
    assert len(SETTINGS) == len(set(SETTINGS)) > 100
