"""Training in PyTorch: one pure-looking step on one flat buffer; nothing is copied to the host but
at logging and saving."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from limner.base_model.base import BaseModel
from limner.config.schema import Config
from limner.diffusion.objective import Objective
from limner.engines.torch import lora, pipeline
from limner.engines.torch.encoders import (
    TorchEncoders,
    TrainableTextEncoders,
    build_on_meta,
    checkpoint_gradients,
    load_component,
)
from limner.engines.torch.flat_parameters import ALIGN, FlatParameters
from limner.engines.torch.processes import TorchProcessGroup
from limner.errors import InputError, IntegrityError
from limner.families.family import Family
from limner.families.text import encode_captions, zero_dropped
from limner.protocols import Arrays, Batch, Metrics, NonFiniteStep, Report

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
SWAP_PIECE = 1 << 24  # numbers that are held twice while weights and average change places


@dataclass
class TorchState:
    """Everything that learns or remembers; ``fault`` is the first step that was not finite, -1
    where there was none."""

    net: torch.nn.Module
    text_encoders: dict[str, torch.nn.Module]  # the text encoders that learn too, by name
    parameters: FlatParameters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: torch.Tensor | None
    fault: torch.Tensor


class TorchEngine:
    """The engine of one process; see ``protocols.Engine``."""

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        family: Family,
        world: TorchProcessGroup,
        micro: int,
        report: Callable[[str], None] = print,
    ):
        self.config, self.base, self.family, self.process, self.micro_batch_size, self.report = (
            config,
            base,
            family,
            world,
            micro,
            report,
        )
        self.rank, self.world_size, self.device = world.rank, world.world_size, world.device
        self.half = HALF.get(world.precision)
        safe = {"vae": self.half} if config.model.vae is not None and self.half is not None else {}
        self.encoders = TorchEncoders(base, self.device, safe)
        if config.optim.kind == "adamw8bit":
            load_adamw8bit()
        if config.adapter.targets:
            lora.choose_targets(build_on_meta(base), config.adapter, family)
        self.prediction_type = Objective.from_scheduler(
            base.configs["scheduler"], config.objective
        ).prediction_type
        if config.engine.tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True

    def get_encoders(self) -> TorchEncoders:
        return self.encoders

    def release_encoders(self, names: Iterable[str] | None = None) -> None:
        self.encoders.release(names)

    def init_state(self, seed: int) -> TorchState:
        fixed = self.family.frozen_arrays
        nets = {
            name: load_component(self.base, name)
            for name in self.family.trained_components(self.config.adapter.text_encoders)
        }
        net = nets[self.family.trained_component]
        self.choose_attention(net)
        if self.config.engine.gradient_checkpointing:
            for one in nets.values():
                checkpoint_gradients(one)
        if self.config.adapter.kind == "lora":
            if self.half is not None:
                for one in nets.values():
                    torch.nn.Module.to(one, self.half)  # diffusers' own warns of nothing
            named = lora.add_adapters(nets, self.config.adapter, self.family, seed)
        else:
            named = {
                name: p.requires_grad_(name not in fixed)
                for name, p in net.named_parameters()
                if name not in fixed
            }
        for one in nets.values():
            one.to(self.device).train()
        arena = FlatParameters(named)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.half is torch.float16)
        ema = (
            arena.flat.detach().to(
                "cpu" if self.config.optim.ema_offload else self.device, copy=True
            )
            if self.config.optim.ema is not None
            else None
        )
        texts = {name: one for name, one in nets.items() if one is not net}
        return TorchState(
            net,
            texts,
            arena,
            self.make_optimizer(arena.flat),
            scaler,
            ema,
            torch.full((), -1, dtype=torch.int64, device=self.device),
        )

    def choose_attention(self, net: torch.nn.Module) -> None:
        """PyTorch's memory-efficient attention is diffusers' default; plain products or xFormers
        serve by wish, and where they can run."""
        if self.config.engine.attention == "math":
            net.set_default_attn_processor()  # type: ignore[operator]
        if self.config.engine.attention == "xformers":
            try:
                net.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
            except Exception as error:
                if self.rank == 0:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    self.report(
                        f"xFormers cannot run here ({reason}); PyTorch's own memory-efficient "
                        "attention is used"
                    )

    def make_optimizer(self, flat: torch.nn.Parameter) -> torch.optim.Optimizer:
        o = self.config.optim
        settings: dict[str, Any] = {
            "lr": o.learning_rate,
            "betas": o.betas,
            "eps": o.eps,
            "weight_decay": o.weight_decay,
        }
        if o.kind == "adamw":
            return torch.optim.AdamW(
                [flat], fused=self.device.type in ("cpu", "cuda", "xpu", "mps"), **settings
            )
        return load_adamw8bit()([flat], **settings)

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
        arena, gradient = state.parameters, state.parameters.flat.grad
        assert gradient is not None
        gradient.zero_()
        rows = self.to_device(batch)
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(split_micro_batches(rows, self.micro_batch_size)):
            torch.manual_seed(
                (seed * 1_000_003 + step * 8191 + self.rank * 131 + i) % 2**63
            )  # dropout, addressed by the step
            loss = self.example_losses(state.net, part, state.text_encoders).sum() / (
                len(batch["timestep"]) * self.world_size
            )
            state.scaler.scale(loss).backward()
            total += loss.detach()
        self.process.sum_(gradient)
        self.process.sum_(total)
        state.optimizer.param_groups[0]["lr"] = learning_rate
        norm, good = self.update(state, gradient, total, step)
        if state.ema is not None and ema is not None:
            weight = torch.where(good, 1.0 - ema, 0.0).to(state.ema.device)
            state.ema.lerp_(arena.flat.detach().to(state.ema.device), weight)
        return state, {"loss": total, "grad_norm": norm}

    def update(
        self, state: TorchState, gradient: torch.Tensor, loss: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip and step, unless something is not finite; all of it on the device. Returns the
        gradient norm and whether an update was made."""
        optimizer, scaler = state.optimizer, state.scaler
        scale = (
            scaler._get_scale_async() if scaler.is_enabled() else None
        )  # the one handle on the scale that does not wait for the device
        norm = compute_norm(gradient) if scale is None else compute_norm(gradient) / scale
        good = torch.isfinite(norm) & torch.isfinite(loss)
        overflow = (
            torch.zeros_like(good) if scale is None else torch.isfinite(loss) & (scale > 1.0)
        )  # the scaler lowers the scale and goes on
        state.fault = torch.where((state.fault < 0) & ~good & ~overflow, step, state.fault)
        shrink = torch.clamp((norm + 1e-6) / self.config.optim.max_grad_norm, min=1.0)
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
        if getattr(
            optimizer, "_step_supports_amp_scaling", False
        ):  # the fused kernel divides by grad_scale, and does nothing where found_inf is set
            optimizer.grad_scale, optimizer.found_inf = shrink, (~good).float()  # type: ignore[attr-defined]
            if scaler.is_enabled():
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        else:
            gradient.div_(shrink).masked_fill_(~good, 0.0)
            scaler.step(optimizer)
            scaler.update()
        return norm, good

    def example_losses(
        self,
        net: torch.nn.Module,
        b: dict[str, torch.Tensor],
        texts: dict[str, torch.nn.Module] | None = None,
    ) -> torch.Tensor:
        """The weighted loss of each example, float32, shape [rows]; where text encoders learn,
        ``b`` has token ids in place of text features."""

        def column(name: str) -> torch.Tensor:
            return b[name].view(-1, *[1] * (b["x0"].dim() - 1))

        x = column("signal_in") * b["x0"] + column("noise_in") * b.get("input_noise", b["noise"])
        target = column("signal_target") * b["x0"] + column("noise_target") * b["noise"]
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            if texts:
                features = encode_captions(self.family, TrainableTextEncoders(texts), b)
                b = b | (zero_dropped(features, b["keep"]) if "keep" in b else features)
            inputs = self.family.network_inputs(b)
            if (
                self.config.objective.dream is not None and net.training
            ):  # algorithm 1 of arXiv:2312.00210
                with torch.no_grad():
                    delta = (
                        target - net(x, b["timestep"], **inputs)[0][:, : x.shape[1]].float()
                    ) * column("dream")
                x, target = x + column("noise_in") * delta, target + delta
            prediction = net(x, b["timestep"], **inputs)[0][:, : x.shape[1]]
        return b["weight"] * (prediction.float() - target).square().flatten(1).mean(1)

    def to_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Copies of the arrays (so that memory is laid out alike in every run), sent without
        waiting where the device allows."""
        host = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in batch.items()}
        if self.device.type != "cuda":
            return {name: t.to(self.device) for name, t in host.items()}
        return {name: t.pin_memory().to(self.device, non_blocking=True) for name, t in host.items()}

    def fetch_metrics(
        self, state: TorchState, metrics: Sequence[Metrics]
    ) -> list[dict[str, float]]:
        names = list(metrics[0]) if metrics else []
        table = torch.stack(
            [state.fault.float(), *(m[name].float() for m in metrics for name in names)]
        ).tolist()
        if table[0] >= 0:
            raise NonFiniteStep(int(table[0]))
        return [
            dict(zip(names, table[1 + i * len(names) :], strict=False)) for i in range(len(metrics))
        ]

    @torch.no_grad()
    def losses(self, state: TorchState, batch: Batch, *, average: bool) -> np.ndarray:
        with self.using_average(state, average), in_eval_mode(state):
            parts = [
                self.example_losses(state.net, part, state.text_encoders)
                for part in split_micro_batches(self.to_device(batch), self.micro_batch_size)
            ]
        return torch.cat(parts).cpu().numpy()

    def using_average(self, state: TorchState, average: bool) -> "SwappedWeights":
        """A context in which the network has the moving average for weights, where there is one and
        it is wished for."""
        return SwappedWeights(state.parameters.flat.data, state.ema if average else None)

    @torch.no_grad()
    def draw_previews(
        self,
        state: TorchState,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        size: int,
    ) -> list[np.ndarray]:
        if self.rank > 0:
            return []
        keep = bool(self.encoders.loaded)
        with (
            self.using_average(state, True),
            in_eval_mode(state),
            torch.autocast(self.device.type, self.half, enabled=self.half is not None),
        ):
            stock = pipeline.build_from_components(
                self.family,
                self.base,
                self.encoders,
                {self.family.trained_component: state.net, **state.text_encoders},
                self.prediction_type,
            )
            made = pipeline.draw_pictures(
                stock, prompts, seeds, steps=steps, guidance_scale=guidance_scale, size=size
            )
        if not keep:
            self.release_encoders()
        return made

    def snapshot(self, state: TorchState) -> Iterator[tuple[str, Arrays]]:
        arena, fixed = state.parameters, self.read_frozen_arrays(state)
        yield "model", arena.read(arena.flat) | fixed
        if state.ema is not None:
            yield "ema", arena.read(state.ema) | fixed
        memory: Arrays = {}
        for key, value in state.optimizer.state[arena.flat].items():
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.numel() == arena.flat.numel()
            ):
                memory |= {f"{key}/{name}": array for name, array in arena.read(value).items()}
            else:
                memory[key] = (
                    value.detach().cpu().numpy()
                    if isinstance(value, torch.Tensor)
                    else np.asarray(value)
                )
        yield "optimizer", memory
        if state.scaler.is_enabled():
            yield (
                "scaler",
                {key: np.asarray(value) for key, value in state.scaler.state_dict().items()},
            )

    def read_frozen_arrays(self, state: TorchState) -> Arrays:
        """The trained network's arrays that do not learn, which a whole network has on disk beside
        those that do."""
        if self.config.adapter.kind == "lora":
            return {}
        return {
            name: state.net.get_parameter(name).detach().cpu().numpy()
            for name in self.family.frozen_arrays
        }

    def restore(self, state: TorchState, groups: Callable[[str], Arrays]) -> TorchState:
        arena, fixed = state.parameters, self.read_frozen_arrays(state)

        def learnt(group: str) -> Arrays:
            return {name: array for name, array in groups(group).items() if name not in fixed}

        arena.write(arena.flat.data, learnt("model"), "the checkpoint's weights")
        if state.ema is not None:
            arena.write(state.ema, learnt("ema"), "the checkpoint's average")
        saved = groups("optimizer")
        memory: dict[str, Any] = {}
        for key in {name.split("/")[0] for name in saved}:
            if key in saved:
                whole = torch.tensor(saved[key])
                memory[key] = (
                    whole
                    if (key == "step" and self.config.optim.kind == "adamw") or whole.dim()
                    else whole.item()
                )
                continue
            like = {
                name.partition("/")[2]: array
                for name, array in saved.items()
                if name.startswith(key + "/")
            }
            memory[key] = torch.zeros(
                arena.flat.shape,
                dtype=torch.from_numpy(np.empty(0, next(iter(like.values())).dtype)).dtype,
                device=self.device,
            )
            arena.write(memory[key], like, "the checkpoint's optimizer")
        on_device = {
            k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in memory.items()
        }
        if not on_device:
            raise IntegrityError("the checkpoint's optimizer: it is empty")
        state.optimizer.state[arena.flat] = on_device
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(
                {key: array.item() for key, array in groups("scaler").items()}
            )
        return state


def compute_norm(flat: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of a buffer, in two steps: in one, PyTorch's kernel for the CPU loses 6e-5
    over three million numbers, and more over more."""
    return torch.linalg.vector_norm(flat.view(-1, ALIGN), dim=1).square().sum().sqrt()


@contextlib.contextmanager
def in_eval_mode(state: TorchState) -> Iterator[None]:
    """Dropout is off inside."""
    nets = [state.net, *state.text_encoders.values()]
    for net in nets:
        net.eval()
    yield
    for net in nets:
        net.train()


class SwappedWeights:
    """Exchanges the contents of two flat buffers inside, and back after: copies only, so that not a
    bit is lost, and a piece at a time."""

    def __init__(self, flat: torch.Tensor, other: torch.Tensor | None):
        self.flat, self.other = flat, other

    def __enter__(self) -> None:
        self.exchange()

    def __exit__(self, *_: object) -> None:
        self.exchange()

    def exchange(self) -> None:
        if self.other is not None:
            for one, other in zip(
                self.flat.split(SWAP_PIECE), self.other.split(SWAP_PIECE), strict=True
            ):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)


def split_micro_batches(
    rows: dict[str, torch.Tensor], micro: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The rows in micro-batches."""
    for start in range(0, len(rows["timestep"]), micro):
        yield {name: tensor[start : start + micro] for name, tensor in rows.items()}


def load_adamw8bit() -> Any:
    """AdamW with 8-bit moments, from bitsandbytes (arXiv:2110.02861).

    Raises:
        InputError: where it cannot run.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            'optim.kind: adamw8bit needs bitsandbytes, "pip install bitsandbytes", and a CUDA '
            'device; or use optim.kind="adamw"'
        ) from error
    if not torch.cuda.is_available():
        raise InputError(
            "optim.kind: adamw8bit runs on CUDA devices only, and there is none; use "
            'optim.kind="adamw"'
        )
    return AdamW8bit


def open_engine(
    config: Config,
    base: BaseModel,
    family: Family,
    world: TorchProcessGroup,
    micro: int,
    report: Report,
) -> TorchEngine:
    """The engine of this process; weights are loaded when they are first needed."""
    return TorchEngine(config, base, family, world, micro, report)
