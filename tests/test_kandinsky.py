"""Kandinsky 2.2, prior and decoder: what a step computes is what diffusers' own classes compute,
and what it makes loads in the stock pipelines."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import limner
from limner import cli, rng
from limner.base_model.open import open_base
from limner.commands import export
from limner.config import toml
from limner.config.schema import AdapterSettings, Config, ModelSettings, PreviewSettings
from limner.data import contact_sheet
from limner.engines.torch import lora, pipeline
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.published import load_published
from limner.storage import checkpoint
from limner.training import loop, several_recipes
from limner.training.stream import Stream

SEED, SIZE, EYE = 3, 32, 24
PRIOR, DECODER = "kandinsky22-prior", "kandinsky22-decoder"
OTHER = {PRIOR: DECODER, DECODER: PRIOR}
SCRIPTS = Path(__file__).parent.parent / "scripts"
# The stock pipeline hands its decoder an argument that diffusers has deprecated.
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning"),
]


def stage(family: str) -> str:
    return family.removeprefix("kandinsky22-")


def settings(base: Path, pictures: Path, run: Path, family: str, **sections: Any) -> Config:
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {
            "base": str(base / stage(family)),
            "other_stage": str(base / stage(OTHER[family])),
            "family": family,
        },
    }
    raw |= {
        "data": {"folder": str(pictures), "size": SIZE, "flip": True, "resample": "box"},
        "objective": {"min_snr": 5.0},
    }
    raw |= {"train": {"steps": 1, "batch_size": 4, "seed": SEED}, "log": {"every": 1}}
    if family == PRIOR:
        raw["data"] |= {"drop_caption": 0.4}
    else:
        raw["data"] |= {"crop": "random", "crop_variants": 3}
    return toml.build(Config, {**raw, **{k: {**raw.get(k, {}), **v} for k, v in sections.items()}})


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that are not square, and so high that the image encoder sees them as they are:
    Limner's way to make pictures smaller is not the processor's."""
    return tiny.pictures(tmp_path_factory.mktemp("wide") / "pictures", 5, size=(EYE, 37))


@pytest.fixture(scope="module")
def result(
    kandinsky: Path, wide: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """A finished run of each kind."""
    folder, out = tmp_path_factory.mktemp("results"), {}
    for family in (PRIOR, DECODER):
        for kind in ("full", "lora"):
            sections = {
                "train": {"steps": 3},
                "adapter": {"kind": "lora", "rank": 3, "alpha": 6.0} if kind == "lora" else {},
                "optim": {"learning_rate": 3e-2, "ema": 0.5},
            }
            preview = {"prompts": ["a red circle"], "steps": 2, "guidance_scale": 4.0, "count": 2}
            out[family, kind] = loop.run_training(
                settings(
                    kandinsky,
                    wide,
                    folder / f"{family}-{kind}",
                    family,
                    **sections,
                    preview=preview,
                ),
                report=lambda line: None,
            )
    return out


def seen_by_clip(pipe: Any, picture: Image.Image) -> torch.Tensor:
    """The image embedding as the stock processor and encoder make it."""
    return pipe.image_encoder(
        torch.from_numpy(pipe.image_processor([picture]).pixel_values[0])[None]
    ).image_embeds[0]


def learned(
    net: torch.nn.Module, family: str, adapter: AdapterSettings
) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn; both matrices of a LoRA moved off zero, else the gradient of the
    first is nothing."""
    record = FAMILIES[family]
    if adapter.kind == "full":
        return {
            name: p
            for name, p in net.named_parameters()
            if name not in record.network.frozen_arrays
        }
    named = lora.add_adapters({record.network.component: net}, adapter, record, SEED)
    for name, p in named.items():
        if ".lora_B." in name:
            p.data += 0.01
    return named


def outcome(loss: torch.Tensor, named: dict[str, torch.nn.Parameter]) -> tuple[float, float]:
    loss.backward()
    return loss.item(), torch.linalg.vector_norm(
        torch.stack([p.grad.double().norm() for p in named.values() if p.grad is not None])
    ).item()


def prior_by_hand(base: Path, pictures: Path, adapter: AdapterSettings) -> tuple[float, float]:
    """Loss and gradient norm of the first step, with diffusers' classes; only the draws are
    Limner's."""
    from diffusers import DDPMScheduler, KandinskyV22PriorPipeline
    from diffusers.training_utils import compute_snr

    pipe = KandinskyV22PriorPipeline.from_pretrained(base / "prior")
    named = learned(pipe.prior, PRIOR, adapter)
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    order = rng.at(SEED, "order", 0).permutation(len(lines))
    embeds, noise, times, captions = [], [], [], []
    for p in range(4):
        row = int(order[p])
        picture = Image.open(pictures / lines[row]["file_name"])
        if rng.uniform(SEED, "flip", p) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        embeds.append(seen_by_clip(pipe, picture).detach())
        noise.append(
            torch.from_numpy(rng.at(SEED, "noise", p).standard_normal(embeds[-1].shape, np.float32))
        )
        times.append(int(rng.uniform(SEED, "timestep", p) * 1000))
        captions.append("" if rng.uniform(SEED, "drop", p) < 0.4 else lines[row]["text"])
    assert 0 < captions.count("") < 4
    pooled, states, mask = pipe._encode_prompt(
        captions, "cpu", 1, do_classifier_free_guidance=False
    )
    assert len({int(n) for n in mask.sum(1)}) > 1
    target = (torch.stack(embeds) - pipe.prior.clip_mean.detach()) / pipe.prior.clip_std.detach()
    scheduler, t = (
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
        torch.tensor(times),
    )
    noisy = scheduler.add_noise(target, torch.stack(noise), t)
    made = pipe.prior(
        noisy,
        t,
        proj_embedding=pooled.detach(),
        encoder_hidden_states=states.detach(),
        attention_mask=mask,
    ).predicted_image_embedding
    weight = torch.clamp(compute_snr(scheduler, t), max=5)
    return outcome(((made - target).square().mean(1) * weight).mean(), named)


def decoder_by_hand(base: Path, pictures: Path, adapter: AdapterSettings) -> tuple[float, float]:
    """The same for the decoder."""
    from diffusers import DDPMScheduler, KandinskyV22Pipeline, KandinskyV22PriorPipeline
    from diffusers.training_utils import compute_snr

    pipe, prior = (
        KandinskyV22Pipeline.from_pretrained(base / "decoder"),
        KandinskyV22PriorPipeline.from_pretrained(base / "prior"),
    )
    named = learned(pipe.unet, DECODER, adapter)
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    order = rng.at(SEED, "order", 0).permutation(len(lines))
    latents, noise, times, embeds = [], [], [], []
    for p in range(4):
        row = int(order[p])
        picture = Image.open(pictures / lines[row]["file_name"])
        crop = int(rng.uniform(SEED, "crops", p) * 3)
        width = SIZE * picture.width // picture.height
        left = int(rng.at(SEED, "crop", row, crop + 1).random(2)[1] * (width - SIZE + 1))
        cut = picture.resize((width, SIZE), Image.Resampling.BOX).crop((left, 0, left + SIZE, SIZE))
        if rng.uniform(SEED, "flip", p) < 0.5:
            cut, picture = (
                one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (cut, picture)
            )
        pixels = torch.from_numpy(np.array(cut, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        latents.append(pipe.movq.encode(pixels).latents[0].detach())
        embeds.append(seen_by_clip(prior, picture).detach())
        noise.append(
            torch.from_numpy(
                rng.at(SEED, "noise", p).standard_normal(latents[-1].shape, np.float32)
            )
        )
        times.append(int(rng.uniform(SEED, "timestep", p) * 1000))
    scheduler, t = DDPMScheduler.from_config(pipe.scheduler.config), torch.tensor(times)
    noisy = scheduler.add_noise(torch.stack(latents), torch.stack(noise), t)
    made = pipe.unet(noisy, t, None, added_cond_kwargs={"image_embeds": torch.stack(embeds)}).sample
    assert made.shape[1] == 8
    snr = compute_snr(scheduler, t)
    return outcome(
        (
            (made[:, :4] - torch.stack(noise)).square().mean((1, 2, 3))
            * torch.clamp(snr, max=5)
            / snr
        ).mean(),
        named,
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", [PRIOR, DECODER])
def test_a_step_is_what_diffusers_computes(family, kind, kandinsky, wide, tmp_path, monkeypatch):
    adapter = AdapterSettings(kind, 3)
    loss, norm = (prior_by_hand if family == PRIOR else decoder_by_hand)(kandinsky, wide, adapter)
    add = lora.add_adapters

    def moved(*arguments):
        named = add(*arguments)
        for name, p in named.items():
            if ".lora_B." in name:
                p.data += 0.01
        return named

    monkeypatch.setattr(lora, "add_adapters", moved)
    loop.run_training(
        settings(
            *(kandinsky, wide, tmp_path, family),
            adapter={"kind": "lora", "rank": 3} if kind == "lora" else {},
        ),
        report=lambda line: None,
    )
    [row] = rows(tmp_path)
    assert row["loss"] == pytest.approx(loss, rel=1e-6) and row["grad_norm"] == pytest.approx(
        norm, rel=5e-6
    )


def test_what_clip_sees_is_what_its_processor_shows_it(kandinsky, tmp_path):
    """To a tenth of a grey level in the mean, from large pictures too: lying, standing, and of an
    odd width."""
    from transformers import CLIPImageProcessorPil

    from limner.data import geometry, image

    processor = CLIPImageProcessorPil.from_pretrained(kandinsky / "prior" / "image_processor")
    for i, shape in enumerate([(300, 417), (333, 250), (96, 96), (24, 24), (20, 31)]):
        path = tiny.pictures(tmp_path / str(i), 1, size=shape) / "000.png"
        [ours] = image.load_views(
            path.read_bytes(),
            [(geometry.center_square(shape, EYE), "bicubic")],
            background="white",
            max_pixels=10**9,
        )
        mean, std = (
            np.array(getattr(processor, f"image_{what}"))[:, None, None] for what in ("mean", "std")
        )
        theirs = (np.asarray(processor([Image.open(path)]).pixel_values[0]) * std + mean) * 255
        difference = np.abs(ours.transpose(2, 0, 1) - theirs)
        assert difference.mean() < 0.3 and difference.max() < 6, shape


def finished(cfg: Config) -> tuple[list[Any], dict[str, bytes]]:
    """The curve without clocks, and the bytes of all arrays of the last checkpoint."""
    run = loop.run_training(cfg, report=lambda line: None)
    found = checkpoint.open_checkpoint(run / f"checkpoint-{cfg.train.steps}")
    files = sorted(
        p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*.safetensors")
    )
    curve = [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(run)]
    return curve, {
        f"{file}:{name}": array.tobytes()
        for file in files
        for name, array in found.arrays(file).items()
    }


@pytest.mark.parametrize("family", [PRIOR, DECODER])
def test_cached_equals_uncached_to_the_bit(family, kandinsky, wide, tmp_path):
    common = {
        "train": {"steps": 3, "micro_batch_size": 2},
        "validation": {"hold_out": 1, "every": 2, "timesteps": 2},
        "optim": {"ema": 0.5},
    }
    seen = []
    for i, cache in enumerate(("off", "memory", str(tmp_path / "cache"), str(tmp_path / "cache"))):
        seen.append(
            finished(
                settings(
                    kandinsky, wide, tmp_path / f"run-{i}", family, **common, data={"cache": cache}
                )
            )
        )
    assert len([row for row in seen[0][0] if "loss" in row]) == 3 and len(seen[0][1]) > 20
    assert all(other == seen[0] for other in seen[1:])


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", [PRIOR, DECODER])
def test_recomputing_activations_changes_no_bit(
    family, kind, kandinsky, wide, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        torch.utils.checkpoint,
        "checkpoint",
        checkpointed := counted(torch.utils.checkpoint.checkpoint, calls),
    )
    monkeypatch.setattr("limner.engines.torch.encoders.checkpoint", checkpointed)
    common = {"train": {"steps": 2, "micro_batch_size": 2}, "adapter": {"kind": kind}}
    kept = finished(settings(kandinsky, wide, tmp_path / "kept", family, **common))
    assert not calls
    again = finished(
        settings(
            kandinsky,
            wide,
            tmp_path / "again",
            family,
            **common,
            engine={"gradient_checkpointing": True},
        )
    )
    assert again == kept
    assert (
        len(calls) == (2 * 2 * 2 if family == PRIOR else len(calls)) and calls
    )  # steps, micro-batches, blocks


def counted(function: Any, calls: list[int]) -> Any:
    def call(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return function(*arguments, **settings)

    return call


def test_a_variant_is_the_other_stage_s_too(result, kandinsky, tmp_path):
    """The prior has weights of a variant only, the run's own result plain ones."""
    prior = Path(shutil.copytree(kandinsky / "prior", tmp_path / "prior"))
    for path in list(prior.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    run = Path(shutil.copytree(result[DECODER, "full"], tmp_path / "run"))
    kept = json.loads((run / "config.json").read_text())
    kept["model"] |= {"variant": "fp16", "other_stage": str(prior)}
    (run / "config.json").write_text(json.dumps(kept))
    [drawn], [wanted] = (
        limner.generate(
            str(folder),
            ["a red circle"],
            steps=2,
            size=SIZE,
            device="cpu",
            output=tmp_path / folder.parent.name,
        )
        for folder in (run, result[DECODER, "full"])
    )
    assert drawn.read_bytes() == wanted.read_bytes()
    limner.export(run, combined=tmp_path / "both")
    assert (tmp_path / "both" / "prior_prior" / "diffusion_pytorch_model.safetensors").is_file()


def test_the_statistics_of_a_prior_do_not_learn(result, kandinsky):
    from diffusers import PriorTransformer

    before = PriorTransformer.from_pretrained(kandinsky / "prior" / "prior")
    for place in ("prior", "checkpoint-3/prior", "checkpoint-3/prior_ema"):
        after = PriorTransformer.from_pretrained(result[PRIOR, "full"] / place)
        assert torch.equal(after.clip_mean, before.clip_mean) and torch.equal(
            after.clip_std, before.clip_std
        )
        assert not torch.equal(after.proj_in.weight, before.proj_in.weight)


def stock(prior: Any, decoder: Any) -> Any:
    from diffusers import KandinskyV22CombinedPipeline

    made = KandinskyV22CombinedPipeline(
        **decoder.components, **{f"prior_{name}": part for name, part in prior.components.items()}
    )
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe: Any, seed: int) -> np.ndarray:
    """What the previews of ``result`` and ``generate`` below draw."""
    pipe.set_progress_bar_config(disable=True)
    how = {
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "height": SIZE,
        "width": SIZE,
        "output_type": "np",
    }
    picture = pipe(["a red circle"], generator=[torch.Generator().manual_seed(seed)], **how).images[
        0
    ]
    return (picture * 255).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", [PRIOR, DECODER])
def test_stock_pipelines_load_the_result_and_draw_the_same_picture(
    family, kind, result, kandinsky, tmp_path
):
    from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

    run = result[family, kind]
    classes = {PRIOR: KandinskyV22PriorPipeline, DECODER: KandinskyV22Pipeline}
    mine = classes[family].from_pretrained(run if kind == "full" else kandinsky / stage(family))
    if kind == "lora":
        net = mine.prior if family == PRIOR else mine.unet
        net.load_lora_adapter(
            run,
            prefix=FAMILIES[family].network.component,
            weight_name="pytorch_lora_weights.safetensors",
        )
        [adapter] = net.peft_config.values()
        assert (adapter.r, adapter.lora_alpha, set(adapter.target_modules)) == (
            3,
            3,
            set(FAMILIES[family].lora_targets[FAMILIES[family].network.component]),
        )
    other = classes[OTHER[family]].from_pretrained(kandinsky / stage(OTHER[family]))
    pipe = stock(*((mine, other) if family == PRIOR else (other, mine)))
    want = [drawn(pipe, SEED + k) for k in range(2)]
    shown = [
        contact_sheet.read_picture(path)
        for path in sorted((run / "previews" / "step-000003").glob("*.png"))
    ]
    assert len(shown) == 2 and all(
        np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(shown, want, strict=True)
    )
    made = limner.generate(
        str(run),
        ["a red circle"],
        seed=SEED,
        count=2,
        steps=2,
        guidance_scale=4.0,
        size=SIZE,
        device="cpu",
        output=tmp_path,
    )
    assert all(
        np.abs(contact_sheet.read_picture(a).astype(int) - b).max() <= 1
        for a, b in zip(made, want, strict=True)
    )
    base = drawn(
        stock(*(classes[f].from_pretrained(kandinsky / stage(f)) for f in (PRIOR, DECODER))), SEED
    )
    assert np.abs(base.astype(int) - want[0]).max() > 8


@pytest.mark.parametrize(
    "kinds", [("full", "full"), ("full", "lora"), ("lora", "full"), ("lora", "lora")]
)
def test_both_stages_tuned(kinds, result, kandinsky, tmp_path):
    """In either order, and beside what one of them was trained with."""
    prior, decoder = result[PRIOR, kinds[0]], result[DECODER, kinds[1]]
    how = {"seed": SEED, "steps": 2, "guidance_scale": 4.0, "size": SIZE, "device": "cpu"}
    [one] = limner.generate(
        str(prior), ["a red circle"], other_stage=str(decoder), output=tmp_path / "one", **how
    )
    [two] = limner.generate(
        str(decoder), ["a red circle"], other_stage=str(prior), output=tmp_path / "two", **how
    )
    [plain] = limner.generate(str(decoder), ["a red circle"], output=tmp_path / "plain", **how)
    np.testing.assert_array_equal(contact_sheet.read_picture(one), contact_sheet.read_picture(two))
    assert not np.array_equal(contact_sheet.read_picture(one), contact_sheet.read_picture(plain))


def test_one_folder_of_both_stages(result, tmp_path, capsys):
    from diffusers import (
        AutoPipelineForText2Image,
        KandinskyV22CombinedPipeline,
        KandinskyV22Pipeline,
        KandinskyV22PriorPipeline,
    )

    prior, decoder, target = result[PRIOR, "full"], result[DECODER, "full"], tmp_path / "both"
    assert (
        cli.main(["export", str(decoder), "--combined", str(target), "--other-stage", str(prior)])
        == 0
    )
    halves = stock(
        KandinskyV22PriorPipeline.from_pretrained(prior),
        KandinskyV22Pipeline.from_pretrained(decoder),
    )
    want = drawn(halves, 5)
    for cls in (AutoPipelineForText2Image, KandinskyV22CombinedPipeline):
        whole = cls.from_pretrained(target)
        assert type(whole) is KandinskyV22CombinedPipeline
        np.testing.assert_array_equal(drawn(whole, 5), want)
    [made] = limner.generate(
        str(target),
        ["a red circle"],
        seed=5,
        steps=2,
        guidance_scale=4.0,
        size=SIZE,
        device="cpu",
        scheduler=None,
        output=tmp_path / "pictures",
    )
    np.testing.assert_array_equal(contact_sheet.read_picture(made), want)
    for message, arguments in {
        "it is there already": ["export", str(decoder), "--combined", str(target)],
        "a LoRA is no folder of weights": [
            "export",
            str(decoder),
            "--combined",
            str(tmp_path / "new"),
            "--other-stage",
            str(result[PRIOR, "lora"]),
        ],
        "nothing is put together without --combined": [
            "export",
            str(decoder),
            "--other-stage",
            str(prior),
        ],
    }.items():
        capsys.readouterr()
        assert cli.main(arguments) == 2 and message in capsys.readouterr().err


def test_a_folder_of_both_serves_as_either_base(result, wide, tmp_path):
    """With the same numbers as two folders, for training and for pictures."""
    both = tmp_path / "both"
    export.combine_stages(
        result[DECODER, "full"],
        both,
        other_stage=str(result[PRIOR, "full"]),
        report=lambda line: None,
    )
    for family in (PRIOR, DECODER):
        halves = {
            "base": str(result[family, "full"]),
            "other_stage": str(result[OTHER[family], "full"]),
        }
        preview = {"prompts": ["a red circle"], "steps": 2, "guidance_scale": 4.0}
        apart = settings(
            tmp_path, wide, tmp_path / f"{family}-apart", family, model=halves, preview=preview
        )
        together = settings(
            tmp_path,
            wide,
            tmp_path / f"{family}-both",
            family,
            model={"base": str(both), "other_stage": None},
            preview=preview,
        )
        assert finished(apart) == finished(together)
        pictures = [
            next((tmp_path / f"{family}-{name}" / "previews" / "step-000001").glob("*.png"))
            for name in ("apart", "both")
        ]
        np.testing.assert_array_equal(*map(contact_sheet.read_picture, pictures))
        [made] = limner.generate(
            str(tmp_path / f"{family}-both"),
            ["a red circle"],
            seed=SEED,
            steps=2,
            guidance_scale=4.0,
            size=SIZE,
            device="cpu",
            output=tmp_path / family,
        )
        assert (
            np.abs(
                contact_sheet.read_picture(made).astype(int)
                - contact_sheet.read_picture(pictures[1])
            ).max()
            <= 1
        )


def test_one_command_trains_both_and_draws_with_both(
    kandinsky, wide, tmp_path, monkeypatch, capsys
):
    """The decoder's previews are made with the prior of the run before."""
    recipe = (
        '[model]\nfamily = "{family}"\nbase = "{base}"\nother_stage = "{other_stage}"\n[train]\n'
        'steps = 2\nbatch_size = 4\nseed = 3\n[adapter]\nkind = "{kind}"\n'
    )
    for kind in ("full", "lora"):
        for family in (PRIOR, DECODER):
            text = recipe.format(
                family=family,
                base=kandinsky / stage(family),
                other_stage=kandinsky / stage(OTHER[family]),
                kind=kind,
            )
            (tmp_path / f"{family}-{kind}.toml").write_text(
                f'run = "{tmp_path / family}-{kind}"\n{text}'
            )
        words = [
            f"data.folder={wide}",
            f"data.size={SIZE}",
            'preview.prompts=["a red circle"]',
            "preview.steps=2",
            "optim.learning_rate=0.03",
        ]
        assert (
            cli.main(
                [
                    "train",
                    *(str(tmp_path / f"{family}-{kind}.toml") for family in (PRIOR, DECODER)),
                    *words,
                ]
            )
            == 0
        )
        run, prior = tmp_path / f"{DECODER}-{kind}", tmp_path / f"{PRIOR}-{kind}"
        assert json.loads((run / "config.json").read_text())["model"]["other_stage"] == str(prior)
        [shown] = (run / "previews" / "step-000002").glob("*.png")
        [made] = limner.generate(
            str(run),
            ["a red circle"],
            other_stage=str(prior),
            seed=3,
            steps=2,
            guidance_scale=7.5,
            size=SIZE,
            device="cpu",
            output=tmp_path / "p" / kind,
        )
        assert (
            np.abs(
                contact_sheet.read_picture(made).astype(int) - contact_sheet.read_picture(shown)
            ).max()
            <= 1
        )
    capsys.readouterr()
    same = str(tmp_path / f"{PRIOR}-full.toml")
    assert (
        cli.main(["train", same, same, *words]) == 2
        and "two recipes would train in" in capsys.readouterr().err
    )
    (tmp_path / "bad.toml").write_text(
        (tmp_path / f"{DECODER}-full.toml")
        .read_text()
        .replace("/decoder", "/nowhere")
        .replace("-full", "-bad")
    )
    (tmp_path / "new.toml").write_text(
        (tmp_path / f"{PRIOR}-full.toml").read_text().replace("-full", "-new")
    )
    assert cli.main(["train", str(tmp_path / "new.toml"), str(tmp_path / "bad.toml"), *words]) == 2
    assert (
        "nowhere" in capsys.readouterr().err
        and not (tmp_path / f"{PRIOR}-new" / "metrics.jsonl").exists()
    ), "the first one was trained in vain"


def test_recipes_one_after_the_other_share_an_engine(kandinsky, sd, wide, tmp_path):
    first = settings(kandinsky, wide, tmp_path / "first", PRIOR)
    for name, value in (("kind", "jax"), ("precision", "bf16"), ("patience", 9.0)):
        second = settings(kandinsky, wide, tmp_path / "second", DECODER, engine={name: value})
        with pytest.raises(InputError, match=f"need the same engine.{name}"):
            several_recipes.run_all([first, second])


def refusal(family: str, kandinsky: Path, **model: Any) -> str:
    given = {
        "base": str(kandinsky / stage(family)),
        "other_stage": str(kandinsky / stage(OTHER[family])),
        "family": family,
    } | model
    with pytest.raises(InputError) as fault:
        open_base(toml.build(ModelSettings, given), FAMILIES[family])
    return str(fault.value)


def edited(folder: Path, target: Path, component: str, **changes: Any) -> Path:
    """A copy with another config, and no weights, which must not be missed."""
    shutil.copytree(folder, target)
    path = (
        target
        / component
        / ("preprocessor_config.json" if component == "image_processor" else "config.json")
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for weights in target.rglob("*.safetensors"):
        weights.unlink()
    return target


def test_what_does_not_fit_is_named_before_weights_are_looked_at(kandinsky, sd, tmp_path):
    prior, decoder = kandinsky / "prior", kandinsky / "decoder"
    assert (
        "is of a KandinskyV22PriorPipeline; family 'kandinsky22-decoder' needs a "
        "KandinskyV22Pipeline" in refusal(DECODER, kandinsky, base=str(prior))
    )
    assert (
        "is of a KandinskyV22Pipeline; family 'kandinsky22-prior' needs a KandinskyV22PriorPipeline"
        in refusal(PRIOR, kandinsky, base=str(decoder))
    )
    assert "is of a KandinskyV22Pipeline; family 'kandinsky22-prior' needs" in refusal(
        DECODER, kandinsky, other_stage=str(decoder)
    )
    assert "is of a StableDiffusionPipeline; family 'kandinsky22-decoder' needs" in refusal(
        DECODER, kandinsky, base=str(sd)
    )
    assert (
        "goes with a KandinskyV22PriorPipeline, and its image_encoder and image_processor make "
        "features" in refusal(DECODER, kandinsky, other_stage=None)
    )
    lacking = edited(decoder, tmp_path / "lacking", "movq")
    index = json.loads((lacking / "model_index.json").read_text())
    (lacking / "model_index.json").write_text(
        json.dumps({k: v for k, v in index.items() if k != "movq"})
    )
    assert "movq is missing, VQModel is expected" in refusal(DECODER, kandinsky, base=str(lacking))
    narrow = edited(prior, tmp_path / "narrow", "image_encoder", projection_dim=48)
    assert "encoder_hid_dim is 32, the image encoder's projection_dim is 48" in refusal(
        DECODER,
        kandinsky,
        base=str(edited(decoder, tmp_path / "d", "unet")),
        other_stage=str(with_weights(prior, narrow)),
    )
    assert "embedding_dim is 32, the image encoder's projection_dim is 48" in refusal(
        PRIOR, kandinsky, base=str(narrow)
    )
    other = edited(prior, tmp_path / "other", "image_processor", size={"shortest_edge": 48})
    assert "image_processor: size is {'shortest_edge': 48}, 24 is expected" in refusal(
        PRIOR, kandinsky, base=str(other)
    )
    four = edited(decoder, tmp_path / "four", "unet", in_channels=9)
    assert "in_channels is 9 and out_channels 8, the MOVQ's latent_channels is 4" in refusal(
        DECODER, kandinsky, base=str(four)
    )
    assert "model.other_stage: a base of family 'sd' makes pictures alone" in refused_sd(
        sd, other_stage=str(prior)
    )


def with_weights(source: Path, target: Path) -> Path:
    for path in source.rglob("*.safetensors"):
        shutil.copy(path, target / path.relative_to(source))
    return target


def refused_sd(sd: Path, **model: Any) -> str:
    with pytest.raises(InputError) as fault:
        open_base(ModelSettings(base=str(sd), **model), FAMILIES["sd"])
    return str(fault.value)


def test_a_prior_without_statistics_is_refused(kandinsky, tmp_path):
    from diffusers import PriorTransformer

    shutil.copytree(kandinsky / "prior", tmp_path / "prior")
    net = PriorTransformer.from_pretrained(tmp_path / "prior" / "prior")
    net.clip_std.data[0, 3] = 0
    net.save_pretrained(tmp_path / "prior" / "prior")
    assert "clip_std is not above 0 everywhere" in refusal(
        PRIOR, kandinsky, base=str(tmp_path / "prior")
    )


def test_captions_are_for_the_prior_alone(kandinsky, wide, tmp_path):
    pictures = tmp_path / "pictures"
    shutil.copytree(wide, pictures)
    (pictures / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match="5 pictures, but no captions"):
        loop.run_training(
            settings(kandinsky, pictures, tmp_path / "prior", PRIOR), report=lambda line: None
        )
    said: list[str] = []
    loop.run_training(
        settings(kandinsky, pictures, tmp_path / "decoder", DECODER), report=said.append
    )
    loop.run_training(
        settings(kandinsky, wide, tmp_path / "captioned", DECODER), report=said.append
    )
    assert rows(tmp_path / "decoder")[0]["loss"] == rows(tmp_path / "captioned")[0]["loss"]
    assert not any("empty caption" in line or "they have no" in line for line in said)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        (PRIOR, "data.crop", "random"),
        (PRIOR, "data.buckets", {}),
        (PRIOR, "objective.noise_offset", 0.1),
        (PRIOR, "objective.predict", "epsilon"),
        (PRIOR, "data.caption_chunks", 2),
        (DECODER, "data.drop_caption", 0.1),
        (DECODER, "data.caption", "words"),
    ],
)
def test_settings_that_mean_nothing_are_refused(family, name, value, kandinsky, wide, tmp_path):
    section, key = name.split(".")
    with pytest.raises(InputError, match=f"{name}: it means nothing to family '{family}'"):
        loop.run_training(
            settings(kandinsky, wide, tmp_path, family, **{section: {key: value}}),
            report=lambda line: None,
        )


def test_latents_that_are_not_halved_evenly_are_refused(kandinsky, wide, tmp_path):
    cfg = settings(kandinsky, wide, tmp_path, DECODER, data={"size": 34})
    with pytest.raises(InputError, match=r"data\.size: 34 pixels are no multiple of 4, which"):
        loop.run_training(cfg, report=lambda line: None)


def test_sizes_are_multiples_of_64_for_the_published_decoder():
    configs = load_published("kandinsky22-decoder")
    assert FAMILIES[DECODER].images.pixel_multiple(configs) == 64


@pytest.mark.parametrize(("size", "drawn"), [(72, 128), (40, 64), (520, 576)])
def test_a_size_that_the_stock_pipeline_would_round_is_refused(size, drawn):
    decoder = SimpleNamespace(movq_scale_factor=8)
    with pytest.raises(InputError, match=f"no multiple of 64, and the stock .* draw {drawn}; "):
        pipeline.check_size(SimpleNamespace(decoder_pipe=decoder), size)
    with pytest.raises(InputError, match=f"no multiple of 64, and the stock .* draw {drawn}; "):
        pipeline.check_size(decoder, size)
    pipeline.check_size(decoder, 512)
    pipeline.check_size(decoder, None)
    pipeline.check_size(SimpleNamespace(), size)


def test_previews_of_a_prior_need_a_decoder(kandinsky, wide, tmp_path):
    cfg = settings(
        kandinsky,
        wide,
        tmp_path / "run",
        PRIOR,
        model={"other_stage": None},
        preview={"prompts": ["a cat"]},
    )
    with pytest.raises(
        InputError,
        match=r"model\.other_stage: .* goes with a KandinskyV22Pipeline, and pictures are made "
        r"with both",
    ):
        loop.run_training(cfg, report=lambda line: None)
    loop.run_training(replace(cfg, preview=PreviewSettings()), report=lambda line: None)
    with pytest.raises(
        InputError,
        match=r"A KandinskyV22PriorPipeline makes pictures together with its other stage; name "
        r"that too, with --other-stage",
    ):
        limner.generate(str(tmp_path / "run"), ["a cat"], device="cpu")
    with pytest.raises(InputError, match="make pictures together"):
        limner.generate(
            str(tmp_path / "run"), ["a cat"], other_stage=str(kandinsky / "prior"), device="cpu"
        )


def test_buckets_leave_the_image_encoder_s_view_as_it_is(kandinsky, tmp_path):
    """A decoder in buckets: cuts of many shapes, one embedding each of the whole picture."""
    pictures = tmp_path / "pictures"
    tiny.pictures(pictures, 4, size=(40, 70))
    batches = []
    draw = Stream.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Stream,
            "batch",
            lambda self, step, **k: [b := draw(self, step, **k), batches.append(b)][0],
        )
        loop.run_training(
            settings(
                kandinsky,
                pictures,
                tmp_path / "run",
                DECODER,
                data={"buckets": {"step": 8}, "flip": False},
            ),
            report=lambda line: None,
        )
    assert batches[0]["x0"].shape == (4, 4, 12, 20) and batches[0]["embedding"].shape == (4, 32)


def test_the_card_says_how_the_stages_go_together(result):
    for (family, kind), run in result.items():
        card = (run / "README.md").read_text()
        assert (
            "KandinskyV22Pipeline, KandinskyV22PriorPipeline" in card
            and "- kandinsky" in card
            and str(run) not in card
        )
        assert ('load_lora_adapter("path/to/this/folder", prefix=' in card) == (kind == "lora"), (
            family
        )


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("lora_prior", 2),
        *(
            pytest.param(name, 2, marks=pytest.mark.soak)
            for name in ("prior", "decoder", "lora_decoder")
        ),
        *(
            pytest.param(name, 1, marks=pytest.mark.soak)
            for name in ("prior", "decoder", "lora_prior", "lora_decoder")
        ),
    ],
)
def test_scripts_under_a_launcher(name, processes, kandinsky, wide, tmp_path):
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--num_machines=1",
        "--dynamo_backend=no",
        "--mixed_precision=no",
        f"--num_processes={processes}",
    ]
    launch += ["--multi_gpu", "--main_process_port=0"] if processes == 2 else []
    command = [
        sys.executable,
        *launch,
        str(SCRIPTS / f"train_text_to_image_{name}.py"),
        f"--train_data_dir={wide}",
        f"--resolution={SIZE}",
        "--train_batch_size=2",
        f"--pretrained_prior_model_name_or_path={kandinsky / 'prior'}",
        f"--pretrained_decoder_model_name_or_path={kandinsky / 'decoder'}",
        "--max_train_steps=2",
        "--checkpointing_steps=1",
        "--seed=0",
        "--report_to=none",
        f"--output_dir={tmp_path / 'run'}",
        "--snr_gamma=5",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(limner.__file__).parent.parent),
        "ACCELERATE_USE_CPU": "1",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())["world_size"]
        == processes
    )
    result = "pytorch_lora_weights.safetensors" if name.startswith("lora") else "model_index.json"
    assert (tmp_path / "run" / result).is_file() and len(
        [row for row in rows(tmp_path / "run") if "loss" in row]
    ) >= 1
