"""The seam: all that training needs to know of PyTorch or JAX. Numpy goes in, numpy comes out, at
logging and saving only."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from limner.family import Parts

State = Any  # an engine's own; donated to ``step``: never use the old one again
Metrics = dict[str, Any]  # arrays on the device, until ``fetch``
Batch = dict[str, np.ndarray]  # x0, noise, t a s p q w d and features; first axis: examples
Group = dict[str, np.ndarray]  # arrays by parameter name
T = TypeVar("T")


@dataclass(frozen=True)
class Weights:
    """Where the weights of a pipeline lie."""

    model: str  # a folder in the diffusers layout, or a Hub repository
    lora: Path | None = None  # a folder that holds ``pytorch_lora_weights.safetensors``
    family: str | None = None  # where it is known from the run that made them
    variant: str | None = None
    revision: str | None = None
    cache_dir: str | None = None  # where downloads are kept; None: the Hub library's own place

    @property
    def settings(self) -> dict[str, str | None]:
        """What diffusers is told besides the model's name."""
        return {"variant": self.variant, "revision": self.revision, "cache_dir": self.cache_dir}


class World(Protocol):
    """One process of a run, and its place among the others."""

    rank: int
    world: int
    devices: int  # of this process
    precision: str  # no, fp16 or bf16: the recipe's, or the launcher's

    def first(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the first process; every process gets its (JSON) result, or its
        fault."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: the same answer in all of them."""
        ...

    def total(self, values: list[float]) -> list[float]:
        """Each value, added up over the processes."""
        ...

    def barrier(self) -> None:
        """Wait for all processes."""
        ...

    def close(self) -> None:
        """Leave the others in good order."""
        ...


class Engine(Protocol):
    """One process of a training run."""

    def parts(self) -> Parts:
        """The frozen encoders, each loaded when first used."""
        ...

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let go of the memory of these encoders and tokenizers, of all where none are named."""
        ...

    def init(self, seed: int) -> State:
        """The starting point: base weights, fresh adapters (addressed by ``seed`` and parameter
        name), empty optimizer."""
        ...

    def step(
        self,
        state: State,
        batch: Batch,
        *,
        step: int,
        learning_rate: float,
        ema: float | None,
        seed: int,
    ) -> tuple[State, Metrics]:
        """One optimizer step on this process's rows of the global batch; metrics are of the whole
        batch: loss, grad_norm.

        A loss or gradient that is not finite changes nothing but the fault that ``fetch`` reports.
        """
        ...

    def fetch(self, state: State, metrics: Sequence[Metrics]) -> list[dict[str, float]]:
        """The only copy from device to host: the metrics of some steps as numbers.

        Raises:
            FirstFault: when a step since the beginning was not finite.
        """
        ...

    def losses(self, state: State, batch: Batch, *, average: bool) -> np.ndarray:
        """Loss per example without training, shape [rows], with the trained weights or with their
        moving average."""
        ...

    def pictures(
        self,
        state: State,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        size: int,
    ) -> list[np.ndarray]:
        """One picture per prompt and seed with the current weights (the average, where there is
        one), uint8 [size, size, 3].

        All processes call it; the first one draws, the others get none.
        """
        ...

    def snapshot(self, state: State) -> Iterator[tuple[str, Group]]:
        """All that training depends on: groups ``model``, ``ema``, ``optimizer``, ``scaler``, one
        at a time."""
        ...

    def restore(self, state: State, groups: Callable[[str], Group]) -> State:
        """The inverse of ``snapshot``; raises ``IntegrityFault`` on a wrong name, shape or
        dtype."""
        ...


class FirstFault(Exception):
    """The first step (counted from 0) whose loss or gradient was not finite; the loop says which
    examples it had."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step
