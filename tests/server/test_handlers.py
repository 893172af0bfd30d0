from __future__ import annotations

import socket

import httpx
import pytest

from stepbatch.errors import REQUEST_ERRORS, Overloaded, RequestError
from stepbatch.server.handlers import error_response

from .support import DrawingEngine, RunningServer, StubEngine, assert_error, call, make_app


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/images/generation", "/v1/images/generations/", "/v1/files/", "//"])
def test_an_unknown_route_is_not_found(http: httpx.Client, path: str) -> None:
    assert_error(http.post(path, json={"prompt": "a cat"}), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/images/generations", "POST"),
        ("PUT", "/v1/images/generations", "POST"),
        ("GET", "/v1/images/edits", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/x", "GET, HEAD"),
        ("OPTIONS", "/health", "GET, HEAD"),
    ],
)
def test_an_unknown_method_is_told_what_is_allowed(http: httpx.Client, method: str, path: str, allow: str) -> None:
    response = http.request(method, path)
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow


@pytest.mark.parametrize("cls", REQUEST_ERRORS.values(), ids=lambda cls: cls.code)
def test_every_error_carries_its_status_and_advice(cls: type[RequestError]) -> None:
    error = cls("why", "n")
    response = error_response(error)
    assert response.status_code == cls.status
    advice = {None: None, True: "true", False: "false"}[cls.should_retry]
    assert response.headers.get("x-should-retry") == advice
    if error.retry_after is None:
        assert "retry-after" not in response.headers
    else:
        assert 0 <= int(response.headers["retry-after"]) - error.retry_after <= cls.retry_spread


@pytest.mark.parametrize(("soonest", "told"), [(1, {1, 2, 3}), (119, {118, 119, 120})])
def test_not_all_are_told_to_come_again_at_once(soonest: int, told: set[int]) -> None:
    error = Overloaded("why", retry_after=soonest)
    assert {int(error_response(error).headers["retry-after"]) for _ in range(200)} == told


def test_a_fault_of_ours_keeps_its_details_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(StubEngine(error=ZeroDivisionError("secret")))
    headers = {"x-request-id": "mine"}
    response = call(app, "POST", "/v1/images/generations", json={"prompt": "a cat"}, headers=headers)
    message = assert_error(response, 500, "internal_error")
    assert response.headers["x-request-id"] == "mine"
    assert "secret" not in response.text
    assert "mine" in message
    assert "mine" in caplog.text
    metrics = call(app, "GET", "/metrics").text
    assert 'stepbatch:requests_total{code="internal_error"} 1.0' in metrics


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 30 + b"\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["garbage", "two-hosts", "negative-length", "huge-length", "bad-chunk"],
)
def test_what_is_no_http_gets_the_same_shape(server: RunningServer, data: bytes) -> None:
    answer = talk(server, data)
    assert_error(answer, 400, "invalid_request")


@pytest.mark.parametrize("host", ["[", "a b", "x:99999999", "]:1", "\u00e4"])
def test_a_strange_host_is_no_fault_of_ours(server: RunningServer, host: str) -> None:
    body = b'{"prompt": "a cat", "num_inference_steps": 1, "response_format": "url"}'
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n"
    answer = talk(server, head.encode("latin-1") + b"connection: close\r\n\r\n" + body)
    assert answer.status_code == 400
    app = make_app(DrawingEngine(), insecure_no_auth=True)  # where any name will do, and comes again in the url
    answer = call(app, "POST", "/v1/images/generations", content=body, headers={"host": host.encode("latin-1")})
    assert answer.status_code in (200, 400)


def talk(server: RunningServer, data: bytes) -> httpx.Response:
    """Send bytes as they are; what comes back until the connection is closed, as an answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(data)
        received = b""
        try:
            while chunk := sock.recv(65536):
                received += chunk
        except ConnectionResetError:
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)
