"""A connection to JAX's coordinator that outlives it.

JAX ends a process with a stack trace as soon as the coordinator, which lives in the first process,
closes its connection. Behind a relay it sees none close, so that ``engines.watch`` has the time to
name the process that has died.
"""

import contextlib
import socket
import threading


class Relay:
    """A port of this host at which an address elsewhere answers."""

    def __init__(self, address: str):
        host, _, port = address.rpartition(":")
        self.target = (host.strip("[]"), int(port))
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        self.kept: list[socket.socket] = []  # an unreachable socket would be closed
        threading.Thread(target=self.serve, name="relay", daemon=True).start()

    def serve(self) -> None:
        """Pass on whatever comes, both ways."""
        while True:
            near = self.server.accept()[0]
            try:
                far = socket.create_connection(self.target)
            except OSError:  # the coordinator may start later; JAX tries again
                near.close()
                continue
            self.kept += [near, far]
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=ends, name="relay", daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on one way, until the source ends; the target is left open."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
