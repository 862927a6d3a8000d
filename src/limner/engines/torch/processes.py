"""One process of a PyTorch run: its place among the others, its device and its precision.

What the launcher asked for is done or refused: two groups must never train in one folder.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import is_torch_xla_available

from limner.config.schema import EngineSettings
from limner.engines.process import PATIENCE, Processes
from limner.engines.state import PRECISIONS, find_dtype
from limner.engines.torch.arithmetic import prepare_cublas
from limner.errors import InputError, LimnerError

# torchrun and accelerate; then three kinds of MPI.
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
ON = ("1", "true", "yes", "on")
DATA_PARALLEL = (
    "Launch with `accelerate launch --multi_gpu --num_processes N` or `torchrun "
    "--nproc-per-node N`: every process holds the whole model."
)
# Switches that accelerate's launcher sets, and what to say of each.
UNSUPPORTED_SWITCHES = {
    "ACCELERATE_USE_DEEPSPEED": (
        f"DeepSpeed (accelerate's use_deepspeed) is not supported. {DATA_PARALLEL}"
    ),
    "ACCELERATE_USE_FSDP": f"FSDP (accelerate's use_fsdp) is not supported. {DATA_PARALLEL}",
    "ACCELERATE_USE_MEGATRON_LM": (
        f"Megatron-LM (accelerate's use_megatron_lm) is not supported. {DATA_PARALLEL}"
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "accelerate's parallelism_config (sharded, tensor, context, sequence) is not "
        f"supported. {DATA_PARALLEL}"
    ),
}


class TorchProcessGroup(Processes):
    """The processes that were launched together; they may be one.

    Args:
        device: ``engine.device`` of the recipe; None: what the launcher says, else the accelerator
            that torch finds, else the CPU.
        precision: ``engine.precision`` of the recipe; None: what the launcher says, else ``no``.
        patience: ``engine.patience`` of the recipe: seconds that a process may be silent.

    Raises:
        InputError: for a launcher setting that is not supported, a device or precision that cannot
            run here, or fewer processes than were asked for.
    """

    rank: int
    world_size: int
    device_count: int = 1
    device: torch.device
    precision: str

    @property
    def device_name(self) -> str:
        """The device, and of a GPU its model."""
        if self.device.type != "cuda":
            return str(self.device)
        return f"{self.device} ({torch.cuda.get_device_name(self.device)})"

    def __init__(
        self,
        device: str | None = None,
        precision: str | None = None,
        environment: Mapping[str, str] = os.environ,
        patience: float = EngineSettings.patience,
    ) -> None:
        super().__init__()
        self._host_group: dist.ProcessGroup | None = None
        try:
            refuse_settings(environment)
            self.precision = choose_precision(precision, environment)
            self.device = choose_device(device, environment)
            probe_precision(self.device, self.precision)
            requested = requested_world_size(environment, read_parent_command())
            with self.meeting_in_time(requested, patience):
                state = join_group(self.device)
            self.rank = state.process_index
            self.world_size = state.num_processes
            refuse_other_world_size(requested, self.world_size, self.device)
        except LimnerError as error:
            # All processes find the same: the first one of each host reports it.
            error.reported = environment.get("LOCAL_RANK", "0") != "0"
            self.close()
            raise
        if self.world_size > 1:
            # Messages go from host to host, so that no device is waited for.
            self._host_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.start_watch(environment.get("MASTER_ADDR", "localhost"), patience)

    def exchange(self, text: str) -> list[str]:
        """See ``Processes``."""
        if self._host_group is None:
            return [text]
        content = text.encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self._host_group)
        texts: list[str] = []
        for rank, size in enumerate(map(int, sizes)):
            message = bytearray(content) if rank == self.rank else bytearray(size)
            # One broadcast for each process that has something to say, which is rarely more than
            # one: gathering would pad all texts to the longest, and that may be a whole index.
            if size:
                buffer = torch.frombuffer(message, dtype=torch.uint8)
                dist.broadcast(buffer, rank, group=self._host_group)
            texts.append(message.decode())
        return texts

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a flat tensor over all processes, in place; all hold the same bits afterwards."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def arithmetic_versions(self) -> list[str]:
        """Return what the last bits of the encoders' output depend on, besides their weights."""
        versions = [self.device.type, metadata.version("torch")]
        if self.device.type == "cuda":
            # Earlier builds encoded in TF32, whatever engine.tf32 said.
            versions.append("float32 as asked")
        return versions

    def leave_group(self) -> None:
        """Leave the process group, so that another can be joined."""
        self._host_group = None
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        PartialState._reset_state()


def join_processes(settings: EngineSettings) -> TorchProcessGroup:
    """Join the processes of this run."""
    if settings.deterministic:
        prepare_cublas()
    return TorchProcessGroup(settings.device, settings.precision, patience=settings.patience)


def refuse_settings(environment: Mapping[str, str]) -> None:
    """Refuse what a launcher sets and this engine does not do: nothing is ignored in silence.

    Raises:
        InputError: naming all such settings.
    """
    problems = [
        message
        for name, message in UNSUPPORTED_SWITCHES.items()
        if environment.get(name, "").lower() in ON
    ]
    if uses_sagemaker(environment):
        problems.append("SageMaker's own distributed training is not supported.")
    if uses_xla(environment):
        problems.append(
            "TPU and XLA are not supported. Where torch_xla is installed beside a GPU or for the "
            "CPU, set USE_TORCH_XLA=0 and PJRT_DEVICE to nothing."
        )
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if dynamo.upper() not in ("NO", ""):
        problems.append(
            f"torch.compile (accelerate's dynamo_backend={dynamo.lower()}) is not supported. "
            "Launch with `--dynamo_backend no`."
        )
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", ""):
        problems.append(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment is not honoured. Unset it, "
            "and give train.accumulation_steps (--gradient_accumulation_steps)."
        )
    if environment.get("ACCELERATE_TORCH_DEVICE"):
        problems.append(
            "ACCELERATE_TORCH_DEVICE in the environment is not honoured. Unset it, and give "
            "engine.device."
        )
    if problems:
        raise InputError("\n".join(problems))


def uses_sagemaker(environment: Mapping[str, str]) -> bool:
    """Return whether SageMaker is asked to distribute the training."""
    launched = environment.get("ACCELERATE_USE_SAGEMAKER", "").lower() in ON
    return launched and environment.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO") != "NO"


def uses_xla(environment: Mapping[str, str]) -> bool:
    """Return whether accelerate would run on a TPU, or through XLA."""
    in_pod = environment.get("ACCELERATE_IN_TPU_POD", "").lower() in ON
    tpu = environment.get("PJRT_DEVICE", "").upper() == "TPU"
    return in_pod or tpu or is_torch_xla_available()


def choose_precision(wanted: str | None, environment: Mapping[str, str]) -> str:
    """Return the recipe's precision, else the launcher's ``mixed_precision``, else float32's."""
    given = wanted or environment.get("ACCELERATE_MIXED_PRECISION") or "no"
    if given.lower() not in PRECISIONS:
        source = "engine.precision" if wanted else "the launcher's mixed_precision"
        raise InputError(
            f"{source}: {given!r} is not supported. Give engine.precision (or --mixed_precision) "
            f"as one of {', '.join(PRECISIONS)}."
        )
    return given.lower()


def choose_device(
    wanted: str | None, environment: Mapping[str, str], setting: str = "engine.device"
) -> torch.device:
    """Return the device of this process.

    The recipe's, else the CPU if the launcher says so, else the accelerator that torch finds, else
    the CPU.

    Args:
        setting: what ``wanted`` was given with.

    Raises:
        InputError: for a device that does not exist, or that several processes would share.
    """
    available = list_device_kinds()
    name = wanted or available[0]
    if wanted is None and environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        name = "cpu"
    kind, colon, index = name.partition(":")
    if kind not in available or (colon and not index.isdigit()):
        raise InputError(
            f"{setting}: {name!r} cannot be used; torch finds here: {', '.join(available)}. "
            f"Give one of these, or leave {setting} out."
        )
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    count = torch.cuda.device_count() if kind == "cuda" else torch.xpu.device_count()
    check_device_count(name, count, int(environment.get("LOCAL_WORLD_SIZE") or 1))
    local_rank = int(environment.get("LOCAL_RANK") or 0)
    return torch.device(kind, int(index) if colon else local_rank)


def list_device_kinds() -> list[str]:
    """Return the kinds of devices that torch can use, the best first."""
    usable = {
        "cuda": torch.cuda.is_available(),
        "xpu": torch.xpu.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    return [kind for kind, can_run in usable.items() if can_run]


def check_device_count(name: str, count: int, processes: int) -> None:
    """Refuse a device (``cuda``, ``cuda:1``) that ``processes`` of a host cannot have.

    Args:
        count: devices of its kind on this host.
    """
    kind, colon, index = name.partition(":")
    if colon and processes > 1:
        raise InputError(
            f"engine.device: {name!r} names one device for {processes} processes. Give "
            f"engine.device={kind}: each process takes its own."
        )
    if processes > count:
        raise InputError(
            f"{processes} processes were launched on this host, it has {count} {kind} devices. "
            f"Launch {count}, or give engine.device=cpu."
        )
    if colon and int(index) >= count:
        raise InputError(
            f"engine.device: {name!r} does not exist, there are {count}, counted from {kind}:0."
        )


def probe_precision(device: torch.device, precision: str) -> None:
    """Refuse a precision in which a small convolution and product do not really run.

    Raises:
        InputError: with torch's own reason.
    """
    if precision == "no":
        return
    problem = try_autocast(device, find_dtype(torch, precision))
    if problem is not None:
        raise InputError(
            f"engine.precision: {precision} cannot run on {device} ({problem}). Give "
            "engine.precision=no (--mixed_precision=no) or another device."
        )


def try_autocast(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why autocast does not compute in a dtype, forward and backward; None if it does."""
    try:
        with warnings.catch_warnings():
            # Autocast that cannot run turns itself off and does no more than warn.
            warnings.simplefilter("error")
            with torch.autocast(device.type, dtype):
                kernel = torch.ones(4, 3, 3, 3, device=device, requires_grad=True)
                picture = torch.ones(1, 3, 8, 8, device=device)
                features = torch.nn.functional.conv2d(picture, kernel, padding=1).flatten(2)
                product = features @ torch.ones(64, 4, device=device)
            product.float().sum().backward()
    except (RuntimeError, UserWarning) as error:
        return str(error).partition("\n")[0]
    gradient = kernel.grad
    if product.dtype != dtype or gradient is None or not gradient.isfinite().all():
        return "it was computed in another"
    return None


def join_group(device: torch.device) -> PartialState:
    """Join the other processes: by gloo on the CPU, by the device's own collectives elsewhere."""
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


def read_parent_command() -> list[str]:
    """Return the parent process's command line; empty where the system does not give it."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return command.decode(errors="replace").split("\0")


def requested_world_size(environment: Mapping[str, str], parent: Sequence[str]) -> int:
    """Return how many processes the launcher was asked for; 0 for an unknown number above 1.

    torchrun, ``accelerate launch --multi_gpu`` and MPI say it in the environment. ``accelerate
    launch`` without ``--multi_gpu`` starts one process whatever ``--num_processes`` is: then its
    command line has the number, and an address to meet at, given to a process with no rank, means
    several.

    Args:
        parent: the command line of the parent process.
    """
    if "LOCAL_RANK" not in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        processes = parse_count(parent, "num_processes")
        machines = parse_count(parent, "num_machines")
        if processes or machines:
            return max(processes, machines)
        names_size = any(name in environment for name in WORLD_SIZE_VARIABLES)
        if "MASTER_PORT" in environment and not names_size:
            return 0
    for name in WORLD_SIZE_VARIABLES:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 1


def parse_count(command: Sequence[str], name: str) -> int:
    """Return the number given to ``--name`` on a command line; 0 where there is none."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.replace("-", "_").partition("=")
        number = value if equals else following
        if option == f"__{name}" and number.isdigit():
            return int(number)
    return 0


def refuse_other_world_size(wanted: int, world_size: int, device: torch.device) -> None:
    """Refuse a group of another size than the launcher was asked for.

    Each of its processes would train alone, in the same folder.

    Args:
        wanted: see ``requested_world_size``.
    """
    if wanted == world_size:
        return
    count = wanted if wanted > 1 else "N"
    alternative = ", with engine.device=cpu" if device.type == "mps" else ""
    raise InputError(
        f"The launcher was asked for {wanted or 'several'} processes, {world_size} came up "
        f"together on {device.type}. Start several with `accelerate launch --multi_gpu "
        f"--num_processes {count} ...` or `torchrun --nproc-per-node {count} ...` (GPUs or "
        f"CPU{alternative}); start one with `accelerate launch --num_processes 1 ...` or "
        "`python ...`."
    )
