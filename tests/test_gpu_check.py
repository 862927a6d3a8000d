"""The check that a GPU machine runs, rehearsed on the CPU with tiny networks: `benchmarks/gpu`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Left out: tests (they run beside this one), script (needs a checkout of diffusers and
# torchvision), compile (minutes for a first step on two cores, and a C++ compiler).
SECTIONS = ("env", "runs", "syncs", "big", "jaxruns", "sd", "sdxl", "jax", "repeat")
CANNOT = {  # the only rows that may say error here, and why
    "import torchvision.transforms": "only diffusers' script needs it",
    "syncs full bf16 adamw8bit": "bitsandbytes' optimizers run on CUDA devices only",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the check has found, by section and case."""
    out = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, str(ROOT / "benchmarks/gpu/gpu_check.py"), "--root", str(ROOT)]
    command += ["--out", str(out), "--device", "cpu", "--tiny", "--budget", "3600"]
    command += ["--stretch", "8", "--only", ",".join(("prepare", *SECTIONS))]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "table.txt").read_text() in done.stdout
    found = json.loads((out / "results.json").read_text())
    return {(row["section"], row["case"]): row for row in found}


@pytest.mark.soak
@pytest.mark.parametrize("section", SECTIONS)
def test_the_section_ends_well(rows, section):
    """In time, without an error, and with something found."""
    end = rows[section, "end"]
    assert (end["exit"], end["timed_out"]) == (0, False)
    mine = {case: row for (name, case), row in rows.items() if name == section and case != "end"}
    errors = {case: row["error"] for case, row in mine.items() if "error" in row}
    assert mine
    assert errors.keys() <= CANNOT.keys(), errors


@pytest.mark.soak
def test_a_killed_run_ends_with_the_same_bits(rows):
    """As an undisturbed one; and JAX's curve is PyTorch's."""
    killed = rows["runs", "run no-full-repeat-killed"]
    assert killed["exit"] == 0
    assert 4 <= killed["killed_at"] < 8
    assert rows["runs", "compare no-full-repeat-killed"]["same_bits"] is True
    assert rows["jaxruns", "compare jax-no-full-repeat-again"]["same_bits"] is True
    jax = rows["jaxruns", "run jax-no-full"]
    assert jax["exit"] == rows["jaxruns", "run jax-bf16-lora"]["exit"] == 0
    assert jax["from_torch"] < 1e-5


@pytest.mark.soak
def test_steps_learn_and_times_are_numbers(rows):
    """Every parameter that learns has a gradient; AdamW moves the buffer as it should."""
    learning = {case: row["learning"] for (_, case), row in rows.items() if "learning" in row}
    assert len(learning) == 9
    for case, counts in learning.items():
        moved, _, whole = counts.partition(" of ")
        assert moved == whole, case
    assert rows["big", "fused AdamW on a flat buffer of SDXL's size"]["ok"] is True
    timed = [row for row in rows.values() if "img_s" in row]
    assert len(timed) >= 12
    assert all(row["ms"] > 0 and row["img_s"] > 0 for row in timed)
