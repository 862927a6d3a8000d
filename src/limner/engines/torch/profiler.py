"""What a machine does in a second and holds at once: clocks, memory, and arithmetic counted on the
meta device, where nothing is computed."""

import copy
import itertools
import platform
import statistics
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from limner.engines.machine import PUBLISHED_PEAKS, peak_resident, processor_name
from limner.engines.torch import lora
from limner.engines.torch.encoders import build_from_config, build_on_meta
from limner.engines.torch.engine import TorchEngine
from limner.protocols import Batch


class TorchProfiler:
    """Measures one engine from outside."""

    def __init__(self, engine: TorchEngine):
        self.engine, self.device = engine, engine.device
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def mark(self, metrics: Any = None) -> Any:
        """This moment, or that at which a step's metrics are there, on the device's own clock,
        where it has one; nothing waits."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list[Any]) -> list[float]:
        """The time between neighbouring stamps."""
        if not self.cuda:
            return [after - before for before, after in itertools.pairwise(marks)]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]

    def peak_memory(self) -> dict[str, int]:
        """Highest use so far, in bytes: of the GPU as torch counts it, or of the whole process."""
        if self.cuda:
            return {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        return {"process": peak_resident()}

    def describe_machine(self) -> dict[str, Any]:
        """Device, precision and versions."""
        name = (
            torch.cuda.get_device_name(self.device)
            if self.cuda
            else f"{self.device.type} ({processor_name()}, {torch.get_num_threads()} threads)"
        )
        precision = {
            None: "TF32" if self.tf32 else "float32",
            torch.float16: "fp16",
            torch.bfloat16: "bf16",
        }[self.engine.half]
        return {
            "device": name,
            "precision": precision,
            "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        }

    @property
    def tf32(self) -> bool:
        return self.cuda and self.engine.config.engine.tf32

    def count_flops(self, batch: Batch, micro: int) -> float:
        """Floating-point operations of the network in one step's forward and backward passes, with
        nothing recomputed."""
        torch.manual_seed(0)
        net = build_on_meta(self.engine.base)
        if self.engine.config.adapter.kind == "lora":
            lora.add_adapters(
                {self.engine.family.trained_component: net},
                self.engine.config.adapter,
                self.engine.family,
                0,
            )
        rows = {
            name: torch.empty(
                micro, *array.shape[1:], dtype=torch.from_numpy(array).dtype, device="meta"
            )
            for name, array in batch.items()
        }
        counting = copy.copy(self.engine)
        counting.half = None
        with FlopCounterMode(display=False) as counter:
            counting.example_losses(net.train(), rows).sum().backward()
        return counter.get_total_flops() * len(batch["timestep"]) / micro

    def measure_matmul(self) -> float:
        """Operations per second of a large matrix product in the run's precision: the median of
        some."""
        n = 8192 if self.cuda else 2048
        dtype = self.engine.half or torch.float32
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        marks = []
        for _ in range(9):
            marks.append(self.mark())
            a @ b
        return 2 * n**3 / statistics.median(self.seconds(marks)[2:])

    def published_peak(self) -> float | None:
        """The dense peak that the maker states for this device and precision, where it is known."""
        peaks = PUBLISHED_PEAKS.get(torch.cuda.get_device_name(self.device)) if self.cuda else None
        return peaks and peaks[0 if self.engine.half else 1 if self.tf32 else 2] * 1e12


def parameter_shapes(known: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of the network that a config describes."""
    return {name: tuple(p.shape) for name, p in build_from_config(known).named_parameters()}


def open_profiler(engine: TorchEngine) -> TorchProfiler:
    """What measures an engine from outside."""
    return TorchProfiler(engine)
