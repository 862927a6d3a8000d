"""The scripts leave what their namesakes leave: the same folders and files, which stock diffusers
loads and draws with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import limner
from limner.compat import diffusers
from limner.storage import atomic

pytestmark = pytest.mark.frameworks

FULL, LORA = "train_text_to_image", "train_text_to_image_lora"
SCRIPTS = Path(__file__).parent.parent / "scripts"
COMMON = [
    "--resolution=32",
    "--center_crop",
    "--random_flip",
    "--train_batch_size=1",
    "--gradient_accumulation_steps=1",
    "--learning_rate=5.0e-04",
]
COMMON += ["--scale_lr", "--lr_scheduler=constant", "--lr_warmup_steps=0", "--report_to=none"]
UNET = "diffusion_pytorch_model.safetensors"


def flags(base: Path, pictures: Path, run: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={base}",
        f"--train_data_dir={pictures}",
        f"--output_dir={run}",
        *COMMON,
        *more,
    ]


def checkpoints(run: Path) -> set[str]:
    return {p.name for p in run.iterdir() if "checkpoint" in p.name}


def picture(pipeline: Any, seed: int = 0) -> np.ndarray:
    """What a stock pipeline draws in one step; the safety checker is left out by ours and
    theirs."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red circle",
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]


def same(a: Any, b: Any) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    return all(torch.equal(p, theirs[name]) for name, p in ours.items())


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): atomic.digest_file(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def full(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with the average kept, saved after every second."""
    run = tmp_path_factory.mktemp("full") / "run"
    assert (
        diffusers.main(
            FULL,
            flags(
                base,
                pictures,
                run,
                "--max_train_steps=4",
                "--checkpointing_steps=2",
                "--use_ema",
                "--seed=0",
            ),
        )
        == 0
    )
    return run


@pytest.fixture(scope="module")
def lora(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, saved after every second, two checkpoints kept."""
    run = tmp_path_factory.mktemp("lora") / "run"
    more = [
        "--max_train_steps=6",
        "--checkpointing_steps=2",
        "--checkpoints_total_limit=2",
        "--seed=0",
        "--num_validation_images=0",
    ]
    assert diffusers.main(LORA, flags(base, pictures, run, *more)) == 0
    return run


def test_the_result_is_a_pipeline_folder(full: Path, base: Path) -> None:
    from diffusers import DiffusionPipeline

    assert (full / "unet" / UNET).is_file() and (
        full / "scheduler" / "scheduler_config.json"
    ).is_file()
    ours = DiffusionPipeline.from_pretrained(full, safety_checker=None, use_safetensors=True)
    theirs = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    assert (
        same(ours.vae, theirs.vae)
        and same(ours.text_encoder, theirs.text_encoder)
        and not same(ours.unet, theirs.unet)
    )
    drawn = picture(ours)
    assert drawn.shape == (32, 32, 3) and np.isfinite(drawn).all() and drawn.std() > 0
    assert not np.array_equal(drawn, picture(theirs))


@pytest.mark.filterwarnings(
    "ignore:It is deprecated to pass a pretrained model name or path:FutureWarning"
)  # by diffusers to itself
def test_checkpoints_hold_networks_that_stock_pipelines_take(full: Path, base: Path) -> None:
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    assert checkpoints(full) == {"checkpoint-2", "checkpoint-4"}
    early = UNet2DConditionModel.from_pretrained(full, subfolder="checkpoint-2/unet")
    late = UNet2DConditionModel.from_pretrained(str(full / "checkpoint-4" / "unet"))
    pipeline = DiffusionPipeline.from_pretrained(base, unet=early, safety_checker=None)
    assert picture(pipeline).shape == (32, 32, 3)
    average = UNet2DConditionModel.from_pretrained(full, subfolder="checkpoint-4/unet_ema")
    result = UNet2DConditionModel.from_pretrained(full, subfolder="unet")
    assert same(average, result), "the result is the average"
    assert not same(average, late) and not same(early, late)
    kept = EMAModel.from_pretrained(str(full / "checkpoint-4" / "unet_ema"), UNet2DConditionModel)
    assert all(
        torch.equal(a, b) for a, b in zip(kept.shadow_params, average.parameters(), strict=True)
    )


def test_a_finished_run_ends_and_touches_nothing(
    full: Path, base: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(full, run)
    shutil.rmtree(run / "checkpoint-2")
    before = contents(run)
    more = [
        "--max_train_steps=2",
        "--checkpointing_steps=1",
        "--resume_from_checkpoint=checkpoint-4",
        "--use_ema",
        "--seed=0",
    ]
    assert diffusers.main(FULL, flags(base, pictures, run, *more)) == 0
    assert "finished at step 4" in capsys.readouterr().err
    after = contents(run)
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_a_limit_given_on_resume_removes_several_old_checkpoints(
    full: Path, base: Path, pictures: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    run = tmp_path / "run"
    shutil.copytree(full, run)
    more = [
        "--max_train_steps=8",
        "--checkpointing_steps=2",
        "--resume_from_checkpoint=checkpoint-4",
        "--checkpoints_total_limit=2",
        "--use_ema",
        "--seed=0",
    ]
    assert diffusers.main(FULL, flags(base, pictures, run, *more)) == 0
    assert checkpoints(run) == {"checkpoint-6", "checkpoint-8"}
    assert json.loads((run / "result.json").read_text())["step"] == 8
    assert picture(DiffusionPipeline.from_pretrained(run, safety_checker=None)).shape == (32, 32, 3)


def test_an_older_checkpoint_by_name_is_gone_on_from(
    full: Path, base: Path, pictures: Path, tmp_path: Path
) -> None:
    """From checkpoint-2 the same two steps are trained again, to the same bits."""
    run = tmp_path / "run"
    shutil.copytree(full, run)
    shutil.rmtree(run / "checkpoint-4")
    more = [
        "--max_train_steps=4",
        "--checkpointing_steps=2",
        "--resume_from_checkpoint=checkpoint-2",
        "--use_ema",
        "--seed=0",
    ]
    assert diffusers.main(FULL, flags(base, pictures, run, *more)) == 0
    assert checkpoints(run) == {"checkpoint-2", "checkpoint-4"}
    for name in (f"unet/{UNET}", f"unet_ema/{UNET}", "optimizer.safetensors"):
        assert atomic.digest_file(run / "checkpoint-4" / name) == atomic.digest_file(
            full / "checkpoint-4" / name
        )


def test_lora_leaves_one_file_with_the_names_that_pipelines_load(lora: Path, base: Path) -> None:
    from diffusers import DiffusionPipeline

    assert checkpoints(lora) == {"checkpoint-4", "checkpoint-6"}
    arrays = load_file(lora / "pytorch_lora_weights.safetensors")
    assert arrays and all(name.startswith("unet.") and "lora" in name for name in arrays)
    with safe_open(lora / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 4
    assert not (lora / "unet").exists() and not (lora / "model_index.json").exists()
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    before = picture(pipeline)
    pipeline.load_lora_weights(lora)
    after = picture(pipeline)
    assert after.shape == (32, 32, 3) and not np.array_equal(before, after)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(lora / "checkpoint-6")
    assert np.array_equal(picture(pipeline), after), "the newest checkpoint is the result"


def test_lora_goes_on_within_its_limit(
    lora: Path, base: Path, pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora, run)
    more = [
        "--max_train_steps=10",
        "--checkpointing_steps=2",
        "--resume_from_checkpoint=checkpoint-6",
        "--checkpoints_total_limit=2",
        "--seed=0",
    ]
    assert diffusers.main(LORA, flags(base, pictures, run, *more, "--num_validation_images=0")) == 0
    assert checkpoints(run) == {"checkpoint-8", "checkpoint-10"}
    before, after = (
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (lora, run)
    )
    assert before.keys() == after.keys() and any(
        not torch.equal(before[name], after[name]) for name in before
    )


def test_previews_and_the_scaled_learning_rate(base: Path, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = [
        "--max_train_steps=2",
        "--validation_prompts",
        "a red circle",
        "a blue circle",
        "--validation_epochs=1",
        "--train_batch_size=3",
    ]
    assert (
        diffusers.main(
            FULL, flags(base, pictures, run, *more, "--gradient_accumulation_steps=2", "--seed=0")
        )
        == 0
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["learning_rate"] for row in rows if "learning_rate" in row} == {5e-4 * 3 * 2}
    assert len(list((run / "previews").rglob("*.png"))) == 4  # first and last
    assert "a red circle" in (run / "README.md").read_text()


def test_the_script_under_accelerate_with_a_config_file(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    from accelerate.utils import write_basic_config

    write_basic_config(save_location=str(tmp_path / "default_config.yml"))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(tmp_path / "default_config.yml"),
    ]
    command = [
        *launch,
        str(SCRIPTS / f"{FULL}.py"),
        *flags(base, pictures, tmp_path / "run", "--max_train_steps=2", "--gradient_checkpointing"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(limner.__file__).parent.parent)}
    done = subprocess.run(
        command,
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "unet" / UNET).is_file() and (
        tmp_path / "run" / "scheduler" / "scheduler_config.json"
    ).is_file()
    assert checkpoints(tmp_path / "run") == {"checkpoint-2"}
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("texts", [False, True])
def test_sdxl_lora_files_have_the_names_that_diffusers_tests_look_for(
    sdxl: Path, pictures: Path, tmp_path: Path, texts: bool
) -> None:
    """A file that loads, whose keys begin with ``unet``, or with ``text_encoder`` where these
    learn; checkpoints up to the limit."""
    flags = [
        "--resolution=32",
        "--train_batch_size=1",
        "--max_train_steps=6",
        "--checkpointing_steps=2",
        "--checkpoints_total_limit=2",
        "--learning_rate=5e-4",
    ]
    common = [
        f"--pretrained_model_name_or_path={sdxl}",
        f"--train_data_dir={pictures}",
        f"--output_dir={tmp_path}",
        "--scale_lr",
        *flags,
    ]
    assert (
        diffusers.main(
            "train_text_to_image_lora_sdxl", [*common, *(["--train_text_encoder"] if texts else [])]
        )
        == 0
    )
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    for file in (
        tmp_path / "pytorch_lora_weights.safetensors",
        tmp_path / "checkpoint-6" / "pytorch_lora_weights.safetensors",
    ):
        with safe_open(file, "np") as opened:
            keys = list(opened.keys())
        assert all("lora" in key for key in keys)
        assert {key.split(".")[0] for key in keys} == (
            {"unet", "text_encoder", "text_encoder_2"} if texts else {"unet"}
        )


def test_sdxl_leaves_a_pipeline_folder(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    flags = [
        "--resolution=32",
        "--train_batch_size=2",
        "--max_train_steps=2",
        "--use_ema",
        "--proportion_empty_prompts=0.5",
        "--timestep_bias_strategy=later",
    ]
    assert (
        diffusers.main(
            "train_text_to_image_sdxl",
            [
                f"--pretrained_model_name_or_path={sdxl}",
                f"--train_data_dir={pictures}",
                f"--output_dir={tmp_path}",
                *flags,
            ],
        )
        == 0
    )
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file() and (
        tmp_path / "scheduler" / "scheduler_config.json"
    ).is_file()
    there = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert (
        there
        >= {
            "unet",
            "vae",
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
            "scheduler",
        }
        and (tmp_path / "model_index.json").is_file()
    )
