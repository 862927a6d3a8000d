"""One process of a run, its place among the others and its device: what the launcher asked for, or
a refusal; never two worlds in one folder."""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import is_torch_xla_available

from limner.config.schema import EngineSettings
from limner.errors import InputError, LimnerError, from_message, to_message

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WORLD_SIZE_VARIABLES = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)  # torchrun and accelerate; three MPIs
PATIENCE = timedelta(
    days=7
)  # the first process may encode or download for hours while the others wait
T = TypeVar("T")


class TorchProcessGroup:
    """The processes that were launched together; with one of them every method does the obvious
    thing.

    Args:
        device: ``engine.device`` of the recipe; None: what the launcher says, else the accelerator
            that torch finds, else the CPU.
        precision: ``engine.precision`` of the recipe; None: what the launcher says, else ``no``.

    Raises:
        InputError: for a launcher setting that is not supported, a device or precision that cannot
            run here, or fewer processes than were asked for.
    """

    rank: int
    world_size: int
    device_count: int = 1
    device: torch.device
    precision: str

    def __init__(
        self,
        device: str | None = None,
        precision: str | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        try:
            refuse_settings(environment)
            self.precision = choose_precision(precision, environment)
            self.device = choose_device(device, environment)
            probe_precision(self.device, self.precision)
            state = meet_processes(self.device)
            self.rank, self.world_size = state.process_index, state.num_processes
            refuse_other_world_size(
                requested_world_size(environment, parent_command()), self.world_size, self.device
            )
        except LimnerError as fault:
            fault.reported = environment.get("LOCAL_RANK", "0") != "0"  # one message per host
            self.close()
            raise
        self._host = (
            dist.new_group(backend="gloo", timeout=PATIENCE) if self.world_size > 1 else None
        )

    def first(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the first process; every process gets its (JSON) result, or its
        fault."""
        answer, caught = "", None
        if self.rank == 0:
            try:
                answer = json.dumps({"result": action()})
            except BaseException as error:  # the others wait for an answer, whatever happened here
                answer, caught = json.dumps(to_message(error)), error
        answer = self._from_first(answer)
        if caught is not None:
            raise caught
        said = json.loads(answer)
        if "fault" in said:
            raise from_message(said)
        return said["result"]  # type: ignore[no-any-return]

    def _from_first(self, text: str) -> str:
        if self._host is None:
            return text
        size = torch.tensor([len(text.encode())])
        dist.broadcast(size, 0, group=self._host)
        content = (
            torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            if self.rank == 0
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(content, 0, group=self._host)
        return content.numpy().tobytes().decode()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: the same answer in all of them."""
        if self._host is None:
            return flag
        up = torch.tensor([int(flag)])
        dist.all_reduce(up, dist.ReduceOp.MAX, group=self._host)
        return bool(up)

    def barrier(self) -> None:
        """Wait until every process has come this far."""
        if self._host is not None:
            dist.barrier(group=self._host)

    def total(self, values: list[float]) -> list[float]:
        """Each value, added up over the processes in float64: the same bits in all of them."""
        if self._host is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self._host)
        return [float(value) for value in sums]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a flat tensor over all processes, in place; all of them hold the same bits
        afterwards."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def arithmetic_versions(self) -> list[str]:
        """What the last bits of the encoders' output depend on, besides their weights."""
        return [self.device.type, metadata.version("torch")]

    def close(self) -> None:
        """Leave the process group, so that another world can be made."""
        self._host = None
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        PartialState._reset_state()


def join_processes(settings: EngineSettings) -> TorchProcessGroup:
    """Join the processes of this run."""
    return TorchProcessGroup(settings.device, settings.precision)


def refuse_settings(environment: Mapping[str, str]) -> None:
    """Refuse what a launcher passes on and this engine does not do; a setting is never ignored in
    silence."""
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    on = {
        name for name, value in environment.items() if value.lower() in ("1", "true", "yes", "on")
    }
    data_parallel = (
        "Launch with `accelerate launch --multi_gpu --num_processes N` or `torchrun "
        "--nproc-per-node N`: every process holds the whole model."
    )
    refuse = [
        (
            "ACCELERATE_USE_DEEPSPEED" in on,
            f"DeepSpeed (accelerate's use_deepspeed) is not supported. {data_parallel}",
        ),
        (
            "ACCELERATE_USE_FSDP" in on,
            f"FSDP (accelerate's use_fsdp) is not supported. {data_parallel}",
        ),
        (
            "ACCELERATE_USE_MEGATRON_LM" in on,
            f"Megatron-LM (accelerate's use_megatron_lm) is not supported. {data_parallel}",
        ),
        (
            "ACCELERATE_USE_PARALLELISM_CONFIG" in on,
            "accelerate's parallelism_config (sharded, tensor, context, sequence) is not "
            f"supported. {data_parallel}",
        ),
        (
            "ACCELERATE_USE_SAGEMAKER" in on
            and environment.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO") != "NO",
            f"SageMaker's own distributed training is not supported. {data_parallel}",
        ),
        (
            "ACCELERATE_IN_TPU_POD" in on
            or environment.get("PJRT_DEVICE", "").upper() == "TPU"
            or is_torch_xla_available(),
            "TPU and XLA are not supported. Where torch_xla is installed beside a GPU or for the "
            "CPU, set USE_TORCH_XLA=0 and PJRT_DEVICE to nothing.",
        ),
        (
            dynamo.upper() not in ("NO", ""),
            f"torch.compile (accelerate's dynamo_backend={dynamo.lower()}) is not supported. "
            "Launch with `--dynamo_backend no`.",
        ),
        (
            environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", ""),
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment is not honoured. Unset it, "
            "and give train.accumulation_steps (--gradient_accumulation_steps).",
        ),
        (
            bool(environment.get("ACCELERATE_TORCH_DEVICE")),
            "ACCELERATE_TORCH_DEVICE in the environment is not honoured. Unset it, and give "
            "engine.device.",
        ),
    ]
    if problems := [text for wrong, text in refuse if wrong]:
        raise InputError("\n".join(problems))


def choose_precision(wanted: str | None, environment: Mapping[str, str]) -> str:
    """The flag or recipe, else the launcher's ``mixed_precision``, else float32."""
    given = wanted or environment.get("ACCELERATE_MIXED_PRECISION") or "no"
    if given.lower() not in PRECISIONS:
        source = "engine.precision" if wanted else "the launcher's mixed_precision"
        raise InputError(
            f"{source}: {given!r} is not supported. Give engine.precision (or --mixed_precision) "
            f"as one of {', '.join(PRECISIONS)}."
        )
    return given.lower()


def choose_device(wanted: str | None, environment: Mapping[str, str]) -> torch.device:
    """This process's own device: the recipe's, else the CPU if the launcher says so, else the
    accelerator that torch finds, else the CPU."""
    several, local = (
        int(environment.get("LOCAL_WORLD_SIZE") or 1),
        int(environment.get("LOCAL_RANK") or 0),
    )
    found = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    launcher = "cpu" if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") else None
    name = wanted or launcher or next(kind for kind, there in found.items() if there)
    kind, colon, index = name.partition(":")
    here = ", ".join(kind for kind, there in found.items() if there)
    if kind not in found or not found[kind] or (colon and not index.isdigit()):
        raise InputError(
            f"engine.device: {name!r} cannot be used; torch finds here: {here}. Give one of "
            "these, or leave engine.device out."
        )
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    count = torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()
    if colon and several > 1:
        raise InputError(
            f"engine.device: {name!r} names one device for {several} processes. Give "
            f"engine.device={kind}: each process takes its own."
        )
    if several > count:
        raise InputError(
            f"{several} processes were launched on this host, it has {count} {kind} devices. "
            f"Launch {count}, or give engine.device=cpu."
        )
    if colon and int(index) >= count:
        raise InputError(
            f"engine.device: {name!r} does not exist, there are {count}, counted from {kind}:0."
        )
    return torch.device(kind, int(index) if colon else local)


def probe_precision(device: torch.device, precision: str) -> None:
    """Refuse a precision in which a small convolution and product, forward and backward, do not
    really run."""
    if precision == "no":
        return
    wanted = PRECISIONS[precision]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # autocast turns itself off with no more than a warning
            with torch.autocast(device.type, wanted):
                kernel = torch.ones(4, 3, 3, 3, device=device, requires_grad=True)
                product = torch.nn.functional.conv2d(
                    torch.ones(1, 3, 8, 8, device=device), kernel, padding=1
                ).flatten(2) @ torch.ones(64, 4, device=device)
            product.float().sum().backward()
        worked, reason = (
            product.dtype == wanted
            and kernel.grad is not None
            and bool(kernel.grad.isfinite().all()),
            "it was computed in another",
        )
    except (RuntimeError, UserWarning) as error:
        worked, reason = False, str(error).partition("\n")[0]
    if not worked:
        raise InputError(
            f"engine.precision: {precision} cannot run on {device} ({reason}). Give "
            "engine.precision=no (--mixed_precision=no) or another device."
        )


def meet_processes(device: torch.device) -> PartialState:
    """Meet the other processes: gloo on the CPU, the device's own collectives elsewhere."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
            if device.type == "cuda":
                torch.cuda.set_device(device)
            return PartialState(cpu=device.type == "cpu")
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        raise InputError(
            f"the processes of this run could not meet: {error}. Start them with `torchrun` or "
            "`accelerate launch --multi_gpu`."
        ) from error


def parent_command() -> list[str]:
    """The command line of the process that started this one; empty where the system does not
    tell."""
    try:
        return (
            Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
        )
    except OSError:
        return []


def requested_world_size(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """How many processes the launcher was asked for; 0: several, it does not say how many.

    torchrun, ``accelerate launch --multi_gpu`` and MPI say it in the environment. ``accelerate
    launch`` without ``--multi_gpu`` starts one process whatever ``--num_processes`` is: then its
    command line has the number, and an address to meet at, given to a process with no rank, says
    "several".
    """
    if "LOCAL_RANK" not in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        if counts := [
            parse_count(parent, name)
            for name in ("num_processes", "num_machines")
            if parse_count(parent, name)
        ]:
            return max(counts)
        if "MASTER_PORT" in environment and not any(
            name in environment for name in WORLD_SIZE_VARIABLES
        ):
            return 0
    return next(
        (
            int(environment[name])
            for name in WORLD_SIZE_VARIABLES
            if environment.get(name, "").isdigit()
        ),
        1,
    )


def parse_count(command: Sequence[str], name: str) -> int:
    """The number given to ``--name`` on a command line, 0 where there is none."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        key, equals, value = word.replace("-", "_").partition("=")
        value = value if equals else following
        if key == f"__{name}" and value.isdigit():
            return int(value)
    return 0


def refuse_other_world_size(wanted: int, world: int, device: torch.device) -> None:
    """Refuse a world of another size than was asked for: each of its processes would train alone,
    in the same folder."""
    if wanted == world:
        return
    n = wanted if wanted > 1 else "N"
    alternative = ", with engine.device=cpu" if device.type == "mps" else ""
    raise InputError(
        f"The launcher was asked for {wanted or 'several'} processes, {world} came up together on "
        f"{device.type}. "
        f"Start several with `accelerate launch --multi_gpu --num_processes {n} ...` or `torchrun "
        f"--nproc-per-node {n} ...` (GPUs or CPU{alternative}); "
        f"start one with `accelerate launch --num_processes 1 ...` or `python ...`."
    )
