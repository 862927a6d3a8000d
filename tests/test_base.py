"""The base is found, checked before weights are read, and known by its bytes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Hub

from limner.base_model.open import open_base
from limner.config.schema import ModelSettings
from limner.errors import HubError, InputError
from limner.families import FAMILIES
from limner.training.resolve import settle_paths

SD = FAMILIES["sd"]


def copied(sd: Path, to: Path) -> Path:
    return Path(shutil.copytree(sd, to / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(base: Path | str, **settings: str) -> str:
    with pytest.raises(InputError) as caught:
        open_base(ModelSettings(base=str(base), **settings), SD)
    return str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield served


def test_a_local_folder_is_opened(sd: Path) -> None:
    base = open_base(ModelSettings(base=str(sd)), SD)
    assert (base.commit, base.name, base.component_folder("unet")) == (None, str(sd), sd / "unet")
    assert base.configs["vae"]["latent_channels"] == 4
    assert base.configs["scheduler"]["prediction_type"] == "epsilon"
    assert base.configs.model_index["_class_name"] == "StableDiffusionPipeline"
    assert base.weight_files("text_encoder") == [sd / "text_encoder" / "model.safetensors"]
    assert base.weight_files("unet") == [sd / "unet" / "diffusion_pytorch_model.safetensors"]


def test_the_fingerprint_is_of_the_bytes(sd: Path, tmp_path: Path) -> None:
    here, there = (
        open_base(ModelSettings(base=str(sd)), SD),
        open_base(ModelSettings(base=str(copied(sd, tmp_path))), SD),
    )
    known = {c: here.fingerprint(c) for c in SD.components}
    assert len(set(known.values())) == len(known)
    assert {c: there.fingerprint(c) for c in SD.components} == known
    assert (
        here.fingerprint("vae")
        != here.fingerprint("vae", "unet")
        == there.fingerprint("vae", "unet")
    )

    edit(there.folder / "unet" / "config.json", _name_or_path="/somebody/else")
    edit(there.folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    weights = there.folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    tokens = there.folder / "tokenizer" / "merges.txt"
    tokens.write_text(tokens.read_text() + "x y\n")
    changed = open_base(ModelSettings(base=str(there.folder)), SD)
    assert {c for c in SD.components if changed.fingerprint(c) != known[c]} == {
        "vae",
        "scheduler",
        "tokenizer",
    }


def test_variants_and_shards(sd: Path, sd_fp16: Path, tmp_path: Path) -> None:
    assert "only variants: fp16. Pass model.variant=fp16" in refusal(sd_fp16)
    base = open_base(ModelSettings(base=str(sd_fp16), variant="fp16"), SD)
    assert [p.name for p in base.weight_files("vae")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    shards = base.weight_files("unet")
    assert len(shards) == int(shards[0].name.split("-of-")[1][:5]) > 1
    assert "no weights of variant 'fp16'" in refusal(sd, variant="fp16")

    mixed = copied(sd, tmp_path)
    shutil.copy(sd_fp16 / "vae" / "diffusion_pytorch_model.fp16.safetensors", mixed / "vae")
    both = open_base(ModelSettings(base=str(mixed), variant="fp16"), SD)
    assert [p.name for c in ("vae", "text_encoder") for p in both.weight_files(c)] == [
        "diffusion_pytorch_model.fp16.safetensors",
        "model.safetensors",
    ]
    assert both.fingerprint("vae") != open_base(ModelSettings(base=str(mixed)), SD).fingerprint(
        "vae"
    )

    short = Path(shutil.copytree(sd_fp16, tmp_path / "short"))
    (short / "unet" / shards[1].name).unlink()
    assert f"unet: {len(shards) - 1} of {len(shards)} weight files" in refusal(
        short, variant="fp16"
    )


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **changes)


def pickled(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.bin"
    )


def quantized(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "unet-q4.gguf"
    )


def cut(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def pointer(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    )


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (unlink("model_index.json"), ["has no model_index.json", "diffusers layout"]),
        (
            change("model_index.json", _class_name="StableDiffusionXLPipeline"),
            [
                "is of a StableDiffusionXLPipeline",
                "'sd' needs a StableDiffusionPipeline",
                "model.family",
            ],
        ),
        (
            change("model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
            ["unet is UNet3DConditionModel", "UNet2DConditionModel is expected"],
        ),
        (
            change("model_index.json", text_encoder=["transformers", "FlaxCLIPTextModel"]),
            ["text_encoder is FlaxCLIPTextModel", "CLIPTextModel is expected"],
        ),
        (change("model_index.json", unet=["my_unet", "MyUNet"]), ["my_unet.MyUNet", "never run"]),
        (change("model_index.json", _class_name=["pipeline", "Mine"]), ["StableDiffusionPipeline"]),
        (
            change("text_encoder/config.json", auto_map={"AutoModel": "evil.Model"}),
            ["auto_map", "never run"],
        ),
        (
            change("model_index.json", vae=[None, None]),
            ["vae is missing", "AutoencoderKL is expected"],
        ),
        (change("model_index.json", scheduler=[None, None]), ["scheduler is missing"]),
        (
            change("unet/config.json", in_channels=9),
            ["in_channels is 9", "latent_channels is 4", "inpainting"],
        ),
        (
            change("unet/config.json", cross_attention_dim=768),
            ["cross_attention_dim is 768", "hidden_size is 32"],
        ),
        (change("unet/config.json", addition_embed_type="text_time"), ["addition_embed_type"]),
        (
            lambda folder: (folder / "model_index.json").write_text("{"),
            ["model_index.json: not JSON"],
        ),
        (unlink("vae/config.json"), ["vae/config.json", "complete?"]),
        (unlink("scheduler/scheduler_config.json"), ["scheduler_config.json"]),
        (unlink("unet/diffusion_pytorch_model.safetensors"), ["unet: no safetensors weights"]),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), ["tokenizer/tokenizer_config.json"]),
        (
            lambda folder: [
                (folder / "tokenizer" / n).unlink() for n in ("tokenizer.json", "merges.txt")
            ],
            ["neither tokenizer.json nor vocab.json and merges.txt"],
        ),
        (pickled, ["vae", "diffusion_pytorch_model.bin", "Pickles are not read", "safetensors"]),
        (quantized, ["unet-q4.gguf", "quantized"]),
        (cut, ["model.safetensors", "cut short"]),
        (cut_header, ["model.safetensors: not a whole safetensors file (100 bytes)"]),
        (pointer, ["Git LFS pointer", "git lfs pull"]),
    ],
)
def test_refusals(
    sd: Path, tmp_path: Path, spoil: Callable[[Path], object], expected: list[str]
) -> None:
    folder = copied(sd, tmp_path)
    spoil(folder)
    said = refusal(folder)
    assert [part for part in expected if part not in said] == []
    assert (
        said.endswith(".")
        or said.endswith("?")
        or "none of this family" in said
        or "same model" in said
        or "text-to-image base" in said
    )


def test_names_that_cannot_be_a_base(sd: Path, tmp_path: Path) -> None:
    assert "no such folder, and not a name on the Hub" in refusal(tmp_path / "nowhere")
    assert "no such folder" in refusal("plain-word")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert (
        "from_single_file" in (said := refusal(tmp_path / "model.ckpt"))
        and "save_pretrained" in said
    )
    (tmp_path / "model.gguf").write_bytes(b"x")
    assert "quantized" in refusal(tmp_path / "model.gguf")
    assert "model.revision" in refusal(sd, revision="fp16")
    assert "model.trained_revision" in refusal(sd, trained_revision="fp16")


@pytest.mark.parametrize("setting", ["base", "vae"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    names = {"models/none": "no such folder, though there is", "x/y.safetensors": "no such file"}
    for name, message in names.items():
        said = refusal(name) if setting == "base" else refusal(sd, vae=name)
        assert said.startswith(f"model.{setting}: {name}: {message}"), said


def test_a_base_is_remembered_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    given = ModelSettings("models", vae="owner/vae", other_stage="./models", cache_dir="downloads")
    assert settle_paths(given) == ModelSettings(
        str(tmp_path / "models"),
        vae="owner/vae",
        other_stage=str(tmp_path / "models"),
        cache_dir=str(tmp_path / "downloads"),
    )


def test_a_hub_repository_is_fetched_once_and_only_what_is_needed(
    sd: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(sd, tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"other variant")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"single file")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# card\n")
    hub.add("someone/tiny-sd", folder)
    model = ModelSettings(base="someone/tiny-sd", cache_dir=str(tmp_path / "cache"))
    base = open_base(model, SD)
    commit = hub.repos[("model", "someone/tiny-sd")].commit("main")
    assert (base.name, base.commit, base.folder.name) == ("someone/tiny-sd", commit, commit)
    assert base.read_card_metadata() == {"license": "creativeml-openrail-m"}
    assert base.fingerprint(*SD.components) == open_base(
        ModelSettings(base=str(sd)), SD
    ).fingerprint(*SD.components)
    fetched = {
        path.split(f"/{commit}/")[1]
        for method, path, _ in hub.requests
        if method == "GET" and "/resolve/" in path
    }
    there = {p.relative_to(sd).as_posix() for p in sd.rglob("*") if p.is_file()}
    assert fetched == there | {"README.md"}
    before = len(hub.requests)
    open_base(model, SD)
    assert not [r for r in hub.requests[before:] if "/resolve/" in r[1]]

    hub.answer("", 500)
    assert open_base(model, SD).commit == commit
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert open_base(model, SD).fingerprint("unet") == base.fingerprint("unet")
    with pytest.raises(
        HubError, match=r"cannot be reached at http://127.0.0.1:9, .*local cache does not have"
    ):
        open_base(ModelSettings(base="someone/tiny-sd", cache_dir=str(tmp_path / "empty")), SD)


def test_revisions_and_variants_of_a_repository(
    sd: Path, sd_fp16: Path, hub: Hub, tmp_path: Path
) -> None:
    other = copied(sd, tmp_path)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    hub.add("someone/tiny-sd", sd)
    hub.add("someone/tiny-sd", other, revision="non-ema")
    hub.add("someone/half", sd_fp16)
    cache = {"cache_dir": str(tmp_path / "cache")}
    main = open_base(ModelSettings(base="someone/tiny-sd", **cache), SD)
    moved = open_base(ModelSettings(base="someone/tiny-sd", revision="non-ema", **cache), SD)
    mixed = open_base(
        ModelSettings(base="someone/tiny-sd", trained_revision="non-ema", **cache), SD
    )
    assert main.commit == mixed.commit != moved.commit
    assert mixed.fingerprint("unet") == moved.fingerprint("unet") != main.fingerprint("unet")
    assert mixed.fingerprint("vae") == main.fingerprint("vae")
    assert (
        open_base(
            ModelSettings(base="someone/tiny-sd", revision=str(moved.commit), **cache), SD
        ).folder
        == moved.folder
    )
    with pytest.raises(HubError, match="no revision nowhere"):
        open_base(ModelSettings(base="someone/tiny-sd", revision="nowhere", **cache), SD)

    half = open_base(ModelSettings(base="someone/half", variant="fp16", **cache), SD)
    assert half.fingerprint("unet") == open_base(
        ModelSettings(base=str(sd_fp16), variant="fp16"), SD
    ).fingerprint("unet")
    before = len(hub.requests)
    said = refusal("someone/half", variant="fp61", cache_dir=str(tmp_path / "third"))
    assert "only variants: fp16" in said
    said = refusal("someone/tiny-sd", variant="fp61", cache_dir=str(tmp_path / "third"))
    assert "someone/tiny-sd has no weights of variant 'fp61', only plain ones" in said
    assert "Pass model.variant=fp16" in refusal("someone/half", cache_dir=str(tmp_path / "second"))
    assert not [path for _, path, _ in hub.requests[before:] if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", "access is gated. Accept its terms"),
        (401, "RepoNotFound", "no such repository, or it is private"),
        (404, "RepoNotFound", "no such repository"),
        (403, "", "403"),
        (429, "", "429"),
        (500, "", "500"),
    ],
)
def test_the_hub_refuses(
    sd: Path, hub: Hub, tmp_path: Path, status: int, code: str, expected: str
) -> None:
    hub.add("someone/tiny-sd", sd)
    hub.answer("GET /api/models/someone/tiny-sd", status, code=code)
    with pytest.raises(HubError) as caught:
        open_base(ModelSettings(base="someone/tiny-sd", cache_dir=str(tmp_path)), SD)
    assert (
        expected in str(caught.value)
        and "someone/tiny-sd" in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_wrong_model_is_refused_before_its_weights_are_fetched(
    sd: Path, hub: Hub, tmp_path: Path
) -> None:
    folder = copied(sd, tmp_path)
    edit(folder / "unet" / "config.json", in_channels=9)
    hub.add("someone/inpaint", folder)
    assert "in_channels is 9" in refusal("someone/inpaint", cache_dir=str(tmp_path / "cache"))
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    hub.add("someone/xl", folder)
    assert "StableDiffusionXLPipeline" in refusal("someone/xl", cache_dir=str(tmp_path / "cache"))
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


def test_another_autoencoder_on_the_hub(
    sdxl: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository that is an autoencoder, or one that has one in ``vae/``; of either the
    configuration and the weights are fetched, nothing else."""
    alone = shutil.copytree(sdxl / "vae", tmp_path / "alone")
    (alone / "sdxl_vae.safetensors").write_bytes(b"a single file for other programs")
    hub.add("someone/vae", alone)
    hub.add("someone/xl", sdxl)
    for name, inner in (("someone/vae", ""), ("someone/xl", "vae/")):
        before = len(hub.requests)
        base = open_base(
            ModelSettings(
                base=str(sdxl), family="sdxl", vae=name, cache_dir=str(tmp_path / "cache")
            ),
            FAMILIES["sdxl"],
        )
        fetched = {
            path.split("/", 5)[5]
            for method, path, _ in hub.requests[before:]
            if method == "GET" and "/resolve/" in path
        }
        assert fetched == {f"{inner}config.json", f"{inner}diffusion_pytorch_model.safetensors"}, (
            fetched
        )
        assert (
            base.component_folder("vae") != sdxl / "vae"
            and base.component_folder("unet") == sdxl / "unet"
        )
        assert base.fingerprint("vae") == open_base(
            ModelSettings(base=str(sdxl), family="sdxl"), FAMILIES["sdxl"]
        ).fingerprint("vae")
    monkeypatch.setenv(
        "HF_ENDPOINT", "http://127.0.0.1:9"
    )  # nobody listens there: the cache serves
    again = open_base(
        ModelSettings(
            base=str(sdxl), family="sdxl", vae="someone/vae", cache_dir=str(tmp_path / "cache")
        ),
        FAMILIES["sdxl"],
    )
    assert again.weight_files("vae")[0].name == "diffusion_pytorch_model.safetensors"
    with pytest.raises(
        InputError, match=r"model.vae: no/such/place: no such folder, and not a name on the Hub"
    ):
        open_base(
            ModelSettings(base=str(sdxl), family="sdxl", vae="no/such/place"), FAMILIES["sdxl"]
        )


@pytest.mark.frameworks
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_network_that_gives_more_than_latents_is_refused(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "base")
    network = "transformer" if family == "sd3" else "unet"
    edit(folder / network / "config.json", out_channels=32)
    with pytest.raises(InputError, match=f"{network}: out_channels is 32, the autoencoder's"):
        open_base(ModelSettings(str(folder), family), FAMILIES[family])
