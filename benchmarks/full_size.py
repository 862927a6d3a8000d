"""A whole run at the size of Stable Diffusion 1.5 with random weights: encode, train, save, export,
and go on; memory and seconds of each phase.

    python benchmarks/full_size.py WORK [section.key=value ...]

WORK needs 40 GB of disk. The run is stopped, and nothing else is, when less than 1 GiB of memory is
left to the machine. Linux only: it reads /proc.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from limner.commands import random_base
from limner.families.published import load_published

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SIZE = ("VmHWM", "RssAnon", "RssFile")


def make_base(folder: Path) -> None:
    """Stable Diffusion 1.5 with random weights and a small vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    for part, known in (("unet", load_published("sd")["unet"]), ("vae", VAE)):
        random_base.write_random_component(folder / part, known)
    words = tiny.write_tokenizer(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(**TEXT, bos_token_id=words - 2, eos_token_id=words - 1)
    ).save_pretrained(folder / "text_encoder")
    tiny.write_scheduler(folder / "scheduler", "epsilon", {})
    index = {
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    index |= {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", **index})
    )


def make_pictures(folder: Path) -> None:
    """Two captioned pictures of noise."""
    folder.mkdir()
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (512, 512, 3), np.uint8)).save(
            folder / f"{i}.png"
        )
    (folder / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": f"{i}.png", "text": f"noise {i}"}) + "\n" for i in range(2)
        )
    )


def resident(pid: int) -> dict[str, float]:
    """Memory of a process in GiB: the highest so far, what is its own now, and mapped files (which
    the kernel may take back)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {
        name: int(match[1]) / 2**20
        for name in SIZE
        if (match := re.search(rf"^{name}:\s+(\d+) kB", text, re.M))
    }


def available() -> float:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) / 2**20 if found else 0.0


def watch(command: list[str], run: Path) -> dict[str, Any]:
    """Run a command; what it said and when, and the highest memory between those moments."""
    began = time.monotonic()
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    events: list[tuple[float, str]] = [(0.0, "begun")]

    def listen() -> None:
        for line in child.stderr or ():
            events.append((time.monotonic() - began, line.strip()[:160]))

    threading.Thread(target=listen, daemon=True).start()
    phases: dict[str, dict[str, float]] = {}
    while child.poll() is None:
        now, phase = time.monotonic() - began, phase_of(run)
        seen = resident(child.pid)
        known = phases.setdefault(phase, {"begun": now, "own": 0.0, "files": 0.0})
        own, files = (
            max(known["own"], seen.get("RssAnon", 0)),
            max(known["files"], seen.get("RssFile", 0)),
        )
        known |= {
            "ended": now,
            "own": own,
            "files": files,
            "peak_so_far": seen.get("VmHWM", known.get("peak_so_far", 0)),
        }
        if available() < 1:
            child.kill()
            raise SystemExit(
                "stopped: less than 1 GiB of memory is left. So far: "
                f"{json.dumps(phases, indent=1)}"
            )
        time.sleep(0.2)
    if child.returncode:
        raise SystemExit(f"the run ended with {child.returncode}: {events[-5:]}")
    return {
        "seconds": time.monotonic() - began,
        "phases": phases,
        "said": [f"{t:.1f} s: {text}" for t, text in events if text],
    }


def phase_of(run: Path) -> str:
    """What the run is doing, by what lies in its folder."""
    names = {p.name for p in run.glob("*")} | {p.name for p in run.glob(".*")}
    temporary = [name for name in names if name.startswith(".checkpoint") and name.endswith(".tmp")]
    if temporary:
        return f"save {temporary[0].split('.')[1]}"
    last = sorted(name for name in names if name.startswith("checkpoint-"))[-1:]
    if "metrics.jsonl" in names or last:
        return f"train or export, after {last[0]}" if last else "train"
    return "read and encode"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        help="before the run is gone on with for one more (default: %(default)s)",
    )
    a = parser.parse_args()
    if not (a.work / "base").exists():
        make_base(a.work / "base")
        make_pictures(a.work / "pictures")
    run = a.work / "run"
    recipe = Path(__file__).parents[1] / "recipes" / "sd15-full.toml"
    values = {
        "run": run,
        "model.base": a.work / "base",
        "data.folder": a.work / "pictures",
        "data.flip": "false",
        "data.drop_caption": 0.0,
        "data.cache": a.work / "cache",
        "train.batch_size": 1,
        "train.micro_batch_size": 1,
        "engine.precision": "no",
        "engine.device": "cpu",
        "engine.tf32": "false",
        "engine.encode_batch": 1,
        "validation.hold_out": 0,
        "preview.prompts": "[]",
        "checkpoint.keep": 1,
        "log.every": 1,
    }
    command = [
        sys.executable,
        "-m",
        "limner",
        "train",
        str(recipe),
        *(f"{k}={v}" for k, v in values.items()),
        *a.overrides,
    ]
    report = {
        "begun": watch([*command, f"train.steps={a.steps}"], run),
        "gone on": watch([*command, f"train.steps={a.steps + 1}"], run),
    }
    print(json.dumps(report, indent=1))
    print(
        f"{os.cpu_count()} cores; memory in GiB; highest of all: "
        f"{max(p['peak_so_far'] for r in report.values() for p in r['phases'].values()):.2f}"
    )


if __name__ == "__main__":
    main()
