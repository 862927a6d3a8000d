"""One process of a JAX run, its place among the others, and the mesh of all their devices; several
hosts meet by ``jax.distributed``."""

import itertools
import json
import os
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import AxisType, Mesh

from limner.config.schema import EngineSettings
from limner.engines.jax.compile_cache import enable
from limner.engines.machine import share_heap
from limner.errors import InputError, from_message, to_message

T = TypeVar("T")
PATIENCE = (
    7 * 24 * 3600 * 1000
)  # milliseconds: the first process may encode or download for hours while the others wait
MESSAGE_NUMBER = itertools.count()  # so far, in this process


class JaxProcessGroup:
    """The processes that were started together, and their devices as one mesh of ``data`` and
    ``fsdp``.

    Args:
        settings: the recipe's engine.

    Raises:
        InputError: for a device that is not there, a mesh that the devices do not make, or
            processes that do not find each other.
    """

    def __init__(self, settings: EngineSettings):
        self.precision: str = settings.precision or "no"
        if "cpu" in (settings.device, os.environ.get("JAX_PLATFORMS")) or not any(
            map(find_spec, ("jax_plugins", "libtpu"))
        ):
            share_heap()
        enable(settings.compile_cache)
        initialize()
        devices = choose_devices(settings.device)[: settings.devices]
        if settings.devices is not None and settings.devices > len(devices):
            raise InputError(
                f"engine.devices: {settings.devices} devices are asked for, {len(devices)} are "
                f"there ({devices[0].platform})"
            )
        if (
            settings.devices is not None
            and jax.process_count() > 1
            and settings.devices != jax.device_count()
        ):
            raise InputError(
                "engine.devices: several processes use all of their devices; leave it out"
            )
        if len(devices) % settings.fsdp:
            raise InputError(
                f"engine.fsdp: {settings.fsdp} does not divide the {len(devices)} devices; choose "
                "a divisor"
            )
        self.rank, self.world_size = jax.process_index(), jax.process_count()
        grid = np.array(devices).reshape(-1, settings.fsdp)
        self.device_count = len(devices) // self.world_size
        self.mesh = Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    @property
    def kind(self) -> str:
        """cpu, gpu or tpu."""
        return str(self.mesh.devices.flat[0].platform)

    def first(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the first process; every process gets its (JSON) result, or its
        fault."""
        if self.world_size == 1:
            return action()
        answer, caught = None, None
        if self.rank == 0:
            try:
                answer = json.dumps({"result": action()})
            except BaseException as error:  # the others wait for an answer, whatever happened here
                answer, caught = json.dumps(to_message(error)), error
        said = json.loads(self.exchange(answer)[0])
        if caught is not None:
            raise caught
        if "fault" in said:
            raise from_message(said)
        return said["result"]  # type: ignore[no-any-return]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: the same answer in all of them."""
        return flag if self.world_size == 1 else bool(self.exchange("up" if flag else None))

    def total(self, values: list[float]) -> list[float]:
        """Each value, added up over the processes in float64: the same bits in all of them."""
        if self.world_size == 1:
            return list(values)
        rows = [
            [float.fromhex(v) for v in text.split()]
            for text in self.exchange(" ".join(v.hex() for v in map(float, values)))
        ]
        return [float(sum(column)) for column in zip(*rows, strict=True)]

    def barrier(self) -> None:
        """Wait until every process has come this far."""
        if self.world_size > 1:
            self.exchange(None)

    def exchange(self, text: str | None) -> list[str]:
        """What the processes have to say, in the order of ranks; they meet at JAX's coordinator,
        and no device is waited for."""
        client: Any = (
            distributed.global_state.client
        )  # what JAX's public functions offer waits for the devices, and not for hours
        place = f"limner/{next(MESSAGE_NUMBER)}/"
        if text is not None:
            client.key_value_set(f"{place}{self.rank:06}", text)
        client.wait_at_barrier("limner", PATIENCE)
        found: list[str] = [value for _, value in sorted(client.key_value_dir_get(place))]
        if found:
            client.wait_at_barrier("limner", PATIENCE)
            if self.rank == 0:
                client.key_value_delete(place)
        return found

    def arithmetic_versions(self) -> list[str]:
        """What the last bits of the encoders' output depend on, besides their weights."""
        return [self.kind, metadata.version("jaxlib")]

    def close(self) -> None:
        """Nothing is held: JAX parts with the others when the process ends."""


def join_processes(settings: EngineSettings) -> JaxProcessGroup:
    """Join the processes of this run."""
    return JaxProcessGroup(settings)


def choose_devices(kind: str | None) -> list[Any]:
    """All devices of a kind, cpu, gpu or tpu, in the order of their processes; None: of the best
    kind that is there. What is not placed lies on them too.

    Raises:
        InputError: when there is none.
    """
    try:
        devices = sorted(jax.devices(kind), key=lambda device: (device.process_index, device.id))
    except RuntimeError as error:
        there = ", ".join(dict.fromkeys(str(device.platform) for device in jax.devices()))
        raise InputError(
            f"engine.device: {kind!r} is not there: {str(error).splitlines()[0]}. JAX sees {there}."
        ) from error
    if kind is not None:
        jax.config.update(
            "jax_default_device",
            next(device for device in devices if device.process_index == jax.process_index()),
        )
    return devices


def local_device() -> Any:
    """This process's first device, of the kind that was chosen."""
    return getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]


def initialize() -> None:
    """Join the other processes, where a launcher says that there are some: its own variables, or
    those of a cluster or a TPU pod that JAX knows.

    Raises:
        InputError: when they do not find each other.
    """
    if jax.distributed.is_initialized():
        return
    count = int(os.environ.get("LIMNER_PROCESSES", "1"))
    if count > 1:
        try:
            jax.distributed.initialize(
                os.environ["LIMNER_COORDINATOR"], count, int(os.environ["LIMNER_RANK"])
            )
        except KeyError as error:
            raise InputError(
                "LIMNER_PROCESSES is set; LIMNER_COORDINATOR (host:port of the first process) and "
                "LIMNER_RANK are needed too"
            ) from error
        except RuntimeError as error:
            raise InputError(
                f"the {count} processes did not find each other: {str(error).splitlines()[0]}"
            ) from error
    elif os.environ.get("LIMNER_CLUSTER"):
        jax.distributed.initialize()
