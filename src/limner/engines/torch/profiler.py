"""Speed, memory and arithmetic of a PyTorch engine, measured from outside."""

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
from limner.engines.torch.engine import TorchEngine
from limner.engines.torch.weights import build_from_config, build_on_meta
from limner.protocols import Batch


class TorchProfiler:
    """Measures one engine from outside."""

    def __init__(self, engine: TorchEngine):
        self.engine = engine
        self.device = engine.device
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def mark(self, metrics: Any = None) -> Any:
        """Mark this moment on the device's own clock, where it has one; nothing waits.

        Args:
            metrics: of a step that has just been asked for; the mark lies behind it.
        """
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list[Any]) -> list[float]:
        """Return the time between neighbouring marks."""
        if not self.cuda:
            return [after - before for before, after in itertools.pairwise(marks)]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]

    def peak_memory(self) -> dict[str, int]:
        """Return the highest use so far, in bytes: of the GPU, else of the whole process."""
        if self.cuda:
            return {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        return {"process": peak_resident()}

    def describe_machine(self) -> dict[str, Any]:
        """Return device, precision and versions."""
        if self.cuda:
            name = torch.cuda.get_device_name(self.device)
        else:
            threads = torch.get_num_threads()
            name = f"{self.device.type} ({processor_name()}, {threads} threads)"
        precisions = {
            None: "TF32" if self.tf32 else "float32",
            torch.float16: "fp16",
            torch.bfloat16: "bf16",
        }
        return {
            "device": name,
            "precision": precisions[self.engine.half],
            "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        }

    @property
    def tf32(self) -> bool:
        """Whether float32 products are computed in TF32."""
        return self.cuda and self.engine.config.engine.tf32

    def count_flops(self, batch: Batch, micro_batch_size: int) -> float:
        """Count the floating-point operations of the network in one step, nothing recomputed."""
        # On the meta device nothing is computed.
        engine = copy.copy(self.engine)
        engine.half = None
        net = build_on_meta(engine.base)
        if engine.config.adapter.kind != "full":
            name = engine.family.network.component
            lora.insert_adapters({name: net}, engine.config.adapter, engine.family)
        rows: dict[str, torch.Tensor] = {}
        for name, array in batch.items():
            dtype = torch.from_numpy(array).dtype
            shape = (micro_batch_size, *array.shape[1:])
            rows[name] = torch.empty(shape, dtype=dtype, device="meta")
        with FlopCounterMode(display=False) as counter:
            engine.example_losses(net.train(), rows).sum().backward()
        return counter.get_total_flops() * len(batch["timestep"]) / micro_batch_size

    def measure_matmul(self) -> float:
        """Return the operations per second of a large matrix product in the run's precision."""
        n = 8192 if self.cuda else 2048
        dtype = self.engine.half or torch.float32
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        marks = []
        for _ in range(9):
            marks.append(self.mark())
            a @ b
        # The first two warm up.
        return 2 * n**3 / statistics.median(self.seconds(marks)[2:])

    def published_peak(self) -> float | None:
        """Return the dense peak that the maker states for this device and precision, if known."""
        if not self.cuda:
            return None
        peaks = PUBLISHED_PEAKS.get(torch.cuda.get_device_name(self.device))
        if peaks is None:
            return None
        half, tf32, float32 = peaks
        if self.engine.half is not None:
            return half * 1e12
        return (tf32 if self.tf32 else float32) * 1e12


def parameter_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every array of the network that a config describes."""
    net = build_from_config(config)
    return {name: tuple(array.shape) for name, array in net.state_dict().items()}


def open_profiler(engine: TorchEngine) -> TorchProfiler:
    """Return what measures an engine from outside."""
    return TorchProfiler(engine)
