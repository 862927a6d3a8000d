"""What diffusers' guides tell people to type works word for word: only steps, resolution,
precision, device and the tracker are others here."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import warm
import worker
from hub_server import Hub

import limner
from limner.compat import diffusers
from limner.data import contact_sheet

pytestmark = pytest.mark.frameworks

SCRIPTS, SOURCE = Path(__file__).parent.parent / "scripts", str(Path(limner.__file__).parent.parent)
MODEL, DATA = "stable-diffusion-v1-5/stable-diffusion-v1-5", "lambdalabs/naruto-blip-captions"
TOKEN = "hf_thisIsASecret"
HERE = {
    "512": "32",
    "15000": "2",
    '"/sddata/finetune/lora/naruto"': '"lora/naruto"',
    "wandb": "tensorboard",
}

GUIDES = Path(__file__).parent / "data" / "guides"
FULL, LORA = ((GUIDES / f"{name}.sh").read_text() for name in ("text2image", "lora"))


@pytest.fixture(scope="module")
def hub(base: Path, pictures: Path) -> Iterator[Hub]:
    """A Hub that has the guides' model and data set."""
    with Hub(token=TOKEN) as served:
        served.add(MODEL, base)
        served.add(DATA, pictures, kind="dataset")
        yield served


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that JAX compiles sooner: one level, whose middle alone looks at the caption."""
    folder = tmp_path_factory.mktemp("shallow") / "sd"
    return tiny.stable_diffusion(folder, channels=(64,), attention=False)


@pytest.fixture(scope="module")
def place(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands are typed: it holds the scripts."""
    folder = tmp_path_factory.mktemp("place")
    for script in SCRIPTS.glob("*.py"):
        shutil.copy(script, folder)
    return folder


@pytest.fixture(scope="module")
def cold_shell(hub: Hub, place: Path) -> dict[str, str]:
    """The environment of a shell in which commands start as they do everywhere."""
    environment = hub.environment(place / "home", token=TOKEN)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return environment | {"PATH": path, "PYTHONPATH": SOURCE}


@pytest.fixture(scope="module")
def warm_shell(cold_shell: dict[str, str], place: Path) -> Iterator[dict[str, str]]:
    """That of one in which the frameworks need not be imported anew."""
    with warm.open_shell(place / "commands", cold_shell) as environment:
        yield environment


def type_in(command: str, shell: dict[str, str], place: Path, precision: str = "no") -> str:
    """Run a guide's command in a shell; returns what it said. Halves are slow without a GPU."""
    for theirs, ours in {**HERE, "fp16": precision}.items():
        command = command.replace(theirs, ours)
    done = subprocess.run(
        ["bash", "-ec", command],
        env=shell,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr
    return done.stderr


def told_nowhere(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), (
            f"{path} holds the token"
        )


def loss(run: Path) -> float:
    """The mean over the run."""
    [row] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(row["loss"])


def test_the_guide_s_command_and_its_snippet(
    hub: Hub, cold_shell: dict[str, str], place: Path
) -> None:
    said = type_in(FULL, cold_shell, place, "fp16")
    run = place / "sd-naruto-model"
    assert "xFormers cannot run here" in said and "PyTorch's own" in said
    settings = json.loads((run / "config.json").read_text())
    assert (
        settings["engine"]["precision"],
        settings["train"]["accumulation_steps"],
        settings["model"]["base"],
    ) == ("fp16", 4, MODEL)
    assert (run / "checkpoint-2" / "scaler.safetensors").is_file(), (
        "fp16 scales its loss, on a CPU too"
    )
    state = json.loads((run / "checkpoint-2" / "state.json").read_text())
    assert (state["batch_size"], state["world_size"], state["records"]) == (4, 1, 12)
    received = hub.received("tester/sd-naruto-model")
    result = json.loads((run / "result.json").read_text())["files"]
    assert (
        set(received) == {*result, "README.md"} and len(hub.pushed["tester/sd-naruto-model"]) == 1
    )
    assert all(received[name] == (run / name).read_bytes() for name in received)
    assert (
        f"base_model: {MODEL}" in received["README.md"].decode()
        and f"- {DATA}" in received["README.md"].decode()
    )
    assert 'from_pretrained("tester/sd-naruto-model")' in received["README.md"].decode(), (
        "the card's snippet works as it stands"
    )
    told_nowhere(run)

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        str(run), dtype=torch.float32, use_safetensors=True
    ).to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(prompt="yoda", num_inference_steps=2).images[0]
    image.save(place / "yoda-naruto.png")
    assert image.size == (32, 32) and np.asarray(image).std() > 0


def test_the_lora_guide_s_command_and_its_snippet(
    hub: Hub, warm_shell: dict[str, str], place: Path, base: Path
) -> None:
    type_in(LORA, warm_shell, place)
    run = place / "lora" / "naruto"
    assert not (run / "checkpoint-2" / "scaler.safetensors").exists()
    assert len(list((run / "previews").rglob("*.png"))) == 8  # first and last
    assert list((run / "logs").rglob("events.out.tfevents.*"))
    received = hub.received("tester/naruto-lora")
    assert set(received) == {"pytorch_lora_weights.safetensors", "README.md", "preview.png"}
    assert (
        received["pytorch_lora_weights.safetensors"]
        == (run / "pytorch_lora_weights.safetensors").read_bytes()
    )
    told_nowhere(run)

    from diffusers import AutoPipelineForText2Image

    pipeline = AutoPipelineForText2Image.from_pretrained(base, dtype=torch.float32).to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for adapted in (False, True):
        if adapted:
            pipeline.load_lora_weights(str(run), weight_name="pytorch_lora_weights.safetensors")
        drawn.append(
            pipeline(
                "A naruto with blue eyes",
                num_inference_steps=1,
                output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images[0]
        )
    assert drawn[0].shape == (32, 32, 3) and not np.array_equal(*drawn)


def test_the_other_commands(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One's own pictures, Min-SNR, checkpoints and going on from one, in this process."""
    monkeypatch.chdir(tmp_path)
    common = f"""--pretrained_model_name_or_path={base} --train_data_dir={pictures}
      --use_ema --resolution=32 --center_crop --random_flip --train_batch_size=1
      --gradient_accumulation_steps=4 --gradient_checkpointing --learning_rate=1e-05
      --max_grad_norm=1 --lr_scheduler=constant --lr_warmup_steps=0
      --output_dir=sd-naruto-model --seed=1""".split()
    assert (
        diffusers.main(
            "train_text_to_image",
            [*common, "--max_train_steps=4", "--snr_gamma=5.0", "--checkpointing_steps=2"],
        )
        == 0
    )
    run = tmp_path / "sd-naruto-model"
    weighed = loss(run)
    whole = (run / "checkpoint-4" / "unet_ema" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert json.loads((run / "config.json").read_text())["objective"]["min_snr"] == 5.0
    shutil.rmtree(run / "checkpoint-4")
    again = [
        *common,
        "--max_train_steps=4",
        "--snr_gamma=5.0",
        "--checkpointing_steps=2",
        "--resume_from_checkpoint=checkpoint-2",
    ]
    assert diffusers.main("train_text_to_image", again) == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().err
    assert (
        run / "checkpoint-4" / "unet_ema" / "diffusion_pytorch_model.safetensors"
    ).read_bytes() == whole
    assert (
        diffusers.main(
            "train_text_to_image", [*common, "--max_train_steps=4", "--output_dir=plain"]
        )
        == 0
    )
    assert weighed < loss(tmp_path / "plain") * 0.99, "Min-SNR lowers the weight of what is easy"


def flax_inference(model: str, place: Path, environment: dict[str, str]) -> np.ndarray:
    """What the Flax guide draws when its snippet is typed in a folder, where PyTorch, diffusers and
    transformers cannot be imported."""
    code = (
        "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None)\n"
        + (GUIDES / "flax_inference.py").read_text()
    )
    command, environment = (
        [sys.executable, "-c", code, model, "yoda-flax.png"],
        environment | {"PYTHONPATH": SOURCE},
    )
    done = subprocess.run(
        command,
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return contact_sheet.read_picture(place / "yoda-flax.png")


def test_the_flax_guide_s_commands_and_their_snippet(
    hub: Hub,
    cold_shell: dict[str, str],
    warm_shell: dict[str, str],
    place: Path,
    shallow: Path,
    tmp_path: Path,
) -> None:
    """From weights of torch's and from an old Flax base, the same numbers; a push; and what comes
    out is stock diffusers'."""
    from diffusers import StableDiffusionPipeline

    old = tiny.as_flax(shallow, tmp_path / "flax")
    hub.add("runwayml/stable-diffusion-v1-5", shallow)
    hub.add("duongna/stable-diffusion-v1-4-flax", old)
    for name, mine, shell in (
        ("flax", "flax-torch-model", cold_shell),
        ("readme_flax", "flax-msgpack-model", warm_shell),
    ):
        command = (
            (GUIDES / f"{name}.sh")
            .read_text()
            .replace("sd-naruto-model", mine)
            .replace("--max_grad_norm=1", "--from_pt")
        )
        said = type_in(command, shell, place)
        assert "--from_pt: weights are read from safetensors files as they are" in said
        settings = json.loads((place / mine / "config.json").read_text())
        assert (
            settings["engine"]["kind"],
            settings["train"]["batch_size"],
            settings["data"]["resample"],
        ) == ("jax", None, "bilinear")
        pipeline = StableDiffusionPipeline.from_pretrained(place / mine)
        pipeline.set_progress_bar_config(disable=True)
        assert np.asarray(pipeline("yoda", num_inference_steps=2).images[0]).std() > 0
    losses = [loss(place / mine) for mine in ("flax-torch-model", "flax-msgpack-model")]
    assert losses[0] == losses[1]
    assert "unet/diffusion_pytorch_model.safetensors" in hub.received("tester/flax-torch-model")
    told_nowhere(place / "flax-torch-model")
    assert flax_inference("flax-torch-model", place, cold_shell).std() > 1


@pytest.mark.soak
def test_the_flax_guide_s_snippet_on_eight_devices(shallow: Path, tmp_path: Path) -> None:
    """Weights on every device, prompts and keys divided, one compiled call."""
    assert flax_inference(str(shallow), tmp_path, {**os.environ, **worker.devices(8)}).std() > 1


KANDINSKY = "kandinsky-community/kandinsky-2-2"
INFERENCE = """
import numpy as np, torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "height": 32, "width": 32}
    how |= {"output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe(prompt="A robot naruto, 4k photo", **how).images[0]

plain = draw(AutoPipelineForText2Image.from_pretrained("DECODER"))
decoder = draw(AutoPipelineForText2Image.from_pretrained("kandi2-decoder-naruto-model"))
components = DiffusionPipeline.from_pretrained("kandi2-prior-naruto-model").components
components = {"prior_" + k: v for k, v in components.items()}
prior = draw(AutoPipelineForText2Image.from_pretrained("DECODER", **components))
both = draw(AutoPipelineForText2Image.from_pretrained("kandi2-decoder-naruto-model", **components))
pushed = draw(AutoPipelineForText2Image.from_pretrained("tester/kandi2-decoder-naruto-model"))
adapted = AutoPipelineForText2Image.from_pretrained("DECODER")
file = "pytorch_lora_weights.safetensors"
adapted.unet.load_lora_adapter("kandi22-decoder-naruto-lora", prefix="unet", weight_name=file)
pictures = [plain, decoder, prior, both, draw(adapted)]
assert all(np.isfinite(p).all() and p.shape == (32, 32, 3) for p in pictures)
assert all(not np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
assert np.array_equal(pushed, decoder)
"""


def test_kandinsky_s_guide(
    hub: Hub, warm_shell: dict[str, str], kandinsky: Path, place: Path, tmp_path: Path
) -> None:
    """Decoder, prior and LoRA, pushed, and used as the guide uses them; the decoder's folder finds
    its prior by the card."""
    decoder = tmp_path / "decoder"
    shutil.copytree(kandinsky / "decoder", decoder)
    (decoder / "README.md").write_text(
        f"---\nprior:\n- {KANDINSKY}-prior\ntags:\n- kandinsky\nlicense: apache-2.0\n---\n"
    )
    hub.add(f"{KANDINSKY}-decoder", decoder)
    hub.add(f"{KANDINSKY}-prior", kandinsky / "prior")
    for name, precision in (
        ("kandinsky_decoder", "fp16"),
        ("kandinsky_prior", "no"),
        ("kandinsky_lora_decoder", "no"),
    ):
        command = (
            (GUIDES / f"{name}.sh")
            .read_text()
            .replace("768", "32")
            .replace("=1e-0", "=3e-0")
            .replace("--num_train_epochs=100", "--max_train_steps=2")
        )
        type_in(command, warm_shell, place, precision)
    card = hub.received("tester/kandi2-decoder-naruto-model")["README.md"].decode()
    assert f"prior:\n- {KANDINSKY}-prior" in card and f"base_model: {KANDINSKY}-decoder" in card
    assert "pytorch_lora_weights.safetensors" in hub.received("tester/kandi22-decoder-naruto-lora")
    assert (
        "captions are not read" not in card
        and (place / "kandi2-prior-naruto-model" / "preview.png").is_file()
    )
    told_nowhere(place / "kandi2-decoder-naruto-model")
    (place / "inference.py").write_text(INFERENCE.replace("DECODER", f"{KANDINSKY}-decoder"))
    type_in("python inference.py", warm_shell, place)
