"""Training in PyTorch: the step on one flat buffer, and what the loop asks of an engine.

Nothing is copied to the host but at logging and saving.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Unpack

import numpy as np
import torch

from limner.base_model.base import BaseModel
from limner.config.schema import Config
from limner.diffusion import make_objective
from limner.diffusion.result_scheduler import adapt_scheduler
from limner.diffusion.samplers import check_drawing
from limner.engines.dropout import add_keys
from limner.engines.state import find_half_dtype
from limner.engines.torch import pipeline
from limner.engines.torch import state as states
from limner.engines.torch.arithmetic import choose_kernels, set_precision_of_float32
from limner.engines.torch.assembly import build_from_components
from limner.engines.torch.encoders import TorchEncoders, TrainableTextEncoders
from limner.engines.torch.initial_state import Networks, make_state, refuse_settings
from limner.engines.torch.optimizer import clip_and_update
from limner.engines.torch.processes import TorchProcessGroup
from limner.engines.torch.safety_checker import has_safety_checker, load_safety_checker
from limner.engines.torch.state import TorchState
from limner.families.family import Family
from limner.families.text import encode_captions, zero_dropped
from limner.protocols import Arrays, Batch, DrawCall, Metrics, NonFiniteStep, Report

Tensors = dict[str, torch.Tensor]


class TorchEngine:
    """The engine of one process; see ``protocols.Engine``."""

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        family: Family,
        process: TorchProcessGroup,
        micro_batch_size: int,
        report: Report = print,
    ):
        self.config = config
        self.base = base
        self.family = family
        self.process = process
        self.micro_batch_size = micro_batch_size
        self.report = report
        self.rank = process.rank
        self.world_size = process.world_size
        self.device = process.device
        self.half: torch.dtype | None = find_half_dtype(torch, process.precision)
        refuse_settings(config, base, family)
        # An autoencoder that the recipe names is safe in half precision; the base's may not be.
        runs_in_half = config.model.vae is not None and self.half is not None
        self.encoders = TorchEncoders(
            base, self.device, {"vae": self.half} if runs_in_half and self.half else {}
        )
        objective = make_objective(base.configs["scheduler"], config.objective)
        self.prediction_type = objective.prediction_type
        self.checks_previews = (
            bool(config.preview.prompts and config.preview.safety_checker)
            and "safety_checker" in family.pipeline_options(base.configs)
            and has_safety_checker(base.configs.model_index, base.folder, base.variant, report)
        )
        set_precision_of_float32(config.engine.tf32)
        choose_kernels(self.device, config.engine.deterministic)

    def get_encoders(self) -> TorchEncoders:
        """See ``protocols.Engine``."""
        return self.encoders

    def release_encoders(self, names: Iterable[str] | None = None) -> None:
        """See ``protocols.Engine``."""
        self.encoders.release(names)

    def init_state(self, seed: int) -> TorchState:
        """See ``protocols.Engine``."""
        return make_state(self.config, self.base, self.family, self.process, seed, self.report)

    def count_trained(self, state: TorchState) -> int:
        """See ``protocols.Engine``."""
        return sum(shape.numel() for _, shape in state.parameters.spans.values())

    def step(
        self,
        state: TorchState,
        batch: Batch,
        *,
        step: int,
        learning_rate: float,
        ema: float | None,
        seed: int,
    ) -> tuple[TorchState, Metrics]:
        """See ``protocols.Engine``."""
        flat = state.parameters.flat
        assert flat.grad is not None
        flat.grad.zero_()
        loss = self.accumulate_gradient(state, add_keys(batch, seed, state.masks.layers))
        self.process.sum_(flat.grad)
        self.process.sum_(loss)
        state.optimizer.param_groups[0]["lr"] = learning_rate
        norm, updated = clip_and_update(state, loss, step, self.config.optim.max_grad_norm)
        if state.ema is not None and ema is not None:
            # A step that changed no weight moves no average.
            weight = torch.where(updated, 1.0 - ema, 0.0).to(state.ema.device)
            state.ema.lerp_(flat.detach().to(state.ema.device), weight)
        return state, {"loss": loss, "grad_norm": norm}

    def accumulate_gradient(self, state: TorchState, batch: Batch) -> torch.Tensor:
        """Add the gradient of this process's rows to the buffer; return their part of the loss."""
        rows = len(batch["timestep"]) * self.world_size
        total = torch.zeros((), device=self.device)
        for part in self.split_micro_batches(batch):
            state.masks.keys = part.get("dropout_keys")
            losses = self.example_losses(state.net, part, state.text_encoders)
            # The mean over the global batch: micro-batches and processes only have to be added.
            loss = losses.sum() / rows
            state.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def example_losses(
        self, net: torch.nn.Module, rows: Tensors, text_encoders: Networks | None = None
    ) -> torch.Tensor:
        """Return the weighted loss of each example, float32 [rows].

        Args:
            rows: a micro-batch; where text encoders are trained, it has token ids in place of text
                features.
            text_encoders: those that are trained, by name.
        """
        x0, noise = rows["x0"], rows["noise"]

        def column(name: str) -> torch.Tensor:
            return rows[name].view(-1, *[1] * (x0.dim() - 1))

        x = column("signal_in") * x0 + column("noise_in") * rows.get("input_noise", noise)
        target = column("signal_target") * x0 + column("noise_target") * noise
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            if text_encoders:
                features = encode_captions(
                    self.family.text, TrainableTextEncoders(text_encoders), rows
                )
                rows = rows | (zero_dropped(features, rows["keep"]) if "keep" in rows else features)

            def predict(x: torch.Tensor) -> torch.Tensor:
                called = self.family.network
                output = net(**called.enter(x, rows["timestep"], rows))[0]
                prediction: torch.Tensor = called.leave(output, x).float()
                return prediction

            # Algorithm 1 of arXiv:2312.00210; the validation loss is without it.
            if self.config.objective.dream is not None and net.training:
                with torch.no_grad():
                    delta = (target - predict(x)) * column("dream")
                x = x + column("noise_in") * delta
                target = target + delta
            prediction = predict(x)
        return rows["weight"] * (prediction - target).square().flatten(1).mean(1)

    def split_micro_batches(self, batch: Batch) -> Iterator[Tensors]:
        """Yield a batch's rows on the device, as many at a time as it holds at once."""
        rows = self.to_device(batch)
        for start in range(0, len(rows["timestep"]), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            yield {name: tensor[part] for name, tensor in rows.items()}

    def to_device(self, batch: Batch) -> Tensors:
        """Return a batch's arrays on the device, sent without waiting where that is possible."""
        # Copies, so that memory is laid out alike in every run: kernels depend on it.
        host = {
            name: torch.tensor(np.ascontiguousarray(array))
            for name, array in batch.items()
            if name != "position"  # which the host alone needs
        }
        if self.device.type != "cuda":
            return {name: tensor.to(self.device) for name, tensor in host.items()}
        return {
            name: tensor.pin_memory().to(self.device, non_blocking=True)
            for name, tensor in host.items()
        }

    def fetch_metrics(
        self, state: TorchState, metrics: Sequence[Metrics]
    ) -> list[dict[str, float]]:
        """See ``protocols.Engine``."""
        names = list(metrics[0]) if metrics else []
        values = [one[name].float() for one in metrics for name in names]
        # All in one tensor: one copy, one wait.
        fault, *numbers = torch.stack([state.fault.float(), *values]).tolist()
        if fault >= 0:
            raise NonFiniteStep(int(fault))
        return [
            dict(zip(names, numbers[i * len(names) :], strict=False)) for i in range(len(metrics))
        ]

    @torch.no_grad()
    def losses(self, state: TorchState, batch: Batch, *, average: bool) -> np.ndarray:
        """See ``protocols.Engine``."""
        with self.using_average(state, average), states.evaluating(state):
            parts = [
                self.example_losses(state.net, part, state.text_encoders)
                for part in self.split_micro_batches(batch)
            ]
        return torch.cat(parts).cpu().numpy()

    def using_average(self, state: TorchState, average: bool) -> AbstractContextManager[None]:
        """Give the network the moving average for weights inside, if ``average`` and there is one.

        The two change places: copies only, so that not a bit is lost.
        """
        return states.swapped(state.parameters.flat.data, state.ema if average else None)

    @torch.no_grad()
    def draw_previews(
        self,
        state: TorchState,
        prompts: Sequence[str],
        seeds: Sequence[int],
        check_stop: Callable[[], None] = lambda: None,
        **call: Unpack[DrawCall],
    ) -> list[np.ndarray]:
        """See ``protocols.Engine``."""
        if self.rank > 0:
            return []
        keep = bool(self.encoders.loaded)
        nets = {self.family.network.component: state.net, **state.text_encoders}
        with (
            self.using_average(state, True),
            states.evaluating(state),
            torch.autocast(self.device.type, self.half, enabled=self.half is not None),
        ):
            checker = load_safety_checker(self.encoders) if self.checks_previews else None
            stock = build_from_components(
                self.family, self.base, self.encoders, nets, self.prediction_type, checker
            )
            pictures = pipeline.draw_pictures(
                stock,
                prompts,
                seeds,
                report=self.report,
                check_stop=check_stop,
                **call,
            )
        if not keep:
            self.release_encoders()
        return pictures

    def snapshot(self, state: TorchState) -> Iterator[tuple[str, Arrays]]:
        """See ``protocols.Engine``."""
        return states.snapshot(state, self.read_frozen_arrays(state))

    def restore(self, state: TorchState, groups: Callable[[str], Arrays]) -> TorchState:
        """See ``protocols.Engine``."""
        states.restore(state, groups, self.read_frozen_arrays(state))
        return state

    def read_frozen_arrays(self, state: TorchState) -> Arrays:
        """Return the arrays of a whole network's files that are not trained."""
        if self.config.adapter.kind != "full":
            return {}
        # Buffers are among them: positions that a network does not learn.
        arrays = state.net.state_dict()
        return {
            name: arrays[name].detach().cpu().numpy() for name in self.family.network.frozen_arrays
        }


def open_engine(
    config: Config,
    base: BaseModel,
    family: Family,
    process: TorchProcessGroup,
    micro_batch_size: int,
    report: Report,
) -> TorchEngine:
    """Open the engine of this process; weights are loaded when they are first needed."""
    if config.preview.prompts or config.preview.captions:
        objective = make_objective(base.configs["scheduler"], config.objective)
        class_name = base.scheduler_class
        check_drawing(
            adapt_scheduler(base.configs["scheduler"], class_name, objective.prediction_type)
        )
    return TorchEngine(config, base, family, process, micro_batch_size, report)
