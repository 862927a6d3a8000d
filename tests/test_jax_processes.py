"""The JAX engine on several devices and in several processes, without PyTorch."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import worker
from jax_runs import bits, float32_products, opened, settings, trained  # noqa: F401

import limner
from limner import engines
from limner.commands import drawn_model
from limner.config import toml
from limner.config.schema import Config
from limner.data import contact_sheet
from limner.errors import InputError
from limner.families import FAMILIES
from limner.storage import checkpoint

pytestmark = pytest.mark.frameworks

jax = pytest.importorskip("jax")


WORKER = """
import json, sys
for name in ("torch", "diffusers", "transformers", "accelerate", "peft"):
    sys.modules[name] = None  # importing it fails
from pathlib import Path
from limner.config.schema import Config
from limner.config.toml import build
from limner.training import loop
for raw in json.loads(Path(sys.argv[1]).read_text()):
    loop.run_training(build(Config, raw), report=lambda line: None)
"""


def started(folder: Path, jobs: list[Config], **environment: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER)
    (folder / "jobs.json").write_text(json.dumps([toml.to_plain(job) for job in jobs]))
    whole = {
        **os.environ,
        "PYTHONPATH": str(Path(limner.__file__).parent.parent),
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    command = [sys.executable, str(folder / "worker.py"), str(folder / "jobs.json")]
    return subprocess.Popen(
        command, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def done(process: subprocess.Popen[str]) -> None:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said


def rows(run: Path, name: str = "loss") -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found if name in row]


def together(folder: Path, jobs: list[Config]) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    how = {"LIMNER_PROCESSES": "2", "LIMNER_COORDINATOR": f"127.0.0.1:{port}", **worker.devices(2)}
    return [started(folder / f"p{rank}", jobs, LIMNER_RANK=str(rank), **how) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("[::1]:1234", "::1"),
        ("[fe80::1%eth0]:1", "fe80::1%eth0"),
        ("host.example:8", "host.example"),
        ("10.0.0.1:80", "10.0.0.1"),
        ("", "localhost"),
    ],
)
def test_the_host_of_the_first_process_is_as_sockets_take_it(
    address: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limner.engines.jax import processes

    monkeypatch.setenv("LIMNER_COORDINATOR", address)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    assert processes.initialize(processes.read_process_count()) == host


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_eight_devices_two_processes_and_back(again: bool, pictures: Path, tmp_path: Path) -> None:
    """Of a UNet of one level whose middle alone looks at the caption, which compiles sooner.

    One curve on 1 device, on 8 with weights divided over 4 of them, on 2 processes; a run goes from
    1 to 8 to 1, or on with the same bits on as many as before (``again``); none of it with
    PyTorch."""

    def job(
        name: str, engine: dict[str, Any], steps: int = 6, micro: int = 8, **sections: Any
    ) -> Config:
        common = {
            "train": {"steps": steps, "batch_size": 8, "micro_batch_size": micro},
            "checkpoint": {"every": 3},
            "engine": engine,
        }
        return settings(base, pictures, tmp_path / name, "jax", **common, **sections)

    base = tiny.stable_diffusion(tmp_path / "base", channels=(96,), attention=False)
    one = trained(job("one", {}))
    trained(job("moving", {}, 2))
    wide = (
        [
            job("wide", {"fsdp": 4}),
            job("wide again", {"fsdp": 4}, 3),
            job("wide again", {"fsdp": 4}),
        ]
        if again
        else []
    )
    done(started(tmp_path / "eight", [job("moving", {"fsdp": 4}, 4), *wide], **worker.devices(8)))
    trained(job("moving", {}))
    drawn = {"preview": {"prompts": ["a red circle"], "steps": 2}}
    two = [job("two", {"fsdp": 2}, micro=4, **drawn)]
    for process in together(
        tmp_path,
        [*two, *(job("two again", {"fsdp": 2}, steps, micro=4) for steps in (3, 6) if again)],
    ):
        done(process)
    for name in ("moving", "two", *(["wide"] if again else [])):
        assert rows(tmp_path / name) == pytest.approx(one["loss"], rel=1e-6, abs=0), name
        assert rows(tmp_path / name, "held_out_loss")[-1] == pytest.approx(
            one["held_out_loss"][-1], rel=1e-6
        )
    for name in ("wide", "two") if again else ():
        assert bits(tmp_path / name, 6) == bits(tmp_path / f"{name} again", 6), name
    [shown] = (tmp_path / "two" / "previews" / "step-000006").glob("*.png")
    found, _ = drawn_model.find_sources(str(tmp_path / "two"), None)
    pipeline = engines.open_pipeline(
        found, None, "jax", scheduler=None, precision="no", device="cpu"
    )
    [picture] = pipeline.draw(["a red circle"], [3], steps=2, guidance_scale=7.5, size=32)
    assert np.abs(contact_sheet.read_picture(shown).astype(int) - picture).max() <= 1
    state = checkpoint.open_checkpoint(tmp_path / "two" / "checkpoint-6")
    assert state.state.world_size == 2
    file = "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (
        state.arrays(file),
        checkpoint.open_checkpoint(tmp_path / "one" / "checkpoint-6").arrays(file),
    )
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-5


def test_what_one_of_two_processes_finds_is_said_once(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    """A refusal of the first one reaches the second, and nobody waits for ever."""
    pictures = shutil.copytree(pictures, tmp_path / "pictures")
    (pictures / "003.png").write_bytes(b"no picture")
    both = together(
        tmp_path,
        [
            settings(
                base,
                pictures,
                tmp_path / "run",
                "jax",
                train={"steps": 2, "batch_size": 4, "micro_batch_size": 2},
            )
        ],
    )
    said = [process.communicate(timeout=200)[0] for process in both]
    # Where nobody catches the error, too, a process of several ends with its code.
    assert all(process.returncode == InputError.code for process in both)
    assert all("InputError" in text and "003.png" in text for text in said)


def test_rows_that_a_mesh_cannot_divide_are_refused(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    cfg = settings(base, pictures, tmp_path, "jax")
    process = engines.join_processes(cfg.engine)
    process.mesh = SimpleNamespace(size=3)  # type: ignore[attr-defined]
    with pytest.raises(
        InputError,
        match=r"train\.micro_batch_size: a micro-batch of 2 rows \(2 for each of 1 processes\) "
        r"cannot be divided among 3 devices",
    ):
        engines.open_engine(cfg, opened(base, "sd"), FAMILIES["sd"], process, 2, print)


def test_large_arrays_are_divided_and_the_small_ones_lie_together_everywhere(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    from jax.sharding import AbstractMesh

    from limner.engines.jax.layout import SMALL

    cfg = settings(base, pictures, tmp_path, "jax")
    engine = engines.open_engine(
        cfg, opened(base, "sd"), FAMILIES["sd"], engines.join_processes(cfg.engine), 2, print
    )
    engine.mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    shapes = {
        "long": (96, 1024),
        "odd": (8192, 9),
        "none": (255, 1023),
        "little": (32, 64),
        SMALL: (1 << 20,),
    }
    specs = {name: tuple(engine.sharding(name, shape).spec) for name, shape in shapes.items()}
    assert specs == {
        "long": (None, "fsdp"),
        "odd": ("fsdp", None),
        "none": (None, None),
        "little": (None, None),
        SMALL: (None,),
    }
