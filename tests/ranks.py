"""Processes of one run, each with its own exit code and messages: started without a launcher, which
would end all of them and give one code."""

import atexit
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PATIENCE = 4.0  # seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    ctx: ForkServerContext,
    folder: Path,
    engine: str,
    action: Callable[..., None],
    *given: Any,
    ranks: tuple[str, ...] = ("0", "1"),
) -> list[ForkServerProcess]:
    """Two processes that do an action with the folder, the engine and what else is given; what they
    say lies in the folder.

    Args:
        ranks: of those that are started.
    """
    port, processes = str(free_port()), []
    for rank in ranks:
        environment = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        if engine == "torch":
            environment |= {"RANK": rank, "WORLD_SIZE": "2"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        else:
            environment |= {"LIMNER_PROCESSES": "2", "LIMNER_RANK": rank, "JAX_PLATFORMS": "cpu"}
            environment |= {"LIMNER_COORDINATOR": f"127.0.0.1:{port}"}
        process = ctx.Process(target=run, args=(folder, rank, environment, action, engine, given))
        process.start()
        processes.append(process)
    return processes


def run(
    folder: Path,
    rank: str,
    environment: dict[str, str],
    action: Callable[..., None],
    engine: str,
    given: tuple[Any, ...],
) -> None:
    file = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    import torch

    from limner.guard import run_guarded

    torch.set_num_threads(1)
    code = run_guarded(lambda: action(folder, engine, *given))
    sys.stderr.flush()
    # As where Python ends; a child that was forked would leave this out.
    atexit._run_exitfuncs()
    os._exit(code)


def wait_in(folder: Path, engine: str, where: str, victim: int) -> None:
    """Meet, then wait for the victim, which sleeps."""
    import time

    from limner import engines
    from limner.config.schema import EngineSettings
    from limner.training.signals import Stop

    settings = EngineSettings(kind=engine, device="cpu", patience=PATIENCE)  # type: ignore[arg-type]
    with (
        Stop() as stop,
        engines.join_processes(settings) as process,
        process.explain_errors(),
    ):
        stop.tell_others, stop.end = process.request_stop, process.end
        process.on_stop = stop.hear_others
        process.barrier()
        (folder / f"met-{process.rank}").touch()
        if process.rank == victim:
            time.sleep(60)
        elif where == "sum":
            import torch

            process.sum_(torch.ones(3))  # type: ignore[attr-defined]
        elif where == "barrier":
            process.barrier()
        else:
            time.sleep(60)


def meet_alone(folder: Path, engine: str) -> None:
    """Wait for the other process, which does not come."""
    from limner import engines
    from limner.config.schema import EngineSettings
    from limner.engines import process

    process.MEETING = 1.0
    (folder / f"met-{os.environ.get('LOCAL_RANK')}").touch()
    engines.join_processes(EngineSettings(kind=engine, device="cpu", patience=PATIENCE))  # type: ignore[arg-type]


def said(folder: Path, rank: int) -> str:
    return (folder / f"said-{rank}").read_text()


def pass_barriers(folder: Path, engine: str, count: int) -> None:
    """Meet again and again."""
    import time

    from limner import engines
    from limner.config.schema import EngineSettings

    settings = EngineSettings(kind=engine, device="cpu", patience=PATIENCE)  # type: ignore[arg-type]
    with engines.join_processes(settings) as process, process.explain_errors():
        process.barrier()
        (folder / f"met-{process.rank}").touch()
        for _ in range(count):
            process.barrier()
            time.sleep(0.05)


def fail_alone(folder: Path, engine: str, who: int) -> None:
    """Meet; then one leaves with an error while the others wait for it."""
    from limner import engines
    from limner.config.schema import EngineSettings
    from limner.errors import DiskError

    settings = EngineSettings(kind=engine, device="cpu", patience=PATIENCE)  # type: ignore[arg-type]
    with engines.join_processes(settings) as process, process.explain_errors():
        process.barrier()
        if process.rank == who:
            raise DiskError("disk: full")
        process.barrier()


def stop_while_devices_are_sought(folder: Path, engine: str, victim: int) -> None:
    """One gets a signal between its meeting with the others and its devices, for which the others
    wait."""
    import signal
    import time

    import jax

    from limner import engines
    from limner.config.schema import EngineSettings
    from limner.training.signals import Stop

    def stop(kind: str | None = None) -> list[Any]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception as error:
            # As JAX does with whatever ends its start.
            raise RuntimeError(f"Unable to initialize backend 'cpu': {error}")  # noqa: B904
        return []

    if os.environ["LOCAL_RANK"] == str(victim):
        jax.devices = stop
    with Stop():
        engines.join_processes(EngineSettings(kind=engine, device="cpu", patience=PATIENCE))  # type: ignore[arg-type]


def train(folder: Path, engine: str, raw: dict[str, Any]) -> None:
    """A whole run."""
    from limner.config import toml
    from limner.config.schema import Config
    from limner.training import loop

    loop.run_training(toml.build(Config, raw), report=lambda line: None)


def train_all(folder: Path, engine: str, jobs: list[dict[str, Any]]) -> int:
    """One run after the other in one world; how each ended lies in the folder: class of the fault
    or "done", message, whether another process says it, exit code, lines told. Returns the last
    exit code."""
    import json

    from limner import engines
    from limner.config import toml
    from limner.config.schema import Config
    from limner.engines.torch.processes import TorchProcessGroup
    from limner.errors import LimnerError
    from limner.training import loop

    joined = TorchProcessGroup("cpu")
    # A pair that has parted does not meet again.
    leave, joined.close = joined.close, lambda error: None  # type: ignore[method-assign]
    engines.join_processes = lambda settings: joined
    ends: list[list[Any]] = []
    for raw in jobs:
        lines: list[str] = []
        try:
            loop.run_training(toml.build(Config, raw), report=lines.append)
            ends.append(["done", "", False, 0, lines])
        except LimnerError as fault:
            ends.append([type(fault).__name__, str(fault), fault.reported, fault.code, lines])
    (folder / f"ends-{joined.rank}.json").write_text(json.dumps(ends))
    leave()
    return int(ends[-1][3])
