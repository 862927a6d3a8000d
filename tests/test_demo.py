"""What the package brings along is complete and small, and the demo's path runs on it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limner import cli
from limner.commands import demo
from limner.commands.demo import BUNDLED, PROMPTS


def test_the_pictures_are_few_small_and_captioned():
    folder = BUNDLED / "pictures"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert 40 <= len(rows) <= 80
    assert {row["file_name"] for row in rows} == {p.name for p in folder.glob("*.png")}
    assert sum(p.stat().st_size for p in folder.iterdir()) < 300_000
    assert all(row["text"].startswith("a blueprint drawing of") for row in rows)


@pytest.mark.frameworks
def test_the_model_is_small_complete_and_loads_in_stock_diffusers():
    from diffusers import StableDiffusionPipeline

    folder = BUNDLED / "model"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 20 * 2**20
    assert re.search(
        r"Noto Emoji.*Apache|Apache.*Noto Emoji", (folder / "README.md").read_text(), re.DOTALL
    )
    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = np.asarray(pipeline("an emoji of a red apple", num_inference_steps=4).images[0])
    assert picture.shape == (64, 64, 3)


@pytest.mark.frameworks
def test_the_demo_trains_and_ends_with_a_picture(tmp_path, capsys):
    output = tmp_path / "before-after.png"
    small = [
        "train.steps=2",
        "train.batch_size=4",
        "validation.every=2",
        "validation.timesteps=1",
        "optim.warmup=0",
    ]
    assert demo.run_demo(tmp_path / "run", output, small) == output
    with Image.open(output) as sheet:
        assert sheet.size == (200 + 2 * 134 + 6, 28 + len(PROMPTS) * 134)
    said = capsys.readouterr().out
    before, after = demo.read_validation_losses(tmp_path / "run")
    assert f"held-out loss: {before:.4f} before, {after:.4f} after" in said and before != after
    assert "limner train recipes/sd15-lora.toml data.folder=my/pictures" in said
    assert demo.read_validation_losses(tmp_path / "run")[0] == pytest.approx(before)


@pytest.mark.frameworks
def test_again_it_is_finished_and_draws_and_another_bundle_gets_another_folder(
    base, pictures, tmp_path, monkeypatch, capsys
):
    bundle, run = tmp_path / "bundle", tmp_path / "here"
    shutil.copytree(base, bundle / "model")
    shutil.copytree(pictures, bundle / "pictures")
    recipe = (
        "[data]\nsize = 32\n[train]\nsteps = {}\nbatch_size = 2\nseed = 0\n[engine]\ndevice = "
        '"cpu"\n[validation]\nhold_out = 2\ntimesteps = 1\n'
    )
    (bundle / "demo.toml").write_text(recipe.format(2))
    run.mkdir()
    monkeypatch.chdir(run)
    monkeypatch.setattr(demo, "BUNDLED", bundle)
    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr(demo, "PROMPTS", ("a red circle",))
    folders = []
    for changed in (
        None,
        None,
        bundle / "demo.toml",
        bundle / "pictures" / "metadata.jsonl",
        bundle / "model" / "README.md",
    ):
        if changed is not None:
            changed.write_text(changed.read_text() + "\n" if changed.exists() else "another")
            Path("before-after.png").unlink()
        picture = Path("before-after.png").read_bytes() if folders and changed is None else None
        assert cli.main(["demo"]) == 0
        said = "".join(capsys.readouterr())
        assert ("finished at step 2; nothing to do" in said) == (picture is not None)
        assert picture in (None, Path("before-after.png").read_bytes())
        folders.append(sorted(p.name for p in Path("runs").iterdir()))
    assert [len(names) for names in folders] == [1, 1, 2, 3, 4]
    assert all(re.fullmatch(r"demo-[0-9a-f]{8}", name) for name in folders[-1])
