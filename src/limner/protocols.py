"""The seams: what training needs of an engine, of encoders and of a process group."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self, TypedDict, TypeVar, Unpack

import numpy as np

from limner.config.schema import ModelSettings
from limner.errors import LimnerError
from limner.json_types import Plain

Report = Callable[[str], None]
Array = Any  # numpy's, or of the framework that computes
State = Any  # an engine's own; donated to ``step``: never use the old one again
Arguments = dict[str, Any]  # of a network's call, by name
Metrics = dict[str, Array]  # arrays on the device, until ``fetch``
Batch = dict[str, np.ndarray]  # x0, noise, t a s p q w d and features; first axis: examples
Arrays = dict[str, np.ndarray]  # arrays by parameter name
T = TypeVar("T")


@dataclass(frozen=True)
class ModelSource:
    """What pictures are drawn with: where its weights lie, and how its run used them."""

    model: str  # a folder in the diffusers layout, or a Hub repository
    lora: Path | None = None  # a folder that holds ``pytorch_lora_weights.safetensors``
    family: str | None = None  # where it is known from the run that made them
    variant: str | None = None
    revision: str | None = None
    cache_dir: str | None = None  # where downloads are kept; None: the Hub library's own place
    # Of a LoRA's run; see the settings of these names.
    trained_revision: str | None = None
    vae: str | None = None
    other_stage: str | None = None
    prediction_type: str | None = None  # None: the base's own
    text_encoders: bool = False  # whether the LoRA is on them too
    precision: str = "no"  # in which its previews were drawn
    half_vae: bool = False  # whether the autoencoder was in half precision, too
    tf32: bool = False  # whether float32 was computed in TF32
    base_digest: str | None = None  # the fingerprint of the base that it was trained on
    scheduler: str | None = None  # the class of that base's scheduler

    def to_settings(self, family: str) -> ModelSettings:
        """Return the settings of the run that opened this base."""
        return ModelSettings(
            self.model,
            family,
            revision=self.revision,
            trained_revision=self.trained_revision,
            variant=self.variant,
            other_stage=self.other_stage,
            vae=self.vae,
            cache_dir=self.cache_dir,
        )

    @property
    def settings(self) -> dict[str, str | None]:
        """What diffusers is told besides the model's name."""
        return {"variant": self.variant, "revision": self.revision, "cache_dir": self.cache_dir}


Features = dict[str, np.ndarray]  # first axis: examples


@dataclass(frozen=True)
class BaseConfigs:
    """The configs of a base model; ``configs["unet"]`` is the config of a component."""

    model_index: Plain  # model_index.json: the pipeline's class, and each component's
    components: dict[str, Plain]  # component -> its config.json
    # Arrays among the trained network's weights that features are scaled by, float32.
    statistics: Arrays = field(default_factory=dict)

    def __getitem__(self, component: str) -> Plain:
        return self.components[component]


class TextEncoders(Protocol):
    """Text encoders, frozen or learning; arrays of the kind that they are given: numpy, or an
    engine's own."""

    def encode_text(self, name: str, ids: Array, skip: int = 0) -> tuple[Array, Array | None]:
        """Hidden states [n, tokens, width] and pooled embedding [n, width], or None where there is
        none, of token ids [n, tokens].

        Args:
            skip: 0: the states after the last layer norm; 1: those before the last layer, as they
                are.
        """
        ...

    def concat(self, arrays: list[Array], axis: int) -> Array:
        """Arrays joined along an axis."""
        ...

    def pad_width(self, array: Array, width: int) -> Array:
        """An array with zeros after the last axis's own numbers, up to ``width``."""
        ...


class DrawCall(TypedDict):
    """What all pictures of a call have in common; None: the pipeline's own."""

    steps: int  # of the sampler
    guidance_scale: float | None
    size: int | None  # pixels a side


class Tokenizers(Protocol):
    """The tokenizers of a base by name."""

    def list_token_ids(self, tokenizer: str, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, uncut."""
        ...

    def pad_token(self, tokenizer: str) -> int:
        """Id of the padding."""
        ...

    def max_tokens(self, tokenizer: str) -> int:
        """Tokens that the tokenizer is made for, special ones included."""
        ...


class Encoders(TextEncoders, Tokenizers, Protocol):
    """The frozen parts of a base, numpy in and numpy out, loaded when first called; every engine
    has its own."""

    def encode_vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the posterior, float32 [n, channels, h, w], for pixels in
        [-1, 1], float32 [n, 3, H, W]."""
        ...

    def encode_movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """Latents of a VQ autoencoder before they are quantized, float32 [n, channels, h, w], for
        pixels in [-1, 1], float32 [n, 3, H, W]."""
        ...

    def encode_image(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """CLIP image embedding, float32 [n, width], for pixels in [-1, 1], float32 [n, 3, side,
        side], which ``processor`` says how to normalise."""
        ...


class ProcessGroup(Protocol):
    """One process of a run, and its place among the others."""

    rank: int
    world_size: int
    device_count: int  # of this process
    precision: str  # no, fp16 or bf16: the recipe's, or the launcher's

    @property
    def device_name(self) -> str:
        """What computes, e.g. ``cuda:0 (NVIDIA A100)``."""
        ...

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

    def arithmetic_versions(self) -> list[str]:
        """What the last bits of the encoders' output depend on, besides their weights."""
        ...

    # Called, in another thread, when another process was told to stop.
    on_stop: Callable[[], None]
    # Called with the error before ``end`` ends this process.
    on_end: Callable[[LimnerError], None]
    saving: AbstractContextManager[bool]  # while it is held, nothing but a kill ends this process

    def request_stop(self) -> None:
        """Tell the other processes that this one was told to stop."""
        ...

    def explain_errors(self) -> AbstractContextManager[None]:
        """While the block lasts, an error that a lost process has caused here becomes a
        ``LostProcess`` that names it."""
        ...

    def end(self, error: LimnerError) -> NoReturn:
        """End this process at once, whatever its main thread waits for, with the error's code."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """Leave the others in good order, or tell them the error with which this one leaves."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


class Engine(Protocol):
    """One process of a training run."""

    def get_encoders(self) -> Encoders:
        """The frozen encoders, each loaded when first used."""
        ...

    def release_encoders(self, names: Iterable[str] | None = None) -> None:
        """Let go of the memory of these encoders and tokenizers, of all where none are named."""
        ...

    def init_state(self, seed: int) -> State:
        """The starting point: base weights, fresh adapters (addressed by ``seed`` and parameter
        name), empty optimizer."""
        ...

    def count_trained(self, state: State) -> int:
        """How many numbers learn."""
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

    def fetch_metrics(self, state: State, metrics: Sequence[Metrics]) -> list[dict[str, float]]:
        """The only copy from device to host: the metrics of some steps as numbers.

        Raises:
            FirstFault: when a step since the beginning was not finite.
        """
        ...

    def losses(self, state: State, batch: Batch, *, average: bool) -> np.ndarray:
        """Loss per example without training, shape [rows], with the trained weights or with their
        moving average."""
        ...

    def draw_previews(
        self,
        state: State,
        prompts: Sequence[str],
        seeds: Sequence[int],
        check_stop: Callable[[], None] = lambda: None,
        **call: Unpack[DrawCall],
    ) -> list[np.ndarray]:
        """One picture per prompt and seed with the current weights (the average, where there is
        one), uint8 [size, size, 3].

        All processes call it; the first one draws, the others get none.

        Args:
            check_stop: called as often as can be; what it raises ends the drawing.
        """
        ...

    def snapshot(self, state: State) -> Iterator[tuple[str, Arrays]]:
        """All that training depends on: groups ``model``, ``ema``, ``optimizer``, ``scaler``, one
        at a time."""
        ...

    def restore(self, state: State, groups: Callable[[str], Arrays]) -> State:
        """The inverse of ``snapshot``; raises ``IntegrityError`` on a wrong name, shape or
        dtype."""
        ...


class NonFiniteStep(Exception):
    """The first step (counted from 0) whose loss or gradient was not finite; the loop says which
    examples it had."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step
