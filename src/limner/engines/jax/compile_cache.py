"""Compiled programs on disk: executables in JAX's own cache, and traced programs beside them.

JAX finds an executable once a function has been traced and lowered. The result of that, StableHLO,
is kept in the same folder under a digest of all that it depends on, so that the next process needs
no tracing. It is data that ``jax.export`` reads, and executables are XLA's own files: nothing is
unpickled.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

import limner
from limner.engines.jax import sealed_cache
from limner.errors import InputError
from limner.protocols import Report
from limner.storage import atomic

MAX_BYTES = 4 << 30  # of compiled programs; those that were used longest ago go first
# JAX refuses to export these by default, since another version may not know them; the digest that
# a program is found by has the version.
CUSTOM_CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


def enable(setting: str) -> None:
    """Keep compiled programs on disk, where another process finds them.

    Args:
        setting: ``engine.compile_cache``: a folder, "off", or "auto": what
            ``JAX_COMPILATION_CACHE_DIR`` says, else a folder in the user's cache.

    Raises:
        InputError: when the folder cannot be written.
    """
    if setting == "off":
        return
    if setting == "auto" and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        values = jax.config.values
        if values["jax_compilation_cache_dir"]:
            use_folder(
                Path(values["jax_compilation_cache_dir"]), values["jax_compilation_cache_max_size"]
            )
        return
    folder = atomic.user_cache_folder() / "jax" if setting == "auto" else Path(setting)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise InputError(
            f"engine.compile_cache: {folder} cannot be written ({error.strerror}); give another "
            "folder, or off"
        ) from error
    use_folder(folder, MAX_BYTES)


def use_folder(folder: Path, max_bytes: int) -> None:
    """Have JAX keep its executables in a folder, unless somebody else may write there: an
    executable is code."""
    reason = sealed_cache.find_stranger(folder)
    if reason is not None:
        sealed_cache.write_to_stderr(
            f"limner: compiled programs in {folder} are not used: {reason}, and a compiled program "
            f"is code. Run `chmod -R go-w {folder}` if it is yours, or give engine.compile_cache "
            "another folder."
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return
    if max_bytes == MAX_BYTES:
        sealed_cache.sweep(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", max_bytes)
    sealed_cache.install(str(folder), max_bytes)


def load_or_compile(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    devices: Sequence[jax.Device],
    meaning: Any,
    report: Report,
    *,
    out_shardings: Any,
    donate_argnums: int | tuple[int, ...] = (),
) -> jax.stages.Compiled:
    """Compile a pure function, without tracing it if an earlier process has kept its trace.

    Args:
        arguments: trees of arrays, whose names, shapes, types and shardings matter.
        devices: those that the program runs on.
        meaning: all that the program depends on besides the function's name, arguments, this
            package's code, JAX and JAX's settings; plain values.
        report: is told of an entry that is made again.
        out_shardings, donate_argnums: see ``jax.jit``.
    """

    def lower(function: Callable[..., Any]) -> jax.stages.Lowered:
        jitted = jax.jit(function, out_shardings=out_shardings, donate_argnums=donate_argnums)
        return jitted.lower(*arguments)

    cache = sealed_cache.find_installed()
    if cache is None:
        return lower(function).compile()
    cache.report = report
    how = [function.__qualname__, meaning, repr(out_shardings), repr(donate_argnums)]
    key = f"traced-{cache_key(devices, how, arguments)}"
    program: bytes | None = None
    # Some disks cannot be read, and some not written.
    with contextlib.suppress(OSError, TimeoutError):
        program = cache.get(key)
    if program is None:
        program = export_program(jax.jit(function, out_shardings=out_shardings), arguments, devices)
        if program is None:
            return lower(function).compile()
        with contextlib.suppress(OSError, TimeoutError):
            cache.put(key, program)
    # What has just been traced is lowered from its bytes too: JAX's cache, which goes by what is
    # lowered, then finds the executable for the next process.
    try:
        lowered = lower(name_like(export.deserialize(bytearray(program)).call, function))
    except Exception:
        # Its bytes are those that were written, and it is not this function all the same.
        cache.remove(key, "JAX cannot read it")
        lowered = lower(function)
    return lowered.compile()


def name_like(call: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call of an exported function under the function's own name, which profiles show."""

    def run(*arguments: Any) -> Any:
        return call(*arguments)

    run.__name__ = function.__name__
    return run


def export_program(
    jitted: Any, arguments: tuple[Any, ...], devices: Sequence[jax.Device]
) -> bytes | None:
    """Trace a jitted function for the platform of some devices.

    Returns:
        Its StableHLO; None for a function that JAX cannot export, such as one with effects, with
        callbacks to the host, or with cuDNN's attention on several GPUs; and without the
        flatbuffers library.
    """
    platform = devices[0].platform
    if platform == "gpu":
        platform = "cuda" if "cuda" in devices[0].client.platform_version.lower() else "rocm"
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
    try:
        exported = export.export(jitted, platforms=[platform], disabled_checks=checks)(*arguments)
        return bytes(exported.serialize())
    except Exception:
        # The function is compiled as it is, which says what is wrong with it, if anything is.
        return None


def cache_key(devices: Sequence[jax.Device], meaning: Any, arguments: Any) -> str:
    """Return a digest of all that a traced program depends on."""
    leaves = [
        [jax.tree_util.keystr(path), list(a.shape), str(a.dtype), str(getattr(a, "sharding", None))]
        for path, a in jax.tree_util.tree_flatten_with_path(arguments)[0]
    ]
    settings = {
        name: repr(value)
        for name, value in sorted(jax.config.values.items())
        if "cache" not in name
    }
    parts = [
        digest_package(),
        [version(name) for name in ("jax", "jaxlib", "numpy", "optax")],
        [len(devices), devices[0].device_kind, devices[0].client.platform_version],
        settings,
        meaning,
        leaves,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def digest_package() -> str:
    """Return a digest of this package's own code."""
    root = Path(limner.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
