"""Two real processes agree on everything; a world of another size than was asked for, or a setting
that cannot be honoured, is refused in words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limner import errors
from limner.engines.torch import processes
from limner.engines.torch.processes import PRECISIONS, TorchProcessGroup
from limner.errors import DiskError, InputError, LimnerError, Stopped

pytestmark = pytest.mark.frameworks

LAUNCHED = (
    "ACCELERATE_",
    "MASTER_",
    "TORCHELASTIC_",
    "PMI_",
    "OMPI_",
    "MV2_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "PJRT_",
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")

CHILD = """
import json, sys
from pathlib import Path
import torch
from limner import errors
from limner.engines.torch.processes import TorchProcessGroup

def attempt(action):
    try:
        return ["result", world.first(action)]
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "reported", False)]

def full_disk():
    raise errors.DiskError("disk: no room")

torch.set_num_threads(1)
try:
    world = TorchProcessGroup()
except errors.LimnerError as fault:
    file = Path(sys.argv[1], f"refused-{sys.argv[2] if len(sys.argv) > 2 else 0}.json")
    file.write_text(json.dumps([type(fault).__name__, str(fault), fault.reported]))
    sys.exit(fault.code)
rank = world.rank
sums = world.sum_(torch.tensor([0.1, 1.0, 1e-8]) * (rank + 1))
out = {
    "rank": rank, "world": world.world_size, "device": str(world.device),
    "precision": world.precision,
    "sum": [x.hex() for x in sums.tolist()], "total": world.total([0.1 + rank, 2.0]),
    "any": [world.any(False), world.any(rank == 1), world.any(rank == 0), world.any(True)],
    "said": attempt(lambda: {"from": rank, "text": "grüße", "pair": (1, 2)}),
    "nothing": attempt(lambda: None), "fault": attempt(full_disk),
    "bug": attempt(lambda: 1 // 0), "after": attempt(lambda: "still together"),
}
world.barrier()
world.close()
Path(sys.argv[1], f"rank-{rank}.json").write_text(json.dumps(out))
"""


def clean_environment(**more: str) -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(LAUNCHED) and k not in ("RANK", "WORLD_SIZE", "PYTHONPATH")
    }
    source = Path(processes.__file__).parents[3]
    return {
        **kept,
        "PYTHONPATH": str(source),
        "HF_HOME": "/nonexistent",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def launch(tmp_path: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the child under a launcher; what its processes saw lies in ``tmp_path`` afterwards."""
    (tmp_path / "child.py").write_text(CHILD)
    return subprocess.run(
        [*command, str(tmp_path / "child.py"), str(tmp_path)],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def seen(tmp_path: Path, pattern: str = "rank-*.json") -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted(tmp_path.glob(pattern))]


LAUNCHERS = {
    "torchrun": (*TORCHRUN, "--standalone", "--nproc-per-node", "2"),
    "accelerate": (
        *ACCELERATE,
        "--multi_gpu",
        "--num_processes",
        "2",
        "--mixed_precision",
        "bf16",
        "--main_process_port",
        "0",
    ),
}


@pytest.mark.parametrize("command", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes_agree(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = launch(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    first, second = seen(tmp_path)
    assert (first["rank"], second["rank"]) == (0, 1)
    wanted = (torch.tensor([0.1, 1.0, 1e-8]) + torch.tensor([0.1, 1.0, 1e-8]) * 2).tolist()
    for each in (first, second):
        assert (each["world"], each["device"]) == (2, "cpu")
        assert each["precision"] == ("bf16" if "bf16" in command else "no")
        assert each["sum"] == [x.hex() for x in wanted]
        assert each["total"] == [0.1 + 1.1, 4.0]
        assert each["any"] == [False, True, True, True]
        assert each["said"] == ["result", {"from": 0, "text": "grüße", "pair": [1, 2]}]
        assert each["nothing"] == ["result", None]
        assert each["after"] == ["result", "still together"]
    assert first["fault"] == ["DiskError", "disk: no room", False]
    assert second["fault"] == ["DiskError", "disk: no room", True]
    assert first["bug"][0] == "ZeroDivisionError"
    assert second["bug"] == [
        "LimnerError",
        "the first process failed: ZeroDivisionError: integer division or modulo by zero",
        True,
    ]


def test_two_processes_that_accelerate_makes_one_of_are_refused(tmp_path: Path) -> None:
    done = launch(tmp_path, *ACCELERATE, "--cpu", "--num_processes", "2")
    assert done.returncode != 0 and seen(tmp_path) == []
    [[kind, text, told]] = seen(tmp_path, "refused-*.json")
    assert (kind, told) == ("InputError", False)
    assert text.startswith("The launcher was asked for 2 processes, 1 came up together on cpu.")
    assert (
        "`accelerate launch --multi_gpu --num_processes 2 ...` or `torchrun --nproc-per-node 2 ...`"
        in text
    )


def test_config_file_of_a_machine_without_gpu_gives_one_process(tmp_path: Path) -> None:
    from accelerate.utils import write_basic_config

    write_basic_config(save_location=str(tmp_path / "config.yml"))
    assert json.loads((tmp_path / "config.yml").read_text())["num_processes"] == 1
    done = launch(
        tmp_path,
        *ACCELERATE,
        "--config_file",
        str(tmp_path / "config.yml"),
        "--mixed_precision",
        "fp16",
    )
    assert done.returncode == 0, done.stderr
    [only] = seen(tmp_path)
    assert (only["rank"], only["world"], only["device"], only["precision"]) == (0, 1, "cpu", "fp16")


@pytest.mark.parametrize(
    ("environment", "parent", "count"),
    [
        ({}, "bash", 1),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "torchrun --nproc_per_node 4", 4),
        (
            {
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "ACCELERATE_MIXED_PRECISION": "no",
                "MASTER_PORT": "1",
            },
            "accelerate launch --multi_gpu --num_processes 2",
            2,
        ),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "mpirun -n 3", 3),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch train.py", 1),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "1"},
            "accelerate launch --num-processes=2 train.py",
            2,
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "1"},
            "accelerate launch --num_processes 1 --num_machines 2 train.py",
            2,
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "1"},
            "accelerate launch --config_file two.yml train.py",
            0,
        ),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "1"}, "", 0),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "1"},
            "accelerate launch --num_processes 1 train.py",
            1,
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "1"},
            "accelerate launch --cpu --num_processes 2 train.py",
            2,
        ),
        ({"MASTER_PORT": "1"}, "bash", 1),
    ],
)
def test_what_the_launcher_asked_for(environment: dict[str, str], parent: str, count: int) -> None:
    assert processes.requested_world_size(environment, parent.split(" ")) == count


def test_a_world_of_another_size_is_refused() -> None:
    cpu = torch.device("cpu")
    processes.refuse_other_world_size(2, 2, cpu)
    with pytest.raises(
        InputError,
        match=r"asked for several processes, 1 came up .*--num_processes N .*--num_processes 1",
    ):
        processes.refuse_other_world_size(0, 1, cpu)
    with pytest.raises(
        InputError,
        match=r"asked for 4 processes, 1 came up together on mps.*with engine.device=cpu",
    ):
        processes.refuse_other_world_size(4, 1, torch.device("mps"))


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "True", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "1", "parallelism_config"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend=inductor"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "train.accumulation_steps"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1", "engine.device"),
        ("ACCELERATE_IN_TPU_POD", "1", "TPU and XLA"),
        ("PJRT_DEVICE", "TPU", "TPU and XLA"),
    ],
)
def test_launcher_settings_that_are_not_supported_are_refused(
    name: str, value: str, word: str
) -> None:
    with pytest.raises(InputError, match=word) as caught:
        TorchProcessGroup(environment={name: value, "LOCAL_RANK": "1"})
    assert caught.value.reported, "one process per host says it"


def test_settings_that_are_off_are_let_through() -> None:
    processes.refuse_settings(
        {
            "ACCELERATE_USE_DEEPSPEED": "false",
            "ACCELERATE_USE_FSDP": "False",
            "ACCELERATE_DYNAMO_BACKEND": "NO",
        }
    )
    processes.refuse_settings({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "PJRT_DEVICE": ""})
    processes.refuse_settings({"ACCELERATE_USE_SAGEMAKER": "true"})
    with pytest.raises(InputError, match="SageMaker"):
        processes.refuse_settings(
            {
                "ACCELERATE_USE_SAGEMAKER": "true",
                "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL",
            }
        )


def test_recipe_beats_launcher_in_precision() -> None:
    launcher = {"ACCELERATE_MIXED_PRECISION": "fp16"}
    assert processes.choose_precision("bf16", launcher) == "bf16"
    assert processes.choose_precision("no", launcher) == "no"
    assert processes.choose_precision(None, launcher) == "fp16"
    assert processes.choose_precision(None, {}) == "no"
    with pytest.raises(InputError, match="the launcher's mixed_precision: 'fp8' is not supported"):
        processes.choose_precision(None, {"ACCELERATE_MIXED_PRECISION": "fp8"})


def test_a_precision_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    for precision in PRECISIONS:
        processes.probe_precision(torch.device("cpu"), precision)
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setitem(PRECISIONS, "fp16", "complex64")
    with pytest.raises(InputError, match="fp16 cannot run on cpu"):
        processes.probe_precision(torch.device("cpu"), "fp16")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.choose_device("cpu", {}) == torch.device("cpu")
    with pytest.raises(InputError, match=r"'gpu' cannot be used; torch finds here: .*cpu"):
        processes.choose_device("gpu", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes.choose_device(None, {}) == torch.device("cuda", 0)
    assert processes.choose_device(None, {"ACCELERATE_USE_CPU": "True"}) == torch.device("cpu")
    assert processes.choose_device("cuda", {"ACCELERATE_USE_CPU": "True"}) == torch.device(
        "cuda", 0
    )
    assert processes.choose_device(
        None, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    ) == torch.device("cuda", 1)
    assert processes.choose_device("cuda:1", {}) == torch.device("cuda", 1)
    refused = [
        ("cuda:2", "1", "does not exist"),
        ("cuda:0", "2", "names one device"),
        ("cuda:x", "1", "cannot be used"),
    ]
    for name, local, text in [*refused, (None, "3", "3 processes .* has 2 cuda devices")]:
        with pytest.raises(InputError, match=text):
            processes.choose_device(name, {"LOCAL_WORLD_SIZE": local})


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [k for k in os.environ if k.startswith(LAUNCHED) or k in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    alone = TorchProcessGroup("cpu")
    assert (alone.rank, alone.world_size, alone.device, alone.precision) == (
        0,
        1,
        torch.device("cpu"),
        "no",
    )
    assert alone.first(lambda: (1, 2)) == [1, 2], "the same answer as with several processes"
    assert alone.any(True) and not alone.any(False)
    assert alone.total([1.5]) == [1.5]
    assert alone.sum_(torch.ones(2)).tolist() == [1, 1]
    with pytest.raises(DiskError, match="full") as caught:
        alone.first(lambda: throw(DiskError("full")))
    assert not caught.value.reported
    alone.close()
    again = TorchProcessGroup("cpu", "bf16")
    assert again.precision == "bf16"
    again.close()


def throw(fault: LimnerError) -> None:
    raise fault


def test_a_fault_keeps_its_class_and_exit_code_elsewhere() -> None:
    class Special(Stopped):
        pass

    fault = errors.from_message(errors.to_message(Special("at step 3")))
    assert (type(fault), str(fault), fault.code, fault.reported) == (Stopped, "at step 3", 3, True)
