"""What a machine does in a second and holds at once: clocks, memory, and arithmetic counted on the meta device, where nothing is computed."""

import copy
import itertools
import math
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from limner import checkpoint
from limner.engine import Batch
from limner.engines.torch import lora
from limner.engines.torch.engine import TorchEngine
from limner.engines.torch.parts import of_config, on_meta
from limner.snapshot import WEIGHTS

# Dense peaks in TFLOP/s: 16 bits, TF32, float32; from NVIDIA's data sheets of the H100, H200 and A100, where figures with sparsity are twice as high.
PUBLISHED = {
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, 66.9), "NVIDIA H100 PCIe": (756.0, 378.0, 51.0), "NVIDIA H200": (989.4, 494.7, 66.9),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0, 19.5), "NVIDIA A100-SXM4-80GB": (312.0, 156.0, 19.5), "NVIDIA A100 80GB PCIe": (312.0, 156.0, 19.5),
}  # fmt: skip


class Gauge:
    """Measures one engine from outside."""

    def __init__(self, engine: TorchEngine):
        self.engine, self.device = engine, engine.device
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def stamp(self) -> Any:
        """This moment on the device's own clock, where it has one; nothing waits."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, stamps: list[Any]) -> list[float]:
        """The time between neighbouring stamps."""
        if not self.cuda:
            return [after - before for before, after in itertools.pairwise(stamps)]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(stamps)]

    def memory(self) -> dict[str, int]:
        """Highest use so far, in bytes: of the GPU as torch counts it, or of the whole process."""
        if self.cuda:
            return {"allocated": torch.cuda.max_memory_allocated(self.device), "reserved": torch.cuda.max_memory_reserved(self.device)}
        return {"process": peak_resident()}

    def machine(self) -> dict[str, Any]:
        """Device, precision and versions."""
        name = torch.cuda.get_device_name(self.device) if self.cuda else f"{self.device.type} ({processor()}, {torch.get_num_threads()} threads)"
        precision = {None: "TF32" if self.tf32 else "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.engine.half]
        return {"device": name, "precision": precision, "versions": f"torch {torch.__version__}, Python {platform.python_version()}"}

    @property
    def tf32(self) -> bool:
        return self.cuda and self.engine.cfg.engine.tf32

    def flops(self, batch: Batch, micro: int) -> float:
        """Floating-point operations of the network in one step's forward and backward passes, with nothing recomputed."""
        torch.manual_seed(0)
        net = on_meta(self.engine.base)
        if self.engine.cfg.adapt.kind == "lora":
            lora.add({self.engine.family.trains: net}, self.engine.cfg.adapt, self.engine.family, 0)
        rows = {name: torch.empty(micro, *array.shape[1:], dtype=torch.from_numpy(array).dtype, device="meta") for name, array in batch.items()}
        counting = copy.copy(self.engine)
        counting.half = None
        with FlopCounterMode(display=False) as counter:
            counting.example_losses(net.train(), rows).sum().backward()
        return counter.get_total_flops() * len(batch["t"]) / micro

    def matmul(self) -> float:
        """Operations per second of a large matrix product in the run's precision: the median of some."""
        n = 8192 if self.cuda else 2048
        dtype = self.engine.half or torch.float32
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        stamps = []
        for _ in range(9):
            stamps.append(self.stamp())
            a @ b
        return 2 * n**3 / statistics.median(self.seconds(stamps)[2:])

    def published(self) -> float | None:
        """The dense peak that the maker states for this device and precision, where it is known."""
        peaks = PUBLISHED.get(torch.cuda.get_device_name(self.device)) if self.cuda else None
        return peaks and peaks[0 if self.engine.half else 1 if self.tf32 else 2] * 1e12


def peak_resident() -> int:
    """Highest resident set of this process, in bytes."""
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Drawn:
    """An array that is drawn when it is written: uniform within 1 / sqrt(inputs), as PyTorch starts its layers; norms start as the identity."""

    name: str
    shape: tuple[int, ...]
    seed: int
    dtype = np.dtype(np.float32)
    itemsize = 4

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if len(self.shape) == 1:
            return np.full(self.shape, float(self.name.endswith(".weight")), np.float32)
        numbers = np.random.Generator(np.random.SFC64(self.seed)).random(self.shape, np.float32)
        numbers -= np.float32(0.5)
        numbers *= np.float32(2 / math.sqrt(math.prod(self.shape[1:])))
        return numbers


def write_random(folder: Path, known: dict[str, Any]) -> None:
    """Random weights of the network that a config describes, in ``folder``; one array at a time is in memory."""
    arrays: dict[str, Any] = {name: Drawn(name, tuple(p.shape), i) for i, (name, p) in enumerate(of_config(known).named_parameters())}
    checkpoint.write_arrays(folder / WEIGHTS, arrays)
