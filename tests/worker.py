"""A training run in a process of its own, which can be told to die in the middle of the n-th write
to the disk."""

import contextlib
import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

PRELOAD = [
    "torch",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "peft",
    "limner.training.loop",
    "limner.engines.torch.engine",
    "limner.engines.jax.engine",
]


def context() -> ForkServerContext:
    """Processes that begin with everything imported, so that each attempt costs a moment, not a
    start of Python."""
    made = get_context("forkserver")
    made.set_forkserver_preload(PRELOAD)
    return made


def devices(count: int) -> dict[str, str]:
    """For the environment of a process in which JAX is to see so many."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def start(
    ctx: ForkServerContext, raw: dict[str, Any], die_at_write: int | None = None
) -> ForkServerProcess:
    process = ctx.Process(target=run, args=(raw, die_at_write))
    process.start()
    return process


def send_signal(process: ForkServerProcess, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended: once the server of forks has taken note of
    that it has no id, a moment before its exit code is here."""
    if process.exitcode is None:
        assert process.pid, "0 would be all processes of the tests"
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def run(raw: dict[str, Any], die_at_write: int | None) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    import torch

    from limner.config import toml
    from limner.config.schema import Config
    from limner.guard import run_guarded
    from limner.storage import atomic
    from limner.training import loop

    torch.set_num_threads(1)
    if die_at_write is not None:
        writes, sync = iter(range(die_at_write)), atomic.sync

        def counted(path: Any) -> None:
            if next(writes, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        atomic.sync = counted
    os._exit(
        run_guarded(lambda: loop.run_training(toml.build(Config, raw), report=lambda text: None))
    )
