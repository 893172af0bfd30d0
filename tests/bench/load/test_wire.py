import errno
import os
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from stepbatch.bench.load.wire import MAX_ERROR, Spool, error_message, retry_after, words
from stepbatch.errors import SetupError


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too many", "code": "x"}}', "too many"),
        (b'{"error": "plain"}', "plain"),
        (b'{"message": "here"}', "here"),
        (b'{"detail": "not found"}', "not found"),
        (b'{"detail": [{"loc": ["body"], "msg": "field required"}]}', "field required"),
        (b"<html>\n  Bad\tGateway\n</html>", "<html> Bad Gateway </html>"),
        (b'{"error": {"code": 3}}', '{"error": {"code": 3}}'),
        (b"", ""),
        (b"\xff\xfe", "\N{REPLACEMENT CHARACTER}" * 2),
        (b"x" * 1000, "x" * (MAX_ERROR - 3) + "..."),
        (b"[" * 100_000, "[" * (MAX_ERROR - 3) + "..."),
    ],
)
def test_an_error_is_told_in_the_servers_words(body: bytes, message: str) -> None:
    assert error_message(body) == message


def headers(**values: str) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict({name.replace("_", "-"): value for name, value in values.items()}))


def test_how_long_to_wait() -> None:
    assert retry_after(headers()) is None
    assert retry_after(headers(Retry_After="3")) == 3.0
    assert retry_after(headers(Retry_After="9", retry_after_ms="250")) == 0.25
    assert retry_after(headers(Retry_After="9", retry_after_ms="soon")) == 9.0
    for nonsense in ("-1", "nan", "inf", "soon", "1e99", ""):
        assert retry_after(headers(Retry_After=nonsense)) is None
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < (retry_after(headers(Retry_After=date)) or 0) <= 100
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    assert retry_after(headers(Retry_After=past)) == 0.0


@given(st.lists(st.binary(max_size=50)), st.data())
def test_a_spool_gives_back_what_it_was_given(pieces: list[bytes], data: st.DataObject) -> None:
    spool = Spool()
    try:
        extents = [(spool.append(piece), len(piece)) for piece in pieces]
        chosen = data.draw(st.lists(st.sampled_from(range(len(pieces))))) if pieces else []
        assert spool.read(tuple(extents[i] for i in chosen)) == b"".join(pieces[i] for i in chosen)
    finally:
        spool.close()


def test_without_a_place_for_answers_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(SetupError, match=r"can't keep answers .* No such file"):
        Spool()


def test_a_fault_is_told_in_few_words() -> None:
    assert words(ConnectionResetError(errno.ECONNRESET, "x")) == os.strerror(errno.ECONNRESET)
    assert words(aiohttp.ServerDisconnectedError()) == "Server disconnected"
    assert words(aiohttp.ClientPayloadError("a\nb" * 300)).endswith("...")
    assert words(OSError()) == "OSError"
