"""The demo around the model: its requests, the figures, the sheet."""

import socket
from pathlib import Path

import pytest

from stepbatch.config import ModelConfig
from stepbatch.demo import run
from stepbatch.demo.burst import BURST, Answer, Server, figures, send, serving
from stepbatch.demo.checker import matches
from stepbatch.demo.scenes import parse
from stepbatch.demo.sheet import contact_sheet
from stepbatch.errors import SetupError


def drawn(broken: int = -1) -> list[Answer]:
    """Answers as a perfect model would give them, one of them failed."""
    answers = []
    for i, wish in enumerate(BURST):
        scene = parse(wish.prompt)
        assert scene is not None
        picture = scene.render(wish.width, wish.height)
        answers.append(Answer(wish, 1.0 + i, None, "no") if i == broken else Answer(wish, 1.0 + i, picture))
    return answers


def test_the_burst_is_of_the_language_and_of_many_kinds() -> None:
    assert len(BURST) == len({wish.prompt for wish in BURST}) == 24
    for wish in BURST:
        assert parse(wish.prompt) is not None, wish.prompt
        assert 4 <= wish.steps <= 20
        for side in (wish.width, wish.height):
            assert side in range(128, 257, 16)
    assert {wish.width > wish.height for wish in BURST} == {True, False}
    assert len({(wish.width, wish.height) for wish in BURST}) > 20
    assert 0.0 in {wish.guidance for wish in BURST}


def test_entries_say_what_is_right() -> None:
    entries = run.check(drawn(broken=2))
    assert [entry.mismatch for entry in entries] == [None if i == 2 else "" for i in range(24)]
    assert run.summary(entries).startswith("23 of 23 pictures")


def test_figures() -> None:
    result = figures(drawn(broken=23), seconds=46.0, jobs_per_step=3.0)
    assert (result.requests, result.failed) == (24, 1)
    assert result.requests_per_second == 0.5
    assert (result.latency_mean, result.latency_p50, result.latency_p99) == (12.0, 12.0, 23.0)
    assert figures([], 1.0, 0.0).latency_mean == 0.0


def test_the_sheet_shows_each_picture_as_it_is(tmp_path: Path) -> None:
    entries = run.check(drawn())
    sheet = contact_sheet(entries, "title", "subtitle")
    first = entries[0].answer.picture
    assert first is not None
    found = [(x, y) for x in range(60, 120) for y in range(170, 230) if sheet.crop((x, y, x + 128, y + 128)) == first]
    assert len(found) == 1
    assert matches(sheet.crop((*found[0], found[0][0] + 128, found[0][1] + 128)), parse(BURST[0].prompt))  # type: ignore[arg-type]


def test_only_what_differs_from_the_defaults_becomes_a_flag() -> None:
    assert run.model_flags(ModelConfig()) == []
    assert run.model_flags(ModelConfig(num_threads=2)) == ["--num-threads", "2"]


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(SetupError, match="the server did not start: stepbatch: error: --port"),
        serving(["--port", "99999"], tmp_path / "log"),
    ):
        pass


def test_a_server_that_is_gone_is_one_line() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and doesn't listen
        with pytest.raises(SetupError, match="the server does not answer: "):
            Server(*nobody.getsockname()).steps()


def test_burst_at_a_server(tmp_path: Path) -> None:
    with serving(["--backend", "fake", "--fake-step-ms", "1"], tmp_path / "log") as server:
        answers, result = send(server, BURST[:8])
    assert result.failed == 0
    assert 1 < result.jobs_per_step <= 8
    assert [answer.picture.size for answer in answers if answer.picture] == [(w.width, w.height) for w in BURST[:8]]
