"""A cache may save time; it may never change a number: cached equals uncached to the bit, although
encoders feel the shape of a batch."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moments
import numpy as np
import pytest

from limner.config import toml
from limner.config.schema import Config
from limner.errors import DiskError, InputError
from limner.families import FAMILIES
from limner.features import caches, encoder
from limner.features.encoder import FeatureEncoder, ImageRequest
from limner.features.store import DiskStore, MemoryStore

SD = FAMILIES["sd"]


class Sensitive:
    """Encoders whose last bits depend on how many examples they see, like those of every
    framework."""

    def __init__(self) -> None:
        self.shapes: list[tuple[str, int]] = []
        self.seen: list[str] = []

    def encode_vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.shapes.append((name, len(pixels)))
        mean = pixels[:, :, ::4, ::4] * np.float32(1 + len(pixels) * 1e-6)
        return mean, np.abs(mean) + 1

    def list_token_ids(self, tokenizer: str, texts: list[str]) -> list[list[int]]:
        self.seen += [text for text in texts if text]
        return [[sum(map(ord, text))] * 3 if text else [] for text in texts]

    def pad_token(self, tokenizer: str) -> int:
        return 0

    def max_tokens(self, tokenizer: str) -> int:
        return 3

    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        self.shapes.append((name, len(ids)))
        states = np.repeat(ids[:, :, None] * (1 + len(ids) * 1e-6), 2, axis=2).astype(np.float32)
        return states, states[:, 0]


def square(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)


def requests(
    numbers: Sequence[int], cached: Callable[[int], bool] = lambda i: True
) -> list[ImageRequest]:
    return [
        ImageRequest(f"key {i}" if cached(i) else None, (8, 8), lambda i=i: [square(i)])
        for i in numbers
    ]


def encoded(folder: Path | None, parts: Sensitive, batch: int = 4) -> FeatureEncoder:
    stores = (
        (None, None)
        if folder is None
        else (
            DiskStore(folder / "picture-x", lambda text: None),
            DiskStore(folder / "caption-x", lambda text: None),
        )
    )
    return FeatureEncoder(SD, lambda: parts, *stores, batch, text_batch=batch)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (
            a[name].dtype == b[name].dtype == np.float32
            and a[name].shape == b[name].shape
            and a[name].tobytes() == b[name].tobytes()
        )


CAPTIONS = ["a red circle", "", "ein grüner Kreis", "x"]


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2, 3], [5, 3, 1, 5, 6, 0], list(range(9))])
def test_cached_equals_uncached_to_the_bit(tmp_path: Path, numbers: list[int]) -> None:
    """However the cache was filled, and however the batch is put together."""
    plain = encoded(None, Sensitive())
    images, texts = (
        plain.image_features(requests(numbers)),
        plain.text_features([CAPTIONS[i % 4] for i in numbers]),
    )
    cached = encoded(tmp_path, Sensitive())
    cached.fill_images(requests([6, 0, 8]), lambda: None)
    cached.fill_images(requests(range(9)), lambda: None)
    cached.fill_texts(CAPTIONS, lambda: None)
    used = Sensitive()
    again = encoded(tmp_path, used)
    equal(again.image_features(requests(numbers)), images)
    equal(again.text_features([CAPTIONS[i % 4] for i in numbers]), texts)
    assert (
        used.shapes == []
        and not again.is_incomplete(requests(numbers), CAPTIONS)
        and again.is_incomplete(requests([77]), CAPTIONS)
    )


def test_encoders_see_one_batch_shape_only(tmp_path: Path) -> None:
    parts = Sensitive()
    made = encoded(tmp_path, parts, batch=5)
    made.fill_images(requests(range(13)), lambda: None)
    made.fill_texts([f"caption {i}" for i in range(7)], lambda: None)
    for count in (1, 4, 5, 6, 11):
        made.image_features(requests(range(20, 20 + count)))
        made.text_features([f"new {i}" for i in range(count)])
    assert {size for _, size in parts.shapes} == {5} and {name for name, _ in parts.shapes} == {
        "vae",
        "text_encoder",
    }


def test_a_batch_with_rows_that_are_not_cached(tmp_path: Path) -> None:
    """Some keys None, some never stored: the batch is right, and in its order."""
    expected = encoded(None, Sensitive()).image_features(requests([4, 1, 7, 2]))
    made = encoded(tmp_path, Sensitive())
    made.fill_images(requests([1, 2, 4, 7], cached=lambda i: i != 7), lambda: None)
    assert "key 1" in made.image_store and len(made.image_store.rows) == 3  # type: ignore[operator, union-attr]
    equal(made.image_features(requests([4, 1, 7, 2], cached=lambda i: i != 7)), expected)
    equal(made.image_features(requests([4, 1, 7, 2])), expected)
    equal(
        made.image_features(requests([7], cached=lambda i: False)),
        encoded(None, Sensitive()).image_features(requests([7])),
    )


def test_each_is_encoded_once(tmp_path: Path) -> None:
    parts = Sensitive()
    made = encoded(tmp_path, parts, batch=1)
    made.fill_texts(["a", "b", "a", "b", "a"], lambda: None)
    made.fill_texts(["b", "c"], lambda: None)
    assert parts.seen == ["a", "b", "c"]


def test_a_damaged_shard_is_named_and_encoded_again(tmp_path: Path) -> None:
    encoded(tmp_path, Sensitive()).fill_images(requests(range(6)), lambda: None)
    (shard,) = (tmp_path / "picture-x").iterdir()
    shard.write_bytes(shard.read_bytes()[:-7] + b"changed")
    told: list[str] = []
    parts = Sensitive()
    made = FeatureEncoder(
        SD, lambda: parts, DiskStore(tmp_path / "picture-x", told.append), None, 4
    )
    made.fill_images(requests(range(6)), lambda: None)
    assert len(told) == 1 and str(shard) in told[0] and len(parts.shapes) == 2
    equal(
        made.image_features(requests([5, 0])),
        encoded(None, Sensitive()).image_features(requests([5, 0])),
    )


def test_filling_goes_on_after_death_between_and_inside_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "SHARD", 3)
    expected = encoded(None, Sensitive()).image_features(requests(range(10)))
    for n in range(1, 100):
        folder = tmp_path / str(n)
        encoded(folder, Sensitive())
        died = moments.dies_at(
            n,
            lambda folder=folder: encoded(folder, Sensitive()).fill_images(
                requests(range(10)), lambda: None
            ),
        )
        parts = Sensitive()
        made = encoded(folder, parts)
        before = len(made.image_store.rows)  # type: ignore[union-attr]
        assert before % 3 == 0 or before == 10
        made.fill_images(requests(range(10)), lambda: None)
        assert len(parts.shapes) == -(-(10 - before) // 3) and len(made.image_store.rows) == 10  # type: ignore[union-attr]
        equal(made.image_features(requests(range(10))), expected)
        if not died:
            break
    assert n > 10


def test_a_stop_is_looked_at_between_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "SHARD", 3)
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise InterruptedError

    made = encoded(tmp_path, Sensitive())
    with pytest.raises(InterruptedError):
        made.fill_images(requests(range(10)), check)
    assert len(made.image_store.rows) == 6  # type: ignore[union-attr]


def test_other_processes_rows_are_seen_after_a_refresh(tmp_path: Path) -> None:
    mine, other = Sensitive(), encoded(tmp_path, Sensitive())
    made = encoded(tmp_path, mine)
    other.fill_texts(["theirs"], lambda: None)
    assert not made.is_incomplete([], ["theirs"]) and made.is_incomplete([], ["nobody's"])
    made.text_features(["theirs"])
    assert mine.shapes == []


def test_rounding_is_the_same_cached_or_not(tmp_path: Path) -> None:
    plain, parts = (
        FeatureEncoder(SD, Sensitive, None, None, 4, text_batch=4, dtype="float16"),
        Sensitive(),
    )
    made = FeatureEncoder(
        SD,
        lambda: parts,
        DiskStore(tmp_path / "p"),
        MemoryStore(),
        4,
        text_batch=4,
        dtype="float16",
    )
    made.fill_images(requests(range(6)), lambda: None)
    made.fill_texts(CAPTIONS, lambda: None)
    parts.shapes.clear()
    equal(made.image_features(requests([5, 1])), plain.image_features(requests([5, 1])))
    equal(made.text_features(CAPTIONS), plain.text_features(CAPTIONS))
    assert parts.shapes == [] and made.image_store.get(["key 1"])["mean"].dtype == np.float16  # type: ignore[union-attr]
    exact = encoded(None, Sensitive()).image_features(requests([5, 1]))["mean"]
    assert 0 < np.abs(plain.image_features(requests([5, 1]))["mean"] - exact).max() < 1e-3
    with pytest.raises(InputError, match="context has numbers beyond what float16 can hold"):
        plain.text_features(["\U0010ffff"])


@pytest.mark.parametrize(
    ("data", "batch"),
    [
        ({"size": 64}, 8),
        ({"size": 512}, 8),
        ({"size": 768}, 3),
        ({"size": 1024}, 2),
        ({"size": 4096}, 1),
    ],
)
def test_large_pictures_are_encoded_few_at_once(data: dict, batch: int) -> None:
    assert caches.image_batch_size(toml.build(Config, {"data": data})) == batch
    assert (
        caches.image_batch_size(
            toml.build(Config, {"data": {"size": 64, "buckets": {"resolutions": [64, 1024]}}})
        )
        == 2
    )
    assert (
        caches.image_batch_size(toml.build(Config, {"data": data, "engine": {"encode_batch": 5}}))
        == 5
    )


def test_shapes_are_encoded_and_kept_apart(tmp_path: Path) -> None:
    parts = Sensitive()
    sizes = {i: (8, 8) if i % 3 else (4, 12) for i in range(10)}
    asked = [
        ImageRequest(f"key {i}", sizes[i], lambda i=i: [np.resize(square(i), (*sizes[i], 3))])
        for i in range(10)
    ]
    made = encoded(tmp_path, parts)
    made.fill_images(asked, lambda: None)
    assert (
        len(list((tmp_path / "picture-x").iterdir())) == 2
        and {size for _, size in parts.shapes} == {4}
        and len(parts.shapes) == 3
    )
    parts.shapes.clear()
    for i in range(10):
        equal(
            made.image_features([asked[i]]), encoded(None, Sensitive()).image_features([asked[i]])
        )
    assert parts.shapes == []


def test_too_little_room_is_known_after_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, free = encoded(tmp_path, parts := Sensitive()), SimpleNamespace(free=2 * 200 * 96 - 1)
    monkeypatch.setattr(encoder, "SHARD", 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    made.world_size = 2
    with pytest.raises(
        DiskError,
        match=f"{tmp_path}/picture-x: 0 MiB are needed for what is not encoded yet, 0 MiB are "
        "free. Make room, set data.cache",
    ):
        made.fill_images(requests(range(200)), lambda: None)
    assert len(parts.shapes) == 1 and not list((tmp_path / "picture-x").iterdir())
    free.free += 1
    made.fill_images(requests(range(200)), lambda: None)
    assert not made.is_incomplete(requests(range(200)), [])


def test_a_loader_s_fault_comes_out_as_it_is(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise InputError("picture 7 is gone")

    with pytest.raises(InputError, match=r"^picture 7 is gone$"):
        encoded(tmp_path, Sensitive()).fill_images(
            [*requests(range(7)), ImageRequest("key 7", (8, 8), fail)], lambda: None
        )


def test_real_encoders_do_not_feel_place_or_neighbours(base: Path) -> None:
    """What the fixed shape rests on: a row's bits are the same wherever in the batch it stands,
    whatever stands beside it."""
    from limner.base_model.open import open_base
    from limner.config.schema import ModelSettings
    from limner.engines.torch.encoders import TorchEncoders

    parts = TorchEncoders(open_base(ModelSettings(base=str(base)), SD), _cpu())
    made = FeatureEncoder(SD, lambda: parts, None, None, 3, text_batch=3)
    alone = [
        made.encode_images([[np.kron(square(i), np.ones((4, 4, 1), np.uint8))]]) for i in range(3)
    ]
    together = made.encode_images(
        [[np.kron(square(i), np.ones((4, 4, 1), np.uint8))] for i in (2, 0, 1)]
    )
    for place, i in enumerate((2, 0, 1)):
        equal({name: array[place : place + 1] for name, array in together.items()}, alone[i])
    words = ["a red circle", "", "a blue circle of a photo"]
    texts = made.encode_texts([words[2], words[0], words[1]])["context"]
    for place, i in enumerate((2, 0, 1)):
        assert texts[place].tobytes() == made.encode_texts([words[i]])["context"][0].tobytes()


def _cpu() -> Any:
    import torch

    return torch.device("cpu")
