"""Which servers are driven: their addresses, what is sent with every request, and whether they are up."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from stepbatch.bench.load.wire import FAULTS, words
from stepbatch.bench.options import TargetOptions
from stepbatch.errors import OptionError, SetupError

KEEP_ALIVE = 2.0  # seconds: less than servers' own, often 5, so that none closes a connection that is just used again
LOOK_SECONDS = 5.0  # until a look at whether a server is up is given up
LOOK_EVERY = 0.5  # seconds
BARE_SECONDS = 5.0  # until a server that has no page that says whether it is up is taken to be
NEITHER = "it has neither /health nor /v1/models"

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_OF_THE_BODY = ("content-type", "content-length", "transfer-encoding")


@dataclass(frozen=True)
class Target:
    """Servers, by address without a path of OpenAI's API, and the headers that all of them are sent."""

    bases: tuple[str, ...]
    headers: tuple[tuple[str, str], ...]


def resolve(options: TargetOptions) -> Target:
    """What the flags say.

    Raises:
        OptionError: an address or a header is none.
    """
    host = f"[{options.host}]" if ":" in options.host else options.host
    bases = tuple(_base(url) for url in options.base_url or (f"http://{host}:{options.port}",))
    for base in bases:
        if bases.count(base) > 1:
            raise OptionError(f"--base-url names {base} twice")
    headers = [_header(text) for text in options.header]
    key = options.api_key or os.environ.get("OPENAI_API_KEY", "")
    if _UNPRINTABLE.search(key):
        raise OptionError(f"{'--api-key' if options.api_key else 'OPENAI_API_KEY'} has characters that no key can have")
    if key and "authorization" not in (name.lower() for name, _ in headers):
        headers.append(("Authorization", f"Bearer {key}"))
    return Target(bases, tuple(headers))


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")  # as the look-up of its address does
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port, or no host, or a host that can be none: UnicodeError is one too
        fine = False
    if not fine or parts.query or parts.fragment or re.search(r"\s", url):
        raise OptionError(f"--base-url must be like http://HOST:PORT, not {url!r}")
    if parts.username is not None:
        raise OptionError("--base-url must have no password in it; use --api-key or --header")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    name, value = name.strip(), value.strip()
    if not colon or not _TOKEN.fullmatch(name) or _UNPRINTABLE.search(value):
        about = f"; this one begins with {name!r}" if colon else ""  # the rest may be secret
        raise OptionError(f"--header must be 'NAME: VALUE'{about}")
    if name.lower() in _OF_THE_BODY:
        raise OptionError(f"--header can't set {name}, which goes with each request's body")
    return name, value


def open_session(headers: Sequence[tuple[str, str]]) -> aiohttp.ClientSession:
    """A session that bounds neither connections nor time, which is its user's affair."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE, ttl_dns_cache=None),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=[("Accept-Encoding", "identity"), *headers],  # nothing is unpacked while the load runs
    )


async def wait_ready(options: TargetOptions) -> None:
    """Wait until every server is up: ``/health``, or in its absence ``/v1/models``, answers 200.

    A server that has neither page counts as up once it has answered so for a while.
    That it waits, and for what, is said on standard error, once for each server.

    Raises:
        OptionError: an address or a header is none.
        SetupError: one isn't up after ``--ready-timeout``, or refuses us.
    """
    target = resolve(options)
    deadline = time.monotonic() + options.ready_timeout
    async with open_session(target.headers) as session:
        for base in target.bases:
            waiting, bare = False, time.monotonic() + BARE_SECONDS
            while fault := await _look(session, base, deadline):
                if fault == NEITHER and time.monotonic() >= bare:
                    break
                if time.monotonic() >= deadline:
                    raise SetupError(f"the server at {base} is not up after {options.ready_timeout:g} s: {fault}")
                if not waiting:
                    print(f"stepbatch: waiting for the server at {base}: {fault}", file=sys.stderr, flush=True)
                waiting = True
                await asyncio.sleep(min(LOOK_EVERY, max(0.0, deadline - time.monotonic())))


async def _look(session: aiohttp.ClientSession, base: str, deadline: float) -> str:
    """Why a server isn't up; empty if it is."""
    seconds = min(LOOK_SECONDS, max(LOOK_EVERY, deadline - time.monotonic()))
    path, status = "", 404
    for path in ("/health", "/v1/models"):
        try:
            async with asyncio.timeout(seconds), session.get(base + path) as response:
                status = response.status
        except TimeoutError:
            return f"no answer to {path}"
        except FAULTS as error:
            return words(error)
        if status not in (404, 405):
            break
    if status in (404, 405):
        return NEITHER
    if status in (401, 403):
        raise SetupError(f"the server at {base} refuses us: {path} answers {status}; see --api-key and --header")
    return "" if status == 200 else f"{path} answers {status}"
