"""Run the demo: the bundled small model learns the style of the bundled pictures, on the CPU."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from limner import bundled, engines
from limner.config import toml
from limner.config.schema import Config
from limner.data import contact_sheet
from limner.protocols import ModelSource
from limner.storage import atomic, outputs
from limner.storage.layout import LORA_FILE
from limner.storage.run_folder import RunFolder
from limner.training import loop, sinks

BUNDLED = Path(bundled.__file__).parent
PROMPTS = tuple(
    f"a blueprint drawing of a {thing}"
    for thing in ("house", "fish", "clock", "heart", "star", "cup")
)
SEED = 0
STEPS = 25
GUIDANCE_SCALE = 3.0


def run_demo(
    folder: Path | None, output: Path, overrides: Sequence[str] = (), engine: str = "torch"
) -> Path:
    """Train as ``demo.toml`` says, then draw the same prompts before and after into one picture.

    Args:
        folder: the run's folder, in which an earlier demo is resumed; None: one in ``runs``.
        output: the picture.
    """
    outputs.check_output_picture("--output", output)
    folder = folder or choose_run_folder(engine)
    loop.run_training(load_demo_recipe(folder, engine, overrides))
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


def load_demo_recipe(folder: Path, engine: str, overrides: Sequence[str]) -> Config:
    """Read ``demo.toml`` with the paths of this installation; ``overrides`` win over them."""
    paths = {
        "run": folder,
        "model.base": BUNDLED / "model",
        "data.folder": BUNDLED / "pictures",
        "data.cache": folder / "cache",
    }
    # A path quoted as JSON is a TOML string, too.
    settings = [
        f"{name}={json.dumps(str(path), ensure_ascii=False)}" for name, path in paths.items()
    ]
    settings.append(f'engine.kind="{engine}"')
    return toml.load_recipe(BUNDLED / "demo.toml", [*settings, *overrides])


def choose_run_folder(engine: str = "torch") -> Path:
    """Return a folder named by a digest of the bundle, so that no demo resumes one of another."""
    files = [BUNDLED / "demo.toml"]
    for part in ("model", "pictures"):
        files += sorted(path for path in (BUNDLED / part).rglob("*") if path.is_file())
    digests = [[path.relative_to(BUNDLED).as_posix(), atomic.digest_file(path)] for path in files]
    prefix = "demo-" if engine == "torch" else f"demo-{engine}-"
    return Path("runs") / f"{prefix}{atomic.digest_json(digests)[:8]}"


def draw_before_and_after(
    folder: Path, engine: str = "torch"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw each prompt with the base and with the run's result, from the same seed."""
    base = ModelSource(str(BUNDLED / "model"))
    if (folder / LORA_FILE).exists():
        result = ModelSource(base.model, folder)
    else:
        result = ModelSource(str(folder))
    before = draw_prompts(base, engine)
    after = draw_prompts(result, engine)
    return list(zip(before, after, strict=True))


def draw_prompts(source: ModelSource, engine: str) -> list[np.ndarray]:
    """Draw one picture of each prompt, on the CPU."""
    pipeline = engines.open_pipeline(
        source, None, engine, scheduler="ddim", precision="no", device="cpu"
    )
    return engines.draw_pictures(
        pipeline,
        PROMPTS,
        [SEED + i for i in range(len(PROMPTS))],
        steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
        size=None,
        batch=len(PROMPTS),
    )


def read_validation_losses(folder: Path) -> tuple[float, float]:
    """Return the first and the last validation loss of a run."""
    rows = sinks.read_metrics(RunFolder(folder).metrics)
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    return losses[0], losses[-1]
