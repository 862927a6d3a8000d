"""Several data sets are one source; each record says where it is from; a data set is named once."""

from pathlib import Path

import pytest
import tiny

from limner.config import rules, toml
from limner.config.schema import Config, DataSettings
from limner.data import mixture
from limner.data.source import BadRecord
from limner.errors import InputError


def given(*tables: dict, **data: object) -> DataSettings:
    return toml.build(
        Config,
        {
            "model": {"base": "b"},
            "train": {"steps": 1, "batch_size": 1},
            "data": {"sets": list(tables), **data},
        },
    ).data


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    one = tiny.pictures(tmp_path / "one", 3)
    other = tiny.pictures(tmp_path / "other", 2, column="words")
    (other / "000.png").unlink()
    return one, other


def test_records_come_in_the_order_of_the_sets(two: tuple[Path, Path]) -> None:
    source = mixture.open_source(
        given({"folder": str(two[0])}, {"folder": str(two[1]), "caption": "words"}),
        lambda line: None,
    )
    assert len(source) == 5 and [mixture.set_of(source, i) for i in range(5)] == [0, 0, 0, 1, 1]
    assert (
        source[2].key.endswith("/one: 002.png")
        and source[4].key.endswith("/other: 001.png")
        and source[4].captions == ("a green circle, number 1",)
    )
    with pytest.raises(BadRecord) as bad:
        source[3]
    assert bad.value.key.endswith("/other: 000.png")
    alone = mixture.open_source(DataSettings(folder=str(two[0])), lambda line: None)
    assert mixture.set_of(alone, 2) == 0 and alone[2].key == "002.png"


def test_a_set_named_twice_is_refused_by_whatever_name(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(two[0])
    for name in (str(two[0]), str(tmp_path / "link"), f"{two[0]}/../one"):
        with pytest.raises(
            InputError, match=r"one is named twice. Name it once, with repeats, or with a weight"
        ):
            mixture.open_source(given({"folder": str(two[0])}, {"folder": name}), lambda line: None)
    with pytest.raises(InputError, match=r"data.sets: me/x is named twice"):
        mixture.open_source(
            given({"hub": "me/x"}, {"hub": "me/x", "repeats": 3}), lambda line: None
        )


def test_what_is_wrong_with_one_set_says_which(two: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"data.sets\[1\]: .*no column 'text'"):
        mixture.open_source(
            given({"folder": str(two[0])}, {"folder": str(two[1])}), lambda line: None
        )


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (
            [{"folder": "a", "weight": 1.0}, {"folder": "b"}],
            "data.sets: give a weight to every data set, or to none",
        ),
        ([{"folder": "a", "weight": 0.0}], "data.sets[0].weight: 0.0 is not above 0"),
        ([{"folder": "a", "weight": -1.0}], "data.sets[0].weight: -1.0 is not above 0"),
        ([{"folder": "a", "repeats": 0}], "data.sets[0].repeats: 0 is below 1"),
        (
            [{"folder": "a", "weight": 1.0, "repeats": 2}],
            "data.sets[0]: a weight says already how often its records come",
        ),
        ([{"folder": "a", "hub": "b/c"}], "data.sets[0]: give exactly one of folder and hub"),
        ([{}], "data.sets[0]: give exactly one of folder and hub"),
    ],
)
def test_settings_that_cannot_be_honoured(tables: list[dict], words: str) -> None:
    cfg = toml.build(
        Config,
        {"model": {"base": "b"}, "train": {"steps": 1, "batch_size": 1}, "data": {"sets": tables}},
    )
    with pytest.raises(InputError) as refused:
        rules.check_config(cfg)
    assert words in str(refused.value)


def test_home_stands_in_the_folder_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert given({"folder": "~/pictures"}).sets[0].folder == "/home/me/pictures"
