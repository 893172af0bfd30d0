"""Clients that are slow, or don't read: a crowd of them, in a thread."""

from __future__ import annotations

import select
import socket
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

NEVER = float("inf")
WINDOW = 1 << 16  # bytes that a client's kernel reads ahead


class Crowd:
    """Connections that all say the same, the end of it slowly, until they are hung up on.

    Args:
        url: The server's.
        count: How many they are.
        at_once: What each of them says at once.
        slowly: What each of them says after that, byte by byte.
        every: Seconds from byte to byte.
        reads: Whether what comes is read.
    """

    def __init__(
        self, url: str, count: int, at_once: bytes, slowly: bytes = b"", every: float = 1.0, reads: bool = True
    ) -> None:
        self.heard = [b""] * count
        self.lasted = [NEVER] * count  # seconds until each was hung up on
        self._slowly = slowly
        self._every = every
        self._reads = reads
        self._leaving = False
        self._began = time.monotonic()
        self._sockets = [_connect(url, at_once) for _ in range(count)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def left(self) -> int:
        """How many are still connected."""
        return self.lasted.count(NEVER)

    def answered(self) -> int:
        """How many have something to read, or have been hung up on."""
        poll = select.poll()
        for connection in self._sockets:
            poll.register(connection, select.POLLIN)
        return len(poll.poll(0))

    def close(self) -> None:
        """Hang up."""
        self._leaving = True
        self._thread.join()
        for connection in self._sockets:
            connection.close()

    def _run(self) -> None:
        numbers = {connection.fileno(): index for index, connection in enumerate(self._sockets)}
        poll = select.poll()
        for number in numbers:
            poll.register(number, select.POLLIN if self._reads else 0)  # hang-ups are always told
        said, due = 0, self._began
        while self.left and not self._leaving:
            for number, event in poll.poll(1000 * min(0.1, max(0.0, due - time.monotonic()))):
                if self._is_over(numbers[number], event):
                    self.lasted[numbers[number]] = time.monotonic() - self._began
                    poll.unregister(number)
            if time.monotonic() >= due:
                self._say(self._slowly[said : said + 1])
                said, due = said + 1, due + self._every

    def _is_over(self, index: int, event: int) -> bool:
        if not self._reads:
            return bool(event & (select.POLLHUP | select.POLLERR))
        try:
            data = self._sockets[index].recv(1 << 16)
        except ConnectionError:
            return True
        self.heard[index] += data
        return not data

    def _say(self, byte: bytes) -> None:
        for lasted, connection in zip(self.lasted, self._sockets, strict=True):
            if lasted == NEVER:
                with suppress(ConnectionError, BlockingIOError):  # what comes, or doesn't, tells the rest
                    connection.send(byte)


def _connect(url: str, text: bytes) -> socket.socket:
    address = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
    connection.connect((address.hostname, address.port))
    connection.sendall(text)
    connection.setblocking(False)
    return connection
