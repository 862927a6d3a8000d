"""Stable Diffusion as a record of functions, and where its state lies in a checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limner.config import toml
from limner.config.schema import AdapterSettings, Config
from limner.errors import LimnerError
from limner.families import FAMILIES
from limner.protocols import BaseConfigs
from limner.storage import checkpoint, layout
from limner.storage.run_state import RunState

SD = FAMILIES["sd"]
COMPONENTS: dict[str, dict[str, Any]] = {
    "unet": {"in_channels": 4, "cross_attention_dim": 768},
    "vae": {"latent_channels": 4, "scaling_factor": 0.18215},
    "text_encoder": {"hidden_size": 768},
}
CONFIGS = BaseConfigs({}, COMPONENTS)


def test_clean_is_a_scaled_draw_from_the_posterior() -> None:
    """As diffusers' ``latent_dist.sample() * scaling_factor`` with the same normal numbers."""
    mean, std, normal = np.random.default_rng(0).standard_normal((3, 2, 4, 3, 3), np.float32)
    made = SD.images.clean_latents({"mean": mean, "std": np.abs(std)}, CONFIGS, normal)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, (mean + np.abs(std) * normal) * 0.18215, rtol=1e-6)
    np.testing.assert_allclose(
        SD.images.clean_latents(
            {"mean": mean, "std": std * 0}, BaseConfigs({}, {"vae": {}}), normal
        ),
        mean * 0.18215,
        rtol=1e-6,
    )
    assert set(SD.images.latent_features) == {"mean", "std"} and SD.network.enter(
        1, 2, {"context": 3, "x0": 1}
    ) == {"sample": 1, "timestep": 2, "encoder_hidden_states": 3}


def test_a_plain_base_fits() -> None:
    assert SD.incompatibilities(CONFIGS) == []
    unet = {"in_channels": 4, "cross_attention_dim": [768, 768]}
    assert SD.incompatibilities(BaseConfigs({}, COMPONENTS | {"unet": unet})) == []


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        ({"in_channels": 9}, "in_channels is 9, the autoencoder's latent_channels is 4"),
        ({"out_channels": 8}, "out_channels is 8, the autoencoder's latent_channels is 4"),
        (
            {"cross_attention_dim": 1024},
            "cross_attention_dim is 1024, the text encoder's hidden_size is 768",
        ),
        ({"cross_attention_dim": [768, 1024]}, "not from the same model"),
        (
            {"addition_embed_type": "text_time"},
            "conditioned on more than the caption (addition_embed_type)",
        ),
    ],
)
def test_misfits_are_named(unet: dict, words: str) -> None:
    components = COMPONENTS | {"unet": COMPONENTS["unet"] | unet}
    (said,) = SD.incompatibilities(BaseConfigs({}, components))
    assert said.startswith("unet: ") and words in said


def test_every_fault_has_an_exit_code_of_its_own() -> None:
    codes = {cls.__name__: cls.code for cls in LimnerError.__subclasses__()}
    assert codes == {
        "InputError": 2,
        "Stopped": 3,
        "NonFiniteError": 4,
        "DiskError": 5,
        "HubError": 6,
        "IntegrityError": 7,
        "LockedError": 8,
    }


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("ema", [False, True])
def test_a_snapshot_comes_back_and_lies_where_diffusers_looks(
    tmp_path: Path, kind: str, ema: bool
) -> None:
    draws = np.random.default_rng(0)
    name = "unet.down.attn.to_q.lora_A.weight" if kind == "lora" else "conv_in.weight"
    groups = {
        group: {name: draws.standard_normal((3, 2), np.float32)}
        for group in ("model", "ema", "optimizer")
    }
    groups["optimizer"]["step"] = np.array(7.0, np.float32)
    if not ema:
        del groups["ema"]
    cfg = toml.build(Config, {"adapter": {"kind": kind, "rank": 3}})
    path = layout.save_groups(
        tmp_path,
        9,
        iter(groups.items()),
        RunState({}, 1, 2, 1, 3, [], "data", "base", "random", "2.0"),
        cfg,
        SD,
        {"_class_name": "UNet2DConditionModel"},
    )
    found = checkpoint.open_checkpoint(path)
    read = layout.array_reader(found, cfg.adapter, SD)
    for group, arrays in groups.items():
        assert read(group).keys() == arrays.keys()
        for key, array in arrays.items():
            assert (
                read(group)[key].tobytes() == array.tobytes()
                and read(group)[key].shape == array.shape
            )
    assert layout.result_group(found, cfg.adapter, SD) == ("ema" if ema else "model")
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    if kind == "lora":
        expected = {"pytorch_lora_weights.safetensors"} | (
            {"ema/pytorch_lora_weights.safetensors"} if ema else set()
        )
        assert list(found.arrays("pytorch_lora_weights.safetensors")) == [name]
    else:
        folders = ["unet", "unet_ema"] if ema else ["unet"]
        expected = {
            f"{folder}/{file}"
            for folder in folders
            for file in ("config.json", "diffusion_pytorch_model.safetensors")
        }
        assert json.loads((path / "unet" / "config.json").read_text()) == {
            "_class_name": "UNet2DConditionModel"
        }
    assert names == expected | {"optimizer.safetensors", "state.json", "MANIFEST.json"}


def test_lora_metadata_says_rank_and_alpha() -> None:
    for adapt, alpha in (
        (AdapterSettings(kind="lora", rank=8), 8),
        (AdapterSettings(kind="lora", rank=8, alpha=16.0), 16.0),
    ):
        said = json.loads(layout.lora_header(adapt, SD)["lora_adapter_metadata"])
        assert (said["unet.r"], said["unet.lora_alpha"], said["unet.target_modules"]) == (
            8,
            alpha,
            ["to_k", "to_out.0", "to_q", "to_v"],
        )
