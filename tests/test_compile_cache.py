"""Compiled programs on disk save time and change nothing; what is damaged or another's is made
again, and nothing is unpickled."""

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import worker

from limner import engines
from limner.base_model.open import open_base
from limner.commands import bench
from limner.config import toml
from limner.config.schema import Config
from limner.families import FAMILIES

jax = pytest.importorskip("jax")
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from limner.engines.jax import compile_cache, sealed_cache  # noqa: E402

pytestmark = pytest.mark.frameworks

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)
X = np.arange(3, dtype=np.float32)


@pytest.fixture(autouse=True)
def settings_of_before() -> Iterator[None]:
    """JAX's settings, and no cache, after each test."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The programs on disk, in a folder of their own, however quickly they were compiled."""
    compile_cache.enable(str(tmp_path / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return tmp_path / "programs"


@dataclass
class Multiplication:
    """A function that counts how often it is traced, compiled through the cache."""

    traced: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def __call__(self, factor: float, x: np.ndarray) -> list[float]:
        def multiply(given: dict[str, Any]) -> dict[str, Any]:
            self.traced.append(factor)
            return {"y": factor * given["x"]}

        compiled = load(multiply, {"x": x}, {"factor": factor}, self.said.append)
        product: list[float] = compiled({"x": x})["y"].tolist()
        return product


def load(function: Any, argument: Any, meaning: Any = None, report: Any = print) -> Any:
    """Compile a function of one argument through the cache, as a new process would."""
    jax.clear_caches()
    devices = jax.devices()[:1]
    return compile_cache.load_or_compile(
        function, (argument,), devices, meaning, report, out_shardings=None
    )


def paths_of(folder: Path, kind: str) -> set[Path]:
    """The entries of a kind: ``traced``, or the name of an executable."""
    return set(folder.glob(f"limner-*-{kind}-*-cache"))


def test_half_a_compiled_program_is_swept_away(tmp_path: Path) -> None:
    """What a kill has left between a program and the time of its last use; whole ones stay."""
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (tmp_path / name).write_bytes(b"x")
    sealed_cache.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*-*")) == ["whole-atime", "whole-cache"]


def test_a_compiled_step_is_found_without_tracing(folder: Path) -> None:
    """Traced once for one meaning; a damaged one is traced again, and kept."""
    multiply = Multiplication()
    results = [multiply(2.0, X), multiply(2.0, X + 1), multiply(3.0, X), multiply(2.0, X[:2])]
    assert results == [[0, 2, 4], [2, 4, 6], [0, 3, 6], [0, 2]]
    assert multiply.traced == [2.0, 3.0, 2.0]
    devices = jax.devices()[:1]
    keys = [compile_cache.cache_key(devices, {}, x) for x in (X, X.astype(np.int32))]
    assert keys[0] != keys[1]
    paths = paths_of(folder, "traced")
    assert len(paths) == 3 and not multiply.said
    for path in paths:
        path.write_bytes(change_last_bit(path.read_bytes()))
    assert [multiply(3.0, X), multiply(3.0, X)] == [[0, 3, 6], [0, 3, 6]]
    assert multiply.traced == [2.0, 3.0, 2.0, 3.0]
    [line] = multiply.said
    assert "is made again: it is damaged" in line


def change_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def seal(path: Path, content: bytes) -> bytes:
    """What an entry of that name holds."""
    return sealed_cache.make_digest(path.name.removesuffix("-cache"), content) + content


def is_sealed(path: Path) -> bool:
    stored = path.read_bytes()
    return stored == seal(path, stored[sealed_cache.DIGEST_BYTES :])


def test_damaged_foreign_and_poisoned_traces_are_passed_over(folder: Path, tmp_path: Path) -> None:
    """Nothing of them is run, whatever digest they have; pickles of earlier builds are not read."""
    multiply = Multiplication()
    assert multiply(2.0, X) == [0, 2, 4]
    [path] = paths_of(folder, "traced")
    whole = path.read_bytes()
    multiply(3.0, np.arange(4, dtype=np.float32))
    [other] = paths_of(folder, "traced") - {path}
    mark = tmp_path / "ran"

    class Poison:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    poison = pickle.dumps(Poison())
    program = other.read_bytes()[sealed_cache.DIGEST_BYTES :]

    contents = {
        "cut short": whole[:-100],
        "empty": b"",
        "no program": b"x" * 1000,
        "of another name": other.read_bytes(),
        "a pickle": poison,
        "a pickle of an earlier build": hashlib.sha256(poison).digest() + poison,
        "a pickle with the right digest": seal(path, poison),
        "another program with the right digest": seal(path, program),
    }
    for what, content in contents.items():
        path.write_bytes(content)
        before = len(multiply.traced), len(multiply.said)
        # With a digest that is right it is written by the next process.
        for _ in range(2):
            assert multiply(2.0, X) == [0, 2, 4], what
        after = len(multiply.traced), len(multiply.said)
        assert after[1] == before[1] + 1 and str(path) in multiply.said[-1], what
        assert after[0] == before[0] + (2 if "right digest" in what else 1), what
        assert not mark.exists() and is_sealed(path), what


@pytest.mark.parametrize("way", ["damaged", "cut short", "another's", "without a digest"])
def test_an_executable_that_is_not_what_was_written_never_reaches_xla(
    way: str, folder: Path
) -> None:
    """It is compiled again, with one line said, and kept; JAX itself would have warned for ever."""

    def double(x: Any) -> Any:
        return 2 * x

    def triple(x: Any) -> Any:
        return 3 * x

    load(triple, X)
    [other] = paths_of(folder, "jit_triple")
    load(double, X)
    [path] = paths_of(folder, "jit_double")
    whole = path.read_bytes()
    damage: dict[str, Callable[[], bytes]] = {
        "damaged": lambda: change_last_bit(whole),
        "cut short": lambda: whole[:-20],
        "another's": other.read_bytes,
        "without a digest": lambda: whole[sealed_cache.DIGEST_BYTES :],
    }
    path.write_bytes(damage[way]())
    said: list[str] = []
    for _ in range(2):
        assert load(double, X, report=said.append)(X).tolist() == [0, 2, 4]
    [line] = said
    assert str(path) in line
    assert is_sealed(path)


def test_a_folder_that_the_environment_names_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit and a lock; a recipe's own folder comes first."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_compilation_cache_max_size", -1)
    compile_cache.enable("auto")
    multiply = Multiplication()
    assert [multiply(2.0, X), multiply(2.0, X)] == [[0, 2, 4]] * 2
    assert multiply.traced == [2.0]
    [path] = paths_of(tmp_path, "traced")
    assert is_sealed(path) and not list(tmp_path.glob("*-part"))
    path.write_bytes(b"")
    assert multiply(2.0, X) == [0, 2, 4] and len(multiply.said) == 1 and is_sealed(path)
    compile_cache.enable(str(tmp_path / "own"))
    assert multiply(2.0, X) == [0, 2, 4] and len(multiply.traced) == 3
    assert len(paths_of(tmp_path / "own", "traced")) == 1


def test_jax_s_own_entries_are_neither_read_nor_touched(folder: Path) -> None:
    """Other programs of the user may share the folder."""
    theirs = folder / "jit_double-0123-cache"
    theirs.write_bytes(b"theirs")
    theirs.with_name("jit_double-0123-atime").write_bytes(bytes(8))
    load(lambda x: 2 * x, X)
    assert theirs.read_bytes() == b"theirs"


def add_on_the_host(x: Any) -> Any:
    """A callback is a pointer into this process."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: np.asarray(x) + 1, shape, x)


def add_and_print(x: Any) -> Any:
    """An effect."""
    jax.debug.print("{}", x.sum(), ordered=True)
    return x + 1


def add_in_a_tree_of_its_own(x: Any) -> Any:
    return Pair(x + 1)


@jax.tree_util.register_pytree_node_class
@dataclass
class Pair:
    """A kind of tree that JAX does not know how to write."""

    x: Any

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> "Pair":
        return cls(*children)


@pytest.mark.parametrize("add", [add_on_the_host, add_and_print, add_in_a_tree_of_its_own])
def test_a_function_that_cannot_be_exported_is_compiled_all_the_same(
    add: Callable[[Any], Any], folder: Path
) -> None:
    result = load(add, X)(X)
    assert np.asarray(getattr(result, "x", result)).tolist() == [1, 2, 3]
    assert not paths_of(folder, "traced")


def test_what_is_wrong_with_a_function_is_said_as_without_the_cache(folder: Path) -> None:
    with pytest.raises(TypeError, match="add got incompatible shapes"):
        load(lambda x: x + jax.numpy.ones(4), X)


def test_a_folder_that_cannot_be_written_costs_time_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sealed_cache.SealedCache, "get", refuse)
    monkeypatch.setattr(sealed_cache.SealedCache, "put", refuse)
    # JAX warns of its executables.
    with pytest.warns(UserWarning, match="persistent compilation cache entry"):
        assert load(lambda x: 2 * x, X)(X).tolist() == [0, 2, 4]


def test_an_executable_comes_out_of_jax_s_cache_however_it_was_traced(folder: Path) -> None:
    """As after an edit that leaves the program as it was."""
    x, traced, hits = np.random.default_rng(0).standard_normal((64, 64), np.float32), [], []

    def mix(x: Any) -> Any:
        traced.append(x)
        return jax.nn.softmax(jax.numpy.sin(x @ x)) * jax.numpy.exp(x)

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    found = [np.asarray(load(mix, x, {"code": code})(x)) for code in (1, 1, 2, 2)]
    jax.monitoring.unregister_event_listener(listen)
    assert len(traced) == 2 and len(hits) == 3
    assert all(np.array_equal(one, found[0]) for one in found)


def train_three_steps(base: Path, folder: Path) -> list[float]:
    """The losses of a LoRA with dropout, and the held-out ones after it, compiled into a folder."""
    raw = {
        "model": {"base": str(base)},
        "engine": {"kind": "jax", "compile_cache": str(folder)},
        "data": {"folder": str(base), "size": 32},
        "adapter": {"kind": "lora", "dropout": 0.2},
        "train": {"steps": 3, "batch_size": 4, "micro_batch_size": 2},
    }
    config, family = toml.build(Config, raw), FAMILIES["sd"]
    opened, process = open_base(config.model, family), engines.join_processes(config.engine)
    engine = engines.open_engine(config, opened, family, process, 2, print)
    state, rows = engine.init_state(3), bench.make_batch(config, opened.configs, family, 4)
    metrics = []
    for step in range(3):
        options = {"step": step, "learning_rate": 1e-3, "ema": None, "seed": 3}
        state, of_step = engine.step(state, rows, **options)
        metrics.append(of_step)
    losses = [value for row in engine.fetch_metrics(state, metrics) for value in row.values()]
    return [*losses, *engine.losses(state, rows, average=False).tolist()]


def test_losses_are_the_same_with_a_cold_and_a_warm_cache_and_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; the second time nothing is traced or compiled."""
    base = tiny.stable_diffusion(tmp_path / "sd", channels=(64,), attention=False)
    cold = train_three_steps(base, folder)
    assert len(paths_of(folder, "traced")) == 2
    jax.clear_caches()
    kept = {path: path.read_bytes() for path in folder.glob("*-cache")}
    with monkeypatch.context() as patched:
        patched.setattr(compile_cache, "export_program", lambda *_: pytest.fail("traced"))
        assert train_three_steps(base, folder) == cold
    assert {path: path.read_bytes() for path in folder.glob("*-cache")} == kept
    monkeypatch.setattr(sealed_cache, "find_installed", lambda: None)
    jax.clear_caches()
    assert train_three_steps(base, tmp_path / "other") == cold


def test_a_second_process_traces_nothing(tmp_path: Path) -> None:
    """On eight devices, with a donated tree, a key, a loop and rematerialization: the same bits and
    the same memory as without the cache."""
    outputs = []
    for folder in ("plain", str(tmp_path), str(tmp_path)):
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("traced_step.py")), folder],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | worker.devices(8),
        )
        outputs.append(process.stdout.split())
    plain, first, second = outputs
    assert [int(output[0]) > 0 for output in outputs] == [True, True, False]
    assert plain[1:] == first[1:] == second[1:] and int(plain[2]) > 0


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_folder_that_others_may_write_is_not_used(
    mode: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for how in ("setting", "environment"):
        (tmp_path / how).mkdir()
        (tmp_path / how).chmod(mode)
        if how == "environment":
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / how)
            jax.config.update("jax_compilation_cache_dir", str(tmp_path / how))
            compile_cache.enable("auto")
        else:
            compile_cache.enable(str(tmp_path / how))
        assert sealed_cache.find_installed() is None
        assert jax.config.values["jax_compilation_cache_dir"] is None
        said = capfd.readouterr().err
        assert f"compiled programs in {tmp_path / how} are not used: others than its owner" in said


def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    compile_cache.enable(str(tmp_path))
    assert sealed_cache.find_installed() is None
    assert f"it belongs to user {tmp_path.stat().st_uid}" in capfd.readouterr().err


@pytest.mark.parametrize("size", [compile_cache.MAX_BYTES, -1])
@pytest.mark.parametrize("mode", [0o660, 0o606])
def test_an_entry_that_others_may_write_is_made_again(size: int, mode: int, tmp_path: Path) -> None:
    sealed_cache.install(str(tmp_path), size)
    cache, lines = sealed_cache.find_installed(), []
    assert cache is not None
    cache.report = lines.append
    before = os.umask(0)
    try:
        cache.put("program", b"code")
    finally:
        os.umask(before)
    assert cache.get("program") == b"code", "what we write is ours alone, whatever the umask"
    [entry] = tmp_path.glob("*-cache")
    entry.chmod(mode)
    assert cache.get("program") is None and not entry.exists()
    assert len(lines) == 1 and "is made again: others than its owner may write it" in lines[0]


@pytest.mark.parametrize("size", [compile_cache.MAX_BYTES, -1])
def test_an_entry_that_is_no_file_is_made_again(
    size: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pipe in the place of a program, or of the time of its last use."""
    sealed_cache.install(str(tmp_path), size)
    cache, lines = sealed_cache.find_installed(), []
    assert cache is not None
    cache.report = lines.append
    kinds = ("cache", "atime") if size > 0 else ("cache",)
    for kind in kinds:
        cache.put("program", b"code")
        entry = tmp_path / f"{sealed_cache.make_name('program')}-{kind}"
        entry.unlink()
        os.mkfifo(entry)
        assert cache.get("program") is None and not entry.exists()
        assert len(lines) == 1 and lines.pop().endswith("is made again: it is no regular file")
    cache.put("program", b"code")
    assert cache.get("program") == b"code"
    other = tmp_path / "other-atime"
    os.mkfifo(other)
    (tmp_path / "other-cache").write_bytes(b"x")
    sealed_cache.sweep(tmp_path)
    assert capfd.readouterr().err == f"limner: {other} is removed: it is no regular file\n"
    assert not list(tmp_path.glob("other-*"))


class PathOfEtils(type(Path())):  # type: ignore[misc]
    """What JAX takes for its paths where etils is installed: less than Python's own."""

    @property
    def chmod(self) -> Any:
        raise AttributeError("etils' paths have no chmod")

    def stat(self, **options: Any) -> SimpleNamespace:
        status = super().stat(**options)
        return SimpleNamespace(st_size=status.st_size, st_mode=status.st_mode)


@pytest.mark.parametrize("size", [compile_cache.MAX_BYTES, -1])
def test_paths_of_etils_serve_as_well(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax._src.lru_cache.pathlib, "Path", PathOfEtils)
    sealed_cache.install(str(tmp_path), size)
    cache = sealed_cache.find_installed()
    assert cache is not None and isinstance(cache.path, PathOfEtils)
    cache.put("program", b"code")
    assert cache.get("program") == b"code"
    [entry] = tmp_path.glob("*-cache")
    assert entry.stat().st_mode & 0o777 == 0o600
