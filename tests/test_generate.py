"""Pictures from a run: what training previews, what ``limner generate`` draws and what stock
diffusers draws are the same."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import limner
from limner import cli
from limner.commands import drawn_model, generate
from limner.config import toml
from limner.config.schema import Config
from limner.errors import InputError, IntegrityError
from limner.protocols import ModelSource
from limner.storage.layout import LORA_FILE
from limner.training import loop

pytestmark = pytest.mark.frameworks


@pytest.fixture(scope="module")
def runs(base, pictures, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind, with a preview of its last step."""
    made = {}
    for kind in ("full", "lora"):
        run = tmp_path_factory.mktemp(kind) / "run"
        raw = {
            "run": str(run),
            "model": {"base": str(base)},
            "data": {"folder": str(pictures), "size": 32},
            "adapter": {"kind": kind, "rank": 2, "alpha": 6.0} if kind == "lora" else {},
            "objective": {"predict": "v_prediction"} if kind == "full" else {},
            "optim": {"learning_rate": 3e-3, "ema": 0.5},
            "train": {"steps": 4, "batch_size": 4, "seed": 5},
            "preview": {
                "prompts": ["a red circle", "a blue square"],
                "count": 2,
                "every": 4,
                "steps": 4,
                "guidance_scale": 3.0,
            },
        }
        made[kind] = loop.run_training(toml.build(Config, raw), report=lambda text: None)
    return made


def drawn(run: str, prompts: list[str], folder: Path, **settings) -> list[np.ndarray]:
    paths = limner.generate(
        run,
        prompts,
        output=folder,
        **{"steps": 4, "guidance_scale": 3.0, "seed": 5, "device": "cpu", **settings},
    )
    return [np.asarray(Image.open(path)) for path in paths]


def previews(run: Path) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(path))
        for path in sorted((run / "previews" / "step-000004").glob("*.png"))
    ]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_previews_generate_and_stock_diffusers_draw_the_same(runs, base, tmp_path, kind):
    from diffusers import StableDiffusionPipeline

    run = runs[kind]
    ours = drawn(str(run), ["a red circle", "a blue square"], tmp_path, count=2)
    assert len(ours) == 4 and ours[0].shape == (32, 32, 3)
    assert np.abs(ours[0].astype(int) - ours[1]).max() > 10  # another seed, another picture
    stock = StableDiffusionPipeline.from_pretrained(
        run if kind == "full" else base, use_safetensors=True
    )
    if kind == "lora":
        stock.load_lora_weights(run)
    stock.set_progress_bar_config(disable=True)
    for i, (prompt, seed) in enumerate(
        [("a red circle", 5), ("a red circle", 6), ("a blue square", 5), ("a blue square", 6)]
    ):
        picture = stock(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="np",
        ).images[0]
        assert np.abs((picture * 255).round() - ours[i]).max() <= 1, i
        assert np.abs(previews(run)[i].astype(int) - ours[i]).max() <= 1, i


def test_a_tuned_model_draws_another_picture_than_its_base(runs, base, tmp_path):
    before = drawn(str(base), ["a red circle"], tmp_path / "base")
    for kind, run in runs.items():
        assert (
            np.abs(
                drawn(str(run), ["a red circle"], tmp_path / kind)[0].astype(int) - before[0]
            ).mean()
            > 1
        ), kind


def test_a_picture_depends_on_its_seed_alone_not_on_the_batch(runs, tmp_path):
    one = drawn(
        str(runs["full"]), ["a red circle", "a blue square", "red"], tmp_path / "one", batch_size=1
    )
    many = drawn(
        str(runs["full"]), ["a red circle", "a blue square", "red"], tmp_path / "many", batch_size=3
    )
    for a, b in zip(one, many, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1


@pytest.mark.parametrize(
    "name", ["ddim", "ddpm", "dpm++", "euler", "euler-a", "heun", "pndm", "unipc"]
)
def test_schedulers_by_name(runs, name):
    from limner.engines.torch import pipeline
    from limner.engines.torch.pipeline import SCHEDULERS

    made = pipeline.open_pipeline(
        ModelSource(str(runs["full"])), None, scheduler=name, precision="no", device="cpu"
    )
    assert type(made.scheduler).__name__ == SCHEDULERS[name][0]
    assert made.scheduler.config.prediction_type == "v_prediction"  # the recipe's, not the base's
    [picture] = pipeline.draw_pictures(made, ["red"], [0], steps=4, guidance_scale=2.0, size=None)
    assert picture.std() > 0


def test_the_command_reads_prompts_and_writes_a_grid(runs, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    arguments = [
        "generate",
        str(runs["lora"]),
        "red",
        "--prompt-file",
        str(prompts),
        "--steps",
        "2",
        "--count",
        "2",
        "--device",
        "cpu",
    ]
    assert (
        cli.main(
            [
                *arguments,
                "--output",
                str(tmp_path / "out"),
                "--grid",
                str(tmp_path / "grid.png"),
                "--negative-prompt",
                "blue",
                "--size",
                "32",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in said] == [
        *(
            f"{i:03d}-{name}-{i % 2}.png"
            for i, name in enumerate(
                ["red", "red", "a-red-circle", "a-red-circle", "a-blue-square", "a-blue-square"]
            )
        ),
        "grid.png",
    ]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (200 + 2 * 134 + 6, 6 + 3 * 134)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{run}"], "no prompt"),
        (["generate", "{run}", "red", "--scheduler", "dimm"], "'dimm' is not one of ddim"),
        (["generate", "{run}", "red", "--count", "0"], "at least 1"),
        (["generate", "{empty}", "red"], "neither a diffusers folder"),
        (["generate", "{run}", "--prompt-file", "{empty}/none.txt"], "cannot be read"),
        (["generate", "{run}", "red", "--size", "100"], "no multiple of 8; choose 96"),
        (["generate", "{run}", "red", "--size=-8"], "no multiple of 8; choose 8"),
        (["generate", "{run}", "red", "--device", "foo"], "--device: 'foo' cannot be used; torch"),
        (["generate", "{run}", "red", "--device", "cuda:7"], "--device: 'cuda:7' cannot be used"),
        (["generate", "{run}", "red", "--seed", str(2**70)], "is not within 0 to 2**63 - 1"),
        (["generate", "{run}", "red", "--seed=-1"], "seed: -1 is not within 0"),
        (["generate", "{run}", "red", "--grid", "g.nope"], "--grid: g.nope is of no format"),
        (["generate", "{run}", "red", "--grid", "g.psd"], "--grid: g.psd is of no format"),
        (["generate", "{run}", "red", "--grid", "{empty}"], "--grid"),
        (
            [
                "generate",
                "{run}",
                "red",
                "--output",
                "{empty}",
                "--grid",
                "{empty}/x/../001-red-1.png",
                "--count",
                "2",
            ],
            "001-red-1.png is the file of a picture that is drawn; choose another",
        ),
        (["generate", "{run}", "red", "--output", "{empty}/file"], "file is a file; give a folder"),
        (["generate", "{run}", "red", "--output", "{empty}/file/a"], "file is a file"),
        (["generate", "{run}", "red", "--guidance-scale", "nan"], "nan is not within 0 to 1,000"),
        (["generate", "{run}", "red", "--guidance-scale", "inf"], "inf is not within 0 to 1,000"),
        (["generate", "{run}", "red", "--guidance-scale=-1"], "-1.0 is not within 0 to 1,000"),
        (["generate", "{run}", "red", "--size", "1000000000000000"], "more than the 16,384"),
        (["generate", "{run}", "--prompt-file", "/dev/null"], "not a regular file"),
        (["generate", "{run}", "--prompt-file", "{empty}/utf16"], "save it as UTF-8"),
        (
            ["generate", "{run}", "red", "--steps", "1001"],
            "1001 are more than the scheduler's 1000",
        ),
        (["generate", "{run}", "red", "--steps", "1001", "--scheduler=ddim"], "take fewer"),
        (["generate", "{run}", "red", "--steps", "1001", "--engine=jax"], "take fewer"),
        (["generate", "{run}", "red", "--steps", str(10**9)], "at least 1 and at most 100000"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_message(runs, tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    (tmp_path / "utf16").write_text("red", encoding="utf-16")
    assert cli.main([a.format(run=runs["full"], empty=tmp_path) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize("engine", ["torch", pytest.param("jax", marks=pytest.mark.soak)])
def test_pictures_are_written_batch_by_batch_and_what_they_replace_is_told(
    base, tmp_path, capsys, monkeypatch, engine
):
    """What ends the drawing loses the batches that follow only."""
    settings = {"steps": 1, "engine": engine, "batch_size": 1, "device": "cpu", "size": 32}
    written = generate.write_drawings

    def fail(drawings, paths):
        if len(list(tmp_path.iterdir())) == 2:
            raise KeyboardInterrupt
        written(drawings, paths)

    monkeypatch.setattr(generate, "write_drawings", fail)
    with pytest.raises(KeyboardInterrupt):
        limner.generate(base, ["red", "blue", "green"], output=tmp_path, **settings)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000-red-0.png", "001-blue-0.png"]
    monkeypatch.setattr(generate, "write_drawings", written)
    assert "replaced" not in str(capsys.readouterr())
    limner.generate(base, ["red"], output=tmp_path, **settings)
    assert "1 older file of the same number, prompt and seed replaced" in str(capsys.readouterr())


def test_a_file_of_prompts_is_read_as_captions_are(tmp_path):
    """A byte order mark is no part of a prompt, and only a newline ends one."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red\u2028circle\r\n\r\n blue\x0bsquare \n".encode())
    assert generate.read_prompts(file) == ["a red\u2028circle", "blue\x0bsquare"]
    file.write_text("x" * 2_000_000)
    with pytest.raises(InputError, match="more than 1,000,000 characters"):
        generate.read_prompts(file)


@pytest.mark.parametrize("kind", ["torch", "jax"])
@pytest.mark.parametrize("command", ["check", "train"])
def test_more_preview_steps_than_timesteps_are_refused_before_training(
    base, pictures, tmp_path, capsys, command, kind
):
    ddim = Path(shutil.copytree(base, tmp_path / "base"))
    for file in (ddim / "model_index.json", ddim / "scheduler" / "scheduler_config.json"):
        file.write_text(file.read_text().replace("PNDMScheduler", "DDIMScheduler"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'run = "{tmp_path}/run"\nmodel.base = "{ddim}"\nengine.kind = "{kind}"\n'
        f'data = {{ folder = "{pictures}", size = 32 }}\ntrain = {{ steps = 1, batch_size = 1 }}\n'
        'preview = { prompts = ["red"], steps = 1001 }\n'
    )
    assert cli.main([command, str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "preview.steps: 1001 are more than the scheduler's 1000 timesteps" in said
    assert "Traceback" not in said and not list(tmp_path.glob("run/checkpoint*"))


def test_steps_of_an_open_pipeline_are_looked_at_before_it_draws(runs):
    """As of a model that was fetched."""
    from limner.engines.torch import pipeline

    made = pipeline.open_pipeline(
        ModelSource(str(runs["full"])), None, scheduler="ddim", precision="no", device="cpu"
    )
    with pytest.raises(InputError, match="steps: 1000 are more than the scheduler's 1000"):
        pipeline.draw_pictures(made, ["red"], [0], steps=1000, guidance_scale=2.0, size=None)


@pytest.mark.parametrize(
    ("kind", "file", "change"),
    [
        ("lora", "result.json", None),
        ("lora", "result.json", lambda content: content[:-9]),
        ("lora", LORA_FILE, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        ("full", "result.json", None),
        ("full", "vae/config.json", None),
        ("full", "unet/config.json", lambda content: content + b"\n"),
    ],
)
def test_a_result_of_a_run_that_is_not_whole_is_not_drawn_with(
    runs, tmp_path, capsys, kind, file, change
):
    """As when its writing was cut short: files of two results would draw something."""
    run = Path(shutil.copytree(runs[kind], tmp_path / "run"))
    assert drawn_model.find_sources(str(run), None)[0].family == "sd"
    content = (run / file).read_bytes()
    (run / file).unlink()
    if change is not None:
        (run / file).write_bytes(change(content))
    words = ["generate", str(run), "x", "--device=cpu", f"--output={tmp_path}"]
    assert cli.main(words) == 7
    said = capsys.readouterr().err
    assert f"{run}: the result of this run is not whole" in said and "training command" in said
    (run / "config.json").unlink()
    base = "base/of-it" if kind == "lora" else None
    assert drawn_model.find_sources(str(run), base)[0].family is None


def test_a_lora_without_its_base_asks_for_it(runs, tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(
        (runs["lora"] / "pytorch_lora_weights.safetensors").read_bytes()
    )
    with pytest.raises(InputError, match="--base"):
        limner.generate(str(tmp_path), ["red"])


def test_of_a_lora_file_its_folder_is_asked_for(tmp_path, capsys):
    (tmp_path / LORA_FILE).write_bytes(b"")
    assert cli.main(["generate", str(tmp_path / LORA_FILE), "a red apple"]) == 2
    assert f"limner generate {tmp_path} --base BASE" in capsys.readouterr().err


def test_a_lora_takes_its_base_from_where_the_run_kept_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "other").mkdir()
    (run / "pytorch_lora_weights.safetensors").touch()
    model = {"base": "owner/name", "variant": "fp16", "revision": "abc", "cache_dir": "/downloads"}
    (run / "config.json").write_text(json.dumps({"model": model}))
    assert drawn_model.find_sources("~/run", None) == (
        ModelSource("owner/name", run, "sd", "fp16", "abc", "/downloads"),
        None,
    )
    assert drawn_model.find_sources("~/run", "~/other") == (
        ModelSource(str(tmp_path / "other"), run, "sd", cache_dir="/downloads"),
        None,
    )
    (run / "model_index.json").touch()
    whole = ModelSource(str(run), None, "sd", variant="fp16", cache_dir="/downloads")
    assert drawn_model.find_sources("~/run", None) == (whole, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/nope", "x"], "model: runs/nope: no such folder, though there is {cwd}/runs. Give"),
        (["civitai.safetensors", "x"], "model: civitai.safetensors: no such file, and not a name"),
        (["me/lora.safetensors", "x"], "model: me/lora.safetensors: no such file, and not a name"),
        (["nope", "x"], "model: nope: no such folder, and not a name on the Hub"),
        (["runs/lora", "x", "--base", "runs/b"], "--base: runs/b: no such folder, though"),
        (["runs/lora", "x"], "config.json: model.base: {cwd}/gone: no such folder"),
        (["runs/lora", "x", "--base", "me/b", "--other-stage", "runs/c"], "runs/c: no such folder"),
    ],
)
def test_a_mistyped_path_never_asks_the_hub(tmp_path, monkeypatch, capsys, arguments, message):
    """The endpoint answers nothing: asking it would be another message, and exit code 6."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "lora"
    run.mkdir(parents=True)
    (run / "pytorch_lora_weights.safetensors").touch()
    (run / "config.json").write_text(json.dumps({"model": {"base": str(tmp_path / "gone")}}))
    assert cli.main(["generate", *arguments]) == 2
    said = capsys.readouterr().err
    assert message.format(cwd=tmp_path) in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"model": {"base": 5}}, "model.base: 5 was given, a text is expected"),
        ({"model": {"family": "zzz"}}, "zzz"),
        ({"model": {}, "engine": {"precision": "fp8"}}, "engine.precision: 'fp8' was given"),
        ({"model": {}, "objective": []}, None),
        ({"model": {}, "adapter": 3}, "adapter"),
        ({"model": "stabilityai/x"}, None),
        (["a", "list"], None),
    ],
)
def test_a_config_that_is_no_run_s_is_left_alone_and_a_damaged_one_is_told(
    tmp_path, written, message
):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(written))
    if message is None:
        known = drawn_model.read_run_settings(config)
        assert known is None or known.model.base == ""
    else:
        with pytest.raises(IntegrityError, match="not what a run has written") as told:
            drawn_model.read_run_settings(config)
        assert message in str(told.value)


def test_a_prompt_that_is_no_utf8_is_drawn(runs, tmp_path):
    [picture] = drawn(str(runs["full"]), ["red \udcff"], tmp_path)
    assert picture.shape == (32, 32, 3)


def test_a_hub_that_cannot_be_reached_is_said(tmp_path, monkeypatch, capsys):
    """Once, and with its own exit code; the tests are offline."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["generate", "owner/name", "x", "--output", str(tmp_path)]) == 6
    said = capsys.readouterr().err
    assert said.startswith("limner: owner/name: the Hub cannot be reached at http://127.0.0.1:9")
    assert said.count("\n") == 1


def test_the_pipeline_is_fetched_into_the_folder_that_is_given(tmp_path, monkeypatch):
    import diffusers

    from limner import engines

    given = {}

    def refuse(model, **settings):
        given.update(settings, model=model)
        raise OSError("not there")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", refuse)
    monkeypatch.setattr("limner.engines.torch.loading.read_pipeline_class", lambda source: "X")
    with pytest.raises(InputError, match="not there"):
        engines.open_pipeline(
            ModelSource("owner/name", cache_dir="/downloads", revision="abc"),
            None,
            scheduler=None,
            precision="no",
            device="cpu",
        )
    assert (given["model"], given["cache_dir"], given["revision"], given["variant"]) == (
        "owner/name",
        "/downloads",
        "abc",
        None,
    )


@pytest.mark.parametrize("text", ["\N{ARTIST PALETTE} é", 'a "b" \\ c\td\x7f', ""])
def test_show_writes_any_text_as_toml(text):
    import tomllib

    from limner.config import toml

    assert tomllib.loads(f"x = {toml.format_value([text])}")["x"] == [text]
    assert "\N{ARTIST PALETTE}" not in text or "\N{ARTIST PALETTE}" in toml.format_value(text)


def test_show_prints_settings_and_arithmetic(pictures, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\nbase = "x"\n[data]\nfolder = "{pictures}"\n[train]\nepochs = 3\nbatch_size = 8\n'
        "micro_batch_size = 2\n[validation]\nhold_out = 2\n"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["show", str(recipe), "optim.learning_rate=2e-5"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate = 2e-05" in said
    assert "8 examples = 2 processes x 2 micro-batches x 2" in said
    assert "records: 12 listed, 2 held out, 10 to train on" in said
    assert "one epoch: 1.25 steps; the run: 4 steps" in said  # ceil(3 * 10 / 8)
    assert cli.main(["show", str(recipe), "validation.hold_out=0.25"]) == 0
    assert "records: 12 listed, 3 held out, 9 to train on" in capsys.readouterr().out
    assert cli.main(["show", str(recipe), "validation.hold_out=12"]) == 2
    assert "12 records are held out of 12" in capsys.readouterr().err
    import tomllib

    assert toml.build(Config, tomllib.loads(said)) == toml.load_recipe(
        recipe, ["optim.learning_rate=2e-5"]
    )
    assert json.loads(json.dumps(tomllib.loads(said)))["train"]["batch_size"] == 8


def test_what_show_prints_is_a_recipe(pictures, tmp_path, capsys):
    """Tables, lists of tables and what is not set in them, too."""
    import tomllib

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\nbase = "x"\n[data]\nsets = [{{ folder = "{pictures}", repeats = 2 }}]\n'
        "[data.buckets]\nstep = 16\n[objective.timestep_bias]\nmultiplier = 2.0\n"
        "[train]\nsteps = 3\nbatch_size = 2\n"
    )
    assert cli.main(["show", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert toml.build(Config, tomllib.loads(said)) == toml.load_recipe(recipe)
