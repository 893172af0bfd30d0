"""From settings to a server that runs until it's told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import cast

import uvicorn

from stepbatch.config import EngineConfig, ServerConfig
from stepbatch.engine.client import AsyncEngine
from stepbatch.errors import SetupError
from stepbatch.garbage import settle
from stepbatch.logs import set_up
from stepbatch.race import done_before
from stepbatch.server.access import check_access, with_all_keys
from stepbatch.server.app import create_app
from stepbatch.server.images import VIDEO_THREADS
from stepbatch.server.logs import AccessLog
from stepbatch.server.protocol import MOST_LINGERING, Protocol

BACKLOG = 512  # clients that wait to be connected; as many are, at once, before any of them is looked at
M_MMAP_THRESHOLD = -3  # as malloc.h has it
LARGE_BLOCK = 1 << 20  # bytes
OTHER_DESCRIPTORS = 256  # open files and sockets that are no client's
MOST_DESCRIPTORS = 1 << 16  # as many are asked for where the system gives them; more than that serves nobody
KEEP_ALIVE_SECONDS = 20  # longer than clients keep idle connections, else they may send just as it is closed
LAST_ANSWERS_SECONDS = 5  # how long answers may take to be written once their pictures are done
LAST_WORD_SECONDS = 3.5  # until those without an answer are told that there will be none, and have time to read that
HURRY_SECONDS = 4.0  # from a second signal to the end, whatever is still going on then

log = logging.getLogger(__name__)


def run_server(server_config: ServerConfig, engine_config: EngineConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    On the first signal, requests in flight may finish and new ones get 503; on a second, it leaves at once, and the
    process ends within ``HURRY_SECONDS``. It ends here too where a video is still being written that was given up.

    Raises:
        SetupError: the address can't be listened on, or not without a key, or the engine can't start.
    """
    set_up(server_config.log, "server")
    _allow_descriptors(server_config.limits.max_connections + MOST_LINGERING + BACKLOG + OTHER_DESCRIPTORS)
    _give_back_memory()
    server_config = replace(server_config, access=with_all_keys(server_config.access, os.environ))
    with bind(server_config.http.host, server_config.http.port) as sock:
        check_access(server_config, sock.getsockname()[0])
        status = asyncio.run(_Run(server_config, engine_config, sock).run())
    if any(thread.name.startswith(VIDEO_THREADS) for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(status)  # a thread that writes a video can't be told to end, and would be waited for
    return status


def bind(host: str, port: int) -> socket.socket:
    """A socket on the address. It doesn't listen yet: until the model is loaded, clients are refused, not kept waiting.

    Raises:
        SetupError: the address is in use, unknown or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            stack.pop_all()  # bound: from here on it's the caller's to close
    except (OSError, UnicodeError) as error:  # a name that can't be encoded, a..b for one, is no OSError
        raise _cannot_listen(host, port, error) from error
    return sock


class Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would close the door before requests in flight are done."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def refuse_unanswered(self) -> None:
        """Answer all who have no answer yet; uvicorn would cut them off with one of its own."""
        for connection in list(self.server_state.connections):
            cast(Protocol, connection).refuse_unanswered()


def make_server(engine: AsyncEngine, config: ServerConfig) -> Server:
    """An HTTP server around a started engine, to be run on a socket of ours."""
    settings = uvicorn.Config(
        AccessLog(create_app(engine, config), config.log.log_prompts),
        http=cast(type[asyncio.Protocol], partial(Protocol, config.limits, set())),  # it is only ever called
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # it has paths as callers wrote them
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
    )
    return Server(settings)


class _Run:
    """One run from start to exit."""

    def __init__(self, server_config: ServerConfig, engine_config: EngineConfig, sock: socket.socket) -> None:
        self.config = server_config
        self.sock = sock
        self.engine = AsyncEngine(engine_config, log=server_config.log)
        self.stopping = asyncio.Event()
        self.hurrying = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            if not await done_before(self.stopping.wait(), self.engine.start()):
                return 0
            return await self._serve()
        finally:
            await self.engine.stop()

    async def _serve(self) -> int:
        server = make_server(self.engine, self.config)
        try:
            self.sock.listen(BACKLOG)
        except OSError as error:  # another process bound the address too, and listened first
            raise _cannot_listen(self.config.http.host, self.config.http.port, error) from error
        print(f"stepbatch serves {self.engine.info.id} on {self._url()}", flush=True)
        settle()
        serving = asyncio.ensure_future(server.serve(sockets=[self.sock]))
        await self.stopping.wait()
        log.info("stopping: requests in flight have %g s to finish", self.config.http.drain_seconds)
        finished = await done_before(self.hurrying.wait(), self.engine.stop(self.config.http.drain_seconds))
        server.should_exit = True
        await self._last_answers(server, serving)
        return 0 if finished and not server.force_exit else 1

    async def _last_answers(self, server: Server, serving: asyncio.Future[None]) -> None:
        """Wait until what is done is written, for as long as that may take, or until somebody is in a hurry."""
        hurry = asyncio.ensure_future(self.hurrying.wait())
        last_word = asyncio.get_running_loop().call_later(LAST_WORD_SECONDS, server.refuse_unanswered)
        await asyncio.wait((hurry, serving), return_when=asyncio.FIRST_COMPLETED)
        last_word.cancel()
        server.force_exit = hurry.done()
        hurry.cancel()
        await serving

    def _on_signal(self) -> None:
        if self.stopping.is_set() and not self.hurrying.is_set():
            self.hurrying.set()
            # A thread that writes a video can't be told to end, nor can a driver that holds on to the engine process.
            cut = threading.Timer(HURRY_SECONDS, os._exit, (1,))
            cut.daemon = True
            cut.start()
        self.stopping.set()

    def _url(self) -> str:
        host, port = self.sock.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_descriptors(count: int) -> None:
    """Raise this process's own limit of open files and sockets, as far as the system's goes, and warn below ``count``.

    Clients that are refused have some too, until they are gone, so there are better more than ``count``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(count, MOST_DESCRIPTORS)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < count:
        log.warning("at most %d files and sockets can be open here; --max-connections needs %d", most, count)


def _give_back_memory() -> None:
    """Have large blocks go back to the system when they are free; glibc would keep those of the largest answers."""
    with contextlib.suppress(AttributeError):  # another libc, which has its own way
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> SetupError:
    if isinstance(error, UnicodeError):
        reason = "that is no host's name"
    else:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return SetupError(f"can't listen on {host}:{port}: {reason}")
