"""The result loads in stock pipelines with the weights that were trained, is whole or absent, and
only it is pushed."""

import ast
import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import moments
import numpy as np
import pytest
import yaml
from hub_server import Hub
from safetensors.numpy import load_file

from limner.base_model.base import BaseModel
from limner.base_model.open import open_base
from limner.config import toml
from limner.config.schema import (
    AdapterSettings,
    Config,
    DataSettings,
    ExportSettings,
    ModelSettings,
)
from limner.errors import DiskError, HubError, InputError, IntegrityError
from limner.families import FAMILIES
from limner.storage import atomic
from limner.storage.layout import LORA_FILE
from limner.training import model_card, push, result

SD = FAMILIES["sd"]
CANARY = "hf_" + "canaryToken0" * 3
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def opened(sd: Path) -> BaseModel:
    return open_base(ModelSettings(base=str(sd)), SD)


@pytest.fixture(scope="module")
def trained(sd: Path) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(1)
    return {
        k: v + draws.normal(0, 0.01, v.shape).astype(v.dtype)
        for k, v in load_file(sd / UNET).items()
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub(token=CANARY) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_TOKEN", CANARY)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield served


def pipeline(folder: Path, **settings: Any) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(1)
    made = StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, safety_checker=None, **settings
    )
    made.set_progress_bar_config(disable=True)
    return made


def everything(folder: Path) -> bytes:
    return b"\n".join(
        str(p.relative_to(folder)).encode() + p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    )


def test_a_stock_pipeline_loads_the_trained_weights(
    sd: Path, opened: BaseModel, trained: dict[str, np.ndarray], tmp_path: Path
) -> None:
    for name in ("unet", "vae"):
        opened.configs[name]["_name_or_path"] = str(sd)
    for left in (
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/model-00001-of-00002.safetensors",
    ):  # of an export that died, or of another model
        (tmp_path / left).parent.mkdir()
        (tmp_path / left).write_text("{}")
    result.write_full(opened, SD, tmp_path, trained, "epsilon", 7)
    loaded = pipeline(tmp_path)
    assert all(np.array_equal(v.numpy(), trained[k]) for k, v in loaded.unet.state_dict().items())
    for part in (
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
    ):
        new, old = tmp_path / part, sd / part
        assert (
            json.loads(new.read_text()) == json.loads(old.read_text())
            if part.endswith("json")
            else new.read_bytes() == old.read_bytes()
        )
    assert loaded("a red circle", num_inference_steps=2, output_type="np").images.shape == (
        1,
        32,
        32,
        3,
    )
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["step"], found["kind"]) == (7, "full")
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {*found["files"], "result.json"} and not [
        n for n in written if "MANIFEST" in n
    ]
    assert str(sd).encode() not in everything(tmp_path) and result.is_result_whole(tmp_path, 7)


def test_a_file_of_the_base_that_is_no_json_is_copied_as_it_is(
    sd: Path, trained: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sd, tmp_path / "base"))
    odd = {"notes.json": b"\xef\xbb\xbf{}", "broken.json": b"{", "deep.json": b"[" * 100_000}
    for name, content in odd.items():
        (folder / "text_encoder" / name).write_bytes(content)
    base = open_base(ModelSettings(base=str(folder)), SD)
    result.write_full(base, SD, tmp_path / "run", trained, "epsilon", 1)
    for name, content in odd.items():
        assert (tmp_path / "run" / "text_encoder" / name).read_bytes() == content


def test_variants_shards_and_extras_of_the_base(
    sd_fp16: Path, trained: dict[str, np.ndarray], tmp_path: Path
) -> None:
    folder, run = Path(shutil.copytree(sd_fp16, tmp_path / "base")), tmp_path / "run"
    shutil.rmtree(folder / "vae")
    shutil.copytree(
        folder / "unet", folder / "vae"
    )  # a frozen part in several files: only their names matter here
    extras = {
        "safety_checker": "StableDiffusionSafetyChecker",
        "feature_extractor": "CLIPImageProcessor",
        "image_encoder": "CLIPVisionModelWithProjection",
    }
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        name: ["stable_diffusion" if name == "safety_checker" else "transformers", cls]
        for name, cls in extras.items()
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, file in (
        ("safety_checker", "model.fp16.safetensors"),
        ("image_encoder", "pytorch_model.bin"),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(
            json.dumps({"_name_or_path": "/home/someone/models"})
        )
        shutil.copy(folder / "text_encoder" / "model.fp16.safetensors", folder / name / file)
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text('{"size": 224}')

    half = open_base(
        ModelSettings(base=str(folder), variant="fp16"),
        replace(SD, incompatibilities=lambda configs: []),
    )
    result.write_full(half, SD, run, trained, "epsilon", 1)
    names = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert not [n for n in names if "fp16" in n] and UNET in names
    shards = sorted(n for n in names if n.startswith("vae/") and "-of-" in n)
    merged = {k: v for n in shards for k, v in load_file(run / n).items()}
    mapped = json.loads(
        (run / "vae" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )["weight_map"]
    assert (
        len(shards) > 1
        and {"vae/" + n for n in mapped.values()} == set(shards)
        and set(mapped) == set(merged)
    )
    assert (run / "text_encoder" / "model.safetensors").read_bytes() == (
        folder / "text_encoder" / "model.fp16.safetensors"
    ).read_bytes()
    out = json.loads((run / "model_index.json").read_text())
    assert out["image_encoder"] == [None, None] and "image_encoder/config.json" not in names
    assert {
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
    } <= names
    assert b"/home/someone" not in everything(run)


@pytest.mark.parametrize(
    ("predict", "cls"), [("v_prediction", "PNDMScheduler"), ("sample", "DDIMScheduler")]
)
def test_the_scheduler_says_what_was_trained(
    opened: BaseModel, trained: dict[str, np.ndarray], tmp_path: Path, predict: str, cls: str
) -> None:
    result.write_full(opened, SD, tmp_path, trained, predict, 1)
    loaded = pipeline(tmp_path)
    assert (loaded.scheduler.config.prediction_type, type(loaded.scheduler).__name__) == (
        predict,
        cls,
    )
    assert np.allclose(
        loaded.scheduler.betas.numpy(), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    )
    assert np.isfinite(loaded("a red circle", num_inference_steps=2, output_type="np").images).all()


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 10.0), (3, 1.5)])
def test_lora_keeps_rank_and_alpha(
    sd: Path, opened: BaseModel, tmp_path: Path, rank: int, alpha: float
) -> None:
    loaded, draws = pipeline(sd), np.random.default_rng(0)
    targets = ("to_q", "to_out.0")
    arrays, wanted = {}, {}
    for name, module in loaded.unet.named_modules():
        if name.endswith(targets):
            out, into = module.weight.shape
            down, up = (
                draws.normal(0, 0.1, (rank, into)).astype(np.float32),
                draws.normal(0, 0.1, (out, rank)).astype(np.float32),
            )
            arrays |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            wanted[name] = module.weight.detach().numpy() + alpha / rank * up @ down
    result.write_lora(
        opened, SD, tmp_path, arrays, AdapterSettings("lora", rank, alpha, targets=targets), 3
    )
    assert set(load_file(tmp_path / LORA_FILE)) == set(arrays)
    loaded.load_lora_weights(tmp_path)
    scales = {
        module.scaling["default_0"]
        for module in loaded.unet.modules()
        if hasattr(module, "scaling")
    }
    config = loaded.unet.peft_config["default_0"]
    assert scales == {1.0} and config.r == config.lora_alpha == rank
    loaded.fuse_lora()
    fused = {
        n: m.base_layer.weight.detach().numpy()
        for n, m in loaded.unet.named_modules()
        if n in wanted
    }
    assert len(fused) == len(wanted) > 4 and all(
        np.allclose(fused[n], w, atol=1e-6) for n, w in wanted.items()
    )
    assert result.is_result_whole(tmp_path, 3) and not result.is_result_whole(tmp_path, 4)


DYING = """
import os, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file
from limner.base_model.open import open_base
from limner.config.schema import ModelSettings
from limner.families import SD
from limner.training import result

count = 0
def dying(action):
    def act(*arguments, **settings):
        global count
        count += 1
        if count == int(sys.argv[3]):
            os._exit(137)
        return action(*arguments, **settings)
    return act

base, run = open_base(ModelSettings(base=sys.argv[1]), SD), Path(sys.argv[2])
arrays = load_file(base.weight_files("unet")[0])
arrays = {k: v * np.float32(sys.argv[4]) for k, v in arrays.items()}
for name in ("rename", "replace", "unlink", "fsync"):
    setattr(os, name, dying(getattr(os, name)))
result.write_full(base, SD, run, arrays, "v_prediction", int(sys.argv[5]))
print(count)
"""


def dying(
    sd: Path, run: Path, moment: int, factor: float, step: int
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DYING, str(sd), str(run), str(moment), str(factor), str(step)],
        capture_output=True,
        text=True,
    )


def digests(run: Path) -> dict[str, str]:
    return {
        p.relative_to(run).as_posix(): atomic.digest_file(p)
        for p in sorted(run.rglob("*"))
        if p.is_file() and not p.relative_to(run).parts[0].startswith(".")
    }


def test_killed_at_any_moment_it_is_never_a_mixture_and_completes(
    sd: Path, opened: BaseModel, tmp_path: Path
) -> None:
    dying(sd, tmp_path / "old", 0, 1.0, 4)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    moments = int(dying(sd, tmp_path / "new", 0, 2.0, 8).stdout)
    old, new = digests(tmp_path / "old"), digests(tmp_path / "new")
    assert (
        result.is_result_whole(tmp_path / "new", 8)
        and old.keys() == new.keys()
        and old[UNET] != new[UNET]
    )
    arrays = {k: v * np.float32(2) for k, v in load_file(sd / UNET).items()}
    for moment in (1, 2, 3, 4, *range(5, moments - 3, 9), moments - 2, moments - 1, moments):
        run = Path(shutil.copytree(tmp_path / "old", tmp_path / f"run{moment}"))
        assert dying(sd, run, moment, 2.0, 8).returncode == 137
        left = digests(run)
        assert result.is_result_whole(run, 8) == (left == new)
        if "model_index.json" in left:
            assert {k: v for k, v in old.items() if k != "result.json"} == {
                k: v for k, v in left.items() if k != "result.json"
            } or left.items() <= new.items()
        result.write_full(opened, SD, run, arrays, "v_prediction", 8)
        atomic.sweep(run)
        assert result.is_result_whole(run, 8) and digests(run) == new
        assert {p.name for p in run.iterdir()} == {p.name for p in (tmp_path / "new").iterdir()}


@pytest.mark.parametrize(
    ("kind", "every"), [("lora", 1), ("full", 11), pytest.param("full", 1, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_when_the_disk_refuses_the_result_that_was_there_is_whole(
    kind: str, every: int, number: int, sd: Path, opened: BaseModel, tmp_path: Path
) -> None:
    """At every call that can fail, for n = 1, 1 + ``every``, ... until none fails."""
    arrays = load_file(sd / UNET)

    def write(factor: int, step: int) -> None:
        scaled = {name: array * np.float32(factor) for name, array in arrays.items()}
        if kind == "full":
            result.write_full(opened, SD, tmp_path, scaled, "epsilon", step)
        else:
            result.write_lora(opened, SD, tmp_path, scaled, AdapterSettings(kind="lora"), step)

    write(1, 4)
    old, refused = digests(tmp_path), 0
    for n in itertools.count(1, every):
        with moments.failing(n, number) as count:
            try:
                write(2, 8)
            except DiskError:
                refused += 1
        left = digests(tmp_path)
        # What fails after the last name has changed is the new result's sync.
        assert left == old or result.is_result_whole(tmp_path, 8)
        assert result.is_result_whole(tmp_path, 4 if left == old else 8)
        if count[0] < n:
            break
        if left != old:
            write(1, 4)
    assert refused > 5 and result.is_result_whole(tmp_path, 8)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def fill(folder: Path, step: int, *more: str) -> dict[str, Any]:
    """A small result; no pipeline would take it."""
    for name in ("unet/weights", "vae/weights", "model_index.json", *more):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {step}")
    return result.seal_result(folder, "full", step)


def interrupt(count: list[int], n: int, before: bool, real: Any) -> Any:
    """A function with Ctrl-C before or after its n-th call."""

    def call(*given: Any) -> Any:
        count[0] += 1
        if count[0] == n and before:
            raise KeyboardInterrupt
        done = real(*given)
        if count[0] == n:
            raise KeyboardInterrupt
        return done

    return call


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_interrupted_at_any_call_a_result_is_the_old_or_the_new(
    first: bool, before: bool, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C as by anything else; on systems that exchange two names in one step, or do not."""
    for n in itertools.count(1):
        run, count = tmp_path / f"run{n}", [0]
        run.mkdir()
        if not first:
            fill(run, 4, "old/weights")
        old = digests(run)
        files = fill(run / ".stage", 8, "new/weights")
        wrap = partial(interrupt, count, n, before)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "rename", wrap(os.rename))
            patch.setattr(os, "replace", wrap(os.replace))
            patch.setattr(atomic, "sync", wrap(atomic.sync))
            exchange = wrap(atomic.exchange) if exchanges else lambda one, other: False
            patch.setattr(atomic, "exchange", exchange)
            result.install_result(run / ".stage", run, files)
        if not result.is_result_whole(run, 8):
            assert digests(run) == old and (first or result.is_result_whole(run, 4))
        if count[0] < n:
            break
    assert n > 6 and result.is_result_whole(run, 8)


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_at_any_moment_one_of_the_two_results_is_loadable(
    every: int, sd: Path, opened: BaseModel, tmp_path: Path
) -> None:
    run, arrays, dead = tmp_path / "run", load_file(sd / UNET), 0
    half = {name: array * np.float32(0.5) for name, array in arrays.items()}
    result.write_full(opened, SD, run, arrays, "epsilon", 4)
    unets = {atomic.digest_file(run / UNET)}
    for n in itertools.count(1, every):
        died = moments.dies_at(n, lambda: result.write_full(opened, SD, run, half, "epsilon", 8))
        unets.add(atomic.digest_file(run / UNET))
        names = result.list_components(json.loads((run / "model_index.json").read_text()))
        assert all(any((run / name).iterdir()) for name in names)
        if not died:
            break
        dead += 1
        atomic.sweep(run)
        result.write_full(opened, SD, run, arrays, "epsilon", 4)
    assert dead > 5 and len(unets) == 2


def test_damage_is_seen(opened: BaseModel, trained: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert not result.is_result_whole(tmp_path / "nothing")
    result.write_full(opened, SD, tmp_path, trained, "epsilon", 5)
    for name in ("vae/config.json", UNET):
        data = (tmp_path / name).read_bytes()
        for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
            (tmp_path / name).write_bytes(damaged)
            assert not result.is_result_whole(tmp_path, 5)
            with pytest.raises(IntegrityError, match="Run the training command again"):
                push.push_result(tmp_path, "someone/thing")
        (tmp_path / name).write_bytes(data)
    assert result.is_result_whole(tmp_path, 5)
    found = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(found | {"step": 6}))
    assert not result.is_result_whole(tmp_path, 6)


HOSTILE = 'a "red" <script>alert(1)</script> | ](http://x)\n## title ``` {{x}} \\ é 🍎 *b*'


def test_the_card_tells_no_secrets_and_runs_nothing(opened: BaseModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(opened.folder, tmp_path / "base"))
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [x]\n---\ntext\n")
    local = open_base(ModelSettings(base=str(folder)), SD)
    cfg = toml.build(
        Config,
        {
            "run": "/home/somebody/run",
            "model": {"base": str(folder), "cache_dir": "/home/somebody/cache"},
            "data": {"folder": "/home/somebody/pictures", "cache": "/home/somebody/features"},
            "adapter": {"kind": "lora", "targets": ["to_q", "a|b<i>"]},
            "preview": {"prompts": [HOSTILE]},
        },
    )
    text = model_card.write_model_card(
        toml.to_plain(cfg), local, SD, 12, prompts=[HOSTILE], repo="someone/red-things", grid=True
    )
    assert "somebody" not in text and str(tmp_path) not in text
    matter = yaml.safe_load(text.split("---\n")[1])
    assert (
        matter["license"] == "creativeml-openrail-m"
        and "base_model" not in matter
        and "datasets" not in matter
    )
    assert {"stable-diffusion", "text-to-image", "diffusers", "diffusers-training", "lora"} <= set(
        matter["tags"]
    ) and matter["library_name"] == "diffusers"
    before, code, rest = (
        text.split("```python\n")[0],
        *text.split("```python\n")[1].split("\n```\n", 1),
    )
    rest, recipe = rest.split("```toml\n")
    recipe, rest = recipe.split("\n```\n", 1)
    assert (
        "<script>" not in before + rest and "<i>" not in before + rest and "\n## title" not in text
    )
    assert "## title ```" not in before + rest and "](http" not in before + rest
    tree = ast.parse(code)
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert HOSTILE in strings and "someone/red-things" in strings
    assert tomllib.loads(recipe)["adapter"]["targets"] == ["to_q", "a|b<i>"]
    assert (
        "optim.learning_rate = 0.0001" in recipe.splitlines()
        and "12 steps" in text
        and "](preview.png)" in text
    )

    unnamed = model_card.write_model_card(toml.to_plain(cfg), local, SD, 12)
    assert "\n# run\n" in unnamed and "somebody" not in unnamed

    on_hub = replace(local, name="someone/base", commit="0" * 40)
    plain = toml.to_plain(Config(data=DataSettings(hub="someone/pictures")))
    matter = yaml.safe_load(model_card.write_model_card(plain, on_hub, SD, 1).split("---\n")[1])
    assert (matter["base_model"], matter["base_model_relation"], matter["datasets"]) == (
        "someone/base",
        "finetune",
        ["someone/pictures"],
    )
    elsewhere = toml.to_plain(Config(data=DataSettings(hub="/home/somebody/table")))
    assert "somebody" not in model_card.write_model_card(elsewhere, on_hub, SD, 1)
    assert "license" not in yaml.safe_load(
        model_card.write_model_card(plain, opened, SD, 1).split("---\n")[1]
    )


@pytest.mark.parametrize("inner", ["", "vae"])
@pytest.mark.parametrize("name", ["model", "vae"])
def test_the_card_loads_the_autoencoder_from_what_was_given(
    sd: Path, tmp_path: Path, name: str, inner: str
) -> None:
    """The autoencoder's own folder, whatever it is called, or one that has it in ``vae``."""
    given = tmp_path / name
    shutil.copytree(sd / "vae", given / inner)
    model = ModelSettings(base=str(sd), vae=str(given))
    config = toml.to_plain(Config(model=model, adapter=AdapterSettings(kind="lora")))
    text = model_card.write_model_card(config, open_base(model, SD), SD, 1)
    wanted = '"path/to/the/autoencoder"' + (', subfolder="vae"' if inner else "")
    assert f"vae=AutoencoderKL.from_pretrained({wanted})" in text and str(given) not in text


def filled(opened: BaseModel, trained: dict[str, np.ndarray], run: Path) -> Path:
    """A run's folder with all that must stay at home."""
    result.write_full(opened, SD, run, trained, "epsilon", 5)
    plain = toml.to_plain(Config(export=ExportSettings(hub="red")))
    atomic.write_text(
        run / "README.md",
        model_card.write_model_card(plain, opened, SD, 5, repo="tester/red", grid=True),
    )
    (run / "preview.png").write_bytes(b"png")
    for name in (
        "checkpoint-5/optimizer.safetensors",
        "checkpoint-5/unet/config.json",
        "logs/x/events",
        "metrics.jsonl",
        "skipped.jsonl",
        "config.json",
        "unet/.stray",
        "previews/1.png",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("private")
    return run


def test_only_the_result_is_pushed_and_the_token_is_written_nowhere(
    opened: BaseModel, trained: dict[str, np.ndarray], hub: Hub, tmp_path: Path
) -> None:
    run, told = filled(opened, trained, tmp_path / "run"), []
    assert push.check_push("red", private=True) == "tester/red"
    address = push.push_result(run, "red", True, told.append)
    assert address == f"{hub.url}/tester/red" and hub.repos[("model", "tester/red")].private
    allowed = {*result.read_result(run)["files"], "README.md", "preview.png"}
    assert len(hub.pushed["tester/red"]) == 1 and sorted(hub.pushed["tester/red"][0]) == sorted(
        allowed
    )
    received = hub.received("tester/red")
    assert set(received) == allowed and all(
        data == (run / name).read_bytes() for name, data in received.items()
    )
    assert {sent for _, path, sent in hub.requests if path.startswith("/api/")} == {
        f"Bearer {CANARY}"
    }
    assert all(name in told[0] for name in allowed) and CANARY not in "".join(told)
    assert CANARY.encode() not in everything(tmp_path) and not [
        n for n, data in received.items() if CANARY.encode() in data
    ]


@pytest.mark.parametrize(
    "request_",
    [
        "GET /api/whoami",
        "POST /api/repos/create",
        "POST /api/models/.*/preupload",
        "POST /api/models/.*/commit",
    ],
)
def test_a_failed_push_leaves_a_whole_result_and_says_how_to_try_again(
    opened: BaseModel, trained: dict[str, np.ndarray], hub: Hub, tmp_path: Path, request_: str
) -> None:
    run = filled(opened, trained, tmp_path / "my run")
    before = everything(run)
    hub.answer(request_, 403, times=1)
    with pytest.raises(HubError) as caught:
        push.push_result(run, "tester/red", False, lambda text: None)
    assert (
        "(403)" in str(caught.value)
        and f"limner export '{run}' --push tester/red" in str(caught.value)
        and CANARY not in str(caught.value)
    )
    assert (
        everything(run) == before
        and result.is_result_whole(run, 5)
        and "tester/red" not in hub.pushed
    )
    push.push_result(run, "tester/red", False, lambda text: None)
    assert len(hub.pushed["tester/red"]) == 1


def test_what_would_fail_at_the_end_is_found_before_training(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"'a/b/c' is no name of a repository"):
        push.check_push("a/b/c")
    for request_, status, expected in [
        ("create", 403, r"\(403\)"),
        ("auth-check/write", 403, r"\(403\)"),
        ("whoami", 429, r"\(429\)"),
        ("whoami", 500, r"\(500\)"),
    ]:
        hub.answer(request_, status, times=1)
        with pytest.raises(HubError, match=rf"{expected}.*Nothing was trained yet"):
            push.check_push("tester/red")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"token is not valid \(401\)"):
        push.check_push("tester/red")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token was found"):
        push.check_push("tester/red")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        push.check_push("tester/red")
    assert ("model", "tester/red") in hub.repos and not hub.pushed


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "diffusers", "transformers", "datasets", "huggingface_hub", "yaml")
    code = (
        "import sys, limner.base_model.open, limner.commands.export; print([m for m in "
        f"{heavy} if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
        ).stdout.strip()
        == "[]"
    )
