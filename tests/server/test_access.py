"""Who is let in, found out from outside: by every route there is, and by every way around."""

from __future__ import annotations

import hmac
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepbatch.cli.parser import build_groups
from stepbatch.config import API_KEY_VARIABLE, AccessConfig, BatchingConfig, EngineConfig, HttpConfig, ServerConfig
from stepbatch.errors import OptionError, SetupError
from stepbatch.server.access import Keys, check_access, own_hosts, with_all_keys

from .conftest import running
from .support import MODEL, DrawingEngine, RunningServer, StubEngine, WaitingEngine, assert_error, call, make_app

KEY, OTHER = "iT0vGq-9sQpX4bWz7", "c2VjcmV0LXNlY3JldA=="
KEYED = {"api_key": (f"alice={KEY}", OTHER), "docs": True}
ALLOWED = {"authorization": f"Bearer {KEY}"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "ANYTHING")


def routes() -> list[str]:
    """A path to each route."""
    app: Any = make_app(StubEngine(), **KEYED)
    paths = {re.sub(r"\{[^}]*\}", "x", route.path) for route in app.routes}
    assert len(paths) > 12
    return sorted(paths)


@pytest.mark.parametrize("path", [*routes(), "/", "/nothing", "/docs", "/redoc", "/health/", "/Health", "/v1"])
def test_every_route_there_is_needs_a_key(path: str) -> None:
    app = make_app(StubEngine(), **KEYED)
    for method in METHODS:
        answer = call(app, method, path)
        if (path, method) in (("/health", "GET"), ("/health", "HEAD")):
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-should-retry"] == "false"
        if method != "HEAD":
            assert_error(answer, 401, "invalid_api_key")


@pytest.mark.parametrize("path", [path for path in routes() if "x" not in path.split("/")])
def test_with_a_key_every_route_is_there(path: str) -> None:
    app = make_app(StubEngine(state="ready"), **KEYED)
    assert call(app, "GET", path, headers=ALLOWED).status_code in (200, 404, 405)
    assert call(app, "GET", "/v1/models", headers=ALLOWED).status_code == 200


@pytest.mark.parametrize("key", [KEY, OTHER])
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
def test_any_of_the_keys_will_do(key: str, scheme: str) -> None:
    app = make_app(StubEngine(), **KEYED)
    assert call(app, "GET", "/v1/models", headers={"authorization": scheme + key}).status_code == 200


@pytest.mark.parametrize("header", [
    "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY.lower()}", KEY, f"Basic {KEY}",
    f"Bearer alice={KEY}", f"Bearer {KEY},{OTHER}", f"Bearer {KEY} {OTHER}", f"Bearer\t{KEY}", "Bearer \xff",
    "Bearer alice",
])  # fmt: skip
def test_what_is_no_key_lets_nobody_in(header: str) -> None:
    app = make_app(StubEngine(), **KEYED)
    answer = call(app, "GET", "/v1/models", headers={"authorization": header.encode("latin-1")})
    message = assert_error(answer, 401, "invalid_api_key")
    assert KEY not in message
    assert KEY not in str(answer.headers)


def test_of_two_keys_that_come_at_once_none_counts() -> None:
    app = make_app(StubEngine(), **KEYED)
    headers = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer x")]
    assert call(app, "GET", "/v1/models", headers=headers).status_code == 401
    assert call(app, "GET", f"/v1/models?api_key={KEY}", headers={"x-api-key": KEY}).status_code == 401


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    with running(MODEL, **KEYED) as server:
        yield server


TRICKS = [
    "/%68ealth", "/health%2f..%2fv1%2fmodels", "/health/../v1/models", "/health/..;/v1/models", "/health;/v1/models",
    "//health", "/./health", "/health/.", "/health/", "/HEALTH", "/health%00", "/health%20", "/health#",
    "/v1/models#/health",
    "http://127.0.0.1/health", "http://health/v1/models", "/v1/models?/health", "/v1/models?x=/health", "/v1%2fmodels",
    "//v1/models", "/v1/models/", "/V1/models", "/v1/../health", "/v1/models/..%2f..%2fhealth",
    "/metrics/%2e%2e/health", "*",
    "/\\health", "/health\\..\\v1\\models", "/v1/files/../../health", "health", "/openapi.json",
]  # fmt: skip


@pytest.mark.parametrize("target", TRICKS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_no_way_of_writing_a_path_gets_around_it(keyed: RunningServer, target: str, method: str) -> None:
    status, body = exchange(keyed, f"{method} {target} HTTP/1.1\r\nHost: health\r\nContent-Length: 0\r\n")
    assert status in (400, 401), body  # 400: it is no HTTP
    assert b"tiny-fake" not in body


@pytest.mark.parametrize("line", ["X-Original-URL: /health", "X-Rewrite-URL: /health", "X-Forwarded-Prefix: /health",
                                  "X-HTTP-Method-Override: HEAD", "Upgrade: websocket"])  # fmt: skip
def test_no_header_gets_around_it(keyed: RunningServer, line: str) -> None:
    assert exchange(keyed, f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{line}\r\n")[0] == 401


def test_the_next_request_on_a_connection_needs_a_key_of_its_own(keyed: RunningServer) -> None:
    first = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    _, body = exchange(keyed, first + "GET /v1/models HTTP/1.1\r\nHost: x\r\n")
    assert body.count(b"HTTP/1.1 200") + body.count(b"HTTP/1.1 401") == 2
    assert body.index(b"HTTP/1.1 200") < body.index(b"HTTP/1.1 401")


def test_a_body_is_not_waited_for(keyed: RunningServer) -> None:
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
    assert exchange(keyed, head)[0] == 401


def exchange(server: RunningServer, head: str) -> tuple[int, bytes]:
    """Send a request as it is written, but for its end; the status, and all that comes."""
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode("latin-1") + b"Connection: close\r\n\r\n")
        data = b""
        while piece := connection.recv(65536):
            data += piece
    return int(data.split()[1]), data


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, compared = Keys([f"k{number}=secret{number}" for number in range(5)]), []
    compare = hmac.compare_digest

    def counting(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return compare(given, known)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for token, name in ((b"secret0", "k0"), (b"secret4", "k4"), (b"wrong", None), (b"", None), (b"x" * 10000, None)):
        compared.clear()
        assert keys.name_of(token) == name
        assert compared == [(32, 32)] * 5  # digests: all of one length, whatever came


def test_keys_without_a_name_are_numbered() -> None:
    keys = Keys(["first", "alice=second", "third"])
    names = [keys.name_of(token) for token in (b"first", b"second", b"third", b"alice=second")]
    assert names == ["key-1", "alice", "key-2", None]


@pytest.mark.parametrize(("given", "reason"), [
    (("",), "must be"), (("a b",), "must be"), (("ä",), "must be"), (("=",), "must be"), (("=x",), "must be"),
    (("name=",), "name="), (("a=x", "a=y"), "called a"), (("a=x", "b=x"), "another name"), (("x", "key-1=y"), "called"),
])  # fmt: skip
def test_keys_that_can_not_be(given: tuple[str, ...], reason: str) -> None:
    if given == ("name=",):  # the padding of a key, and no name
        assert Keys(given).name_of(b"name=") == "key-1"
        return
    with pytest.raises(OptionError, match=reason):
        Keys(given)


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice={KEY}\n\n  {OTHER}  # bob's\n")
    file.chmod(0o600)
    config = AccessConfig(api_key=("flag-flag-flag-flag",), api_key_file=str(file))
    found = with_all_keys(config, {API_KEY_VARIABLE: "env=environment-key-1, environment-key-2,"})
    assert found.api_key == (
        "flag-flag-flag-flag", f"alice={KEY}", OTHER, "env=environment-key-1", "environment-key-2"
    )  # fmt: skip
    assert not caplog.records
    assert with_all_keys(AccessConfig(), {API_KEY_VARIABLE: ""}).api_key == ()


def test_a_file_that_others_can_read_and_a_short_key_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("hunter2")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        with_all_keys(AccessConfig(api_key_file=str(file)), {})
    assert "chmod 600" in caplog.text
    assert "line 1 has fewer than 16 characters" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("# none\n", "has no key"),
        (f"{KEY}\nse cret\n", "line 2, must be"),
        (b"\xff\xfe", "not text"),
    ],
)
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str | bytes | None, reason: str) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SetupError, match=reason) as caught:
        with_all_keys(AccessConfig(api_key_file=str(file)), {})
    assert "se cret" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_what_is_no_key_is_not_quoted() -> None:
    for config, environment in (
        (AccessConfig(api_key=("se cret",)), {}),
        (AccessConfig(), {API_KEY_VARIABLE: "se cret"}),
    ):
        with pytest.raises(OptionError) as caught:
            with_all_keys(config, environment)
        assert "cret" not in str(caught.value)


def test_a_config_as_text_has_no_keys() -> None:
    config = build_groups(ServerConfig, KEYED)
    assert KEY not in repr(config) + str(config.access) + f"{config!r}"
    assert "alice" not in repr(config)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
def test_without_a_key_this_machine_alone_is_let_in(address: str) -> None:
    check_access(ServerConfig(), address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1", "fe80::1", "::ffff:127.0.0.1"])
def test_what_other_machines_reach_needs_a_key_or_its_absence_said(address: str) -> None:
    with pytest.raises(SetupError, match=r"--api-key.*--insecure-no-auth"):
        check_access(ServerConfig(), address)
    check_access(build_groups(ServerConfig, KEYED), address)
    check_access(build_groups(ServerConfig, {"insecure_no_auth": True}), address)
    with pytest.raises(SetupError, match="leave out one or the other"):
        check_access(build_groups(ServerConfig, {**KEYED, "insecure_no_auth": True}), address)


@pytest.mark.parametrize("settings", [{"api_key": ("a b",)}, {"api_key": ("x", "x")}, {"allowed_host": ("a/b",)}])
def test_what_can_not_be_is_refused_at_start(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        check_access(build_groups(ServerConfig, settings), "127.0.0.1")


HOSTS = ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:30200", "[::1]", "[::1]:80"]
STRANGERS = ["evil.example", "evil.example:30200", "localhost.evil.example", "127.0.0.1.evil.example", "localhost.",
             "localhost@evil.example", "10.0.0.1", "::1", "[::2]", "0.0.0.0", "", "localhost, evil.example",
             "\xe4"]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_this_machines_names_are_answered(host: str) -> None:
    app = make_app(StubEngine())
    assert call(app, "GET", "/v1/models", headers={"host": host}).status_code == 200
    page = {"host": "localhost", "origin": f"http://{host}"}
    assert call(app, "GET", "/v1/models", headers=page).status_code == 200


@pytest.mark.parametrize("host", STRANGERS)
def test_other_names_are_refused_on_every_route(host: str) -> None:
    app = make_app(StubEngine())
    for path in ("/v1/models", "/health", "/metrics", "/nothing"):
        assert_error(call(app, "GET", path, headers={"host": host.encode("latin-1")}), 400, "invalid_host")


@pytest.mark.parametrize("origin", ["null", "", "https://evil.example", "http://localhost.evil.example:80"])
def test_other_peoples_pages_are_refused(origin: str) -> None:
    """They can send what they can't read the answer to, without asking first."""
    headers = {"origin": origin, "content-type": "text/plain"}
    app = make_app(DrawingEngine())
    answer = call(app, "POST", "/v1/images/generations", headers=headers, json={"prompt": "a cat"})
    assert_error(answer, 400, "invalid_host")


def test_over_a_socket_too(server: RunningServer) -> None:
    assert exchange(server, "GET /v1/models HTTP/1.1\r\nHost: localhost:1\r\n")[0] == 200
    for head in ("HTTP/1.1\r\nHost: evil.example\r\n", "HTTP/1.1\r\nHost:\r\n", "HTTP/1.0\r\n"):
        assert exchange(server, f"GET /v1/models {head}")[0] == 400
    assert exchange(server, "GET http://localhost/v1/models HTTP/1.1\r\nHost: evil.example\r\n")[0] == 400


def test_names_that_are_allowed() -> None:
    app = make_app(StubEngine(), allowed_host=("Draw.example:443",), host="box.example")
    for host in ("draw.example", "draw.example:8000", "localhost", "box.example"):
        assert call(app, "GET", "/v1/models", headers={"host": host}).status_code == 200
    assert call(app, "GET", "/v1/models", headers={"host": "other.example"}).status_code == 400


def test_any_name_will_do_where_a_key_is_needed_or_nothing_is() -> None:
    http = HttpConfig()
    assert own_hosts(AccessConfig(api_key=(KEY,)), http) is None
    assert own_hosts(AccessConfig(insecure_no_auth=True), http) is None
    assert own_hosts(AccessConfig(), HttpConfig(host="::1")) == {"localhost", "127.0.0.1", "[::1]"}
    keyed = AccessConfig(api_key=(KEY,), allowed_host=("a",))
    assert own_hosts(keyed, http) == {"localhost", "127.0.0.1", "[::1]", "a"}


@pytest.mark.parametrize("settings", [{}, KEYED])
def test_no_page_is_given_leave_to_read(settings: dict[str, Any]) -> None:
    app = make_app(StubEngine(), **settings)
    asked = {"origin": "http://localhost", "access-control-request-method": "POST"}
    for method, path in (("OPTIONS", "/v1/images/generations"), ("GET", "/v1/models"), ("GET", "/health")):
        answer = call(app, method, path, headers=asked | ALLOWED)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert call(app, "OPTIONS", "/v1/images/generations", headers=asked).status_code in (401, 405)


def test_the_description_is_served_only_where_asked_for() -> None:
    assert call(make_app(StubEngine(), docs=True), "GET", "/openapi.json").status_code == 200
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert_error(call(make_app(StubEngine()), "GET", path), 404, "not_found")


def test_shares_are_those_of_keys_whatever_users_they_name() -> None:
    engine = DrawingEngine(config=EngineConfig(model=MODEL, batching=BatchingConfig(fair_shares=True)))
    app = make_app(engine, **KEYED)
    for key in (KEY, OTHER):
        for body in ({}, {"user": "somebody"}, {"user": "key:alice"}):
            answer = call(
                app, "POST", "/v1/images/generations", headers={"authorization": f"Bearer {key}"},
                json={"prompt": "a cat", **body},
            )  # fmt: skip
            assert answer.status_code == 200, answer.text
            assert answer.json()["ignored"] == list(body)
    assert [request.user for request in engine.requests] == ["key:alice"] * 3 + ["key:key-1"] * 3


def test_a_video_is_its_keys_too(tmp_path: Path) -> None:
    engine = WaitingEngine()
    app = make_app(engine, **KEYED, video_dir=str(tmp_path))
    answer = call(app, "POST", "/v1/videos", headers=ALLOWED, json={"prompt": "a cat"})
    assert answer.status_code == 200, answer.text
    assert [handle.request.user for handle in engine.handles.values()] == ["key:alice"]
