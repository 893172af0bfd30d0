"""From settings to a server that runs until it's told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Generator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepbatch.config import EngineConfig, ServerConfig
from stepbatch.engine.client import AsyncEngine
from stepbatch.errors import RequestError, SetupError
from stepbatch.race import done_before
from stepbatch.server.app import create_app
from stepbatch.server.handlers import error_body
from stepbatch.server.request_id import new_request_id

BACKLOG = 2048
LAST_ANSWERS_SECONDS = 5  # how long answers may take to be written once their pictures are done

log = logging.getLogger(__name__)


def run_server(server_config: ServerConfig, engine_config: EngineConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    On the first signal, requests in flight may finish and new ones get 503; on a second, it leaves at once.

    Raises:
        SetupError: the address can't be listened on, or the engine can't start.
    """
    _set_up_logging(server_config.log.log_level)
    with bind(server_config.http.host, server_config.http.port) as sock:
        return asyncio.run(_Run(server_config, engine_config, sock).run())


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


class Protocol(H11Protocol):
    """uvicorn's, with our error shape for what can't be read as HTTP and so reaches no application."""

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error_body(RequestError(msg))
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("x-request-id", new_request_id()),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def make_server(engine: AsyncEngine, config: ServerConfig) -> Server:
    """An HTTP server around a started engine, to be run on a socket of ours."""
    settings = uvicorn.Config(
        create_app(engine, config),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=config.log.log_level in ("debug", "info"),
        server_header=False,
        timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
    )
    return Server(settings)


class _Run:
    """One run from start to exit."""

    def __init__(self, server_config: ServerConfig, engine_config: EngineConfig, sock: socket.socket) -> None:
        self.config = server_config
        self.sock = sock
        self.engine = AsyncEngine(engine_config)
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
        serving = asyncio.ensure_future(server.serve(sockets=[self.sock]))
        await self.stopping.wait()
        log.info("stopping: requests in flight have %g s to finish", self.config.http.drain_seconds)
        finished = await done_before(self.hurrying.wait(), self.engine.stop(self.config.http.drain_seconds))
        server.force_exit = not finished
        server.should_exit = True
        await serving
        return 0 if finished else 1

    def _on_signal(self) -> None:
        if self.stopping.is_set():
            self.hurrying.set()
        self.stopping.set()

    def _url(self) -> str:
        host, port = self.sock.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> SetupError:
    if isinstance(error, UnicodeError):
        reason = "that is no host's name"
    else:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return SetupError(f"can't listen on {host}:{port}: {reason}")


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and stop lines say nothing new
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warns of what callers are told anyway
