"""Commands that are typed in a shell, run by forks of a process that has imported the frameworks:
each start costs a moment, not ten seconds of imports."""

import contextlib
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import worker

COMMANDS = ("python", "accelerate")
# What stands on the PATH in the command's place: it hands over its words and files, and waits.
STAND_IN = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    words = json.dumps([[{name!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(words).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(words)
    sys.exit(server.recv(1)[0])
"""


@contextlib.contextmanager
def open_shell(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A shell's environment in which ``python`` and ``accelerate launch`` start warm. Libraries
    read theirs once, when they are imported: all commands have the same."""
    folder.mkdir()
    address = str(folder / "socket")
    for name in COMMANDS:
        (folder / name).write_text(
            STAND_IN.format(python=sys.executable, address=address, name=name)
        )
        (folder / name).chmod(0o700)
    own = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import warm"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        with subprocess.Popen(
            [sys.executable, "-c", f"{own}; warm.serve({listening.fileno()})"],
            env=environment,
            pass_fds=[listening.fileno()],
        ) as server:
            try:
                yield environment | {"PATH": f"{folder}{os.pathsep}{environment['PATH']}"}
            finally:
                server.kill()


def serve(listening: int) -> None:
    """Run one command after another, each in a fork."""
    for name in worker.PRELOAD:
        importlib.import_module(name)
    server = socket.socket(fileno=listening)
    while True:
        asked = server.accept()[0]
        with asked:
            head, files, *_ = socket.recv_fds(asked, 4, 3)
            size, said = int.from_bytes(head, "big"), bytearray()
            while len(said) < size:
                said += asked.recv(size - len(said))
            child = os.fork()
            if child == 0:
                for own, theirs in enumerate(files):
                    os.dup2(theirs, own)
                # Python knows of its old ones whether they were files or pipes.
                sys.stdin, sys.stdout, sys.stderr = (
                    open(own, mode, closefd=False)  # noqa: SIM115 - for the fork's whole life
                    for own, mode in enumerate("rww")
                )
                run(*json.loads(said))
                sys.exit()  # what a script raises ends the fork as it would end the script
            for one in files:
                os.close(one)
            asked.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255]))


def run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be ``python SCRIPT`` or ``accelerate launch SCRIPT`` in this process."""
    os.chdir(folder)
    replace_environment(environment)
    if words[0] == "accelerate":
        words, environment = read_launch(words[2:])
        replace_environment(environment)
    sys.argv, sys.path[0] = words[1:], str(Path(words[1]).resolve().parent)
    runpy.run_path(words[1], run_name="__main__")


def read_launch(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command and environment that ``accelerate launch`` makes of its words for one process."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    asked = launch.launch_command_parser().parse_args(words)
    asked, _, _ = launch._validate_launch_command(asked)
    return prepare_simple_launcher_cmd_env(asked)


def replace_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
