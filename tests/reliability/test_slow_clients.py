"""Promise 9: clients that send a byte a second, or don't read what they asked for, are hung up on and delay nobody."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from .record import Finding
from .serving import Served, descriptors, resident_mb, until
from .slow import Crowd

HEAD = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: "
BODY = b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100000\r\n\r\n"
SLACK = 5.0  # seconds that a busy machine may take longer


@pytest.fixture(scope="module")
def seconds(soak: bool) -> dict[str, float]:
    """The deadlines: the defaults in the long form."""
    return {"header": 10.0, "body": 30.0, "write": 60.0} if soak else {"header": 1.5, "body": 2.0, "write": 2.0}


@pytest.fixture(scope="module")
def server(seconds: dict[str, float]) -> Iterator[Served]:
    server = Served(*(f"--{name}-seconds={value}" for name, value in seconds.items()))
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def crowd(server: Served) -> Iterator[Callable[..., Crowd]]:
    """Makes crowds, which leave at the end."""
    made: list[Crowd] = []

    def make(*arguments: Any, **options: Any) -> Crowd:
        made.append(Crowd(server.url, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return BODY.replace(b"100000", b"%d" % len(data)) + data


def latencies(server: Served, go_on: Callable[[], object], most: float = 120.0) -> list[float]:
    """How long each request of a client that does as it should took, one after the other while ``go_on`` is true."""
    took: list[float] = []
    end = time.monotonic() + most
    while go_on() and time.monotonic() < end:
        began = time.monotonic()
        assert server.generate(num_inference_steps=20).status_code == 200  # a tenth of a second
        took.append(time.monotonic() - began)
    return took


def quiet(server: Served, seconds: float) -> list[float]:
    return latencies(server, lambda: True, seconds)


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def test_a_byte_a_second_does_not_keep_a_connection(
    server: Served,
    seconds: dict[str, float],
    crowd: Callable[..., Crowd],
    size: Callable[[Any, Any], Any],
    note: Callable[[Finding], None],
) -> None:
    many, every = size((20, 0.1), (100, 1.0))
    without = quiet(server, size(0.7, 30.0))
    opened = descriptors(server.pid)
    heads = crowd(many, b"", HEAD + 500 * b"x", every)
    bodies = crowd(many, BODY, 500 * b"x", every)
    during = latencies(server, lambda: heads.left + bodies.left)
    assert all(b" 408 " in heard and b'"request_timeout"' in heard for heard in heads.heard + bodies.heard)
    assert seconds["header"] <= min(heads.lasted)
    assert max(heads.lasted) < seconds["header"] + SLACK
    assert seconds["body"] <= min(bodies.lasted)
    assert max(bodies.lasted) < seconds["body"] + SLACK
    until(lambda: descriptors(server.pid) <= opened)
    without += quiet(server, size(0.7, 30.0))
    assert p99(during) < 2 * p99(without) + size(0.5, 0.0)
    note(
        Finding(
            9,
            "slow clients",
            f"{2 * many} connections beside one healthy client",
            f"a byte every {every:g} s: {many} heads, {many} bodies",
            f"408, and closed after {max(heads.lasted):.1f} s and {max(bodies.lasted):.1f} s at most; "
            f"healthy p99 {1000 * p99(during):.0f} ms, {1000 * p99(without):.0f} ms without",
        )
    )


def test_who_does_not_read_holds_up_nobody(
    server: Served,
    seconds: dict[str, float],
    crowd: Callable[..., Crowd],
    size: Callable[[Any, Any], Any],
    note: Callable[[Finding], None],
) -> None:
    some, many = size((1, 9), (25, 25))
    large = {"prompt": "[noise]", "size": "1856x1856", "num_inference_steps": 1}
    picture = server.generate(**large, response_format="url").json()["data"][0]["url"]
    path = "/" + picture.split("/", 3)[3]
    with ThreadPoolExecutor(8) as clients:  # what the allocator keeps of so many at once is not theirs
        list(clients.map(lambda _: server.generate(**large), range(some - 1)))
    without = quiet(server, size(0.7, 30.0))
    opened, held = descriptors(server.pid), resident_mb(server.pid)
    answers = crowd(some, post(large), reads=False)
    until(lambda: answers.answered() == some, 120)  # from here on there is nothing to do for them but to wait
    files = crowd(many, get(path), reads=False)
    during = latencies(server, lambda: answers.left + files.left)
    assert seconds["write"] <= min(files.lasted)
    assert max(files.lasted) < seconds["write"] + SLACK
    until(lambda: descriptors(server.pid) <= opened)
    kept = resident_mb(server.pid) - held
    without += quiet(server, size(0.7, 30.0))
    assert kept < 64
    assert p99(during) < 2 * p99(without) + size(0.5, 0.0)
    note(
        Finding(
            9,
            "clients that don't read",
            f"{some + many} answers of 10 MB beside one healthy client",
            f"nothing of them is read: {some} new pictures, {many} times one file",
            f"all closed after {max(files.lasted):.1f} s, {max(0.0, kept):.0f} MiB kept; "
            f"healthy p99 {1000 * p99(during):.0f} ms, {1000 * p99(without):.0f} ms without",
        )
    )


def test_answers_that_are_not_read_have_a_bound(
    serve: Callable[..., Served], size: Callable[[Any, Any], Any], note: Callable[[Finding], None]
) -> None:
    room, seconds = size(16, 256), size(6.0, 60.0)
    server = serve(f"--max-answers-mb={room}", f"--write-seconds={seconds}")
    large = {"size": "1856x1856", "num_inference_steps": 1}  # 13 MiB, in base64
    assert server.generate(prompt="[noise]", **large).status_code == 200
    held = resident_mb(server.pid)
    answer, crowds = server.generate(), []
    try:
        while answer.status_code == 200 and len(crowds) < room:
            crowd = Crowd(server.url, 1, post({"prompt": f"[noise] {len(crowds)}", **large}), reads=False)
            crowds.append(crowd)
            until(lambda crowd=crowd: crowd.answered() == 1, 60)
            answer = server.generate()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert server.http.get("/ready").status_code == 200
        kept = resident_mb(server.pid) - held
        assert kept < room + 64
        until(lambda: server.generate().status_code == 200, seconds + 30)
    finally:
        for crowd in crowds:
            crowd.close()
    figure = f"429 from the {len(crowds) + 1}th on, {max(0.0, kept):.0f} MiB held of {room}; then let in again"
    note(Finding(9, "answers that nobody reads", "13 MiB each, all different", "one client after the other", figure))


def test_uploads_that_fall_silent_keep_no_prompt_out(serve: Callable[..., Served]) -> None:
    server = serve("--max-uploads-mb=2", "--body-seconds=2")
    head = b"POST /v1/images/edits HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=x\r\n"
    part = b'--x\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n'
    upload = head + b"content-length: 1100000\r\n\r\n" + part + bytes(1_060_000)
    files = {"image": ("x", bytes(1_100_000))}

    def edit() -> tuple[int, str]:
        answer = server.http.post("/v1/images/edits", data={"prompt": "a cat"}, files=files)
        return answer.status_code, answer.json()["error"]["code"]

    crowd = Crowd(server.url, 2, upload)
    try:
        for _ in range(100):  # in each of which the server takes 64 KiB from everybody
            assert server.http.get("/health").status_code == 200
        assert edit() == (429, "overloaded")
        assert server.generate().status_code == 200
        until(lambda: not crowd.left, 2 + SLACK)
        assert all(b" 408 " in heard for heard in crowd.heard)
    finally:
        crowd.close()
    assert edit() == (400, "invalid_value")
