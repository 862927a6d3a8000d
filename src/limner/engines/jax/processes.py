"""One process of a JAX run, its place among the others, and the mesh of all their devices.

Several hosts meet by ``jax.distributed``.
"""

import atexit
import contextlib
import functools
import itertools
import os
import sys
from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import AxisType, Mesh

from limner.config.schema import EngineSettings
from limner.engines.jax.compile_cache import enable
from limner.engines.jax.relay import Relay
from limner.engines.machine import share_heap
from limner.engines.process import PATIENCE, Processes
from limner.errors import InputError, LimnerError, find_stop

# Counts the exchanges of this process: all processes of a run make the same ones.
MESSAGE_NUMBER = itertools.count()


class JaxProcessGroup(Processes):
    """The processes that were started together, and their devices as one mesh.

    The mesh has two axes: ``data``, and ``fsdp`` over which large arrays are divided.

    Args:
        settings: the recipe's engine.

    Raises:
        InputError: for a device that is not there, a mesh that the devices do not make, or
            processes that do not find each other.
    """

    rank: int
    world_size: int
    device_count: int
    precision: str

    def __init__(self, settings: EngineSettings):
        super().__init__()
        self.precision = settings.precision or "no"
        prepare_host(settings)
        count = read_process_count()
        with self.meeting_in_time(count, settings.patience):
            host = initialize(count)
        # What JAX knows before it looks for devices, for which the processes wait for each other.
        self.rank = distributed.global_state.process_id
        self.world_size = distributed.global_state.num_processes
        self.start_watch(host, settings.patience)
        try:
            self.mesh = make_mesh(settings)
        except BaseException as error:
            self.close(error)
            raise
        self.device_count = self.mesh.size // self.world_size

    @property
    def device_name(self) -> str:
        """The devices of all processes, and what they are."""
        model = self.mesh.devices.flat[0].device_kind
        name = self.kind if model == self.kind else f"{self.kind} ({model})"
        return f"{self.mesh.size} x {name}" if self.mesh.size > 1 else name

    @property
    def kind(self) -> str:
        """cpu, gpu or tpu."""
        return str(self.mesh.devices.flat[0].platform)

    def exchange(self, text: str) -> list[str]:
        """See ``Processes``; the processes meet at JAX's coordinator."""
        if self.world_size == 1:
            return [text]
        # JAX's public functions wait for the devices, and not for hours; its own client does not.
        client: Any = distributed.global_state.client
        folder = f"limner/{next(MESSAGE_NUMBER)}/"
        keys = [f"{folder}{rank:06}" for rank in range(self.world_size)]
        patience = PATIENCE // timedelta(milliseconds=1)
        if text:
            client.key_value_set(keys[self.rank], text)
        client.wait_at_barrier("limner", patience)
        texts: dict[str, str] = dict(client.key_value_dir_get(folder))
        if texts:
            # Nothing is deleted before all have read it.
            client.wait_at_barrier("limner", patience)
            if self.rank == 0:
                client.key_value_delete(folder)
        return [texts.get(key, "") for key in keys]

    def arithmetic_versions(self) -> list[str]:
        """Return what the last bits of the encoders' output depend on, besides their weights."""
        return [self.kind, metadata.version("jaxlib")]

    def leave_group(self) -> None:
        """Do nothing: JAX leaves the others when the process ends."""

    def close(self, error: BaseException | None = None) -> None:
        """See ``ProcessGroup``."""
        super().close(error)
        if error is not None and self.world_size > 1:
            # While Python ends, JAX would wait for the others, and abort where they are gone.
            code = error.code if isinstance(error, LimnerError) else LimnerError.code
            atexit.register(end_now, code)


def end_now(code: int) -> None:
    """End this process with a code, and with nothing that others have registered before."""
    for stream in (sys.stdout, sys.stderr):
        # Nobody may be left to read it.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def join_processes(settings: EngineSettings) -> JaxProcessGroup:
    """Join the processes of this run."""
    return JaxProcessGroup(settings)


def prepare_host(settings: EngineSettings) -> None:
    """Set what JAX reads when it starts: one heap on a CPU, and where compiled programs lie."""
    if settings.deterministic:
        exclude_nondeterministic_kernels()
    asks_for_cpu = "cpu" in (settings.device, os.environ.get("JAX_PLATFORMS"))
    has_accelerator = any(map(find_spec, ("jax_plugins", "libtpu")))
    if asks_for_cpu or not has_accelerator:
        share_heap()
    enable(settings.compile_cache)


def exclude_nondeterministic_kernels() -> None:
    """Have XLA compile for GPUs only what leaves the same bits each time, before it starts.

    That leaves no choice among kernels by their measured speed either.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def make_mesh(settings: EngineSettings) -> Mesh:
    """Return all devices of the run as a mesh.

    Raises:
        InputError: see ``choose_devices`` and ``check_mesh``.
        Stopped: where a signal came while they were looked for.
    """
    devices = choose_devices(settings.device)[: settings.devices]
    if jax.process_count() != distributed.global_state.num_processes:
        raise InputError(
            f"JAX finds {jax.process_count()} processes, and this one was started alone. Set "
            "LIMNER_CLUSTER=1 in all of them, so that they meet"
        )
    check_mesh(settings, devices)
    grid = np.array(devices).reshape(-1, settings.fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def check_mesh(settings: EngineSettings, devices: list[Any]) -> None:
    """Refuse a mesh that these devices do not make.

    Raises:
        InputError: naming the setting.
    """
    wanted = settings.devices
    if wanted is not None and wanted > len(devices):
        raise InputError(
            f"engine.devices: {wanted} devices are asked for, {len(devices)} are "
            f"there ({devices[0].platform})"
        )
    if wanted is not None and jax.process_count() > 1 and wanted != jax.device_count():
        raise InputError("engine.devices: several processes use all of their devices; leave it out")
    if len(devices) % settings.fsdp:
        raise InputError(
            f"engine.fsdp: {settings.fsdp} does not divide the {len(devices)} devices; choose "
            "a divisor"
        )


def choose_devices(kind: str | None) -> list[Any]:
    """Return all devices of a kind, in the order of their processes.

    Arrays for which no device is named are placed there from now on.

    Args:
        kind: cpu, gpu or tpu; None: the best that is there.

    Raises:
        InputError: when there is none.
    """
    try:
        devices = sorted(jax.devices(kind), key=lambda device: (device.process_index, device.id))
    except RuntimeError as error:
        # JAX makes an error of its own of whatever ends it, and names no cause.
        if (stop := find_stop(error.__context__)) is not None:
            raise stop from None
        usable = ", ".join(dict.fromkeys(str(device.platform) for device in jax.devices()))
        reason = str(error).splitlines()[0]
        raise InputError(
            f"engine.device: {kind!r} is not there: {reason}. JAX sees {usable}."
        ) from error
    if kind is not None:
        own = [device for device in devices if device.process_index == jax.process_index()]
        jax.config.update("jax_default_device", own[0])
    return devices


def local_device() -> Any:
    """Return this process's first device, of the kind that was chosen."""
    return getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]


def to_local_device(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Return arrays on this process's first device."""
    return {name: jax.device_put(array, local_device()) for name, array in arrays.items()}


def read_process_count() -> int:
    """Return how many processes there are, 0 for as many as JAX finds in a cluster or a TPU pod."""
    count = int(os.environ.get("LIMNER_PROCESSES", "1"))
    return 0 if count <= 1 and os.environ.get("LIMNER_CLUSTER") else max(count, 1)


def initialize(count: int) -> str:
    """Join the other processes, where there are some.

    Args:
        count: see ``read_process_count``.

    Returns:
        The first process's host.

    Raises:
        InputError: when the processes do not find each other.
    """
    if jax.distributed.is_initialized():
        return find_coordinator()
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    # The processes watch each other by themselves, and the clock while they meet.
    join = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=int(PATIENCE.total_seconds()),
        heartbeat_timeout_seconds=int(PATIENCE.total_seconds()),
        shutdown_timeout_seconds=10,
    )
    if count > 1:
        try:
            coordinator = os.environ["LIMNER_COORDINATOR"]
            rank = int(os.environ["LIMNER_RANK"])
        except KeyError as error:
            raise InputError(
                "LIMNER_PROCESSES is set; LIMNER_COORDINATOR (host:port of the first process) and "
                "LIMNER_RANK are needed too"
            ) from error
        try:
            address = coordinator if rank == 0 else Relay(coordinator).address
            join(address, count, rank)
        except RuntimeError as error:
            raise InputError(
                f"the {count} processes did not find each other: {str(error).splitlines()[0]}"
            ) from error
    elif count == 0:
        join()
    return get_host(os.environ.get("LIMNER_COORDINATOR", "")) or find_coordinator()


def find_coordinator() -> str:
    """Return the host of the first process, where JAX has found it."""
    return get_host(distributed.global_state.coordinator_address or "localhost:0")


def get_host(address: str) -> str:
    """Return the host of ``host:port``, as a socket takes it: an IPv6 address without brackets."""
    return address.rpartition(":")[0].strip("[]")
