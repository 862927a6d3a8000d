"""Dropout masks are addresses: the right rate, independent of each other, the same bits wherever
they are made."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from limner.engines.dropout import keep_elements, make_keys, mix
from limner.engines.torch.dropout import AddressedDropout, Masks, replace_dropout

pytestmark = pytest.mark.frameworks

COUNT = 1 << 14
LAYERS = [f"unet.down_blocks.{i}.attn1.to_{name}.lora_dropout" for i in range(8) for name in "qkv"]
HASHES = mix(np.arange(COUNT, dtype=np.uint32)).view(np.int32)


def masks(seed: int, positions: int, layers: list[str], rate: float) -> np.ndarray:
    """Bool [layers, positions, COUNT]."""
    keys = make_keys(seed, np.arange(positions), layers)
    return np.stack([keep_elements(keys[:, i], HASHES, rate) for i in range(len(layers))])


def by_the_book(seed: int, position: int, layer: str, count: int, rate: float) -> list[bool]:
    """One mask with Python's own integers."""
    key, offset = (int(k) % 2**32 for k in make_keys(seed, np.array([position]), [layer])[0, 0])

    def hashed(n: int) -> int:
        n ^= n >> 16
        n = n * 0x21F0AAAD % 2**32
        n ^= n >> 15
        n = n * 0xD35A2D97 % 2**32
        return n ^ (n >> 15)

    out = []
    for i in range(count):
        value = (key * hashed(i) + offset) % 2**32
        signed = value - 2**32 if value >= 2**31 else value
        out.append(signed >= round(rate * 2**32) - 2**31)
    return out


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate(rate: float) -> None:
    """Of every mask within five of a binomial's deviations, of all together too; and their squares
    sum up to about as many as there are."""
    kept = masks(3, 20, LAYERS, rate).sum(-1).ravel()
    deviations = (kept - COUNT * (1 - rate)) / np.sqrt(COUNT * rate * (1 - rate))
    count = len(deviations)
    assert np.abs(deviations).max() < 5
    assert abs(deviations.sum()) / np.sqrt(count) < 4
    assert abs(np.square(deviations).sum() - count) / np.sqrt(2 * count) < 4


def correlations(one: np.ndarray, other: np.ndarray, rate: float) -> np.ndarray:
    """Between two masks each, in deviations of what chance gives."""
    spread = rate * (1 - rate)
    products = (one - (1 - rate)) * (other - (1 - rate))
    return products.sum(-1) / (spread * np.sqrt(COUNT))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_of_examples_layers_and_seeds_are_independent(rate: float) -> None:
    all_masks = masks(3, 20, LAYERS, rate).astype(np.float64)
    other_seed = masks(4, 20, LAYERS, rate).astype(np.float64)
    pairs = {
        "examples": [
            (all_masks[:, i], all_masks[:, j]) for i, j in itertools.combinations(range(20), 2)
        ],
        "layers": [(all_masks[i], all_masks[j]) for i, j in itertools.combinations(range(24), 2)],
        "seeds": [(all_masks, other_seed)],
        "neighbours": [(all_masks[..., :-1], all_masks[..., 1:])],
        "channels": [(all_masks[..., :-320], all_masks[..., 320:])],
    }
    for name, masked in pairs.items():
        found = np.concatenate([correlations(*pair, rate).ravel() for pair in masked])
        count = len(found)
        assert np.abs(found).max() < 5.5, name
        assert abs(found.sum()) / np.sqrt(count) < 4, name
        assert abs(np.square(found).sum() - count) / np.sqrt(2 * count) < 4, name


def test_elements_are_dropped_about_equally_often() -> None:
    """Over many examples, whatever their place in the example."""
    kept = masks(0, 400, LAYERS[:5], 0.25).sum((0, 1))
    deviations = (kept - 2000 * 0.75) / np.sqrt(2000 * 0.25 * 0.75)
    assert np.abs(deviations).max() < 5
    assert abs(np.square(deviations).sum() - COUNT) / np.sqrt(2 * COUNT) < 4


def test_the_keys_are_functions_of_their_address() -> None:
    """Neither of the other rows nor of the other layers; all of a seed and of a position counts."""
    whole = make_keys(5, np.array([7, 2**40, 9]), LAYERS)
    assert whole.shape == (3, 24, 2) and whole.dtype == np.int32 and (whole[..., 0] % 2 == 1).all()
    np.testing.assert_array_equal(make_keys(5, np.array([9]), LAYERS[3:5]), whole[2:, 3:5])
    keys = [
        make_keys(seed, np.array([position]), LAYERS)
        for seed in (5, 5 + 2**32, 6)
        for position in (0, 1, 2**32, 2**40)
    ]
    assert len(np.unique(np.concatenate(keys).reshape(-1, 2), axis=0)) == 12 * len(LAYERS)


SHAPES = [(3, 77, 5), (6, 11, 4), (3, 2, 5, 7), (3, 1)]


def in_torch(rate: float, keys: np.ndarray, x: np.ndarray) -> np.ndarray:
    shared = Masks()
    shared.layers, shared.keys = LAYERS, torch.tensor(keys)
    layer = AddressedDropout(rate, 2, shared)
    # More elements than are asked for may have been hashed before.
    shared.hash_elements(3)
    shared.hash_elements(1000)
    return layer(torch.tensor(x)).numpy()


def in_jax(rate: float, keys: np.ndarray, x: np.ndarray) -> np.ndarray:
    jax = pytest.importorskip("jax")
    from limner.engines.jax.dropout import AdapterDropout

    def apply(keys, x):
        return AdapterDropout("unet", rate, keys, tuple(LAYERS))("down_blocks.0.attn1.to_v.", x)

    return np.asarray(jax.jit(apply)(keys, x))


@pytest.mark.parametrize("compute", [in_torch, in_jax])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_engines_drop_the_same_elements(
    shape: tuple[int, ...], compute: Callable[[float, np.ndarray, np.ndarray], np.ndarray]
) -> None:
    """Three examples, once in two chunks each."""
    x, positions = np.random.default_rng(0).standard_normal(shape, np.float32), [4, 0, 2**33]
    keys = make_keys(2**63, np.array(positions), LAYERS)
    dropped = compute(0.3, keys, x)
    assert dropped.shape == x.shape and dropped.dtype == x.dtype
    rows = dropped.reshape(3, -1)
    for row, position in enumerate(positions):
        keep = by_the_book(2**63, position, LAYERS[2], rows.shape[1], 0.3)
        want = np.where(keep, x.reshape(3, -1)[row] / np.float32(0.7), 0)
        np.testing.assert_array_equal(rows[row] != 0, keep)
        np.testing.assert_allclose(rows[row], want, rtol=1e-6)


@pytest.mark.parametrize("compute", [in_torch, in_jax])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_mean_is_kept(
    rate: float, compute: Callable[[float, np.ndarray, np.ndarray], np.ndarray]
) -> None:
    """Over 4,000 examples, every element's within five deviations; all squares sum up to about as
    many as there are."""
    rows, width = 4000, 64
    x = np.random.default_rng(1).uniform(1, 2, width).astype(np.float32)
    keys = make_keys(6, np.arange(rows), LAYERS[:3])
    means = compute(rate, keys, np.tile(x, (rows, 1))).mean(0, dtype=np.float64)
    deviations = (means / x - 1) / np.sqrt(rate / (1 - rate) / rows)
    assert np.abs(deviations).max() < 5
    assert abs(np.square(deviations).sum() - width) / np.sqrt(2 * width) < 4


def test_dropout_modules_are_replaced() -> None:
    """By their names in files, where their rate is above 0; in evaluation nothing is dropped."""
    from peft import LoraConfig
    from transformers import CLIPTextConfig, CLIPTextModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    net = CLIPTextModel(CLIPTextConfig(**small, num_attention_heads=2))
    net.add_adapter(LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "fc1"]))
    net.extra = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.0))
    shared = replace_dropout({"text_encoder": net})
    layer = "text_encoder.text_model.encoder.layers.0"
    assert shared.layers == [
        f"{layer}.self_attn.q_proj.lora_dropout",
        f"{layer}.mlp.fc1.lora_dropout",
        "text_encoder.text_model.extra.0",
    ]
    kinds = [type(module) for module in net.modules() if "Dropout" in type(module).__name__]
    assert kinds.count(AddressedDropout) == 3 and kinds.count(torch.nn.Dropout) == 1
    shared.keys = torch.tensor(make_keys(0, np.arange(2), shared.layers))
    x = torch.ones(2, 50, dtype=torch.bfloat16)
    net.eval()
    assert torch.equal(net.extra(x), x)
    net.train()
    dropped = net.extra(x)
    assert dropped.dtype == torch.bfloat16 and set(dropped.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(dropped[0], dropped[1]) and torch.equal(dropped, net.extra(x))
