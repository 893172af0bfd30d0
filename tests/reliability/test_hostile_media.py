"""Promise 11: files from who means no good cost little, and nothing is fetched, started or written for them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.pictures import file, image

from .media import HARMLESS, REFUSED
from .record import Finding
from .serving import Served, run_first

ROOM = file(image(size=(64, 64)))
AT_ONCE = 4  # clients
WATCH = """
import os, sys
written = os.open({path!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
watched = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system")
def watch(event, arguments):
    if event in watched or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
        os.write(written, f"{{event}} {{arguments!r}}\\n".encode())
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server's processes write down what they connect to, start, and write to."""
    return tmp_path_factory.mktemp("watched") / "done"


@pytest.fixture(scope="module")
def server(done: Path) -> Iterator[Served]:
    server = Served(env=run_first(done.parent, WATCH.format(path=str(done))))
    try:
        yield server
    finally:
        server.kill()


def edit(server: Served, data: bytes, name: str = "a.png", part: str = "image") -> httpx.Response:
    files = [(part, (name, data))] if part == "image" else [("image", ("a.png", ROOM)), (part, (name, data))]
    return server.http.post("/v1/images/edits", data={"prompt": "x", "num_inference_steps": "1"}, files=files)


def memory_mb(pid: int, which: str) -> float:
    found = re.search(rf"{which}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


class Peak:
    """The most memory that processes took, over what they had at first, MiB."""

    def __init__(self, *pids: int) -> None:
        self.had = {}
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # begins a new peak
            self.had[pid] = memory_mb(pid, "VmRSS")

    def grown(self) -> float:
        return max(memory_mb(pid, "VmHWM") - had for pid, had in self.had.items())


def test_hostile_files_are_refused_soon_and_cost_little(
    server: Served,
    done: Path,
    size: Callable[[Any, Any], Any],
    note: Callable[[Finding], None],
) -> None:
    rounds, bound = size((1, 5.0), (20, 1.0))  # seconds that a busy machine takes, and one that isn't
    for part in ("image", "mask"):  # what is loaded once, and stays
        assert edit(server, ROOM, part=part).status_code == 200
        assert edit(server, REFUSED["GIF"], part=part).status_code == 400
    assert "subprocess.Popen" in done.read_text()  # the engine: it is written down
    before, peak, took = done.read_text(), Peak(server.pid, server.engine_pid()), []

    def send(case: tuple[str, bytes, str, int]) -> None:
        name, data, part, status = case
        began = time.monotonic()
        response = edit(server, data, f"../../../../tmp/{name}.png", part)
        took.append(time.monotonic() - began)
        assert response.status_code == status, (name, part, response.text)
        if status == 400:
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("invalid_value", part), name

    cases = [(name, data, part, 400) for name, data in REFUSED.items() for part in ("image", "mask")]
    cases += [(name, data, "image", 200) for name, data in HARMLESS.items()]
    for _ in range(rounds):
        for case in cases:
            send(case)
    alone = max(took)
    with ThreadPoolExecutor(AT_ONCE) as clients:
        list(clients.map(send, rounds * cases))
    grown = peak.grown()
    assert alone < bound
    assert grown < 64
    assert done.read_text() == before
    note(
        Finding(
            11,
            "hostile media",
            f"{len(took)} uploads, {AT_ONCE} at once",
            f"{len(REFUSED) + len(HARMLESS)} kinds: bombs, floods, animations, other formats, cut off, `../` names",
            f"4xx, or read without what unpacks, in {alone:.2f} s at most alone; {grown:.0f} MiB more memory at most; "
            "nothing connected to, started or written",
        )
    )


def test_an_address_where_a_file_belongs_is_not_fetched(server: Served, done: Path) -> None:
    before = done.read_text()
    for address in (f"{server.url}/health", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data"):
        for part in ("image", "mask"):
            files = [(part, (None, address))]
            response = server.http.post("/v1/images/edits", data={"prompt": "x"}, files=files)
            assert (response.status_code, response.json()["error"]["param"]) == (400, part)
        response = server.http.post("/v1/images/edits", json={"prompt": "x", "image": address})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_form")
    assert done.read_text() == before


@pytest.mark.parametrize("path", ["/v1/files/../../etc/passwd", "/v1/files/..%2f..%2fetc%2fpasswd", "/v1/files/%2e%2e"])
def test_no_path_leads_out(server: Served, path: str) -> None:
    request = server.http.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    assert server.http.send(request).status_code == 404
