"""The main job in minutes, offline: the bundled small model learns the style of the bundled
pictures, on the CPU."""

import json
from collections.abc import Sequence
from pathlib import Path

from limner import bundled, engines
from limner.config import toml
from limner.data import contact_sheet
from limner.protocols import ModelSource
from limner.storage import atomic
from limner.storage.layout import LORA_FILE
from limner.training import loop, sinks

BUNDLED = Path(bundled.__file__).parent
PROMPTS = tuple(
    f"a blueprint drawing of a {thing}"
    for thing in ("house", "fish", "clock", "heart", "star", "cup")
)
SEED, STEPS, GUIDANCE = 0, 25, 3.0


def run_demo(
    folder: Path | None, output: Path, overrides: Sequence[str] = (), engine: str = "torch"
) -> Path:
    """Train as ``demo.toml`` says into ``folder`` (or go on there), then draw the same prompts
    before and after into ``output``."""
    folder = folder or default_run_folder(engine)
    overrides = [f'engine.kind="{engine}"', *overrides]
    places = {
        "run": folder,
        "model.base": BUNDLED / "model",
        "data.folder": BUNDLED / "pictures",
        "data.cache": folder / "cache",
    }
    loop.run_training(
        toml.load_recipe(
            BUNDLED / "demo.toml",
            [
                *(
                    f"{name}={json.dumps(str(path), ensure_ascii=False)}"
                    for name, path in places.items()
                ),
                *overrides,
            ],
        )
    )
    before, after = read_validation_losses(folder)
    sheet = contact_sheet.draw_contact_sheet(
        draw_before_and_after(folder, engine), PROMPTS, heads=("base", "fine-tuned"), tile=128
    )
    with atomic.disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output)
    print(
        f"held-out loss: {before:.4f} before, {after:.4f} after ({after / before - 1:+.0%}). "
        f"Pictures: {output}"
    )
    print(
        "Your own: limner train recipes/sd15-lora.toml data.folder=my/pictures "
        "model.base=stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    return output


def default_run_folder(engine: str = "torch") -> Path:
    """Another one for another bundle, so that a demo never meets the run of an older one."""
    files = [
        BUNDLED / "demo.toml",
        *(
            p
            for part in ("model", "pictures")
            for p in sorted((BUNDLED / part).rglob("*"))
            if p.is_file()
        ),
    ]
    digest = atomic.digest_json(
        [[p.relative_to(BUNDLED).as_posix(), atomic.digest_file(p)] for p in files]
    )
    return Path("runs") / f"demo-{'' if engine == 'torch' else f'{engine}-'}{digest[:8]}"


def draw_before_and_after(folder: Path, engine: str = "torch") -> list[tuple]:
    """For each prompt, the picture of the base and that of the run, from the same seed."""
    base, lora = str(BUNDLED / "model"), folder if (folder / LORA_FILE).exists() else None
    columns = []
    for model, adapter in ((base, None), (base if lora else str(folder), lora)):
        pipeline = engines.open_pipeline(
            ModelSource(model, adapter),
            None,
            engine,
            scheduler="ddim",
            precision="no",
            device="cpu",
        )
        seeds = [SEED + i for i in range(len(PROMPTS))]
        columns.append(
            engines.draw_pictures(
                pipeline,
                PROMPTS,
                seeds,
                steps=STEPS,
                guidance_scale=GUIDANCE,
                size=None,
                batch=len(PROMPTS),
            )
        )
    return list(zip(*columns, strict=True))


def read_validation_losses(folder: Path) -> tuple[float, float]:
    """The first and the last held-out loss of a run."""
    losses = [
        row["held_out_loss"]
        for row in sinks.read_metrics(folder / "metrics.jsonl")
        if "held_out_loss" in row
    ]
    return losses[0], losses[-1]
