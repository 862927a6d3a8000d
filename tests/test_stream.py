"""Example p is a pure function of (seed, p): for any number of processes, any order of calls,
whatever else is switched on."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from limner import rng
from limner.config import toml
from limner.config.schema import DataSettings, ObjectiveSettings
from limner.data import buckets
from limner.data.index import Entry
from limner.data.order import Order
from limner.data.prefetch import prefetch
from limner.data.source import Record
from limner.diffusion import make_objective
from limner.errors import InputError
from limner.families import FAMILIES
from limner.features.encoder import FeatureEncoder
from limner.features.store import DiskStore
from limner.storage import atomic
from limner.training.stream import Draw, Stream

SD = FAMILIES["sd"]
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS: dict[str, dict[str, Any]] = {"vae": {"scaling_factor": 0.5}}
COUNT = 10


class Toy:
    """Encoders that show what went in: pixels made small, and the caption's letters."""

    def encode_vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return pixels[:, :, ::2, ::2].copy(), np.full_like(pixels[:, :, ::2, ::2], 0.25)

    def list_token_ids(self, tokenizer: str, texts: list[str]) -> list[list[int]]:
        return [[sum(map(ord, text))] * 2 if text else [] for text in texts]

    def pad_token(self, tokenizer: str) -> int:
        return 0

    def max_tokens(self, tokenizer: str) -> int:
        return 2

    def encode_text(
        self, name: str, ids: np.ndarray, skip: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(ids[..., None], 2, axis=2).astype(np.float32), ids.astype(np.float32)


def records(shape: tuple[int, int] = (24, 16)) -> tuple[tuple[Entry, ...], list[Record]]:
    draws = np.random.default_rng(0)
    source = [
        Record(
            f"picture {i}",
            draws.integers(0, 256, (*shape, 3), np.uint8),
            tuple(f"{i} {word}" for word in ("a", "b", "c")),
        )
        for i in range(COUNT)
    ]
    return tuple(
        Entry(i, r.key, r.captions, f"digest{i}", *shape) for i, r in enumerate(source)
    ), source


def stream(
    seed: int = 5,
    batch: int = 4,
    shape: tuple[int, int] = (24, 16),
    folder: Path | None = None,
    noise: dict | None = None,
    **data: Any,
) -> Stream:
    entries, source = records(shape)
    settings = toml.build(DataSettings, {"size": 8, **data})
    wanted = toml.build(ObjectiveSettings, noise or {})
    stores = (None, None) if folder is None else (DiskStore(folder / "p"), DiskStore(folder / "c"))
    encoded = FeatureEncoder(SD, Toy, *stores, 3)
    order = Order(
        seed,
        batch,
        [buckets.choose_shape(e.size, settings) for e in entries],
        [0] * COUNT,
        [1],
        [],
        settings.buckets is not None,
    )
    return Stream(
        entries,
        order,
        source,
        settings,
        wanted,
        make_objective(SCHEDULER, wanted),
        SD,
        CONFIGS,
        encoded,
        seed,
        batch,
    )


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


RICH = {
    "crop": "random",
    "flip": True,
    "drop_caption": 0.3,
    "noise": {"noise_offset": 0.1, "input_perturbation": 0.1, "min_snr": 5.0},
}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_do_not_know_the_number_of_processes(world: int) -> None:
    one = stream(**RICH)
    for step in (0, 2, 7):
        equal(
            joined([stream(**RICH).batch(step, rank, world) for rank in range(world)]),
            one.batch(step),
        )


def test_any_order_of_calls_and_any_number_of_threads() -> None:
    forward = [stream(**RICH).batch(step) for step in range(6)]
    backward = stream(**RICH)
    for step in reversed(range(6)):
        equal(backward.batch(step), forward[step])
    for threads in (1, 3):
        for made, expected in zip(
            prefetch(stream(**RICH).batch, 0, 6, threads=threads), forward, strict=True
        ):
            equal(made, expected)


def test_the_cache_moves_no_number(tmp_path: Path) -> None:
    settings = RICH | {"crop_variants": 2}
    cached = stream(folder=tmp_path, **settings)
    cached.features.fill_images(
        [
            cached.crops.make_request(e, g)
            for e in cached.entries
            for g in cached.crops.list_variants(e) or ()
        ],
        lambda: None,
    )
    cached.features.fill_texts([c for e in cached.entries for c in e.captions] + [""], lambda: None)
    cached = dataclasses.replace(
        cached,
        features=FeatureEncoder(
            SD,
            lambda: pytest.fail("an encoder was asked for"),
            cached.features.image_store,
            cached.features.text_store,
            3,
        ),
    )
    for step in range(8):
        equal(cached.batch(step), stream(**settings).batch(step))


def test_every_epoch_is_a_permutation() -> None:
    made = stream(batch=4)
    keys = [key for step in range(15) for key in made.record_names(step)]
    epochs = [keys[i : i + COUNT] for i in range(0, 6 * COUNT, COUNT)]
    assert all(sorted(epoch) == sorted(e.key for e in made.entries) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert stream(seed=6).record_names(0) != made.record_names(0) == stream().record_names(0)
    assert made.record_names(2) == [made.make_draw(p).entry.key for p in range(8, 12)]


def draws(**settings: Any) -> list[Draw]:
    made = stream(**settings)
    return [made.make_draw(p) for p in range(200)]


ASPECTS = {
    "record": lambda d: d.entry.row,
    "place": lambda d: (d.geometry.top, d.geometry.left),
    "flip": lambda d: d.geometry.flip,
    "caption": lambda d: d.caption,
    "timestep": lambda d: d.u,
}


@pytest.mark.parametrize(
    ("changed", "moves"),
    [
        ({"flip": True}, {"flip"}),
        ({"crop": "random"}, {"place"}),
        ({"drop_caption": 0.5}, {"caption"}),
        ({"noise": {"noise_offset": 0.1}}, set()),
        ({"resample": "box"}, set()),
    ],
)
def test_one_setting_moves_no_other_draw(changed: dict, moves: set[str]) -> None:
    plain, other = draws(), draws(**changed)
    assert {
        name for name, of in ASPECTS.items() if list(map(of, plain)) != list(map(of, other))
    } == moves


def test_crops_move_nothing_but_the_place() -> None:
    some, other = draws(crop="random", flip=True), draws(crop="random", crop_variants=3, flip=True)
    assert {
        name for name, of in ASPECTS.items() if list(map(of, some)) != list(map(of, other))
    } == {"place"}


def test_draws_are_independent_and_fair() -> None:
    made = stream(crop="random", flip=True, drop_caption=0.25)
    some = [made.make_draw(p) for p in range(3000)]
    flip = np.array([d.geometry.flip for d in some], float)
    dropped = np.array([d.caption == "" for d in some], float)
    u, top = np.array([d.u for d in some]), np.array([d.geometry.top for d in some], float)
    assert (
        abs(flip.mean() - 0.5) < 0.03
        and abs(dropped.mean() - 0.25) < 0.03
        and abs(u.mean() - 0.5) < 0.02
    )
    assert set(top) == set(range(5)) and all(
        abs(n / 3000 - 0.2) < 0.03 for n in Counter(top).values()
    )
    captions = Counter(d.caption.split()[1] for d in some if d.caption)
    assert set(captions) == {"a", "b", "c"} and all(
        abs(n / captions.total() - 1 / 3) < 0.04 for n in captions.values()
    )
    assert np.abs(np.corrcoef([flip, dropped, u, top]) - np.eye(4)).max() < 0.06


def test_drop_caption_at_its_ends() -> None:
    assert all(d.caption for d in draws()) and not any(d.caption for d in draws(drop_caption=1.0))


def test_pixels_are_those_of_the_geometry() -> None:
    """Through decode, cut and encoder to x0: an end-to-end look at one row."""
    made = stream(crop="random", flip=True, shape=(12, 8))
    batch = made.batch(3)
    for row, p in enumerate(range(12, 16)):
        d = made.make_draw(p)
        g, whole = d.geometry, np.asarray(Image.fromarray(made.source[d.entry.row].image))
        square = whole[g.top : g.top + 8, :8][:, :: -1 if g.flip else 1]
        mean = (square.transpose(2, 0, 1)[:, ::2, ::2] / 127.5 - 1).astype(np.float32)
        posterior = rng.at(5, "posterior", p).standard_normal((3, 4, 4), np.float32)
        np.testing.assert_allclose(batch["x0"][row], (mean + 0.25 * posterior) * 0.5, atol=1e-6)
        assert (batch["context"][row] == sum(map(ord, d.caption))).all()


def test_a_picture_that_changes_or_goes_during_the_run_is_named(tmp_path: Path) -> None:
    """Its features would else be cached under the old content's name, and serve other runs."""
    made = stream(folder=tmp_path / "cache")
    entry, path = made.entries[0], tmp_path / "0.png"
    Image.fromarray(made.source[0].image).save(path)  # type: ignore[arg-type]
    good = dataclasses.replace(made, source=[Record("0.png", path, ("a",))])  # type: ignore[arg-type]
    entry = dataclasses.replace(entry, digest=atomic.digest_file(path))
    (geometry,) = made.crops.list_variants(entry) or ()
    good.features.fill_images([good.crops.make_request(entry, geometry)], lambda: None)
    flipped = good.crops.make_request(entry, dataclasses.replace(geometry, flip=True))
    Image.new("RGB", (16, 24)).save(path)
    with pytest.raises(InputError, match="the picture is another than when the run began"):
        good.features.fill_images([flipped], lambda: None)
    path.unlink()
    with pytest.raises(InputError, match=r"picture 0: no such file\."):
        flipped.load()
    assert flipped.key not in good.features.image_store  # type: ignore[operator]


def test_noise_offset_and_input_perturbation() -> None:
    """noise += offset * randn(B, C, 1, 1), part of the target; the input alone sees noise + gamma *
    randn."""
    plain, offset, perturbed = (
        stream(noise=n).batch(1)
        for n in ({}, {"noise_offset": 0.1}, {"noise_offset": 0.1, "input_perturbation": 0.2})
    )
    assert "input_noise" not in plain and "input_noise" not in offset
    shift = (offset["noise"] - plain["noise"]) / np.float32(0.1)
    per_channel = np.stack(
        [rng.at(5, "offset", p).standard_normal((3, 1, 1), np.float32) for p in range(4, 8)]
    )
    np.testing.assert_allclose(shift, np.broadcast_to(per_channel, shift.shape), atol=1e-5)
    assert perturbed["noise"].tobytes() == offset["noise"].tobytes()
    extra = np.stack(
        [rng.at(5, "perturbation", p).standard_normal((3, 4, 4), np.float32) for p in range(4, 8)]
    )
    np.testing.assert_allclose(
        perturbed["input_noise"], offset["noise"] + np.float32(0.2) * extra, atol=1e-6
    )
    for name in ("x0", "timestep", "weight", "context"):
        assert plain[name].tobytes() == perturbed[name].tobytes()
    numbers = [perturbed[name] for name in perturbed.keys() - {"position"}]
    assert all(array.dtype == np.float32 for array in numbers)
    assert perturbed["position"].dtype == np.int64
    assert perturbed["position"].tolist() == [4, 5, 6, 7]


def test_noise_is_standard_normal_and_no_two_rows_share_it() -> None:
    made = stream(batch=10)
    noise = np.concatenate([made.batch(step)["noise"] for step in range(20)])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert len({row.tobytes() for row in noise}) == len(noise)
    assert (
        abs(
            np.corrcoef(
                noise.ravel(), np.concatenate([made.batch(s)["x0"] for s in range(20)]).ravel()
            )[0, 1]
        )
        < 0.05
    )


def test_variants_are_all_there_is() -> None:
    """What is encoded beforehand is exactly what the draws can ask for."""
    for settings in (
        {},
        {"flip": True},
        {"crop": "random", "crop_variants": 3},
        {"crop": "random", "crop_variants": 3, "flip": True},
        {"crop": "random", "flip": True, "shape": (16, 16)},
    ):
        made = stream(**settings)
        asked: dict[int, set] = {}
        for p in range(1500):
            d = made.make_draw(p)
            asked.setdefault(d.entry.row, set()).add(d.geometry)
        for entry in made.entries:
            ways = made.crops.list_variants(entry)
            assert (
                ways is not None and len(ways) == len(set(ways)) and set(ways) == asked[entry.row]
            )
    assert len(stream(flip=True).crops.list_variants(made.entries[0]) or ()) == 2
    free = stream(crop="random")
    assert free.crops.list_variants(free.entries[0]) is None
    assert len({free.make_draw(p).geometry for p in range(100)}) > 3


def test_a_picture_s_key_says_all_it_depends_on() -> None:
    made = stream(flip=True)
    entry = made.entries[0]
    keys = {made.crops.make_request(entry, g).key for g in made.crops.list_variants(entry) or ()}
    assert len(keys) == 2
    geometry = (made.crops.list_variants(entry) or [])[0]
    others = [
        dict(resample="box"),
        dict(background="black"),
        dict(size=4),
        dict(crop="random", crop_variants=1),
    ]
    for changed in others:
        other = stream(**({"flip": True} | changed))
        keys |= {
            other.crops.make_request(entry, g).key
            for g in (other.crops.list_variants(entry) or [])[:1]
        }
    keys.add(made.crops.make_request(dataclasses.replace(entry, digest="another"), geometry).key)
    keys.add(made.crops.make_request(entry, dataclasses.replace(geometry, height=13)).key)
    assert len(keys) == 2 + len(others) + 2 and None not in keys
    assert made.crops.make_request(entry, geometry, cached=False).key is None
    renamed = dataclasses.replace(entry, row=entry.row, key="moved.png", captions=("other",))
    assert (
        made.crops.make_request(renamed, geometry).key
        == made.crops.make_request(entry, geometry).key
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_held_out_covers_all_and_is_constant(world: int) -> None:
    """Each record at each noise level once, whatever training does, in batches of one shape;
    filling rows do not count."""
    made = stream(**RICH)
    held = made.entries[:3]
    seen: list[tuple[bytes, int]] = []
    for rank in range(world):
        for count, batch in made.validation_batches(held, 5, rank, world):
            assert (
                {len(array) for array in batch.values()} == {4 // world}
                and 0 <= count <= 4 // world
                and "input_noise" not in batch
            )
            seen += [(batch["noise"][i].tobytes(), int(batch["timestep"][i])) for i in range(count)]
    assert len(seen) == len(set(seen)) == 15
    assert Counter(t for _, t in seen) == {t: 3 for t in (100, 300, 500, 700, 900)}
    again = [batch for _, batch in stream(**RICH).validation_batches(held, 5)]
    for batch, (_, first) in zip(again, made.validation_batches(held, 5), strict=True):
        equal(batch, first)


def test_held_out_pictures_can_be_encoded_beforehand(tmp_path: Path) -> None:
    """Even where training crops anew each time: then no encoder is needed at the first validation,
    nor at any other."""
    made = stream(folder=tmp_path, **RICH)
    held = made.entries[:3]
    made.features.fill_images(
        [made.crops.make_request(e, made.crops.place_for_validation(e)) for e in held], lambda: None
    )
    made.features.fill_texts([e.captions[0] for e in held], lambda: None)
    stores = made.features.image_store, made.features.text_store
    blind = dataclasses.replace(
        made,
        features=FeatureEncoder(SD, lambda: pytest.fail("an encoder was asked for"), *stores, 3),
    )
    for (_, batch), (_, expected) in zip(
        blind.validation_batches(held, 4), stream(**RICH).validation_batches(held, 4), strict=True
    ):
        equal(batch, expected)


def test_held_out_noise_is_not_training_s() -> None:
    made = stream()
    (_, watched), *_ = made.validation_batches(made.entries[:1], 4)
    assert not {row.tobytes() for row in watched["noise"]} & {
        row.tobytes() for step in range(3) for row in made.batch(step)["noise"]
    }
    assert (watched["context"] == sum(map(ord, made.entries[0].captions[0]))).all()


def test_prefetch_keeps_order_and_raises_where_it_is_its_turn() -> None:
    loaded: list[int] = []

    def load(step: int) -> int:
        loaded.append(step)
        if step == 5:
            raise ValueError("step 5 is bad")
        return step * step

    got: list[int] = []
    with pytest.raises(ValueError, match="step 5 is bad"):
        for value in prefetch(load, 2, 50, threads=2):
            got.append(value)
            assert max(loaded) <= len(got) + 1 + 3
    assert got == [4, 9, 16]
    assert list(prefetch(load, 7, 7)) == [] and list(prefetch(load, 9, 3)) == []


def test_prefetch_lets_go_when_its_consumer_does() -> None:
    import threading

    batches = prefetch(lambda step: step, 0, 1000, threads=3)
    assert next(batches) == 0
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("limner-load")]
