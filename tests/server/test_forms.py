from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from stepbatch.errors import (
    InvalidForm,
    InvalidValue,
    PayloadTooLarge,
    RequestCancelled,
    RequestError,
    UnknownParameter,
)
from stepbatch.server.body import Room, Share
from stepbatch.server.forms import Form, FormLimits, read_form

TYPE = b'Multipart/Form-Data; charset=utf-8; boundary="b--7"'


def check_name(name: str) -> None:
    if name not in ("a", "b"):
        raise UnknownParameter("no", name)


LIMITS = FormLimits(
    body_bytes=10_000, text_bytes=100, file_bytes=5000, parts=6, files={"file": 2, "one": 1}, check_name=check_name
)


def part(name: str, data: bytes, file: bool = False) -> bytes:
    extra = '; filename="x.png"\r\nContent-Type: image/png' if file else ""
    return f'--b--7\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + data + b"\r\n"


def read(chunks: Iterator[bytes], kind: bytes | None = TYPE, limits: FormLimits = LIMITS, **headers: bytes) -> Form:
    """What a body that comes in these chunks is read as."""

    async def receive() -> dict[str, Any]:
        chunk = next(chunks, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    named = [(b"content-type", kind)] if kind else []
    named += [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    with Room(1 << 20).share() as share:
        return asyncio.run(read_form(Request({"type": "http", "headers": named}, receive), limits, share))


def read_parts(*parts: bytes) -> Form:
    return read(iter([*parts, b"--b--7--\r\n"]))


def refused(error: type[RequestError], *parts: bytes) -> RequestError:
    with pytest.raises(error) as caught:
        read_parts(*parts)
    return caught.value


def test_texts_and_files_by_name() -> None:
    form = read_parts(
        part("a", "é\r\n--b--".encode()), part("file", b"\0\r\n", True), part("b", b""), part("file[]", b"", True)
    )
    assert form == Form(texts={"a": "é\r\n--b--", "b": ""}, files={"file": [b"\0\r\n", b""]})


BODY = part("a", b"\r\n--b-\r\n") + part("file", b"\r\n--b--\r\n--b--8" * 9, True) + b"--b--7--\r\nepilogue"


@given(st.lists(st.integers(1, 9)))
def test_it_does_not_matter_in_which_chunks_it_comes(sizes: list[int]) -> None:
    def chunks() -> Iterator[bytes]:
        position = 0
        for size in sizes:
            yield BODY[position : position + size]
            position += size
        yield BODY[position:]

    assert read(chunks()) == Form({"a": "\r\n--b-\r\n"}, {"file": [b"\r\n--b--\r\n--b--8" * 9]})


@pytest.mark.parametrize(
    "kind",
    [None, b"application/json", b"application/x-www-form-urlencoded", b"multipart/mixed; boundary=b--7", b"\xff;"],
)
def test_another_kind_of_body_is_refused_with_what_is_needed(kind: bytes | None) -> None:
    with pytest.raises(InvalidForm, match="must be multipart/form-data"):
        read(iter([BODY]), kind)


@pytest.mark.parametrize(
    "kind", [b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=" + b"x" * 999]
)
def test_a_boundary_is_needed(kind: bytes) -> None:
    with pytest.raises(InvalidForm, match=r"[Bb]oundary"):
        read(iter([BODY]), kind)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"prompt=x",
        b"--another\r\n",
        BODY[:-20],
        part("a", b"x"),
        b"--b--7\r\nbad header\r\n\r\nx\r\n--b--7--",
        b"--b--7\r\n\r\nx\r\n--b--7--",
        b'--b--7\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n--b--7--',
        b"--b--7\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--7--",
        b"--b--7\r\nContent-Disposition: form-data; filename=a\r\n\r\nx\r\n--b--7--",
        b"--b--7\r\nx: " + 5000 * b"x" + b"\r\n\r\nx\r\n--b--7--",
        b"--b--7\r\n" + 99 * b"x: y\r\n" + b"\r\nx\r\n--b--7--",
    ],
)
def test_a_malformed_body_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidForm):
        read(iter([body]))


@pytest.mark.parametrize(
    ("error", "parts", "param"),
    [
        (UnknownParameter, [part("c", b"x")], "c"),
        (UnknownParameter, [part("a[]", b"x")], "a[]"),
        (UnknownParameter, [part("\xff", b"x")], "\xff"),
        (InvalidValue, [part("a", b"x"), part("a", b"x")], "a"),
        (InvalidValue, [part("a", b"\xff")], "a"),
        (InvalidValue, [part("a", b"x", True)], "a"),
        (InvalidValue, [part("file", b"http://x/y.png")], "file"),
        (InvalidValue, [part("file[]", b"data:image/png;base64,")], "file"),
        (InvalidValue, [part("file", b"", True)] * 3, "file"),
        (InvalidValue, [part("one", b"", True)] * 2, "one"),
        (PayloadTooLarge, [part("file", b"x" * 5001, True)], "file"),
        (PayloadTooLarge, [part("a", b"x" * 60), part("b", b"x" * 41)], "b"),
    ],
)
def test_a_part_is_refused_by_name(error: type[RequestError], parts: list[bytes], param: str) -> None:
    assert refused(error, *parts).param == param


def test_there_are_not_too_many_parts() -> None:
    parts = [part("a", b""), part("b", b""), part("file", b"", True), part("file", b"", True), part("one", b"", True)]
    assert read_parts(*parts)
    with pytest.raises(PayloadTooLarge, match="at most 4 parts"):
        read(iter([*parts, b"--b--7--"]), limits=replace(LIMITS, parts=4))


def test_limits_can_be_reached() -> None:
    form = read_parts(part("a", b"x" * 60), part("b", b"x" * 40), part("one", b"x" * 5000, True))
    assert len(form.files["one"][0]) == 5000


def test_a_body_that_says_it_is_too_long_is_not_even_asked_for() -> None:
    def chunks() -> Iterator[bytes]:
        pytest.fail("it was")
        yield b""

    for length in (b"10001", b"9" * 40):
        with pytest.raises(PayloadTooLarge):
            read(chunks(), content_length=length)


@pytest.mark.parametrize("name", ["file", "a"])
def test_no_more_than_is_allowed_is_held(name: str) -> None:
    taken = 0

    def chunks() -> Iterator[bytes]:
        nonlocal taken
        yield part(name, b"", name == "file")[:-2]
        for _ in range(10_000):
            taken += 1000
            yield b"x" * 1000

    tracemalloc.start()
    with pytest.raises(PayloadTooLarge):
        read(chunks())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken <= LIMITS.file_bytes + 1000
    assert peak < 200_000


def test_a_client_that_goes_away_is_told_apart() -> None:
    messages = iter([{"type": "http.request", "body": BODY[:30], "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(messages)

    request = Request({"type": "http", "headers": [(b"content-type", TYPE)]}, receive)
    with pytest.raises(RequestCancelled):
        asyncio.run(read_form(request, LIMITS, Share(Room(1 << 20))))


@given(
    st.lists(st.sampled_from([b"--b--7", b"--", b"\r\n", b"Content-Disposition: form-data; name=", b"a", b'"', b"x: "]))
)
def test_any_bytes_are_read_or_refused(pieces: list[bytes]) -> None:
    form = None
    with suppress(RequestError):
        form = read(iter([b"".join(pieces)]))
    assert form is None or (form.texts.keys() <= {"a"} and not form.files)
