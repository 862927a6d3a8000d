"""Runs of the JAX engine are those of PyTorch: curves, checkpoints, results and their pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from haste import compiled_in_haste
from jax_runs import (
    HALFWAY,
    IS_SOAK,
    STEPS,
    bits,
    float32_products,  # noqa: F401
    opened,
    settings,
    trained,
)

import limner
from limner import engines
from limner.commands import bench, drawn_model
from limner.config import toml
from limner.config.schema import Config
from limner.data import contact_sheet
from limner.errors import InputError
from limner.families import FAMILIES
from limner.storage import checkpoint
from limner.training import loop
from limner.training.stream import Stream

pytestmark = pytest.mark.frameworks

jax = pytest.importorskip("jax")


@pytest.fixture(scope="module")
def bases(base: Path, sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family. Every day their UNets are of one level, and look at the caption in
    the middle alone: they compile in half the time. Those of two are in `make soak`, and in the
    networks' own tests."""
    if IS_SOAK:
        return {"sd": base, "sdxl": sdxl}
    folder = tmp_path_factory.mktemp("bases")
    return {
        "sd": tiny.stable_diffusion(folder / "sd", channels=(64,), attention=False),
        "sdxl": tiny.stable_diffusion_xl(folder / "sdxl", shallow=True),
    }


@pytest.fixture(scope="module")
def pair(bases: dict[str, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of both engines from one recipe, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("pairs"), {}

    def runs(family: str, kind: str) -> tuple[dict[str, Any], dict[str, Any], Path, Path]:
        if (family, kind) not in made:
            places = [folder / f"{family}-{kind}-{engine}" for engine in ("torch", "jax")]
            cfgs = [
                settings(bases[family], pictures, place, engine, family, kind)
                for place, engine in zip(places, ("torch", "jax"), strict=True)
            ]
            made[family, kind] = (*map(trained, cfgs), *places)
        return made[family, kind]

    return runs


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd", "full"),
        pytest.param("sd", "lora", marks=pytest.mark.soak),
        pytest.param("sdxl", "full", marks=pytest.mark.soak),
        ("sdxl", "lora"),
    ],
)
def test_both_engines_have_one_curve(family: str, kind: str, pair: Any) -> None:
    """With Min-SNR, an average, accumulation; SDXL's LoRA with both text encoders and dropout."""
    ours, theirs = pair(family, kind)[:2]
    assert (
        len(theirs["loss"]) == len(set(theirs["loss"])) == STEPS
        and len(theirs["held_out_loss"]) == 3
    )
    for name, rel in (("loss", 1e-5), ("held_out_loss", 1e-5), ("grad_norm", 2e-5)):
        assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=0)


def losses_with_dropout(
    base: Path, pictures: Path, by: str, micro: int, rate: float
) -> list[float]:
    """The losses of four steps of a LoRA, and the held-out ones of four examples after them."""
    cfg = settings(base, pictures, base, by, kind="lora", adapter={"dropout": rate})
    process, found = engines.join_processes(cfg.engine), opened(base, "sd")
    engine = engines.open_engine(cfg, found, FAMILIES["sd"], process, micro, print)
    state, rows = engine.init_state(3), bench.make_batch(cfg, found.configs, FAMILIES["sd"], 4)
    metrics = []
    for step in range(4):
        batch = rows | {"position": rows["position"] + 4 * step}
        options = {"step": step, "learning_rate": 5e-2, "ema": None, "seed": 3}
        state, of_step = engine.step(state, batch, **options)
        metrics.append(of_step)
    losses = [row["loss"] for row in engine.fetch_metrics(state, metrics)]
    return [*losses, *engine.losses(state, rows, average=False).tolist()]


@pytest.mark.soak
def test_dropout_is_the_example_s_in_both_engines(pictures: Path, tmp_path: Path) -> None:
    """Whatever the micro-batches are; and none when nothing is learnt."""
    base = tiny.stable_diffusion(tmp_path / "sd", channels=(64,), attention=False)
    want = losses_with_dropout(base, pictures, "torch", 4, 0.3)
    for micro in (4, 2, 1):
        got = losses_with_dropout(base, pictures, "jax", micro, 0.3)
        assert got == pytest.approx(want, rel=1e-5, abs=0)
    without = losses_with_dropout(base, pictures, "torch", 4, 0.0)
    # An adapter adds nothing at first.
    assert want[0] == without[0]
    apart = [abs(a / b - 1) for a, b in zip(want[2:], without[2:], strict=True)]
    assert min(apart) > 1e-3


def test_dropout_without_an_address_is_refused(pictures: Path, tmp_path: Path) -> None:
    """That inside the attention of a text encoder that learns, as the PyTorch engine does."""
    base = tiny.stable_diffusion(tmp_path / "sd", channels=(64,))
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.1}))
    cfg = settings(base, pictures, tmp_path, "jax", kind="lora", adapter={"text_encoders": True})
    process = engines.join_processes(cfg.engine)
    with pytest.raises(InputError, match=r"text_encoder: .* attention_dropout of 0\.1"):
        engines.open_engine(cfg, opened(base, "sd"), FAMILIES["sd"], process, 2, print)


@pytest.mark.parametrize(("family", "kind"), [("sd", "full"), ("sdxl", "lora")])
def test_both_engines_leave_the_same_checkpoints_and_results(
    family: str, kind: str, pair: Any
) -> None:
    """Names, shapes and types; and numbers, as far as Adam lets round-off be seen."""
    places = pair(family, kind)[2:]
    for name in (f"checkpoint-{HALFWAY}", f"checkpoint-{STEPS}"):
        one, two = (checkpoint.open_checkpoint(place / name) for place in places)
        files = sorted(
            p.relative_to(one.folder).as_posix() for p in one.folder.rglob("*.safetensors")
        )
        assert files == sorted(
            p.relative_to(two.folder).as_posix() for p in two.folder.rglob("*.safetensors")
        )
        for file in files:
            a, b = one.arrays(file), two.arrays(file)
            assert a.keys() == b.keys() and all(
                (a[k].shape, a[k].dtype) == (b[k].shape, b[k].dtype) for k in a
            )
            if not file.startswith("optimizer"):
                assert max(np.abs(a[k] - b[k]).max() for k in a) < STEPS * 1e-5
    results = [json.loads((place / "result.json").read_text())["files"].keys() for place in places]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param("sd", "full", marks=pytest.mark.soak),
        ("sdxl", "lora"),
        pytest.param("sd", "lora", marks=pytest.mark.soak),
    ],
)
def test_a_picture_is_the_stock_pipeline_s(family: str, kind: str, pair: Any) -> None:
    """Of JAX's result, in both: the same latents, within 2 of 255."""
    import torch

    found, _ = drawn_model.find_sources(str(pair(family, kind)[3]), None)
    noise = np.random.default_rng(0).standard_normal((3, 4, 16, 16), np.float32)
    prompts = ["a red circle", "a blue one", "a red circle"]
    for name in ("ddim", "unipc"):
        stock = engines.open_pipeline(found, None, scheduler=name, precision="no", device="cpu")
        stock.set_progress_bar_config(disable=True)
        how = {
            "num_inference_steps": 4,
            "guidance_scale": 5.0,
            "height": 32,
            "width": 32,
            "output_type": "np",
        }
        want = stock(prompts, latents=torch.tensor(noise), **how).images * 255
        own = engines.open_pipeline(
            found, None, "jax", scheduler=name, precision="no", device="cpu"
        )
        made = own.draw_from_noise(prompts, noise, steps=4, guidance_scale=5.0, size=32)
        made = (made * 255).round()
        assert np.abs(made - want).max() <= 2 and made.std() > 1
        # In batches of the same size, which are not compiled again.
        again = np.stack(
            own.draw(
                [*prompts[:2], *prompts[:2]],
                [0, 1, 0, 1],
                steps=4,
                guidance_scale=5.0,
                size=32,
                batch=3,
            )
        )
        np.testing.assert_array_equal(again[:2], again[2:])


@pytest.mark.soak
def test_the_command_draws_with_jax(pair: Any, tmp_path: Path) -> None:
    [made] = limner.generate(
        str(pair("sd", "full")[3]),
        ["a red circle"],
        steps=2,
        size=32,
        engine="jax",
        output=tmp_path,
    )
    assert contact_sheet.read_picture(made).shape == (32, 32, 3)


@pytest.mark.parametrize(("family", "kind"), [("sd", "full"), ("sdxl", "lora")])
def test_a_resumed_run_ends_with_the_same_bits(
    family: str,
    kind: str,
    pair: Any,
    bases: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
) -> None:
    whole = pair(family, kind)[3]
    shutil.copytree(whole / f"checkpoint-{HALFWAY}", tmp_path / "run" / f"checkpoint-{HALFWAY}")
    loop.run_training(
        settings(bases[family], pictures, tmp_path / "run", "jax", family, kind),
        report=lambda line: None,
    )
    assert bits(tmp_path / "run", STEPS) == bits(whole, STEPS)


def test_a_number_that_is_not_finite_touches_nothing(
    pair: Any,
    bases: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from limner.errors import NonFiniteError

    batch = Stream.batch

    def poisoned(self: Any, step: int, **how: Any) -> Any:
        found = batch(self, step, **how)
        return (
            found | {"noise": found["noise"] * np.float32(np.inf)} if step == HALFWAY + 2 else found
        )

    whole = pair("sd", "full")[3]
    shutil.copytree(whole / f"checkpoint-{HALFWAY}", tmp_path / "run" / f"checkpoint-{HALFWAY}")
    monkeypatch.setattr(Stream, "batch", poisoned)
    with pytest.raises(
        NonFiniteError, match=f"step {HALFWAY + 3}: the loss or the gradient is not a finite number"
    ):
        loop.run_training(
            settings(
                bases["sd"],
                pictures,
                tmp_path / "run",
                "jax",
                log={"every": STEPS},
                checkpoint={"every": STEPS},
            ),
            report=lambda line: None,
        )
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == [
        f"checkpoint-{HALFWAY}"
    ]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.soak)])
def test_half_precision(
    precision: str, pair: Any, bases: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """The loss stays near float32's; fp16 scales it and remembers the scale."""
    exact = pair("sd", "full")[1]["loss"]
    with compiled_in_haste():
        got = trained(
            settings(
                bases["sd"],
                pictures,
                tmp_path / "run",
                "jax",
                train={"steps": 3, "micro_batch_size": 4},
                engine={"precision": precision},
            )
        )
    assert got["loss"] == pytest.approx(exact[:3], rel=3e-2)
    if precision == "fp16":
        scaler = checkpoint.open_checkpoint(tmp_path / "run" / "checkpoint-3").arrays(
            "scaler.safetensors"
        )
        assert scaler["scale"] == 65536.0 and scaler["_growth_tracker"] == 3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"engine": {"devices": 4}},
            r"engine\.devices: 4 devices are asked for, 1 are there \(cpu\)",
        ),
        ({"engine": {"fsdp": 2}}, r"engine\.fsdp: 2 does not divide the 1 devices"),
        ({"engine": {"device": "tpu"}}, r"engine\.device: 'tpu' is not there"),
        (
            {"engine": {"compile_cache": "/proc/nowhere"}},
            r"engine\.compile_cache: /proc/nowhere cannot be written",
        ),
        ({"optim": {"kind": "adamw8bit"}}, r"optim\.kind: adamw8bit is bitsandbytes'"),
        (
            {"adapter": {"kind": "lora", "targets": ["nothing"]}},
            r"adapter\.targets: the unet has no module named nothing",
        ),
        (
            {"optim": {"ema": 0.9, "ema_offload": True}},
            r"optim\.ema_offload: the JAX engine divides the average",
        ),
        (
            {"adapter": {"kind": "lora", "targets": ["conv1"]}},
            r"adapter\.targets: .*conv1 is no linear layer",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    sections: dict[str, Any], message: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        loop.run_training(
            settings(base, pictures, tmp_path, "jax", **sections), report=lambda line: None
        )


def test_kandinsky_is_not_trained_yet(kandinsky: Path, pictures: Path, tmp_path: Path) -> None:
    raw = {
        "run": str(tmp_path),
        "model": {"base": str(kandinsky / "prior"), "family": "kandinsky22-prior"},
        "data": {"folder": str(pictures)},
    }
    raw |= {"train": {"steps": 1, "batch_size": 1}, "engine": {"kind": "jax"}}
    with pytest.raises(
        InputError, match="does not train a PriorTransformer of family 'kandinsky22-prior' yet"
    ):
        loop.run_training(toml.build(Config, raw), report=lambda line: None)
