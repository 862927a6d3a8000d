"""Limner on a CUDA device, once and whole: is it right, does it wait, how fast, how much memory.

    python gpu_check.py --root REPOSITORY --out FOLDER [--budget 505]
        [--script train_text_to_image.py] [--only env,sd] [--tiny --device cpu]

Ends with one JSON file and a table. Every section is a process of its own with a time box; what it
has found is on disk line by line, so that a crash, a hang or the end of the budget loses only what
is still missing. Sections, most valuable first: env; runs, syncs, big, jaxruns, tests (together:
nothing is timed in them); sd (Stable Diffusion 1.5 at 512 pixels, full and LoRA, with levers);
script (diffusers' own script); sdxl; repeat; jax; compile. ``--tiny --device cpu`` runs the same
code on tiny networks: a rehearsal of the plumbing, not a measurement.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from pathlib import Path

HERE = Path(__file__).resolve()
BUNDLED = ("src", "limner", "bundled")
PEAK = 790  # TFLOP/s of a large bf16 product on an H200: every MFU in the table is of this
NOISE_LEVELS = ("signal_in", "noise_in", "signal_target", "noise_target")
TFLOP = {  # an image, forward and backward, nothing recomputed
    ("sd", "full"): 2.407,
    ("sd", "lora"): 1.725,
    ("sdxl", "full"): 20.231,
    ("sdxl", "lora"): 14.188,
}
TOGETHER = ("runs", "syncs", "big", "jaxruns", "tests")
ALONE = (
    ("sd", 125),
    ("script", 85),
    ("sdxl", 90),
    ("repeat", 80),
    ("jax", 100),
    ("compile", 120),
)


# ------------------------------------------------------- the conductor: standard library only


def main() -> None:
    parser = argparse.ArgumentParser(description="Limner on a CUDA device, once and whole.")
    parser.add_argument("--root", type=Path, required=True, help="the repository")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--budget", type=float, default=505, help="seconds that all may take")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: a rehearsal")
    parser.add_argument("--script", type=Path, help="diffusers' train_text_to_image.py")
    parser.add_argument("--only", default="", help="sections, comma-separated")
    parser.add_argument("--stretch", type=float, default=1.0, help="multiplies every box")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.root, args.out = args.root.resolve(), args.out.resolve()
    if args.section:
        run_section(args)
    else:
        run_all(args)


def run_all(args) -> None:
    """Every section that is wanted, in its box, and the results of all of them."""
    end = time.time() + args.budget
    shutil.rmtree(find_scratch(args), ignore_errors=True)  # a check that was killed leaves its own
    find_scratch(args).mkdir(parents=True)
    args.out.mkdir(parents=True, exist_ok=True)
    only = [name for name in args.only.split(",") if name]

    def choose(*names: str) -> list[str]:
        return [name for name in names if not only or name in only]

    try:
        run_together(args, choose("env"), 40, end)
        # weights on disk for the script and JAX; CPU only
        background = [start_section(args, name, end) for name in choose("prepare")]
        run_together(args, choose(*TOGETHER), 130, end)
        for name, box in ALONE:
            if choose(name) and end - time.time() > 12:
                run_together(args, [name], box, end)
        for one in background:
            stop_section(one)
    finally:
        gather_results(args)
        shutil.rmtree(find_scratch(args), ignore_errors=True)


def find_scratch(args) -> Path:
    """The check's working folder, in memory's file system where there is one."""
    shared = Path("/dev/shm")
    there = shared.is_dir() and os.access(shared, os.W_OK)
    place = shared if there else Path(tempfile.gettempdir())
    return place / f"limner-gpu-check-{zlib.crc32(str(args.out).encode()):08x}"


def start_section(args, name: str, deadline: float):
    """A section in a process, and a process group, of its own."""
    scratch = find_scratch(args)
    command = [sys.executable, str(HERE), "--root", str(args.root), "--out", str(args.out)]
    command += ["--device", args.device, "--section", name, "--deadline", str(deadline)]
    command += ["--stretch", str(args.stretch), *(["--tiny"] if args.tiny else [])]
    command += ["--script", str(args.script.resolve())] if args.script else []
    paths = [str(args.root / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "LIMNER_CACHE": str(scratch / "cache"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }
    with open(args.out / f"log-{name}.txt", "w") as log:
        return launch(command, log, environment, start_new_session=True), name


def launch(command: list[str], log, environment, **more) -> subprocess.Popen:
    """A process that writes what it says into a file."""
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, **more)


def stop_section(one) -> None:
    process, _ = one
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it has left running


def run_together(args, names: list[str], box: float, end: float) -> None:
    """Sections side by side, for as many seconds as their box has."""
    box = min(box * args.stretch, end - time.time() - 4)
    if not names or box <= 5:
        return
    began, deadline = time.time(), time.time() + box
    running = [start_section(args, name, deadline - 3) for name in names]
    while any(process.poll() is None for process, _ in running) and time.time() < deadline:
        time.sleep(0.25)
    for process, name in running:
        late = process.poll() is None
        stop_section((process, name))
        seconds = time.time() - began
        row = {"section": name, "case": "end", "seconds": round(seconds, 1)}
        row |= {"timed_out": late, "exit": process.returncode}
        with open(args.out / "found.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{seconds:6.1f} s] {name}: {tell_end(row)}", flush=True)


def tell_end(row: dict) -> str:
    return "OUT OF TIME" if row["timed_out"] else f"exit {row['exit']}"


def gather_results(args) -> None:
    """One file of rows, one of logs and a table, in place of what the sections have written."""
    rows = []
    for path in sorted(args.out.glob("found*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    (args.out / "results.json").write_text(json.dumps(rows, indent=0))
    logs = []
    for path in sorted(args.out.glob("log-*.txt")):
        logs.append(f"===== {path.name}\n{path.read_text(errors='replace')[-60_000:]}")
    (args.out / "logs.txt").write_text("\n".join(logs))
    for path in [*args.out.glob("log-*.txt"), *args.out.glob("found*.jsonl")]:
        path.unlink()
    text = format_table(rows)
    (args.out / "table.txt").write_text(text)
    print(text)


def format_table(rows: list[dict]) -> str:
    out = []
    for row in rows:
        if row.get("case") != "end":
            out.append(format_row(row))
        elif row["timed_out"] or row["exit"]:
            seconds = row["seconds"]
            out.append(f"{row['section']}: {tell_end(row)} after {seconds} s (see logs.txt)")
    return "\n".join(out) + "\n"


def format_row(row: dict) -> str:
    head = f"{row['section']:7} {row['case']:44}"
    if "error" in row:
        return f"{head} ERROR {row['error'][:150]}"
    if "ms" not in row:
        left_out = ("section", "case", "detail")
        return f"{head} {json.dumps({k: v for k, v in row.items() if k not in left_out})[:190]}"
    parts = [f"{row['ms']:8.2f} ms"]
    parts += [f"{row['img_s']:7.1f} img/s"] if "img_s" in row else []
    labels = {"host_ms": "host", "mfu": "MFU", "gib": "GiB", "kernels": "kernels"}
    parts += [f"{label} {row[key]}" for key, label in labels.items() if row.get(key) is not None]
    return f"{head} {'  '.join(parts)}"


# ------------------------------------------------------- inside a section

ARGS: argparse.Namespace
SMALL = False  # the syncs section takes tiny networks on every device


def say(case: str, **found) -> None:
    """A row of the results, on disk at once."""
    row = json.dumps({"section": ARGS.section, "case": case, **found}, default=str)
    with open(ARGS.out / f"found-{ARGS.section}.jsonl", "a") as file:
        file.write(row + "\n")
    print(row[:400], flush=True)


@contextlib.contextmanager
def guard(case: str, needs: float = 5.0):
    """A case that may fail without taking the others along; skipped where time is too short."""
    if count_seconds() < needs:
        say(case, error=f"skipped: {count_seconds():.0f} s left")
        yield False
        return
    try:
        yield True
    except Exception as error:
        traceback.print_exc()
        first = str(error).splitlines()[0] if str(error) else ""
        detail = traceback.format_exc()[-3000:]
        say(case, error=f"{type(error).__name__}: {first}", detail=detail)
    finally:
        free_memory()


def count_seconds() -> float:
    """Seconds that this section has left."""
    return ARGS.deadline - time.time()


def free_memory() -> None:
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        import gc

        gc.collect()
        sys.modules["torch"].cuda.empty_cache()


def run_section(args) -> None:
    global ARGS
    ARGS = args
    sections = {
        "env": check_environment,
        "prepare": prepare_weights,
        "runs": check_runs,
        "syncs": check_syncs,
        "big": check_big,
        "tests": run_tests,
        "sd": measure_sd,
        "script": measure_script,
        "sdxl": measure_sdxl,
        "jaxruns": check_jax_runs,
        "jax": measure_jax,
        "repeat": measure_repeatable,
        "compile": measure_compiled,
    }
    sections[args.section]()


def is_cuda() -> bool:
    return ARGS.device == "cuda"


def format_mfu(tflop: float, milliseconds: float) -> str:
    return f"{tflop / milliseconds / PEAK * 1000:.1%}"


def check_environment() -> None:
    """Versions, imports, precisions; on a GPU its rates for products and copies too."""
    import torch

    say_versions()
    imports = [
        "limner.training.loop",
        "limner.engines.torch.engine",
        "diffusers",
        "datasets",
        "pyvips",
    ]
    for name in (*imports, "simplejpeg", "imagehash", "peft", "torchvision.transforms"):
        began = time.time()
        with guard(f"import {name}", 0):
            __import__(name)
            say(f"import {name}", seconds=round(time.time() - began, 2))
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    say("tf32 as torch starts", cudnn=flags[0], matmul=flags[1])
    from limner.engines.torch.processes import TorchProcessGroup

    for precision in ("no", "bf16", "fp16"):
        with guard(f"World {precision}", 0):
            world = TorchProcessGroup(ARGS.device, precision)
            say(f"World {precision}", device=str(world.device))
            world.close()
    if is_cuda():
        measure_device()


def say_versions() -> None:
    import importlib.metadata

    names = ["torch", "triton", "diffusers", "transformers", "accelerate", "peft", "numpy", "jax"]
    names += ["jaxlib", "bitsandbytes", "pyvips", "simplejpeg", "datasets", "ImageHash"]
    versions: dict[str, str | None] = {}
    for name in (*names, "safetensors", "huggingface_hub"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    say("versions", python=sys.version.split()[0], **versions)


def measure_device() -> None:
    """What the card itself does: large products, copies in its memory and from the host's."""
    import torch

    say(
        "device",
        name=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        memory_gib=round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        cudnn=torch.backends.cudnn.version(),
        cores=os.cpu_count(),
    )
    n = 8192
    kinds = {
        "bf16": (torch.bfloat16, False),
        "fp32": (torch.float32, False),
        "tf32": (torch.float32, True),
    }
    for name, (dtype, tf32) in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        ms = statistics.median(time_calls(lambda x=x, y=y: x @ y, 3, 10))
        say(f"matmul {name}", tflops=round(2 * n**3 / ms / 1e9, 1))
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    ms = statistics.median(time_calls(lambda: target.copy_(source), 2, 8))
    say("copy", tb_s=round(2 * source.numel() * 4 / ms / 1e9, 2))
    host = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    device = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    ms = statistics.median(time_calls(lambda: device.copy_(host, non_blocking=True), 1, 4))
    say("pinned to device", gb_s=round((1 << 28) / ms / 1e6, 1))


def time_calls(run, warm: int, count: int) -> list[float]:
    """Milliseconds of each call, on the device's clock."""
    import torch

    for _ in range(warm):
        run()
    if not torch.cuda.is_available() or not is_cuda():
        out = []
        for _ in range(count):
            began = time.perf_counter()
            run()
            out.append(1000 * (time.perf_counter() - began))
        return out
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [one.elapsed_time(two) for one, two in itertools.pairwise(marks)]


# ------------------------------------------------------- right: the bundled model, by commands


def build_command(run: Path, device: str, *more: str) -> list[str]:
    """``limner train`` of the bundled recipe into the folder ``run``."""
    bundled = ARGS.root.joinpath(*BUNDLED)
    steps = 8 if ARGS.tiny else 100
    words = {
        "run": run,
        "model.base": bundled / "model",
        "data.folder": bundled / "pictures",
        "data.cache": find_scratch(ARGS) / f"cache-{run.name}",
    }
    fixed = [f"{key}={json.dumps(str(value))}" for key, value in words.items()]
    fixed += [f"train.steps={steps}", "train.batch_size=16", f"log.every={max(1, steps // 20)}"]
    fixed += [f"validation.every={steps}", f"checkpoint.every={steps}", "checkpoint.keep=9"]
    fixed += [f"engine.device={json.dumps(device)}", 'engine.attention="sdpa"']
    recipe = str(bundled / "demo.toml")
    return [sys.executable, "-m", "limner", "train", recipe, *fixed, *more]


LORA = ['adapter.kind="lora"', "optim.learning_rate=2e-3"]


def list_jobs(every: int) -> dict[str, tuple[str, list[str]]]:
    """Device and settings of each run, by its name."""
    device, bf16, fp16 = ARGS.device, ['engine.precision="bf16"'], ['engine.precision="fp16"']
    repeat, saving = ["engine.deterministic=true"], [f"checkpoint.every={every}"]
    jobs = {
        "cpu": ("cpu", []),
        "cpu-lora": ("cpu", LORA),
        "no-full": (device, []),
        "bf16-full": (device, bf16),
        "fp16-full": (device, fp16),
        "no-lora": (device, LORA),
        "tf32-full": (device, ["engine.tf32=true"]),
        "no-full-repeat": (device, repeat),
        "no-full-repeat-killed": (device, repeat + saving),
        "bf16-full-repeat": (device, bf16 + repeat),
        "bf16-full-repeat-killed": (device, bf16 + repeat + saving),
    }
    if ARGS.tiny:
        jobs = {name: jobs[name] for name in ("no-full-repeat", "no-full-repeat-killed")}
    return jobs


def check_runs() -> None:
    """Recipes at once, repeats, and two that are killed and go on; then they are compared."""
    place = find_scratch(ARGS) / "runs"
    place.mkdir(exist_ok=True)
    every = 2 if ARGS.tiny else 20
    jobs = list_jobs(every)
    train_jobs(jobs, place, every)
    for name in jobs:
        with guard(f"compare {name}", 0):
            compare_run(place, name)


def launch_job(name: str, job: tuple[str, list[str]], place: Path) -> subprocess.Popen:
    device, more = job
    threads = "4" if device == "cpu" and not ARGS.tiny else "1"
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    with open(place / f"{name}.log", "a") as log:
        return launch(build_command(place / name, device, *more), log, environment)


def train_jobs(jobs: dict[str, tuple[str, list[str]]], place: Path, every: int) -> None:
    """Run them side by side; those named killed are, after two checkpoints, and started again."""
    began = time.time()
    live = {name: launch_job(name, job, place) for name, job in jobs.items()}
    killed: dict[str, int] = {}
    while count_seconds() > 6 and any(process.poll() is None for process in live.values()):
        for name in [name for name in jobs if name.endswith("-killed") and name not in killed]:
            found = [int(p.name.split("-")[1]) for p in (place / name).glob("checkpoint-*")]
            if found and max(found) >= 2 * every:
                live[name].kill()  # SIGKILL; it has no children
                live[name].wait()
                killed[name] = max(found)
                live[name] = launch_job(name, jobs[name], place)
        time.sleep(0.05)
    for name, process in live.items():
        if process.poll() is None:
            process.kill()
        code, wall = process.wait(), round(time.time() - began, 1)
        tail = {"tail": (place / f"{name}.log").read_text(errors="replace")[-600:]} if code else {}
        say(f"run {name}", exit=code, killed_at=killed.get(name), wall=wall, **tail)


def read_metrics(run: Path, key: str) -> dict[int, float]:
    """What a run has logged under a name, by step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def read_held_out(run: Path) -> float:
    return list(read_metrics(run, "held_out_loss").values())[-1]


def read_weights(run: Path) -> dict:
    """The arrays of a run's last checkpoint."""
    from safetensors.numpy import load_file

    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    names = ("unet/*.safetensors", "pytorch_lora_weights.safetensors")
    files = [file for name in names for file in last.glob(name)]
    return {key: array for file in files for key, array in load_file(file).items()}


def compare_run(place: Path, name: str) -> None:
    """A run beside the one that it should equal, or beside the CPU's."""
    import numpy as np

    like = name.removesuffix("-again").removesuffix("-killed")
    if like == name:
        like = "cpu-lora" if "lora" in name else "cpu"
    if name == like or not (place / like).exists():
        return
    cut = [run for run in (name, like) if not (place / run / "result.json").exists()]
    if cut:
        say(f"compare {name}", error=f"not finished: {', '.join(cut)}")
        return
    one, other = (read_metrics(place / run, "loss") for run in (name, like))
    shared = sorted(one.keys() & other.keys())
    far = max(abs(one[step] - other[step]) / other[step] for step in shared)
    found = {
        "with": like,
        "points": len(shared),
        "largest_relative_difference_of_loss": float(f"{far:.3g}"),
        "held_out": tuple(round(read_held_out(place / run), 5) for run in (name, like)),
    }
    new, old = read_weights(place / name), read_weights(place / like)
    if new.keys() == old.keys():
        found["same_bits"] = all(np.array_equal(new[key], old[key]) for key in new)
        moved = sum(float(np.square(new[key].astype("f8") - old[key]).sum()) for key in new)
        whole = sum(float(np.square(old[key].astype("f8")).sum()) for key in old)
        found["relative_distance_of_weights"] = float(f"{math.sqrt(moved) / math.sqrt(whole):.3g}")
    say(f"compare {name}", **found)


def run_tests() -> None:
    """The project's tests of what holds on a GPU."""
    files = ["tests/test_schedule.py"] if ARGS.tiny else ["--cuda", "tests/test_cuda.py"]
    report, log = find_scratch(ARGS) / "tests.xml", ARGS.out / "log-pytest.txt"
    limit = max(10, int(count_seconds() - 8))
    command = [sys.executable, "-m", "pytest", *files, f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", "-W", "default", "--maxfail=40"]
    command += ["-o", "junit_logging=no"]
    with contextlib.suppress(Exception):
        import xdist  # noqa: F401

        command += ["-n", "1" if ARGS.tiny else "4"]
    try:
        with open(log, "w") as file:
            subprocess.run(
                command,
                cwd=ARGS.root,
                timeout=limit,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
    except subprocess.TimeoutExpired:
        say("pytest", error=f"not done in {limit} s", tail=log.read_text()[-800:])
        return
    say_report(report)


def say_report(report: Path) -> None:
    """How many tests there were, and the first messages of those that failed."""
    import xml.etree.ElementTree

    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    bad = []
    for case in suite.iter("testcase"):
        problems = [case.find(kind) for kind in ("failure", "error")]
        for problem in [one for one in problems if one is not None][:1]:
            bad.append((case.get("name"), problem.get("message", "")[:160]))
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors")}
    say("pytest", **counts, bad=bad[:25])


# ------------------------------------------------------- engines on random weights of full size

TINY_SD = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}


def get_configs(family: str):
    """The published configs of a family, or tiny ones."""
    from limner.families.published import load_published

    configs = load_published(family)
    if ARGS.tiny or SMALL:
        configs["unet"].update(TINY_SD)
        if family == "sdxl":
            heads = {"attention_head_dim": [4, 8], "transformer_layers_per_block": [1, 2]}
            configs["unet"].update(heads)
    return configs


def get_size(family: str) -> int:
    """Pixels of a side."""
    return 32 if ARGS.tiny else {"sd": 512, "sdxl": 1024}[family]


def load_random(base, name: str):
    """Random weights made on the device itself, in place of a file."""
    import torch

    from limner.engines.torch.weights import build_from_config

    net = build_from_config(base.configs[name]).to_empty(device=ARGS.device)
    with torch.no_grad():
        for key, p in net.named_parameters():
            if p.dim() == 1:
                p.fill_(float(key.endswith(".weight")))
            else:
                p.uniform_(-1, 1).mul_(1 / math.sqrt(math.prod(p.shape[1:])))
    return net


class Bench:
    """One engine and its state; the batch size can be changed."""

    def __init__(
        self,
        family: str,
        kind: str,
        precision: str = "bf16",
        ema: float | None = 0.9999,
        **sections,
    ):
        from limner.base_model.base import BaseModel
        from limner.config import toml
        from limner.config.schema import Config
        from limner.engines.torch import initial_state
        from limner.engines.torch.engine import TorchEngine
        from limner.engines.torch.processes import TorchProcessGroup
        from limner.families import FAMILIES

        initial_state.load_component = load_random
        raw = {
            "model": {"base": "random", "family": family},
            "train": {"steps": 10, "batch_size": 1},
            "adapter": {"kind": kind},
            "data": {"size": get_size(family)},
            "optim": {"ema": ema},
            "engine": {"precision": precision, "device": ARGS.device},
        }
        for name, more in sections.items():
            raw[name] = {**raw.get(name, {}), **more}
        self.cfg = toml.build(Config, raw)
        self.family, self.kind, self.configs = FAMILIES[family], kind, get_configs(family)
        trained = self.family.network.component
        self.base = BaseModel(Path("/nowhere"), {}, trained, "random", None, None, self.configs)
        self.world = TorchProcessGroup(ARGS.device, precision)
        self.engine = TorchEngine(self.cfg, self.base, self.family, self.world, 1, print)
        self.state = self.engine.init_state(0)
        self.count = 0

    def make_batch(self, rows: int):
        from limner.commands import bench

        return bench.make_batch(self.cfg, self.configs, self.family, rows)

    def make_step(self, rows: int):
        """A function that trains one step on a batch of so many rows, always the same."""
        batch = self.make_batch(rows)
        self.engine.micro_batch_size = rows

        def step():
            self.state, self.seen = self.engine.step(
                self.state,
                batch,
                step=self.count,
                learning_rate=1e-6,
                ema=None if self.state.ema is None else 0.999,
                seed=0,
            )
            self.count += 1

        return step

    def measure(self, case: str, rows: int, run=None, count: int = 10, profile: bool = False):
        """A row: time on the device's clock and on the host's, MFU, memory, loss, kernels."""
        with guard(case) as able:
            if not able:
                return
            import torch

            if is_cuda():
                torch.cuda.reset_peak_memory_stats()
            run = run or self.make_step(rows)
            times = sorted(time_calls(run, *((1, 2) if ARGS.tiny else (3, count))))
            ms = statistics.median(times)
            found = {
                "ms": round(ms, 3),
                "p10": round(times[len(times) // 10], 3),
                "p90": round(times[-1 - len(times) // 10], 3),
                "img_s": round(1000 * rows / ms, 2),
                "host_ms": round(time_host(run), 1),
            }
            tflop = TFLOP.get((self.family.name, self.kind))
            found["mfu"] = format_mfu(tflop * rows, ms) if tflop else None
            if is_cuda():
                found["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
            loss = getattr(self, "seen", {}).get("loss")
            found["loss"] = None if loss is None else float(loss)
            if profile and count_seconds() > 15:
                found |= profile_step(run)
            say(case, rows=rows, **found)


def time_host(run) -> float:
    """Milliseconds that the host needs for a step, with nothing queued before it."""
    import torch

    times = []
    for _ in range(2 if ARGS.tiny else 3):
        if is_cuda():
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


KERNELS = {  # words in the names of kernels; the first kind that fits
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "adam": ("adam", "multi_tensor"),
    "norm": ("norm", "rowwise", "moments"),
    "conv": ("conv", "xmma", "wgrad", "dgrad", "implicit", "cudnn::", "nchw", "nhwc"),
    "gemm": ("gemm", "cutlass", "nvjet", "sm90_"),
    "copy": ("memcpy", "memset", "copy"),
}


def profile_step(run) -> dict:
    """Kernels of one step, by kind: how many, and for how long the device is busy with them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not is_cuda():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    sums: dict[str, list[float]] = {}
    top: dict[str, list[float]] = {}
    for event in seen.events():
        if str(event.device_type).endswith("CUDA"):
            name = event.name.lower()
            fitting = (kind for kind, words in KERNELS.items() if any(w in name for w in words))
            for group, key in ((sums, next(fitting, "elementwise")), (top, event.name[:90])):
                group.setdefault(key, [0, 0.0])
                group[key][0] += 1
                group[key][1] += event.time_range.elapsed_us() / 1000
    return {
        "kernels": sum(int(n) for n, _ in sums.values()),
        "busy_ms": round(sum(ms for _, ms in sums.values()), 2),
        "by_kind": sort_kernels(sums),
        "top": sort_kernels(top, 14),
    }


def sort_kernels(group: dict[str, list[float]], most: int | None = None) -> dict:
    """The longest first."""
    ordered = sorted(group.items(), key=lambda item: -item[1][1])[:most]
    return {name: (int(n), round(ms, 2)) for name, (n, ms) in ordered}


def check_syncs() -> None:
    """A step may not wait for the device: torch raises where it would. The line is told."""
    global SMALL
    SMALL = True
    on = {"precision": "bf16", "device": ARGS.device}
    cases: list[tuple[str, str, str, dict]] = [
        ("full no", "full", "no", {}),
        ("full bf16", "full", "bf16", {}),
        ("full fp16", "full", "fp16", {}),
        ("lora bf16", "lora", "bf16", {}),
        ("lora fp16", "lora", "fp16", {}),
    ]
    more = {
        "full bf16 checkpointing": {"engine": {"gradient_checkpointing": True, **on}},
        "full bf16 dream": {"objective": {"dream": 1.0}},
        "lora bf16 dropout": {"adapter": {"kind": "lora", "dropout": 0.1}},
        "full bf16 ema_offload": {"optim": {"ema": 0.999, "ema_offload": True}},
        "full bf16 adamw8bit": {"optim": {"kind": "adamw8bit", "ema": None}},
    }
    cases += [(name, name.split()[0], "bf16", sections) for name, sections in more.items()]
    for name, kind, precision, sections in cases:
        with guard(f"syncs {name}", 3) as able:
            if able:
                check_waiting(name, Bench("sd", kind, precision, **sections))


def check_waiting(name: str, b: Bench) -> None:
    """Three steps, and two in which torch raises an error where the host would wait."""
    import torch

    step = b.make_step(2)
    for _ in range(3):
        step()
    if is_cuda():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    where = None
    try:
        for _ in range(2):
            step()
    except RuntimeError as error:
        calls = traceback.extract_tb(error.__traceback__)
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in calls]
        where = {"error_text": str(error)[:120], "frames": frames[-6:]}
    finally:
        if is_cuda():
            torch.cuda.set_sync_debug_mode("default")
    row = b.engine.fetch_metrics(b.state, [b.seen])
    learning = [p for p in b.state.net.parameters() if p.requires_grad]
    moved = sum(int(p.grad is not None and float(p.grad.abs().sum()) > 0) for p in learning)
    loss = round(row[0]["loss"], 4)
    say(f"syncs {name}", waits=where, learning=f"{moved} of {len(learning)}", loss=loss)
    b.world.close()


def check_big() -> None:
    """Optimizers on one flat buffer of over 2**31 numbers, as the UNet of SDXL makes it."""
    n = 3_000_064 if not is_cuda() else 2_567_500_032
    with guard("fused AdamW on a flat buffer of SDXL's size", 8) as able:
        if able:
            check_fused(n)
    with guard("AdamW8bit on a flat buffer of SDXL's size", 8) as able:
        if able and is_cuda():
            check_eight_bit(n)


def check_fused(n: int) -> None:
    """The first step of AdamW moves each number by the learning rate, against its gradient."""
    import torch

    from limner.engines.torch.optimizer import compute_norm

    device = ARGS.device
    draws = torch.Generator(device).manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(n, device=device))
    p.grad = torch.empty(n, device=device)
    for piece in p.grad.split(1 << 26):
        piece.uniform_(-1, 1, generator=draws)
    middles = (2**30, 2**31) if is_cuda() else ()
    spots = [slice(0, 1024), *(slice(at - 512, at + 512) for at in middles), slice(n - 1024, n)]
    kept = [p.grad[spot].double().cpu() for spot in spots]
    norm = float(compute_norm(p.grad))
    optimizer = torch.optim.AdamW([p], lr=1e-3, fused=True, weight_decay=0.0)
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)
    # The gradient is divided in place: a second step would be another one.
    optimizer.step()
    off = []
    for spot, gradient in zip(spots, kept, strict=True):
        want = -1e-3 * gradient.sign()
        off.append(float((p.detach()[spot].double().cpu() - want).abs().max()))
    times = time_calls(optimizer.step, 0, 1 if not is_cuda() else 3)
    say(
        "fused AdamW on a flat buffer of SDXL's size",
        ok=max(off) < 5e-5,
        largest_error=max(off),
        norm_error=abs(norm / math.sqrt(n / 3) - 1),
        ms=round(min(times), 2),
        tb_s=round(32 * n / min(times) / 1e9, 2),
    )


def check_eight_bit(n: int) -> None:
    """Whether a step of the 8-bit AdamW moves the first, the middle and the last numbers."""
    import torch

    from limner.config.schema import OptimizerSettings
    from limner.engines.torch.optimizer import make_optimizer

    settings = OptimizerSettings(kind="adamw8bit", learning_rate=1e-3, weight_decay=0.0)
    for label, count in (("1 billion", 1 << 30), ("SDXL's size", n)):
        p = torch.nn.Parameter(torch.zeros(count, device="cuda"))
        p.grad = torch.ones(count, device="cuda")
        optimizer = make_optimizer(settings, p)
        optimizer.step()
        torch.cuda.synchronize()
        starts = (0, count // 2, count - 1024)
        moved = [int((p.detach()[at : at + 1024] != 0).sum()) for at in starts]
        say(f"AdamW8bit on {label}", ok=all(m == 1024 for m in moved), moved_of_1024=moved)
        del p, optimizer
        free_memory()


# ------------------------------------------------------- levers


def store_channels_last(state) -> None:
    """The same flat buffer, kernels stored channels last: a dense view with other strides."""
    import torch

    named = dict(state.net.named_parameters())
    for name, (first, shape) in state.parameters.spans.items():
        if len(shape) == 4:
            o, i, h, w = shape
            for flat, put in (
                (state.parameters.flat.data, "data"),
                (state.parameters.flat.grad, "grad"),
            ):
                piece = flat[first : first + shape.numel()]
                kept = piece.view(shape).clone()
                view = piece.view(o, h, w, i).permute(0, 3, 1, 2)
                view.copy_(kept)
                setattr(named[name], put, view)
    for p in state.net.parameters():
        if p.dim() == 4 and not p.requires_grad:
            p.data = p.data.to(memory_format=torch.channels_last)


def make_adam():
    """AdamW, the moving average and the bfloat16 copy in one pass over memory, in Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(
        p,
        half,
        g,
        m,
        v,
        e,
        shrink,
        good,
        rate,
        b1,
        b2,
        eps,
        decay,
        bias1,
        bias2,
        average,
        n,
        HAS_EMA: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = at < n
        if tl.load(good) != 0:
            grad = tl.load(g + at, mask=there, other=0.0).to(tl.float32) / tl.load(shrink)
            weight = tl.load(p + at, mask=there, other=0.0)
            first = tl.load(m + at, mask=there, other=0.0)
            second = tl.load(v + at, mask=there, other=0.0)
            weight -= rate * decay * weight
            first = b1 * first + (1 - b1) * grad
            second = b2 * second + (1 - b2) * grad * grad
            weight -= rate / bias1 * first / (tl.sqrt(second) / bias2 + eps)
            tl.store(p + at, weight, mask=there)
            tl.store(m + at, first, mask=there)
            tl.store(v + at, second, mask=there)
            tl.store(half + at, weight.to(half.dtype.element_ty), mask=there)
            if HAS_EMA:
                mean = tl.load(e + at, mask=there, other=0.0)
                tl.store(e + at, mean + average * (weight - mean), mask=there)

    def step(p, half, g, m, v, e, shrink, good, count):
        n, block = p.numel(), 2048
        rate, b1, b2, eps, decay, average = 1e-6, 0.9, 0.999, 1e-8, 1e-2, 1e-3
        bias1, bias2 = 1 - b1**count, math.sqrt(1 - b2**count)
        buffers = (p, half, g, m, v, e if e is not None else p, shrink, good)
        numbers = (rate, b1, b2, eps, decay, bias1, bias2, average, n)
        grid = (triton.cdiv(n, block),)
        kernel[grid](*buffers, *numbers, HAS_EMA=e is not None, BLOCK=block)

    return step


class Lean:
    """A step that moves fewer bytes and starts fewer kernels than autocast's.

    Float32 masters, a bfloat16 copy that the optimizer writes, bfloat16 gradients in one buffer,
    no autocast; clipping, AdamW and the average in one pass.
    """

    def __init__(self, b: Bench, rows: int, last: bool = False):
        import torch

        self.b, arena = b, b.state.parameters
        self.master = arena.flat.data
        self.m, self.v = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.half = self.master.to(torch.bfloat16)
        arena.flat.grad = None
        self.grad = torch.zeros_like(self.half)
        named = dict(b.state.net.named_parameters())
        for name, (first, shape) in arena.spans.items():
            part = slice(first, first + shape.numel())
            data, grad = self.half[part], self.grad[part]
            if last and len(shape) == 4:
                o, i, h, w = shape
                data, grad = (x.view(o, h, w, i).permute(0, 3, 1, 2) for x in (data, grad))
                data.copy_(self.master[part].view(shape))
            else:
                data, grad = data.view(shape), grad.view(shape)
            named[name].grad = None
            named[name].data = data
            named[name].grad = grad
        if last:  # masters in the same order
            self.master.copy_(self.half)
        able = is_cuda() or os.environ.get("TRITON_INTERPRET")
        self.step = make_adam() if able else lambda *_: None
        self.rows = b.engine.to_device(b.make_batch(rows))
        for name in ("context", "pooled"):
            if name in self.rows and self.rows[name].dtype == torch.float32:
                self.rows[name] = self.rows[name].bfloat16()

    def compute_loss(self):
        rows = self.rows
        a, s, p, q = (rows[name].view(-1, 1, 1, 1) for name in NOISE_LEVELS)
        x = (a * rows["x0"] + s * rows["noise"]).bfloat16()
        said = self.b.state.net(**self.b.family.network.enter(x, rows["timestep"], rows))[0]
        return (said.float() - (p * rows["x0"] + q * rows["noise"])).square().mean()

    def __call__(self):
        import torch

        self.grad.zero_()
        loss = self.compute_loss()
        loss.backward()
        loss = loss.detach()
        blocks = torch.linalg.vector_norm(self.grad.view(-1, 256), dim=1, dtype=torch.float32)
        norm = blocks.square().sum().sqrt()
        good = (torch.isfinite(norm) & torch.isfinite(loss)).int()
        shrink = torch.clamp(norm + 1e-6, min=1.0)
        buffers = (self.master, self.half, self.grad, self.m, self.v, self.b.state.ema)
        self.step(*buffers, shrink, good, 10)
        self.b.seen = {"loss": loss}


def capture_graph(run):
    """One call as a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def choose_backend(name: str, run):
    """The same call with one of torch's kernels for attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    alone = name == "EFFICIENT_ATTENTION"
    chosen = [getattr(SDPBackend, name), *([] if alone else [SDPBackend.MATH])]

    def run_chosen():
        with sdpa_kernel(chosen, set_priority=not alone):
            run()

    return run_chosen


def switch_casts_off(net) -> None:
    """peft turns the inputs of its adapters into float32, and autocast turns them back."""
    for module in net.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


@contextlib.contextmanager
def try_convolutions():
    """cuDNN measures its convolutions before it chooses one."""
    import torch

    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = False


def measure_sd() -> None:
    """Steps of Stable Diffusion 1.5 at 512 pixels: as they are, and with what might help them."""
    measure_sd_lora()
    b = Bench("sd", "full")
    measure_sd_full(b)
    b.state.optimizer.state.clear()
    free_memory()
    with guard("lean") as able:
        if able:
            measure_lean(b)
    b.world.close()
    del b
    free_memory()
    with guard("encode") as able:
        if able:
            measure_encoding()


def measure_sd_lora() -> None:
    b = Bench("sd", "lora", ema=None)
    for rows in (1,) if ARGS.tiny else (1, 4, 16):
        b.measure(f"sd lora bs{rows}", rows, profile=rows == 1)
    switch_casts_off(b.state.net)
    for rows in (1,) if ARGS.tiny else (1, 4):
        b.measure(f"sd lora bs{rows}, peft's casts off (same bits)", rows)
    if is_cuda():
        measure_lora_graph(b)
    b.world.close()
    del b
    free_memory()


def measure_lora_graph(b: Bench) -> None:
    import torch

    case = "sd lora bs1, forward and backward as a CUDA graph"
    with guard(case) as able:
        if able:
            rows = b.engine.to_device(b.make_batch(1))

            def run_both():
                b.state.parameters.flat.grad.zero_()
                with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                    b.engine.example_losses(b.state.net, rows).sum().backward()

            b.measure(case, 1, capture_graph(run_both))


def measure_sd_full(b: Bench) -> None:
    for rows in (1,) if ARGS.tiny else (1, 4, 16, 64):
        count = 10 if rows < 64 else 4
        b.measure(f"sd full+ema bs{rows}", rows, profile=rows in (1, 16), count=count)
    many = 2 if ARGS.tiny else 16
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
    for name in names[1:2] if ARGS.tiny else names:
        run = choose_backend(name, b.make_step(many))
        b.measure(f"sd full+ema bs{many}, {name.lower()}", many, run, count=5)
    if is_cuda():
        with try_convolutions():
            b.measure("sd full+ema bs16, cudnn.benchmark", 16, count=6)
    with guard("sd full+ema bs16, channels_last") as able:
        if able:
            store_channels_last(b.state)
            b.measure(f"sd full+ema bs{many}, channels_last", many, count=6)
            if is_cuda():
                case = "sd full+ema bs16, channels_last, cudnn.benchmark"
                with try_convolutions():
                    b.measure(case, 16, count=6, profile=True)


def measure_lean(b: Bench) -> None:
    whole = ((False, 16), (True, 16), (True, 4), (True, 1))
    for last, rows in ((False, 1), (True, 1)) if ARGS.tiny else whole:
        if count_seconds() > 8:
            lean = Lean(b, rows, last)
            order = ", channels_last" if last else ""
            case = f"sd full+ema bs{rows}, lean (bf16 copy, one pass){order}"
            b.measure(case, rows, lean, profile=last and rows == 16)
            if is_cuda() and rows < 16:
                case = f"sd full+ema bs{rows}, lean, whole step as a CUDA graph"
                b.measure(case, rows, capture_graph(lean))
            del lean
            free_memory()


def get_coder_shape() -> dict:
    """Settings of the autoencoder of Stable Diffusion, or of a tiny one."""
    levels = 2 if ARGS.tiny else 4
    return {
        "block_out_channels": (32, 32) if ARGS.tiny else (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 2,
        "latent_channels": 4,
    }


def measure_encoding() -> None:
    """What caching costs: the autoencoder's encoder in float32, as Limner runs it, and in bf16."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**get_coder_shape()).eval().requires_grad_(False).to(ARGS.device)
    for dtype in (torch.float32, torch.bfloat16):
        vae.to(dtype)
        for side, rows in ((64, 2),) if ARGS.tiny else ((512, 8), (1024, 2)):
            case = f"encode {side} {str(dtype)[6:]}"
            with guard(case), torch.no_grad():
                x = torch.rand(rows, 3, side, side, device=ARGS.device, dtype=dtype) * 2 - 1
                count = 2 if ARGS.tiny else 6
                times = time_calls(lambda x=x: vae.encode(x).latent_dist.mean, 2, count)
                ms = statistics.median(times)
                mfu = format_mfu((1.117 if side == 512 else 4.879) * rows, ms)
                say(case, ms=round(ms, 2), img_s=round(1000 * rows / ms, 1), mfu=mfu)


def measure_sdxl() -> None:
    """Steps of Stable Diffusion XL at 1024 pixels."""
    b = Bench("sdxl", "lora", ema=None)
    sizes = (1,) if ARGS.tiny else (1, 4)
    for rows in sizes:
        b.measure(f"sdxl lora bs{rows}", rows, count=6, profile=rows == 1)
    switch_casts_off(b.state.net)
    for rows in sizes:
        b.measure(f"sdxl lora bs{rows}, peft's casts off (same bits)", rows, count=6)
    b.world.close()
    del b
    free_memory()
    with guard("sdxl full") as able:
        if able:
            measure_sdxl_full()


def measure_sdxl_full() -> None:
    began = time.time()
    b = Bench("sdxl", "full")
    say("sdxl full init", seconds=round(time.time() - began, 1))
    for rows in (1,) if ARGS.tiny else (1, 4, 8):
        count = 6 if rows < 8 else 3
        b.measure(f"sdxl full+ema bs{rows}", rows, count=count, profile=rows == 1)
    if count_seconds() > 12:
        b.state.net.enable_gradient_checkpointing()
        b.measure("sdxl full+ema bs1, gradient checkpointing", 1, count=4)
        b.state.net.disable_gradient_checkpointing()
    if count_seconds() > 14:
        b.state.optimizer.state.clear()
        free_memory()
        lean = Lean(b, 1, True)
        b.measure("sdxl full+ema bs1, lean, channels_last", 1, lean, count=6)
        if is_cuda():
            case = "sdxl full+ema bs1, lean, whole step as a CUDA graph"
            b.measure(case, 1, capture_graph(lean), count=6)
    b.world.close()


def measure_repeatable() -> None:
    """What kernels cost that repeat their bits: each step with any kernels and with these."""
    from limner.engines.torch.arithmetic import choose_kernels, prepare_cublas

    prepare_cublas()
    cases = (("sd", "full", 16), ("sd", "lora", 4), ("sdxl", "full", 4), ("sdxl", "lora", 4))
    for family, kind, rows in (("sd", "full", 1),) if ARGS.tiny else cases:
        with guard(f"{family} {kind} bs{rows}") as able:
            if able:
                b = Bench(family, kind, ema=0.9999 if kind == "full" else None)
                for repeatable in (False, True, False, True):
                    choose_kernels(b.world.device, repeatable)
                    label = "repeatable" if repeatable else "any kernels"
                    b.measure(f"{family} {kind} bs{rows}, {label}", rows, count=6)
                b.world.close()
                del b
                free_memory()


def measure_compiled() -> None:
    """Regional compilation as a user would want it: the blocks that repeat."""
    import torch

    torch._dynamo.config.cache_size_limit = 128
    with contextlib.suppress(AttributeError):
        torch._dynamo.config.recompile_limit = 128
    for kind, rows in (("full", 1), ("lora", 1)) if ARGS.tiny else (("full", 16), ("lora", 4)):
        with guard(f"compile {kind}", 20) as able:
            if able:
                measure_compiled_kind(kind, rows)


def measure_compiled_kind(kind: str, rows: int) -> None:
    import torch

    b = Bench("sd", kind, ema=0.9999 if kind == "full" else None)
    names = ("BasicTransformerBlock", "ResnetBlock2D")
    blocks = [module for module in b.state.net.modules() if type(module).__name__ in names]
    for module in blocks:
        module.compile(dynamic=False)
    step = b.make_step(rows)
    began = time.time()
    step()
    if is_cuda():
        torch.cuda.synchronize()
    seconds = round(time.time() - began, 1)
    say(f"compile {kind} bs{rows}: first step", seconds=seconds, blocks=len(blocks))
    b.measure(f"sd {kind} bs{rows}, blocks compiled", rows, step, profile=True)
    b.world.close()


# ------------------------------------------------------- diffusers' script, and JAX

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def prepare_weights() -> None:
    """The base of other sections, or a file that tells them not to wait for it."""
    try:
        write_weights()
    except BaseException:
        (find_scratch(ARGS) / "failed").touch()
        raise


def write_weights() -> None:
    """A Stable Diffusion 1.5 with random weights, and pictures, in memory's file system."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from limner.commands import random_base

    place = find_scratch(ARGS) / "sd15.part"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    bundled = ARGS.root.joinpath(*BUNDLED, "model")
    shutil.copytree(bundled / "tokenizer", place / "tokenizer")
    known = json.loads((bundled / "text_encoder" / "config.json").read_text())
    names = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    torch.set_num_threads(2)
    text = CLIPTextConfig(
        hidden_act="quick_gelu",
        hidden_size=768,
        intermediate_size=128 if ARGS.tiny else 3072,
        num_hidden_layers=1 if ARGS.tiny else 12,
        num_attention_heads=12,
        max_position_embeddings=77,
        projection_dim=768,
        **{name: known[name] for name in names if name in known},
    )
    CLIPTextModel(text).save_pretrained(place / "text_encoder")
    vae = AutoencoderKL(scaling_factor=0.18215, **get_coder_shape())
    vae.save_pretrained(place / "vae")
    configs = get_configs("sd")
    random_base.write_random_component(place / "unet", configs["unet"])
    scheduler = {**configs["scheduler"], "_class_name": "DDPMScheduler"}
    (place / "scheduler").mkdir()
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (place / "model_index.json").write_text(json.dumps(INDEX))
    draw_pictures(find_scratch(ARGS) / "pictures")
    place.rename(find_scratch(ARGS) / "sd15")
    say("prepare", seconds="done")


def draw_pictures(folder: Path) -> None:
    """Blurred noise with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    draws, lines = np.random.default_rng(0), []
    for i in range(8 if ARGS.tiny else 128):
        side = 64 if ARGS.tiny else 640
        pixels = draws.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((side, side))
        picture.save(folder / f"{i}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{i}.jpg", "text": f"a picture of number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def wait_for_weights() -> bool:
    """Whether they are there: until they are, or cannot be made."""
    ready, failed = find_scratch(ARGS) / "sd15", find_scratch(ARGS) / "failed"
    while not ready.exists() and not failed.exists() and count_seconds() > 10:
        time.sleep(0.5)
    return ready.exists()


RUNNER = """
import json, os, runpy, sys, time
import torch
stamps, out, limit = [], sys.argv[1], int(sys.argv[2])
sys.argv = sys.argv[3:]
plain = torch.optim.AdamW.step
cuda = torch.cuda.is_available() and os.environ.get("CHECK_DEVICE") == "cuda"
def step(self, *args, **kwargs):
    made = plain(self, *args, **kwargs)
    if cuda:
        event = torch.cuda.Event(enable_timing=True); event.record(); stamps.append(event)
    else:
        stamps.append(time.perf_counter())
    if len(stamps) == limit:
        gib = None
        if cuda:
            torch.cuda.synchronize()
            gib = torch.cuda.max_memory_allocated() / 2**30
        pairs = zip(stamps, stamps[1:])
        ms = [a.elapsed_time(b) if cuda else 1000 * (b - a) for a, b in pairs]
        json.dump({"ms": ms, "gib": gib}, open(out, "w"))
        os._exit(0)
    return made
torch.optim.AdamW.step = step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure_script() -> None:
    """diffusers' script, unmodified, with its best flags; a step lies between two ends of AdamW's.

    Only the process that runs it is ours: it notes the time of every step, and ends after some.
    """
    if ARGS.script is None or not ARGS.script.exists():
        say("script", error="no --script")
        return
    scratch = find_scratch(ARGS)
    if not wait_for_weights():
        say("script", error="the weights were not ready")
        return
    (scratch / "runner.py").write_text(RUNNER)
    for rows, count in ((2, 4),) if ARGS.tiny else ((16, 22), (1, 40), (4, 30)):
        with guard(f"script bs{rows}", 25) as able:
            if able:
                measure_script_batch(rows, count)


def measure_script_batch(rows: int, count: int) -> None:
    scratch = find_scratch(ARGS)
    out, log = scratch / f"script-{rows}.json", scratch / f"script-{rows}.log"
    words = {
        "pretrained_model_name_or_path": scratch / "sd15",
        "train_data_dir": scratch / "pictures",
        "resolution": get_size("sd"),
        "train_batch_size": rows,
        "max_train_steps": 1000,
        "learning_rate": 1e-6,
        "output_dir": scratch / f"script-out-{rows}",
        "checkpointing_steps": 100000,
        "dataloader_num_workers": 0 if ARGS.tiny else 8,
        "seed": 0,
        "cache_dir": scratch / "datasets",
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    flags += ["--center_crop", "--use_ema", "--foreach_ema"]
    flags += ["--mixed_precision", "bf16", "--allow_tf32"] if is_cuda() else []
    runner = [sys.executable, str(scratch / "runner.py"), str(out), str(count)]
    environment = {"CHECK_DEVICE": ARGS.device, "ACCELERATE_USE_CPU": "0" if is_cuda() else "1"}
    with open(log, "w") as file:
        done = subprocess.run(
            [*runner, str(ARGS.script), *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=max(5, count_seconds() - 4),
            env=os.environ | environment,
        )
    if not out.exists():
        tail = log.read_text(errors="replace")[-500:]
        say(f"script bs{rows}", error=f"exit {done.returncode}: {tail}")
        return
    found = json.loads(out.read_text())
    times = found["ms"]
    ms = statistics.median(times[2:] if len(times) > 4 else times)
    say(
        f"script full+ema bs{rows}",
        rows=rows,
        ms=round(ms, 2),
        img_s=round(1000 * rows / ms, 2),
        gib=found["gib"] and round(found["gib"], 2),
        mfu=format_mfu(TFLOP["sd", "full"] * rows, ms),
    )


def prepare_jax() -> str:
    """Set what JAX reads when it is imported; the name of the device for ``engine.device``."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if is_cuda():
        return "gpu"
    os.environ["JAX_PLATFORMS"] = "cpu"
    return "cpu"


def check_jax_runs() -> None:
    """The bundled model's curves through JAX, beside PyTorch's: the same numbers go into both."""
    device = prepare_jax()
    place = find_scratch(ARGS) / "runs"
    place.mkdir(exist_ok=True)
    repeat = ["engine.deterministic=true"]
    jobs = {"jax-no-full": [], "jax-bf16-lora": [*LORA, 'engine.precision="bf16"']}
    jobs |= {"jax-no-full-repeat": repeat, "jax-no-full-repeat-again": repeat}
    live = {}
    for name, more in jobs.items():
        words = build_command(place / name, ARGS.device, *more)
        words = [word for word in words if not word.startswith("engine.device")]
        words += ['engine.kind="jax"', f'engine.device="{device}"']
        with open(place / f"{name}.log", "w") as log:
            live[name] = launch(words, log, os.environ)
    for name, process in live.items():
        with guard(f"run {name}", 0):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(1, count_seconds() - 6))
            if process.poll() is None:
                process.kill()
            say_jax_run(place, name, process.wait())
    with guard("compare jax-no-full-repeat-again", 0):
        compare_run(place, "jax-no-full-repeat-again")


def say_jax_run(place: Path, name: str, code: int) -> None:
    """A run of JAX's, and how far its losses are from PyTorch's where both were trained alike."""
    metrics = place / name / "metrics.jsonl"
    rows = list(map(json.loads, metrics.read_text().splitlines())) if metrics.exists() else []
    losses = [row["loss"] for row in rows if "loss" in row]
    speeds = [round(row["images_per_second"], 1) for row in rows if "images_per_second" in row]
    like = place / ("no-full-repeat" if ARGS.tiny else "cpu")
    alike = "full" in name and (like / "metrics.jsonl").exists()
    other = list(read_metrics(like, "loss").values()) if alike else []
    pairs = zip(losses, other, strict=False)
    far = max((abs(one - two) / two for one, two in pairs), default=None)
    say(
        f"run {name}",
        exit=code,
        from_torch=far and float(f"{far:.3g}"),
        losses=[round(loss, 5) for loss in losses[:3] + losses[-3:]],
        held_out=[round(row["held_out_loss"], 5) for row in rows if "held_out_loss" in row],
        speed=speeds[-1:],
        tail="" if code == 0 else (place / f"{name}.log").read_text(errors="replace")[-500:],
    )


def measure_jax() -> None:
    """A step of Stable Diffusion 1.5 through JAX."""
    device = prepare_jax()
    if not wait_for_weights():
        say("jax sd", error="the weights were not ready")
        return
    for kind, rows in (("full", 16), ("lora", 4)):
        with guard(f"jax sd {kind} bs{rows}", 15) as able:
            if able:
                measure_jax_kind(kind, rows, device)


def measure_jax_kind(kind: str, rows: int, device: str) -> None:
    from limner.commands import bench
    from limner.config import toml
    from limner.config.schema import Config

    raw = {
        "model": {"base": str(find_scratch(ARGS) / "sd15")},
        "train": {"steps": 10, "batch_size": 2 if ARGS.tiny else rows},
        "adapter": {"kind": kind},
        "data": {"size": get_size("sd")},
        "optim": {"ema": 0.9999 if kind == "full" else None},
        "engine": {"kind": "jax", "precision": "bf16" if is_cuda() else "no", "device": device},
    }
    began = time.time()
    steps = 2 if ARGS.tiny else 8
    found = bench.run_bench(toml.build(Config, raw), steps=steps, report=print)
    ms = 1000 * found["step_seconds"]["median"]
    say(
        f"jax sd {kind} bs{rows}",
        ms=round(ms, 2),
        img_s=round(found["images_per_second"], 1),
        mfu=format_mfu(TFLOP["sd", kind] * rows, ms),
        gib=round(max(found["peak_memory"].values()) / 2**30, 2),
        whole_seconds=round(time.time() - began, 1),
        matmul_tflops=round(found["matmul_tflops"], 1),
    )


if __name__ == "__main__":
    main()
