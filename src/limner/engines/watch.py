"""The processes of a run hear of each other: which one has died, has left, or no longer answers.

Each has a TCP connection to the first one, and a thread that sends beats over it. The kernel closes
the connections of a process that dies, and finds out about a host that is gone; a process that is
stopped sends no beats. What a process computes or waits for plays no part in it.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from limner.errors import LimnerError, LostProcess, from_message, to_message
from limner.json_types import parse_json

BEAT = 1.0  # seconds between two beats
MEETING = 30.0  # seconds in which all connections must be there
# Seconds from the end of a connection to the conclusion that a process has died: a launcher that
# ends all of them does so within this time.
DEATH = 2.0
# Seconds that the others have to end by themselves, once one has left with an error.
DEPARTURE = 6.0
REMEDY = (
    "Every checkpoint that was saved is whole: run the same command again, with all processes, to "
    "go on from the newest."
)


class Link:
    """A connection to one other process."""

    def __init__(self, rank: int, name: str, connection: socket.socket):
        self.rank, self.name, self.connection = rank, name, connection
        self.heard = time.monotonic()
        self.received = b""
        self.ended: float | None = None  # when the connection ended
        self.departed: float | None = None  # when it said that it leaves
        self.error: dict[str, str] | None = None  # with which it left
        keep_alive(connection)
        connection.setblocking(False)

    def send(self, message: object = None) -> None:
        """Send a message, or a beat; a connection that has ended is found when it is read."""
        line = b"\n" if message is None else json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):
            self.connection.sendall(line)

    def receive(self) -> list[Any]:
        """Return the messages that have come, and note that something has."""
        try:
            received = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            received = b""
        self.heard = time.monotonic()
        if not received:
            self.ended = self.heard
            return []
        *lines, self.received = (self.received + received).split(b"\n")
        return [json.loads(line) for line in lines if line]

    def judge(self, patience: float, departure: float) -> LimnerError | None:
        """Return why the run must end because of this process, if it must.

        Args:
            departure: seconds that this process has to end by itself, once the other has left with
                an error.
        """
        now = time.monotonic()
        if self.departed is not None:
            if self.error is None or now - self.departed < departure:
                return None
            error = from_message(self.error)
            error.args = (f"{self.name} has left the run: {error}",)
            error.reported = False
            return error
        if self.ended is not None:
            died = now - self.ended >= DEATH
            return LostProcess(f"{self.name} has died. {REMEDY}") if died else None
        if now - self.heard < patience:
            return None
        return LostProcess(
            f"{self.name} has not answered for {patience:g} seconds (engine.patience): it is "
            f"stopped, or its host is. {REMEDY}"
        )


class Watch:
    """One process's connections to the others, watched by a thread.

    Args:
        links: to the first process; in the first process, to all others.
        patience: seconds that a process may be silent.
        on_stop: called when another process was told to stop.
        on_loss: called with the reason why this process must end.
    """

    def __init__(
        self,
        links: list[Link],
        patience: float,
        on_stop: Callable[[], None],
        on_loss: Callable[[LimnerError], None],
    ):
        self.links, self.patience = links, patience
        self.on_stop, self.on_loss = on_stop, on_loss
        self.verdict: LimnerError | None = None
        self.decided = threading.Event()
        self.left = False
        self.departure = DEPARTURE
        self.selector = selectors.DefaultSelector()
        for link in links:
            self.selector.register(link.connection, selectors.EVENT_READ, link)
        threading.Thread(target=self.run, name="watch", daemon=True).start()

    def run(self) -> None:
        """Beat, listen and judge, until all others have left or the run must end."""
        beaten = 0.0
        judged = time.monotonic()
        while not self.is_over():
            if not self.left and time.monotonic() - beaten >= BEAT:
                beaten = time.monotonic()
                for link in self.links:
                    link.send()
            # All that has come is read before anyone is judged.
            ready = self.selector.select(BEAT)
            while ready:
                for key, _ in ready:
                    self.listen(key.data)
                ready = self.selector.select(0)
            self.excuse_others(judged)
            judged = time.monotonic()
            verdict = self.judge_all()
            if verdict is not None and not self.left:
                self.decide(verdict)
                return

    def judge_all(self) -> LimnerError | None:
        """Return why this process must end: what another has said, else the first one lost."""
        verdicts = [link.judge(self.patience, self.departure) for link in self.links]
        return next((one for one in (self.verdict, *verdicts) if one is not None), None)

    def excuse_others(self, judged: float) -> None:
        """Count no silence of the others during which this process was stopped, perhaps with all.

        Args:
            judged: when the others were last judged, in monotonic seconds.
        """
        now = time.monotonic()
        if now - judged > 3 * BEAT:
            for link in self.links:
                link.heard = now

    def is_over(self) -> bool:
        """Whether nothing is left to be heard, and nobody to be judged."""
        settled = (
            self.left or (link.departed is not None and link.error is None) for link in self.links
        )
        return not self.selector.get_map() and all(settled)

    def listen(self, link: Link) -> None:
        """Act on what one process has sent; the first process passes it on."""
        for message in link.receive():
            if "stop" in message:
                self.tell(message, link)
                self.on_stop()
            elif "end" in message:
                self.verdict = from_message(message["end"])
                self.verdict.reported = False
            elif "left" in message:
                link.departed, link.error = time.monotonic(), message["left"]
        if link.ended is not None:
            self.selector.unregister(link.connection)

    def decide(self, verdict: LimnerError) -> None:
        """End this process for a reason that the others are told."""
        self.verdict = verdict
        self.tell({"end": to_message(verdict)})
        self.left = True
        self.decided.set()
        self.on_loss(verdict)

    def tell(self, message: object, but: Link | None = None) -> None:
        """Send a message to all that are connected to this process, but one."""
        for link in self.links:
            if link is not but and link.ended is None:
                link.send(message)

    def leave(self, error: dict[str, str] | None) -> None:
        """Tell the others that this process leaves, with its error as ``to_message`` gives it;
        nothing ends it from now on."""
        if not self.left:
            self.left = True
            self.tell({"left": error})

    def wait_for_verdict(self) -> LimnerError | None:
        """Return which process is the cause of a fault here, if one has died or left."""
        self.departure = 0.0
        self.decided.wait(DEATH + 3 * BEAT)
        return self.verdict


def connect(
    rank: int, count: int, host: str, exchange: Callable[[str], list[str]]
) -> tuple[list[Link], str]:
    """Connect the processes of a run; all call it.

    Args:
        host: of the first process, as the others see it.
        exchange: gives the texts of all processes.

    Returns:
        The connections, and what went wrong, if anything did, in any of them.
    """
    links: list[Link] = []
    fault = ""
    own = f"(process {os.getpid()} on {socket.gethostname()})"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(open_server(host)) if rank == 0 else None
        token = secrets.token_hex(16)
        offer = "" if server is None else json.dumps([server.getsockname()[1], token, own])
        port, token, first = json.loads(exchange(offer)[0])
        try:
            if server is None:
                connection = socket.create_connection((host, port), MEETING)
                connection.sendall(f"{json.dumps([token, rank, own])}\n".encode())
                links = [Link(0, f"process 0 {first}", connection)]
            else:
                links = accept_all(server, token, count - 1)
        except OSError as error:
            fault = f"process {rank} at {host}:{port}: {error}"
        faults = [one for one in exchange(fault) if one]
    return links, "; ".join(faults)


def open_server(host: str) -> socket.socket:
    """Open a port for the others: on this host alone where all processes are on it."""
    if host in ("localhost", "127.0.0.1", "::1"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, 0), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=1024)


def accept_all(server: socket.socket, token: str, count: int) -> list[Link]:
    """Accept so many connections that know the token.

    Raises:
        OSError: when they do not come in time.
    """
    deadline = time.monotonic() + MEETING
    links: dict[int, Link] = {}
    while len(links) < count:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        connection, _ = server.accept()
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        # Strangers send anything, or nothing; the system may reset their connections.
        with contextlib.suppress(ValueError, TypeError, OSError):
            given, rank, name = parse_json(read_line(connection).decode())
            if secrets.compare_digest(given, token):
                links[rank] = Link(rank, f"process {rank} {name}", connection)
                continue
        connection.close()
    return list(links.values())


def read_line(connection: socket.socket) -> bytes:
    """Read one short line, and nothing after it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 1000 and (byte := connection.recv(1)):
        line += byte
    return line


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel find out within half a minute that the other host is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
