"""Notices within seconds that another process of a training has gone, whatever this one is waiting for.

A thread holds one TCP connection to the main process (the main one holds them all). The kernel closes a process's connections however it
ends, SIGKILL included, and keep-alive finds a machine that lost its power; so nothing has to be sent while all is well, and a busy
process is never taken for a dead one. Whoever is told of a loss has a grace to end by itself, then the thread ends it: a collective on
a GPU would wait for a dead process until its own time-out.
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

GRACE_S = {"lost": 10, "failed": 10, "stopped": 40}  # between the news and the end
CONNECT_S = 60
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # s, s, probes: a dead machine is noticed after half a minute
KEY = "watchdog"


class Store(Protocol):
    """What is needed of torch's key-value stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class RankEnded(NamedTuple):
    """The first that was heard of another process's end."""

    kind: str  # "lost": it was killed; "failed", "stopped": it says itself why
    rank: int


class Watchdog:
    """Connects the processes of a training; ``close`` it in the end.

    Args:
        store: where the main process says how it can be reached.
        rank: of this process.
        world_size: number of processes.
        host: address of the main process's machine.
        name: of the program, for what it says.

    Raises:
        OSError: the main process cannot be reached.
    """

    def __init__(self, store: Store, rank: int, world_size: int, *, host: str, name: str = "") -> None:
        self.rank, self.world_size, self.name = rank, world_size, name
        self.news: RankEnded | None = None
        self.heard = threading.Event()
        self.closed = False
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, int] = {}  # connection -> rank at its other end
        self._called: set[int] = set()  # ranks that ever were
        self._listener: socket.socket | None = None
        if rank == 0:
            self._listener = socket.create_server(("", 0), backlog=world_size, family=socket.AF_INET)
            self._token = secrets.token_hex(16)
            store.set(KEY, f"{self._listener.getsockname()[1]} {self._token}")
        else:
            main, self._token = _call(store, rank, host)
            self._peers[_kept_alive(main)] = 0
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(reference()))
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def token(self) -> str:
        """The same on all processes, and never again."""
        return self._token

    def close(self, word: str = "bye", *, linger_s: float = 0) -> None:
        """Leaves; ``word`` tells the others how: ``bye``, ``failed`` or ``stopped``. Stays as long as others do, if so asked."""
        with self._lock:
            self.closed = True
            for peer in list(self._peers):
                self._send(peer, f"{word} {self.rank}")
                with contextlib.suppress(OSError):
                    peer.shutdown(socket.SHUT_WR)
        end = time.monotonic() + linger_s
        while self._peers and time.monotonic() < end:
            time.sleep(0.02)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it

    def absent(self, seconds: float) -> list[int]:
        """Ranks that have not called the main process within so many seconds."""
        end = time.monotonic() + seconds
        while missing := sorted(set(range(1, self.world_size)).difference(self._called)):
            if time.monotonic() > end or self.news is not None:
                break
            time.sleep(0.02)
        return missing

    def wait(self, seconds: float) -> RankEnded | None:
        """The news, if there are any within so many seconds."""
        self.heard.wait(seconds)
        return self.news

    def speaks(self) -> bool:
        """Whether this is the process that says that another was lost."""
        return self.news is not None and self.news.kind == "lost" and self.rank == (1 if self.news.rank == 0 else 0)

    def text(self) -> str:
        """The news as a sentence."""
        assert self.news is not None
        return f"process {self.news.rank} of {self.world_size} was lost (killed, out of memory, or its machine is down), so all stop"

    def _watch(self) -> None:
        """The thread."""
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
            selector.register(_kept_alive(connection), selectors.EVENT_READ, b"")

    def _read(self, selector: selectors.BaseSelector, connection: socket.socket, before: bytes) -> None:
        """Takes what has come in, line by line; an end without a word is a loss."""
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        *lines, rest = (before + data).split(b"\n")
        for line in lines:
            if not self._take(connection, line.decode(errors="replace").split()):
                data = b""
        if data:
            selector.modify(connection, selectors.EVENT_READ, rest)
            return
        selector.unregister(connection)
        with self._lock:
            peer = self._peers.pop(connection, None)
            connection.close()
            gone_quietly = peer is None or self.closed
        if not gone_quietly:
            assert peer is not None
            self._tell("lost", peer)

    def _take(self, connection: socket.socket, words: list[str]) -> bool:
        """One line of another process; returns whether more is expected of it."""
        if len(words) != 2 or not words[1].isdecimal():
            return False
        word, number = words[0], int(words[1])
        with self._lock:
            if connection not in self._peers:  # says who it is
                known = secrets.compare_digest(word, self._token)
                if known:
                    self._peers[connection] = number
                    self._called.add(number)
                    self._send(connection, self._token)
                return known
        if word in GRACE_S:
            self._tell(word, number)
        if word == "bye" or number == self._peers[connection]:
            with self._lock:
                self._peers.pop(connection)
            return False
        return True

    def _tell(self, kind: str, rank: int) -> None:
        """Keeps the first news, passes them on, and sets the end."""
        with self._lock:
            if self.news is not None or self.closed:
                return
            self.news = RankEnded(kind, rank)
            for peer in self._peers:
                self._send(peer, f"{kind} {rank}")
        self.heard.set()
        timer = threading.Timer(GRACE_S[kind], self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        """The end of a process that does not end by itself."""
        if self.closed:
            return
        if self.speaks():
            os.write(2, f"{self.name}: {self.text()}; resume with --resume\n".encode())
        sys.stdout.flush()
        os._exit(1)

    def _send(self, peer: socket.socket, line: str) -> None:
        with contextlib.suppress(OSError):  # it is gone too
            peer.sendall(f"{line}\n".encode())


def _call(store: Store, rank: int, host: str) -> tuple[socket.socket, str]:
    """Reaches the main process; what a former one has left in the store, before a restart, leads nowhere and is tried again.

    Raises:
        OSError: it cannot be reached.
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
            raise ConnectionError(f"{host}:{port} is not the main process")
        time.sleep(0.2)


def _line(connection: socket.socket) -> str:
    """One line, read byte by byte so that the next stays unread; what came before the end if there is none."""
    data = b""
    while len(data) < 100 and (byte := connection.recv(1)) not in (b"", b"\n"):
        data += byte
    return data.decode(errors="replace")


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _forget(watchdog: Watchdog | None) -> None:
    """A forked loader process must not hold the connections open after its parent has gone."""
    if watchdog is not None and not watchdog.closed:
        watchdog.closed = True
        for connection in (watchdog._listener, *watchdog._peers):
            if connection is not None:
                connection.close()
