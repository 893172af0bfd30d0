import asyncio

import pytest
from aiohttp import web
from tests.bench.support import Handler, at, serving

from stepbatch.bench.load import target
from stepbatch.bench.load.target import resolve, wait_ready
from stepbatch.bench.options import TargetOptions
from stepbatch.errors import OptionError, SetupError

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def answering(*statuses: int) -> tuple[Handler, list[str]]:
    """A handler that answers with these in turn, the last for ever; the paths that were asked for."""
    paths: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        paths.append(request.path)
        return web.Response(status=statuses[min(len(paths), len(statuses)) - 1])

    return handle, paths


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:30200", "http://127.0.0.1:30200"),
        ("http://127.0.0.1:30200/", "http://127.0.0.1:30200"),
        ("http://127.0.0.1:30200/v1", "http://127.0.0.1:30200"),
        ("https://example.org/proxy/v1/", "https://example.org/proxy"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses_are_taken_with_or_without_what_follows(url: str, base: str) -> None:
    assert resolve(TargetOptions(base_url=(url,))).bases == (base,)


def test_without_a_base_url_there_are_host_and_port() -> None:
    assert resolve(TargetOptions()).bases == ("http://127.0.0.1:30200",)
    assert resolve(TargetOptions(host="::1", port=80)).bases == ("http://[::1]:80",)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:30200",
        "ftp://x",
        "http://",
        "http://x:port",
        "http://x:99999",
        "http://x:0",
        "http://a..b:80",
        "http://x?y",
        "http://x#y",
        "http://a b",
        "http://[::1",
        "http://me:secret@x",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="--base-url") as caught:
        resolve(TargetOptions(base_url=(url,)))
    assert "secret@" not in str(caught.value)


def test_an_address_is_given_once() -> None:
    with pytest.raises(OptionError, match="--base-url names http://x:1 twice"):
        resolve(TargetOptions(base_url=("http://x:1", "http://x:1/v1")))


def test_headers_are_names_and_values() -> None:
    options = TargetOptions(header=("X-One: a: b", "x-two:", "Authorization: Basic x"), api_key="key")
    assert resolve(options).headers == (("X-One", "a: b"), ("x-two", ""), ("Authorization", "Basic x"))


@pytest.mark.parametrize("header", ["", "name", ": value", "a b: c", "ä: c", "a: b\nc: d", "Content-Type: x"])
def test_what_is_no_header_is_refused(header: str) -> None:
    with pytest.raises(OptionError, match="--header"):
        resolve(TargetOptions(header=(header,)))


def test_a_key_comes_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(TargetOptions()).headers == ()
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    assert resolve(TargetOptions()).headers == (("Authorization", "Bearer from-env"),)
    assert resolve(TargetOptions(api_key="flag")).headers == (("Authorization", "Bearer flag"),)
    with pytest.raises(OptionError, match="--api-key"):
        resolve(TargetOptions(api_key="a\nb"))


async def test_a_server_is_up_when_it_is_healthy() -> None:
    handle, paths = answering(503, 200)
    async with serving(("GET", "/health", handle)) as url:
        await wait_ready(at(url, ready_timeout=20))
    assert paths == ["/health"] * 2


async def test_without_a_health_route_its_models_will_do() -> None:
    handle, paths = answering(200)
    async with serving(("GET", "/v1/models", handle)) as url:
        await wait_ready(at(url))
    assert paths == ["/v1/models"]


async def test_a_server_that_comes_later_is_waited_for() -> None:
    handle, paths = answering(200)
    async with serving() as url:
        pass
    waiting = asyncio.create_task(wait_ready(at(url, ready_timeout=20)))
    await asyncio.sleep(0.1)
    async with serving(("GET", "/health", handle), port=int(url.rpartition(":")[2])):
        await waiting
    assert paths == ["/health"]


async def test_every_server_must_be_up() -> None:
    handle, _ = answering(200)
    async with serving() as down:
        pass
    async with serving(("GET", "/health", handle)) as up:
        with pytest.raises(SetupError, match=f"the server at {down} is not up after 0.1 s: Connection refused"):
            await wait_ready(at(up, down, ready_timeout=0.1))


async def test_who_asks_once_is_told_at_once() -> None:
    async with serving() as url:
        with pytest.raises(SetupError, match="neither /health nor /v1/models"):
            await wait_ready(at(url, ready_timeout=0))


async def test_a_server_that_wants_a_key_is_not_waited_for() -> None:
    handle, paths = answering(401)
    async with serving(("GET", "/health", handle)) as url:
        with pytest.raises(SetupError, match="refuses us: /health answers 401; see --api-key"):
            await wait_ready(at(url))
    assert len(paths) == 1


async def test_a_server_that_does_not_answer_is_given_up() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async with serving(("GET", "/health", hang)) as url:
        with pytest.raises(SetupError, match="no answer to /health"):
            await wait_ready(at(url, ready_timeout=0.1))


async def test_what_is_waited_for_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    handle, _ = answering(503, 503, 200)
    async with serving(("GET", "/health", handle)) as url:
        await wait_ready(at(url))
    assert capsys.readouterr().err == f"stepbatch: waiting for the server at {url}: /health answers 503\n"


async def test_a_server_without_a_page_that_says_so_counts_as_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "BARE_SECONDS", 0.2)
    handle, paths = answering(404)
    async with serving(("GET", "/{any:.*}", handle)) as url:
        await wait_ready(at(url, ready_timeout=30))
    assert paths and paths == ["/health", "/v1/models"] * (len(paths) // 2)
