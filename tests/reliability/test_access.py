"""Promise 17: without a key nobody is let in, by any route, and nobody learns one."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from stepbatch.config import LimitsConfig
from stepbatch.server.openapi import document

from .record import Finding
from .serving import FAKE, Served, address, children

KEY, OTHER, THIRD = "flag-4T0vGqZ9sQpX4bWz", "file-7kQw2nLx8cVb3mHd", "env-1pRs6tYu9iOa5fGj"
FLAGS = ("--host", "0.0.0.0", "--docs", "--fair-shares", "--log-level", "debug")
TRICKS = ("/%68ealth", "//health", "/health/", "/health/../v1/models", "/health/..;/v1/models", "http://x/health")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that every machine could reach, with a key of each origin."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# of the team\nfile={OTHER}\n")
    file.chmod(0o600)
    flags = (*FLAGS, "--api-key", f"flag={KEY}", "--api-key-file", str(file))
    server = Served(*flags, env={"STEPBATCH_API_KEY": f"env={THIRD}"})
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    server.http = httpx.Client(base_url=server.url, timeout=60)
    try:
        yield server
    finally:
        server.kill()


def test_without_a_key_nobody_is_let_in(keyed: Served, note: Callable[[Finding], None]) -> None:
    paths = [re.sub(r"\{[^}]*\}", "x", path) for path in document(LimitsConfig())["paths"]]
    tried = 0
    for path in [*paths, "/", "/docs", "/nothing"]:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
            if (path, method) in (("/health", "GET"), ("/health", "HEAD")):
                continue
            answer = keyed.http.request(method, path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (method, path)
            assert not [name for name in answer.headers if name.startswith("access-control")]
            tried += 1
    for target in TRICKS:
        assert raw(keyed, target) == 401, target
    assert keyed.http.get("/health").status_code == 200
    for key in (KEY, OTHER, THIRD):
        allowed = {"authorization": f"Bearer {key}"}
        assert keyed.http.get("/v1/models", headers=allowed).status_code == 200
        assert keyed.http.get("/metrics", headers=allowed).status_code == 200
        assert keyed.http.get("/openapi.json", headers=allowed).status_code == 200
    client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=OTHER, max_retries=0)
    assert client.images.generate(prompt="a cat", size="64x64", response_format="url").data
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key=OTHER[:-1]).images.generate(prompt="a cat")
    assert refused.value.code == "invalid_api_key"
    figure = (
        f"{tried} routes and methods and {len(TRICKS)} paths in disguise answer 401; three keys of three are let in"
    )
    note(Finding(17, "keys", f"{tried + len(TRICKS)} requests", "no key, or a wrong one", figure))


def test_a_picture_s_url_needs_the_key_too(keyed: Served) -> None:
    allowed = {"authorization": f"Bearer {KEY}"}
    body = {"prompt": "a cat", "size": "64x64", "num_inference_steps": 1, "response_format": "url"}
    url = keyed.http.post("/v1/images/generations", json=body, headers=allowed).json()["data"][0]["url"]
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers=allowed).content.startswith(b"\x89PNG")


def test_no_key_is_told_to_anyone(keyed: Served, note: Callable[[Finding], None]) -> None:
    allowed = {"authorization": f"Bearer {KEY}"}
    told = [
        keyed.http.get(path, headers=allowed).text
        for path in ("/v1/model_info", "/v1/models", "/metrics", "/openapi.json", "/nothing", f"/v1/models/{KEY[:3]}")
    ]
    told.append(keyed.http.get("/v1/models", headers={"authorization": f"Bearer {KEY}x"}).text)
    told.append(keyed.log)
    for pid in descendants(keyed.pid):
        told.append(Path(f"/proc/{pid}/cmdline").read_text())
        told.append(Path(f"/proc/{pid}/environ").read_text())
    assert len(told) >= 10  # the engine process is among them
    for text in told:
        for key in (KEY, OTHER, THIRD):
            assert key not in text
    places = "answers, log at debug, the engine process's arguments and environment"
    note(Finding(17, "keys stay secret", "3 keys", "none", f"no trace in {places}"))


def descendants(pid: int) -> list[int]:
    return [grandchild for child in children(pid) for grandchild in (child, *descendants(child))]


def raw(server: Served, target: str) -> int:
    with socket.create_connection(address(server.url), timeout=20) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return int(connection.makefile("rb").readline().split()[1])


def test_beyond_this_machine_it_is_not_served_without_a_key(note: Callable[[Finding], None]) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "stepbatch", "serve", *FAKE, "--port", "0", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "STEPBATCH_API_KEY"},
        timeout=60,
    )
    assert refused.returncode == 2, refused.stderr
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert "--api-key" in line
    assert "--insecure-no-auth" in line
    note(Finding(17, "no key by oversight", "1 start", "an address that other machines reach", "refused, in one line"))
