"""Tells every rank within seconds that another rank has ended, whatever it is waiting for.

Why torchrun and the time-outs of collectives are not enough:

- torchrun's agent ends the other ranks of its own machine with SIGTERM and, as a rank that waits in a collective does not answer, with
  SIGKILL 30 s later (measured: 32 s from the loss to the end of torchrun). Nothing says which rank was lost or how to resume. Agents of
  other machines notice it through the rendezvous only.
- Gloo reports a closed connection, with a stack trace of every other rank (measured: 51 lines for two ranks). NCCL reports nothing: a
  kernel that waits for a dead rank ends with the collective's time-out, which must be longer than the slowest validation on one rank
  (``utils.distributed.TIMEOUT``).
- Without an agent (one task a GPU under ``srun``, a plain loop over RANK) nothing ends the other ranks before that time-out.
- Heartbeats through torch's TCPStore could not tell a dead rank from one that holds the interpreter for long (reading labels, compiling).

So a thread of every rank holds one TCP connection to the main rank, which holds them all. The kernel closes a process's connections
however it ends, SIGKILL included, and keep-alive probes find a machine that lost its power; nothing is sent while all ranks run. A rank
that is notified has a grace period to end by itself, then the thread ends its process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import weakref
from datetime import timedelta
from typing import NamedTuple, Protocol, cast

GRACE_S = {"lost": 10, "failed": 10, "stopped": 40}  # between the notice and the end of the process
CONNECT_S = 60
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # s, s, probes: a dead machine is noticed after half a minute
KEY = "watchdog"


class Store(Protocol):
    """The part of torch's key-value stores that is used."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class RankEnded(NamedTuple):
    """Which other rank ended first, and how."""

    kind: str  # "lost": without a word, as when killed; "failed", "stopped": it prints the reason itself
    rank: int


class Watchdog:
    """Connects the ranks of a training; ``close`` it in the end.

    Args:
        store: holds the port and token of the main rank.
        rank: of this process.
        world_size: number of processes.
        host: address of the main rank's machine.
        name: of the program, for messages.

    Attributes:
        ended: the first rank that ended early, None while all run.

    Raises:
        OSError: the main rank cannot be reached.
    """

    def __init__(self, store: Store, rank: int, world_size: int, *, host: str, name: str = "") -> None:
        self.rank, self.world_size, self.name = rank, world_size, name
        self.ended: RankEnded | None = None
        self._notified = threading.Event()
        self.closed = False
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, int] = {}  # connection -> rank at its other end
        self._connected: set[int] = set()  # ranks that have ever been connected
        self._listener: socket.socket | None = None
        if rank == 0:
            self._listener = socket.create_server(("", 0), backlog=world_size, family=socket.AF_INET)
            self._token = secrets.token_hex(16)
            store.set(KEY, f"{self._listener.getsockname()[1]} {self._token}")
        else:
            main, self._token = _connect_to_main(store, rank, host)
            self._peers[_enable_keepalive(main)] = 0
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_in_child(reference()))
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def token(self) -> str:
        """Random text, the same on all ranks and new with every start."""
        return self._token

    def close(self, outcome: str = "bye", *, linger_s: float = 0) -> None:
        """Disconnects.

        Args:
            outcome: sent to the other ranks: ``bye`` (finished), ``failed`` or ``stopped``.
            linger_s: the longest to wait for the other ranks to disconnect.
        """
        with self._lock:
            self.closed = True
            for peer in list(self._peers):
                self._send(peer, f"{outcome} {self.rank}")
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_WR)
        end = time.monotonic() + linger_s
        while self._peers and time.monotonic() < end:
            time.sleep(0.02)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it

    def missing_ranks(self, seconds: float) -> list[int]:
        """Ranks that have not connected to the main rank within so many seconds."""
        end = time.monotonic() + seconds
        while missing := sorted(set(range(1, self.world_size)).difference(self._connected)):
            if time.monotonic() > end or self.ended is not None:
                break
            time.sleep(0.02)
        return missing

    def wait(self, seconds: float) -> RankEnded | None:
        """The first rank that ended, if there is one within so many seconds."""
        self._notified.wait(seconds)
        return self.ended

    def reports_loss(self) -> bool:
        """Whether this is the rank that prints that another one was lost: the main rank, or rank 1 where the main one was lost."""
        return self.ended is not None and self.ended.kind == "lost" and self.rank == (1 if self.ended.rank == 0 else 0)

    def loss_message(self) -> str:
        """One sentence: which rank was lost."""
        assert self.ended is not None
        return f"process {self.ended.rank} of {self.world_size} was lost (killed, out of memory, or its machine is down), so all stop"

    def _watch(self) -> None:
        """What the thread runs: handles connections until all are closed."""
        with selectors.DefaultSelector() as selector:
            for connection in (self._listener, *self._peers):
                if connection is not None:
                    selector.register(connection, selectors.EVENT_READ, b"")
            while selector.get_map():
                for key, _ in selector.select():
                    connection = cast("socket.socket", key.fileobj)
                    if connection is self._listener:
                        self._accept(selector, connection)
                    else:
                        self._read(selector, connection, key.data)

    def _accept(self, selector: selectors.BaseSelector, listener: socket.socket) -> None:
        try:
            connection = listener.accept()[0]
        except OSError:  # closed
            selector.unregister(listener)
            listener.close()
        else:
            selector.register(_enable_keepalive(connection), selectors.EVENT_READ, b"")

    def _read(self, selector: selectors.BaseSelector, connection: socket.socket, before: bytes) -> None:
        """Handles the lines that have arrived; a connection that closes without a last line is a lost rank."""
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        *lines, rest = (before + data).split(b"\n")
        for line in lines:
            if not self._handle_line(connection, line.decode(errors="replace").split()):
                data = b""
        if data:
            selector.modify(connection, selectors.EVENT_READ, rest)
            return
        selector.unregister(connection)
        with self._lock:
            peer = self._peers.pop(connection, None)
            connection.close()
            is_lost = peer is not None and not self.closed
        if is_lost:
            assert peer is not None
            self._notify("lost", peer)

    def _handle_line(self, connection: socket.socket, words: list[str]) -> bool:
        """Handles one line of another rank; returns whether more is expected of it."""
        if len(words) != 2 or not words[1].isdecimal():
            return False
        word, number = words[0], int(words[1])
        with self._lock:
            if connection not in self._peers:  # the first line identifies the rank
                known = secrets.compare_digest(word, self._token)
                if known:
                    self._peers[connection] = number
                    self._connected.add(number)
                    self._send(connection, self._token)
                return known
        if word in GRACE_S:
            self._notify(word, number)
        if word == "bye" or number == self._peers[connection]:
            with self._lock:
                self._peers.pop(connection)
            return False
        return True

    def _notify(self, kind: str, rank: int) -> None:
        """Records the first rank that ended, forwards it to the other ranks, and starts the grace period."""
        with self._lock:
            if self.ended is not None or self.closed:
                return
            self.ended = RankEnded(kind, rank)
            for peer in self._peers:
                self._send(peer, f"{kind} {rank}")
        self._notified.set()
        timer = threading.Timer(GRACE_S[kind], self._end_process)
        timer.daemon = True
        timer.start()

    def _end_process(self) -> None:
        """Ends this process at the end of the grace period, from the thread: the main thread may wait in a collective."""
        if self.closed:
            return
        if self.reports_loss():
            os.write(2, f"{self.name}: {self.loss_message()}; resume with --resume\n".encode())
        sys.stdout.flush()
        os._exit(1)

    def _send(self, peer: socket.socket, line: str) -> None:
        with contextlib.suppress(OSError):  # it has ended too
            peer.sendall(f"{line}\n".encode())


def _connect_to_main(store: Store, rank: int, host: str) -> tuple[socket.socket, str]:
    """Connects to the main rank. After a restart the store may still hold the port of the former one, so failures are tried again.

    Raises:
        OSError: the main rank cannot be reached.
    """
    end = time.monotonic() + CONNECT_S
    while True:
        store.wait([KEY], timedelta(seconds=CONNECT_S))
        port, token = store.get(KEY).decode().split()
        try:
            main = socket.create_connection((host, int(port)), timeout=CONNECT_S)
            main.sendall(f"{token} {rank}\n".encode())
            if _line(main) == token:
                main.settimeout(None)
                return main, token
            main.close()
        except OSError:
            if time.monotonic() > end:
                raise
        if time.monotonic() > end:
            raise ConnectionError(f"{host}:{port} is not the main rank")
        time.sleep(0.2)


def _line(connection: socket.socket) -> str:
    """One line, read byte by byte so that the next one stays in the socket; what came before the end of the stream if that is shorter."""
    data = b""
    while len(data) < 100 and (byte := connection.recv(1)) not in (b"", b"\n"):
        data += byte
    return data.decode(errors="replace")


def _enable_keepalive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _close_in_child(watchdog: Watchdog | None) -> None:
    """A forked loader process must not keep the connections open after its parent has ended."""
    if watchdog is not None and not watchdog.closed:
        watchdog.closed = True
        for connection in (watchdog._listener, *watchdog._peers):
            if connection is not None:
                connection.close()
