"""JAX's programs compiled in half the time, for tests in which they run a few times."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def compiled_in_haste() -> Iterator[None]:
    """Without most of XLA's optimizations: to the same tolerance, and slower when they run."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
