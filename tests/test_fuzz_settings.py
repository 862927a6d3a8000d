"""Thousands of mutated recipes, overrides, checkpoints and manifests: each is taken, or refused in
one short message by an error of the right class; nothing else is raised, and nothing takes long.

A part in every run of the tests; all of them by ``make soak``.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limner.config import toml
from limner.config.rules import check_config
from limner.config.schema import SETTINGS
from limner.errors import InputError, IntegrityError, LimnerError
from limner.storage import atomic, checkpoint
from limner.training import result, sinks

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
VALUES = (
    *("0", "-1", "1e400", "nan", "-inf", "true", "1.5", "10000000000000", "0x10", "2020-01-01"),
    *('""', '"x"', '"\\u0000"', "[]", "[[]]", '["a", 1]', "{}", "{a = 1}", "[1, 2, 3]", "none"),
    *("'", '"', "=", "[" * 5000, '"' + "y" * 5000 + '"', "\x00", "\u202e", "\udcff", "9" * 5000),
)
PIECES = (b"\0", b"\xff\xfe", b"[", b"]", b"{", b'"', b"=", b"\n", b"#", b"9" * 50, b"null", b"-")


def mutate(content: bytes, draws: random.Random) -> bytes:
    """Cut, repeat, overwrite or insert, a few times."""
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(len(content) + 1)
        to = min(len(content), at + draws.choice((1, 1, 8, 200)))
        part = content[at:to]
        middle = draws.choice(
            (b"", part * 2, part[::-1], draws.randbytes(len(part)), draws.choice(PIECES))
        )
        content = content[:at] + middle + content[to:]
    return content


def make_override(draws: random.Random) -> str:
    """A setting and a value that may not fit, or neither."""
    name = draws.choice(list(SETTINGS))
    if draws.random() < 0.2:
        name = mutate(name.encode(), draws).decode("utf-8", errors="surrogateescape")
    return draws.choice((f"{name}={draws.choice(VALUES)}",) * 9 + (name,))


def expect_refusal(action: Callable[[], object], *kinds: type[LimnerError]) -> bool:
    """Whether an action is refused; in time, and in a message that can be read."""
    began = time.process_time()
    try:
        action()
    except kinds as error:
        assert 0 < len(str(error)) < 20_000 and "Traceback" not in str(error)
        return True
    finally:
        assert time.process_time() - began < 5
    return False


PART = pytest.mark.parametrize("every", [15, pytest.param(1, marks=pytest.mark.soak)])


@PART
def test_recipes_and_overrides(every: int, tmp_path: Path) -> None:
    refused = taken = 0
    for seed in range(0, 3000, every):
        draws = random.Random(f"recipe {seed}")
        content = draws.choice(RECIPES).read_bytes()
        if seed % 2:
            content = mutate(content, draws)
        recipe = tmp_path / "recipe.toml"
        recipe.write_bytes(content)
        overrides = [make_override(draws) for _ in range(draws.randint(0, 2))]

        def load(recipe: Path = recipe, overrides: list[str] = overrides) -> None:
            check_config(toml.load_recipe(recipe, overrides))

        if expect_refusal(load, InputError):
            refused += 1
        else:
            taken += 1
    assert refused > taken / 4 and taken > 10


def mutate_json(value: Any, draws: random.Random) -> Any:
    """Another value somewhere inside a value of JSON."""
    others = (None, True, -1, 10**30, 1.5, "", "\0", "../x", "/etc", [], {}, [[]], "x" * 3000)
    if isinstance(value, dict) and value and draws.random() < 0.8:
        name = draws.choice(list(value))
        kept = {key: one for key, one in value.items() if key != name}
        if draws.random() < 0.2:
            return kept
        key = draws.choice((name, name, name, "", "a/../../b", "\0"))
        return {**kept, key: mutate_json(value[name], draws)}
    return draws.choice(others)


@PART
def test_checkpoints_and_manifests(every: int, tmp_path: Path) -> None:
    """Of half of them the digests are made anew, as nobody's accident but an attacker would."""
    state = {
        "step": 3,
        "version": 1,
        "config": {"data": {"folder": "a"}, "model": {"base": "b"}, "checkpoint": {}},
        **dict.fromkeys(("seed", "batch_size", "world_size", "records"), 1),
        **dict.fromkeys(("data_digest", "base_digest", "random_digest", "numpy_version"), "x"),
        "mixture": [[1, None]],
        "unlogged_losses": [0.5],
    }
    root, refused = tmp_path / "checkpoint-3", 0
    for seed in range(0, 3000, every):
        draws = random.Random(f"checkpoint {seed}")
        atomic.remove_folder(root)
        with atomic.write_folder(root) as folder:
            (folder / "state.json").write_text(
                json.dumps(mutate_json(state, draws) if seed % 4 == 0 else state)
            )
            (folder / "weights.safetensors").write_bytes(draws.randbytes(40))
        if seed % 4 == 1:
            manifest = json.loads((root / "MANIFEST.json").read_text())
            files = mutate_json(manifest["files"], draws)
            manifest = {"files": files, "digest": atomic.digest_json(files)}
            (root / "MANIFEST.json").write_text(json.dumps(manifest))
            record: dict[str, Any] = {"step": 3, "kind": "lora", "files": files}
            record["digest"] = atomic.digest_json(list(record.values()))
            (root / "result.json").write_text(json.dumps(record))
        elif seed % 4 > 1:
            file = draws.choice(("state.json", "MANIFEST.json", "weights.safetensors"))
            (root / file).write_bytes(mutate((root / file).read_bytes(), draws))

        def read() -> None:
            found = checkpoint.open_checkpoint(root)
            assert isinstance(found.state.seed, int)
            found.arrays("weights.safetensors")

        # Every file is random, or damaged: at the latest its arrays are refused.
        assert expect_refusal(read, IntegrityError, InputError)
        refused += 1
        result.is_result_whole(root)
        lines = [json.dumps({"step": 1}).encode(), mutate(b'{"step": 2, "loss": 0.5}', draws)]
        (root / "metrics.jsonl").write_bytes(b"\n".join([*lines, b""]))
        assert sinks.read_metrics(root / "metrics.jsonl")[0] == {"step": 1}
    assert refused == len(range(0, 3000, every))
