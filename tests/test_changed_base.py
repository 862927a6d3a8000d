"""What a run has learned goes with the base that it was trained on, and with no other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import limner
from limner.config import toml
from limner.config.schema import Config
from limner.errors import InputError
from limner.training import loop

pytestmark = pytest.mark.frameworks


def train(base: Path, pictures: Path, run: Path, **settings: Any) -> Path:
    """Train a run of one step."""
    raw = {
        "run": str(run),
        "model": {"base": str(base)},
        "data": {"folder": str(pictures), "size": 32},
        "train": {"steps": 1, "batch_size": 2, "seed": 5},
    }
    return loop.run_training(toml.build(Config, raw | settings), report=lambda line: None)


def change(base: Path, component: str, **settings: Any) -> None:
    """Change the config of a component."""
    [path] = [*(base / component).glob("*config.json")]
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_result_gets_no_parts_that_it_was_not_trained_with(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(base, tmp_path / "base")
    run = train(mine, pictures, tmp_path / "run", adapter={"kind": "full"})
    (run / "result.json").unlink()
    before = files(run)
    config = mine / "scheduler" / "scheduler_config.json"
    meant = config.read_text()
    change(mine, "scheduler", prediction_type="v_prediction")
    with pytest.raises(InputError, match=r"cannot be exported, because .*\n  the base model: was"):
        limner.export(run)
    assert files(run) == before
    config.write_text(meant)
    limner.export(run)
    assert files(run).keys() - before.keys() == {str(run / "result.json")}


def test_a_class_of_other_betas_is_another_base(base: Path, pictures: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(base, tmp_path / "base")
    config = mine / "scheduler" / "scheduler_config.json"
    told = json.loads(config.read_text())
    silent = {name: told[name] for name in told if name not in ("beta_start", "beta_end")}
    config.write_text(json.dumps(silent))
    run = train(mine, pictures, tmp_path / "run", train={"steps": 1, "batch_size": 2, "seed": 5})
    index = json.loads((mine / "model_index.json").read_text())
    for name, words in (
        ("DDIMScheduler", r"scheduler in model_index\.json: was \w+, now DDIMScheduler"),
        ("HeunDiscreteScheduler", "the base model: was"),
    ):
        index["scheduler"] = ["diffusers", name]
        (mine / "model_index.json").write_text(json.dumps(index))
        more = {"train": {"steps": 2, "batch_size": 2, "seed": 5}}
        with pytest.raises(InputError, match=words):
            train(mine, pictures, run, **more)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_scheduler_of_another_class_draws_no_result(
    base: Path, pictures: Path, tmp_path: Path, kind: str
) -> None:
    mine = shutil.copytree(base, tmp_path / "base")
    run = train(mine, pictures, tmp_path / "run", adapter={"kind": kind})
    before = files(run)
    index = json.loads((mine / "model_index.json").read_text())
    was, index["scheduler"] = index["scheduler"][1], ["diffusers", "EulerDiscreteScheduler"]
    assert was != "EulerDiscreteScheduler"
    (mine / "model_index.json").write_text(json.dumps(index))
    (run / "result.json").unlink()
    with pytest.raises(InputError, match=rf"was {was}, now EulerDiscreteScheduler"):
        limner.export(run)
    (run / "result.json").write_bytes(before[str(run / "result.json")])
    call = {"steps": 1, "device": "cpu", "output": tmp_path / "pictures"}
    if kind == "lora":
        with pytest.raises(InputError, match=rf"had a {was} when .* names a EulerDiscrete"):
            limner.generate(str(run), ["a circle"], **call)
        limner.generate(str(run), ["a circle"], base=str(mine), **call)
    assert files(run) == before


@pytest.mark.parametrize("kind", ["torch", pytest.param("jax", marks=pytest.mark.soak)])
def test_a_lora_is_drawn_on_what_it_was_trained_on(
    base: Path, pictures: Path, tmp_path: Path, kind: str
) -> None:
    mine = shutil.copytree(base, tmp_path / "base")
    run = train(mine, pictures, tmp_path / "run", adapter={"kind": "lora", "rank": 2})
    call = {"engine": kind, "steps": 1, "device": "cpu", "output": tmp_path / "pictures"}
    limner.generate(str(run), ["a circle"], **call)
    weights = mine / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match="is not what it was trained on"):
        limner.generate(str(run), ["a circle"], **call)
    limner.generate(str(run), ["a circle"], base=str(mine), **call)


def swap_ends(path: Path) -> None:
    """Give the first word of a vocabulary the number of the last, and the other way round."""
    raw = json.loads(path.read_text())
    words = raw["model"]["vocab"] if "model" in raw else raw
    first, last = min(words, key=words.get), max(words, key=words.get)
    words[first], words[last] = words[last], words[first]
    path.write_text(json.dumps(raw))


# What each file of a tokenizer is changed to.
VOCABULARY: dict[str, Callable[[Path], object]] = {
    "tokenizer.json": swap_ends,
    "vocab.json": swap_ends,
    "merges.txt": lambda path: path.write_text(path.read_text().rstrip().rpartition("\n")[0]),
    "special_tokens_map.json": lambda path: path.write_text('{"pad_token": "!"}'),
    "added_tokens.json": lambda path: path.write_text('{"!": 0}'),
    "tokenizer_config.json": lambda path: change(path.parents[1], "tokenizer", pad_token="!"),
}


def test_a_tokenizer_is_part_of_what_was_trained_on(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    """Of each of its files a change is seen by all that goes on from a run, one more too."""
    mine = shutil.copytree(base, tmp_path / "base")
    lora = train(mine, pictures, tmp_path / "lora", adapter={"kind": "lora"})
    full = train(mine, pictures, tmp_path / "full", adapter={"kind": "full"})
    (full / "result.json").unlink()
    call = {"steps": 1, "device": "cpu", "output": tmp_path / "pictures"}
    more: dict[str, Any] = {"train": {"steps": 2, "batch_size": 2, "seed": 5}}
    for name, edit in VOCABULARY.items():
        path = mine / "tokenizer" / name
        before = path.read_bytes() if path.exists() else None
        edit(path)
        with pytest.raises(InputError, match=r"lora: its base .* is not what it was trained on"):
            limner.generate(str(lora), ["a circle"], **call)
        for run, kind in ((lora, "lora"), (full, "full")):
            with pytest.raises(InputError, match=r"resumed, because .*\n  the base model: was"):
                train(mine, pictures, run, adapter={"kind": kind}, **more)
        with pytest.raises(InputError, match=r"exported, because .*\n  the base model: was"):
            limner.export(full)
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    limner.export(full)
    limner.generate(str(lora), ["a circle"], **call)
