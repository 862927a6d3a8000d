"""The main job in minutes, offline: the bundled small model learns the style of the bundled pictures, on the CPU."""

import json
from importlib import resources
from pathlib import Path

from limner import config, durable, engines, generate, training
from limner.snapshot import LORA

PROMPTS = ("a blueprint drawing of a house", "a blueprint drawing of a red apple", "a blueprint drawing of a fish", "a blueprint drawing of a clock", "a blueprint drawing of a tree", "a blueprint drawing of a cup")
SEED, STEPS, GUIDANCE = 7, 25, 3.0


def run(folder: Path, output: Path) -> Path:
    """Train as ``demo.toml`` says into ``folder`` (going on, if it was begun before), then draw the same prompts before and after into ``output``."""
    with resources.as_file(resources.files("limner.bundled")) as bundled:
        model = str(bundled / "model")
        places = {"run": folder, "model.base": model, "data.folder": bundled / "pictures", "data.cache": folder / "cache"}
        cfg = config.load(bundled / "demo.toml", [f"{name}={json.dumps(str(path))}" for name, path in places.items()])
        training.run(cfg)
        seeds = [SEED + i for i in range(len(PROMPTS))]
        sheets = []
        for source, lora in ((model, None), (model, folder) if (folder / LORA).exists() else (str(folder), None)):
            pipeline = engines.open_pipeline(source, lora=lora, scheduler="ddim", precision="no", device="cpu")
            sheets.append(engines.draw(pipeline, PROMPTS, seeds, steps=STEPS, guidance_scale=GUIDANCE, size=None, batch=len(PROMPTS)))
    sheet = generate.contact_sheet(list(zip(*sheets, strict=True)), PROMPTS, heads=("base", "fine-tuned"), tile=128)
    with durable.disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output)
    before, after = held_out(folder)
    print(f"held-out loss: {before:.4f} before, {after:.4f} after ({after / before - 1:+.0%}). Pictures: {output}")
    print("Your own: limner train recipes/sd15-lora.toml data.folder=my/pictures model.base=stable-diffusion-v1-5/stable-diffusion-v1-5")
    return output


def held_out(folder: Path) -> tuple[float, float]:
    """The first and the last held-out loss of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    return losses[0], losses[-1]
