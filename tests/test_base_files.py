"""The small files of a base: whatever is in them is read, told in one line, or refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from limner.base_model.base import BaseModel, read_front_matter
from limner.base_model.find import path_exists
from limner.base_model.json_files import MAX_BYTES, read_json
from limner.base_model.open import open_base
from limner.commands.drawn_model import find_sources
from limner.config.schema import ModelSettings
from limner.errors import InputError
from limner.families import FAMILIES
from limner.protocols import BaseConfigs

CARDS = {
    "a day that is none": "date: 2024-13-45",
    "a number that is none": "a: !!float abc",
    "a time that is none": "a: !!timestamp abc",
    "brackets": "a: " + "[" * 20_000,
    "one bracket": "a: [",
    "bytes that are none": "a: !!binary \u00e9",
    "a list as a key": "? [1]\n: 2",
    "a merge of nothing": "<<: 3",
    "a tag of Python's": "a: !!python/object:os.system x",
}


@pytest.mark.parametrize("name", CARDS)
def test_front_matter_that_yaml_refuses_is_told(tmp_path: Path, name: str) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: mit\n{CARDS[name]}\n---\n# A model\n")
    metadata, problem = read_front_matter(card)
    assert metadata == {} and problem is not None
    assert problem.startswith(f"{card}: its front matter cannot be read (")
    assert problem.endswith("so the license is not taken over") and "\n" not in problem
    base = BaseModel(tmp_path, {}, "unet", "b", None, None, BaseConfigs({}, {}))
    assert base.describe_card_problem() == problem and base.read_card_metadata() == {}


def test_front_matter_that_can_be_read(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert read_front_matter(card) == ({}, None)
    for text, expected in (
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: mit\n---\n" + "x" * 10**6, {"license": "mit"}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("", {}),
        ("---\n---\n", {}),
        ("---\nlicense: mit\n", {}),
    ):
        card.write_bytes(text.encode())
        assert read_front_matter(card)[0] == expected
    card.write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert read_front_matter(card)[1] is None
    card.write_text("---\n- 1\n---\n")
    assert read_front_matter(card) == (
        {},
        f"{card}: its front matter is no table, so the license is not taken over",
    )
    card.unlink()
    card.mkdir()
    assert read_front_matter(card) == ({}, None)


@pytest.mark.frameworks
def test_a_card_spoils_no_training(
    sd: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told at the beginning, once, and the result has a card of its own."""
    import limner

    base = Path(shutil.copytree(sd, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: mit\ndate: 2024-13-45\n---\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'run = "{tmp_path / "run"}"\nmodel.base = "{base}"\n[data]\nfolder = "{pictures}"\n'
        'size = 32\n[train]\nsteps = 1\nbatch_size = 2\n[engine]\nprecision = "no"\n'
    )
    limner.train(recipe)
    lines = "".join(capsys.readouterr()).splitlines()
    [told] = [i for i, line in enumerate(lines) if "front matter" in line]
    [done] = [i for i, line in enumerate(lines) if "the result of step 1 is here" in line]
    assert told < 3 and told < done
    assert "base_model_relation" not in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "result.json").is_file()


JSON: dict[str, tuple[bytes, str]] = {
    "deep lists": (b"[" * 100_000, "nested too deep"),
    "deep objects": (b'{"a":' * 100_000, "nested too deep"),
    "rather deep": (b"[" * 200 + b"]" * 200, "nested more than 100 deep"),
    "a digit too many": (b'{"a": ' + b"1" * 5000 + b"}", "limit (4300 digits)"),
    "NaN": (b'{"a": [NaN]}', "NaN is no number"),
    "a NUL": (b'{"a": \0}', "not JSON"),
    "a NUL in a text": (b'{"a": "\0"}', "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not JSON"),
    "a mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "nothing": (b"", "not JSON"),
    "a list": (b"[1]", "a JSON object is expected"),
    "a number": (b"1e999", "a JSON object is expected"),
    "cut": (b'{"a": 1', "not JSON"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_no_config(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(JSON[name][0])
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert JSON[name][1] in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 and "Fetch or save the model again" in str(caught.value)


def test_files_that_might_never_end(tmp_path: Path) -> None:
    pipe, large, odd = (tmp_path / name for name in ("pipe.json", "large.json", "zero.json"))
    os.mkfifo(pipe)
    odd.symlink_to("/dev/zero")
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for path, words in ((pipe, "it is no file"), (odd, "it is no file"), (large, "more than 64")):
        with pytest.raises(InputError, match=words):
            read_json(path)
    with pytest.raises(InputError, match="No such file"):
        read_json(tmp_path / "missing.json")
    # What schedulers are published with.
    large.write_text('{"lambda_min_clipped": -Infinity}')
    assert read_json(large) == {"lambda_min_clipped": float("-inf")}


NAMES = {"a NUL": "a\0b", "300 characters": "x" * 300, "a long path": "y/" * 3000}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_path_can_have(name: str) -> None:
    for setting in ("model.base", "model.vae"):
        with pytest.raises(InputError, match=f"{setting}: .* is no path to a folder") as caught:
            path_exists(setting, NAMES[name])
        assert "\0" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(InputError, match="no path to a folder"):
        open_base(ModelSettings(NAMES[name]), FAMILIES["sd"])
    with pytest.raises(InputError, match="no path to a folder"):
        find_sources(NAMES[name], None)


@pytest.mark.frameworks
@pytest.mark.parametrize("name", NAMES)
def test_an_autoencoder_that_no_path_can_have(sd: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"model.vae: .* is no path to a folder"):
        open_base(ModelSettings(str(sd), vae=NAMES[name]), FAMILIES["sd"])


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet/config.json", {"cross_attention_dim": "abc"}),
    "channels": ("unet/config.json", {"in_channels": [4]}),
    "latents": ("vae/config.json", {"latent_channels": {}}),
    "width": ("text_encoder/config.json", {"hidden_size": "32"}),
    "index": ("model_index.json", {"scheduler": [1, 2]}),
    "library": ("model_index.json", {"vae": [["diffusers"], "AutoencoderKL"]}),
    "class": ("model_index.json", {"_class_name": ["StableDiffusionPipeline"]}),
    "two names": ("model_index.json", {"unet": ["diffusers", {"a": 1}]}),
}


@pytest.mark.frameworks
@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_in_a_config(sd: Path, tmp_path: Path, name: str) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    file, changes = WRONG[name]
    config = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(config | changes))
    with pytest.raises(InputError) as caught:
        open_base(ModelSettings(str(base)), FAMILIES["sd"])
    assert str(base) in str(caught.value) or "the base's scheduler" in str(caught.value)


@pytest.mark.frameworks
@pytest.mark.parametrize("file", ["tokenizer/vocab.json", "unet/more.bin"])
def test_a_pipe_in_a_component(sd: Path, tmp_path: Path, file: str) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    (base / file).unlink(missing_ok=True)
    os.mkfifo(base / file)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        open_base(ModelSettings(str(base)), FAMILIES["sd"])


@pytest.mark.parametrize("name", ["padding_side", "truncation_side"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_captions_are_filled_up_and_cut_on_the_right(
    name: str, side: str, base: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: side}))
    model = ModelSettings(str(folder), "sd")
    if side == "right":
        open_base(model, FAMILIES["sd"])
        return
    with pytest.raises(InputError, match=f"tokenizer: {name} is 'left'"):
        open_base(model, FAMILIES["sd"])
