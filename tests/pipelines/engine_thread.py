"""The engine in a thread of this process, which has imported diffusers; another process takes ten seconds over that."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from typing import BinaryIO

from stepbatch.config import EngineConfig, LogConfig
from stepbatch.engine.backends import load_runner
from stepbatch.engine.messages import Ready
from stepbatch.engine.process import Link, serve


class EngineThread:
    """What ``supervisor`` asks of an engine process; it runs the same loop, at the other end of the same socket."""

    def __init__(self, config: EngineConfig, address: str, record: BinaryIO) -> None:
        self.pid = os.getpid()
        self._thread = threading.Thread(target=_run, args=(config, address, record.fileno()))
        self._thread.start()

    async def wait(self) -> int:
        await asyncio.to_thread(self._thread.join)
        return 0

    def kill(self) -> None:
        """No thread can be: it ends when it is told to leave."""


async def spawn(config: EngineConfig, log: LogConfig, address: str, record: BinaryIO) -> EngineThread:
    """In place of ``supervisor._spawn``."""
    return EngineThread(config, address, record)


def _run(config: EngineConfig, address: str, record: int) -> None:
    link = Link(address, record)
    try:
        runner = load_runner(config)
        link.send(Ready(runner.info))
        with suppress(SystemExit):
            serve(runner, config, link)
    finally:
        link.close(linger_seconds=1.0)
