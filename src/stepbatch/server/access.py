"""Who is let in: those with a key, where there are keys, and those who call the server by a name that it has."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from stepbatch.config import API_KEY_VARIABLE, AccessConfig, HttpConfig, ServerConfig
from stepbatch.errors import InvalidHost, OptionError, RequestError, SetupError, Unauthorized
from stepbatch.request import GenerationRequest
from stepbatch.server.handlers import error_response
from stepbatch.server.logs import note

LIVENESS = (b"/health", ("GET", "HEAD"))  # what is answered without a key: raw path and methods
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
SHORT = 16  # characters; a shorter key can be guessed

# A bearer token, as RFC 6750 has it: = is only at its end, so that there is no doubt where a name ends.
_KEY = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]{1,64})=)?(?P<key>[A-Za-z0-9._~+/-]+=*)")
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]*)?")

log = logging.getLogger(__name__)


class Keys:
    """The keys that let in, by name. Only their digests are kept.

    Args:
        given: ``NAME=KEY`` or ``KEY``; keys without a name are called key-1, key-2, ...

    Raises:
        OptionError: one is no key, or has the name of another, or is another.
    """

    def __init__(self, given: Sequence[str]) -> None:
        self._digests: dict[str, bytes] = {}
        nameless = 0
        for text in given:
            found = _parts(text, "--api-key")
            nameless += found["name"] is None
            name, digest = found["name"] or f"key-{nameless}", _digest(str(found["key"]).encode())
            if name in self._digests:
                raise OptionError(f"two keys are called {name}")
            if digest in self._digests.values():
                raise OptionError(f"the key called {name} has another name too")
            self._digests[name] = digest

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, token: bytes) -> str | None:
        """The name of a key, if it is one. It is compared with every key, so that the time taken tells nothing."""
        given, found = _digest(token), None
        for name, known in self._digests.items():
            if hmac.compare_digest(given, known):
                found = name
        return found


def with_all_keys(config: AccessConfig, environment: Mapping[str, str]) -> AccessConfig:
    """The same with the keys of ``--api-key-file`` and of the environment among its own.

    Raises:
        SetupError: the file can't be read, or something given is no key.
    """
    found = [(f"--api-key, number {number},", text) for number, text in enumerate(config.api_key, start=1)]
    found += _in_file(config.api_key_file) if config.api_key_file else []
    listed = filter(None, map(str.strip, environment.get(API_KEY_VARIABLE, "").split(",")))
    found += [(f"{API_KEY_VARIABLE}, number {number},", text) for number, text in enumerate(listed, start=1)]
    for where, text in found:
        if len(str(_parts(text, where)["key"])) < SHORT:
            log.warning("%s has fewer than %d characters, and might be guessed", where.rstrip(","), SHORT)
    return replace(config, api_key=tuple(text for _, text in found), api_key_file="")


def check_access(config: ServerConfig, address: str) -> None:
    """See that keys and hosts are such, and that nobody is let in by oversight.

    Args:
        config: With all keys.
        address: What the server is bound to, an IP address.

    Raises:
        SetupError: they aren't, or other machines reach it without a key, and that wasn't asked for.
    """
    access = config.access
    keys, _ = Keys(access.api_key), own_hosts(access, config.http)
    if keys and access.insecure_no_auth:
        raise SetupError("--insecure-no-auth lets anyone in, but there are keys: leave out one or the other")
    if not (keys or access.insecure_no_auth or ipaddress.ip_address(address).is_loopback):
        raise SetupError(
            f"other machines can reach {address}, and there is no key: give one by --api-key-file, --api-key or "
            f"{API_KEY_VARIABLE}, or let anyone in with --insecure-no-auth"
        )


def own_hosts(access: AccessConfig, http: HttpConfig) -> frozenset[str] | None:
    """The names that requests may call the server by; ``None`` is any.

    Without keys, whoever reaches the server is let in, and so would be the pages that somebody on this machine looks
    at: by a name of theirs that they have lead here (DNS rebinding), or by sending what they can't read the answer to.

    Raises:
        OptionError: ``--allowed-host`` is no name.
    """
    if not access.allowed_host and (access.api_key or access.insecure_no_auth):
        return None
    allowed = {_host(name) for name in access.allowed_host}
    if None in allowed:
        raise OptionError("--allowed-host must be the name or address of a host")
    own = f"[{http.host}]" if ":" in http.host else http.host
    return frozenset(filter(None, {*LOCAL_NAMES, _host(own), *allowed}))


class AccessMiddleware:
    """Refuses, before anything is read of their bodies, requests without a key and those for another host.

    It goes by the path as it was sent: what is later decoded, or looks like another path, can't pass for what needs no
    key. The name of the key is in ``scope["state"]["api_key_name"]`` then.

    Args:
        keys: Without any, none is needed.
        hosts: In lower case; ``None`` is any.
    """

    def __init__(self, app: ASGIApp, keys: Keys, hosts: frozenset[str] | None) -> None:
        self.app = app
        self.keys = keys
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            self._check_key(scope)
        except RequestError as error:
            note(Request(scope), code=error.code)
            headers = {"www-authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
            await error_response(error, headers)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        if self.hosts is None:
            return
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if len(hosts) != 1 or _host(hosts[0].decode("latin-1")) not in self.hosts:
            raise InvalidHost("the Host header names no host of this server; see --allowed-host")
        if any(_host(origin.decode("latin-1").partition("://")[2]) not in self.hosts for origin in origins):
            raise InvalidHost("the Origin header names no host of this server; see --allowed-host")

    def _check_key(self, scope: Scope) -> None:
        path, methods = LIVENESS
        if not self.keys or (scope["raw_path"] == path and scope["method"] in methods):
            return
        given = _values(scope, b"authorization")
        if not given:
            raise Unauthorized("a key is needed, as Authorization: Bearer KEY")
        scheme, _, token = given[0].partition(b" ")
        name = self.keys.name_of(token.strip(b" "))
        if name is None or scheme.lower() != b"bearer" or len(given) > 1:
            raise Unauthorized("the key is not valid")
        scope["state"]["api_key_name"] = name
        note(Request(scope), key=name)


def by_key(request: Request, generation: GenerationRequest) -> GenerationRequest:
    """The same in the name of the key that it came with, if it did: a share is a key's, whatever user it names."""
    name = request.scope["state"].get("api_key_name")
    return replace(generation, user=f"key:{name}") if name else generation


def _in_file(path: str) -> list[tuple[str, str]]:
    """The keys of a file, each with where it is."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text().splitlines()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise SetupError(f"--api-key-file {path} can't be read: {reason}") from None
    if mode & 0o077:
        log.warning("%s can be read by others than its owner: chmod 600 it", path)
    keys = list(_keys_in(path, lines))
    if not keys:
        raise SetupError(f"--api-key-file {path} has no key")
    return keys


def _keys_in(path: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            yield f"{path}, line {number},", text


def _parts(text: str, where: str) -> Mapping[str, str | None]:
    """The name and the key. What is wrong is told without it, since it may be secret all the same."""
    match = _KEY.fullmatch(text)
    if not match:
        raise OptionError(f"{where} must be KEY or NAME=KEY, of letters, digits and ._~+/-, with = only at a key's end")
    return match.groupdict()


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _host(text: str) -> str | None:
    """The host of a ``Host`` header, without its port; ``None`` if it is none."""
    match = _HOST.fullmatch(text.lower())
    return match["name"] if match else None


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
