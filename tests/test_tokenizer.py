"""The JAX engine's tokenizer gives the ids and the padding of the stock one, whatever its files
say of special tokens."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from limner.errors import InputError

pytestmark = pytest.mark.frameworks

START, END = "<|startoftext|>", "<|endoftext|>"
TEXTS = [
    "",
    "a red circle",
    "cat!",
    "! cat !!",
    "A RED<|EndOfText|> cat",
    "red <|startoftext|> circle<|endoftext|>",
    "  blue\n\t circle  ",
    "<token> <TOKEN> red<token>blue",
    "It's naïve, 12345 “quotes”",
    "new style! <style>",
    "x" * 300,
]


def record(text: str, **changes: bool) -> dict[str, Any]:
    return {
        "content": text,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    } | changes


def typed(text: str, **changes: bool) -> dict[str, Any]:
    return {"__type": "AddedToken"} | record(text, **changes)


# The files of Stable Diffusion 1.x and 2.x, and others that could be: special_tokens_map.json,
# what tokenizer_config.json says beside, added_tokens.json, and added_tokens of tokenizer.json.
SD1 = {"bos_token": record(START), "eos_token": record(END), "unk_token": record(END)}
FILES: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "SD 1.x": {
        "special": SD1 | {"pad_token": END},
        "config": {name: typed(value["content"]) for name, value in SD1.items()}
        | {"pad_token": END},
    },
    "SD 2.x": {
        "special": SD1 | {"pad_token": "!"},
        "config": {name: typed(value["content"]) for name, value in SD1.items()}
        | {"pad_token": END},
    },
    "the map alone": {"special": {"bos_token": START, "eos_token": END, "pad_token": "!"}},
    "the config alone": {"config": {"pad_token": "!"}},
    "a record in the config": {"config": {"pad_token": typed("!", normalized=False)}},
    "a padding that strips": {"special": {"pad_token": record("!", lstrip=True, rstrip=True)}},
    "a padding within words only": {"special": {"pad_token": record("!", single_word=True)}},
    "the config says all": {
        "special": {"pad_token": "!"},
        "config": {
            "pad_token": END,
            "added_tokens_decoder": {"5": record("!", special=False)},
        },
    },
    "a new token": {"added": {"<token>": "new"}, "special": {"pad_token": "!"}},
    "a new token that is the padding": {
        "added": {"<token>": "new"},
        "special": {"pad_token": "<token>"},
    },
    "more special tokens": {
        "special": {"additional_special_tokens": ["<style>"]},
        "config": {"additional_special_tokens": ["<style>"]},
    },
    "more special tokens in the map alone": {
        "special": {"additional_special_tokens": ["<style>"], "pad_token": "!"},
        "added": {"<style>": "new"},
    },
    "more special tokens in both": {
        "special": {"extra_special_tokens": ["<style>", "<token>"]},
        "config": {"extra_special_tokens": ["new"]},
    },
    "tokens with parts of their own": {"config": {"style_token": "<style>", "pad_token": "!"}},
    "tokens of the file": {"file": [("!", {"special": True, "normalized": False})]},
    "a plain token of the file": {
        "file": [("<token>", {"special": False, "normalized": True})],
        "special": {"pad_token": "!"},
    },
    "another end": {"config": {"eos_token": "!", "pad_token": "!"}},
    "special tokens are split": {"config": {"split_special_tokens": True}},
}


def write_files(source: Path, folder: Path, files: dict[str, Any], whole: bool) -> dict[str, Any]:
    """A tokenizer's folder; returns its config.

    Args:
        whole: with tokenizer.json, beside the two old files or in their place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((source / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text((source / "merges.txt").read_text())
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"} | files.get("config", {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if "special" in files:
        (folder / "special_tokens_map.json").write_text(json.dumps(files["special"]))
    if "added" in files:
        added = {text: len(vocabulary) + i for i, text in enumerate(files["added"])}
        (folder / "added_tokens.json").write_text(json.dumps(added))
    if whole:
        content = json.loads((source / "tokenizer.json").read_text())
        for text, changes in files.get("file", []):
            known = content["added_tokens"]
            index = vocabulary.get(text, len(vocabulary) + len(known))
            known.append({"id": index} | record(text) | changes)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return config


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", FILES)
def test_ids_and_padding_are_those_of_the_stock_tokenizer(
    base: Path, tmp_path: Path, kind: str, whole: bool
) -> None:
    from transformers import CLIPTokenizer

    from limner.engines.jax.tokenizer import WordTokenizer

    config = write_files(base / "tokenizer", tmp_path, FILES[kind], whole)
    stock = CLIPTokenizer.from_pretrained(tmp_path)
    ours = WordTokenizer(tmp_path, config)
    assert ours.encode(TEXTS) == stock(TEXTS, truncation=False, verbose=False).input_ids
    assert (ours.pad, ours.limit) == (stock.pad_token_id, stock.model_max_length)


def test_files_by_chance(base: Path, tmp_path: Path) -> None:
    """Two hundred combinations of what four files may say."""
    from transformers import CLIPTokenizer

    from limner.engines.jax.tokenizer import WordTokenizer

    chance = random.Random(0)
    texts = [START, END, "!", "red</w>", "<token>", "cat", "A"]

    def draw_token() -> Any:
        changes = {key: chance.random() < 0.5 for key in ("lstrip", "rstrip", "normalized")}
        text = chance.choice(texts)
        return chance.choice([text, record(text, **changes)])

    def draw_names() -> dict[str, Any]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
        return {name: draw_token() for name in names if chance.random() < 0.4}

    for number in range(200):
        files = {
            "config": {
                name: {"__type": "AddedToken"} | value if isinstance(value, dict) else value
                for name, value in draw_names().items()
            }
        }
        if chance.random() < 0.7:
            files["special"] = draw_names()
        if chance.random() < 0.3:
            files["added"] = dict.fromkeys(["<token>", "<style>"])
        if chance.random() < 0.3:
            added = {str(10 + i): record(chance.choice(texts[2:])) for i in range(2)}
            files["config"]["added_tokens_decoder"] = added
        if chance.random() < 0.5:
            files["file"] = [("!", {"special": chance.random() < 0.5})]
        config = write_files(
            base / "tokenizer", tmp_path / str(number), files, chance.random() < 0.5
        )
        stock = CLIPTokenizer.from_pretrained(tmp_path / str(number))
        ours = WordTokenizer(tmp_path / str(number), config)
        wanted = stock(TEXTS, truncation=False, verbose=False).input_ids
        assert ours.encode(TEXTS) == wanted, files
        assert ours.pad == stock.pad_token_id, files


@pytest.mark.parametrize("engine", ["torch", "jax"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pad_token": None}, "no pad"),
        ({"model_max_length": None}, "model_max_length is 10000000000"),
        ({"model_max_length": 2}, "model_max_length is 2, the text encoder has 77 positions"),
    ],
)
def test_what_no_caption_can_be_filled_up_with_is_refused(
    base: Path, tmp_path: Path, engine: str, config: dict[str, Any], message: str
) -> None:
    import shutil

    import torch

    from limner.base_model.open import open_base
    from limner.config.schema import ModelSettings
    from limner.engines.jax.encoders import JaxEncoders
    from limner.engines.torch.encoders import TorchEncoders
    from limner.families import FAMILIES
    from limner.families.text import tokenize

    shutil.copytree(base, tmp_path / "base")
    write_files(base / "tokenizer", tmp_path / "base" / "tokenizer", {"config": config}, False)
    (tmp_path / "base" / "tokenizer" / "tokenizer.json").unlink()
    opened = open_base(ModelSettings(str(tmp_path / "base"), "sd"), FAMILIES["sd"])
    encoders: Any = JaxEncoders(opened)
    if engine == "torch":
        encoders = TorchEncoders(opened, torch.device("cpu"))
    with pytest.raises(InputError) as refusal:
        tokenize(FAMILIES["sd"].text, encoders, ["a red circle"], 1)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "[1"),
        ("vocab.json", "{}"),
        ("merges.txt", "a b c\n"),
        ("special_tokens_map.json", '{"pad_token": {"text": "!"}}'),
        ("special_tokens_map.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"vocab": 3, "merges": []}}'),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(
    base: Path, tmp_path: Path, name: str, content: str
) -> None:
    from limner.engines.jax.tokenizer import WordTokenizer

    config = write_files(base / "tokenizer", tmp_path, {}, False)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="cannot be read as CLIP's tokenizer"):
        WordTokenizer(tmp_path, config)


def test_kinds_of_files_are_told_apart() -> None:
    """Each kind above is another one."""
    assert all(FILES[a] != FILES[b] for a, b in itertools.combinations(FILES, 2))
