"""Memory for answers: what is being made for clients, and what they haven't taken yet, is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepbatch.errors import Overloaded


class Answers:
    """Room for all answers together. Who comes while it is full is refused; what was let in is never lost.

    It belongs to the event loop's thread.

    Args:
        size: Bytes. One request more may be let in, as far as there is any room.
        later: In how many seconds who is refused should come again.
    """

    def __init__(self, size: int, later: Callable[[], int] = lambda: 1) -> None:
        self.size = size
        self.taken = 0  # bytes
        self._later = later
        self._senders: Counter[int] = Counter()  # of the same bytes, by their identity

    def check(self) -> None:
        """Raises ``Overloaded`` while there is no room."""
        if self.taken >= self.size:
            raise Overloaded("too many answers are being made, or not read by their clients", retry_after=self._later())

    @contextmanager
    def promise(self, size: int) -> Iterator[None]:
        """Keep so many bytes for an answer that is being made."""
        self.taken += size
        try:
            yield
        finally:
            self.taken -= size

    @contextmanager
    def sending(self, content: bytes) -> Iterator[None]:
        """Count an answer until it is sent, or its client gone; one that goes to several is there only once."""
        key = id(content)
        self.taken += 0 if self._senders[key] else len(content)
        self._senders[key] += 1
        try:
            yield
        finally:
            self._senders[key] -= 1
            if not self._senders[key]:
                del self._senders[key]
                self.taken -= len(content)


class CountAnswers:
    """An application whose answers take room while they are sent."""

    def __init__(self, app: ASGIApp, answers: Answers) -> None:
        self.app = app
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_count(message: Message) -> None:
            with self.answers.sending(message.get("body", b"")):
                await send(message)

        await self.app(scope, receive, send_and_count)
