"""Promise 14: where the disk is full, pictures are answered as ever, videos fail cleanly, and it is over by itself."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from .record import Finding
from .serving import Served, descriptors, until

BLOCK = 4096  # bytes, in which room is given
VIDEO = {"prompt": "a cat", "size": "128x128", "num_inference_steps": 2, "num_frames": 9}  # a few blocks when made


class Disk:
    """A file system of 1 MiB, which is as full as a test wants it to be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, server: Served, leave: int = 0) -> None:
        """Leave so many bytes."""
        self.clear(server)
        state = os.statvfs(self.folder)
        with suppress(OSError), self._ballast.open("wb", buffering=0) as file:  # or the server was faster: full it is
            file.write(bytes(state.f_bavail * state.f_bsize - leave))

    def clear(self, server: Served) -> None:
        self._ballast.unlink(missing_ok=True)


class Limit(Disk):
    """The next best thing, for those who may not mount one: the server may not write to files."""

    def fill(self, server: Served, leave: int = 0) -> None:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (leave, resource.RLIM_INFINITY))

    def clear(self, server: Served) -> None:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        yield Limit(folder)
        return
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def server(disk: Disk) -> Iterator[Served]:
    served = Served("--fake-videos", "--video-dir", str(disk.folder / "videos"))
    try:
        yield served
    finally:
        served.kill()


def ask(server: Served, **fields: Any) -> httpx.Response:
    return server.http.post("/v1/videos", json=VIDEO | fields)


def look(server: Served, id: str) -> dict[str, Any]:
    response = server.http.get(f"/v1/videos/{id}")
    assert response.status_code == 200, response.text
    return dict(response.json())


def ending(server: Served, id: str, seconds: float = 20.0) -> dict[str, Any]:
    """A video's record when it has ended."""
    deadline = time.monotonic() + seconds
    while (record := look(server, id))["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline, record
        time.sleep(0.01)
    return record


def made(server: Served) -> str | None:
    """Ask for a video; its id once it is there, or ``None`` where there was no room for it, or for its record."""
    response = ask(server)
    if response.status_code != 200:
        assert_full(response)
        return None
    record = ending(server, response.json()["id"])
    if record["status"] == "failed":
        assert record["error"]["code"] == "storage_full"
        return None
    return str(record["id"])


def assert_full(response: httpx.Response) -> None:
    assert response.status_code == 507, response.text
    assert response.json()["error"]["code"] == "storage_full"
    assert response.headers["x-should-retry"] == "false"


def assert_whole(server: Served, disk: Disk) -> set[str]:
    """Whatever is on the disk, or listed, is a whole video, or failed and nothing of it is there; returns the whole."""
    listed = server.http.get("/v1/videos?limit=100").json()["data"]
    whole = {record["id"] for record in listed if record["status"] == "completed"}
    failed = [record for record in listed if record["status"] == "failed"]
    assert len(whole) + len(failed) == len(listed)
    assert all(record["error"]["code"] == "storage_full" for record in failed)
    files = [path.name for path in (disk.folder / "videos" / "files").iterdir()]
    assert sorted(files) == sorted(f"{id}.{ending}" for id in whole for ending in ("mp4", "webp", "jpg"))
    for id in whole:
        assert server.http.get(f"/v1/videos/{id}/content").content[4:8] == b"ftyp"
    for record in failed:
        assert server.http.get(f"/v1/videos/{record['id']}/content").status_code == 404
    return whole


def test_videos_fail_cleanly_and_are_made_again_once_there_is_room(
    server: Served, disk: Disk, size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    first = made(server)
    assert first
    bytes_before = server.http.get(f"/v1/videos/{first}/content").content
    opened = descriptors(server.pid)

    disk.fill(server)
    assert_full(ask(server))
    disk.clear(server)
    running = ask(server, num_inference_steps=200).json()["id"]  # when the disk fills up
    until(lambda: look(server, running)["status"] == "in_progress", 10)
    disk.fill(server)
    error = ending(server, running)["error"]
    assert error["code"] == "storage_full"
    assert str(disk.folder) not in error["message"]
    assert assert_whole(server, disk) == {first}
    assert server.http.get(f"/v1/videos/{first}/content").content == bytes_before

    tried, fitted = size(6, 60), 0
    for i in range(tried):  # room for the record, but not for all of the files; then for them too
        disk.fill(server, leave=BLOCK * (1 + 3 * i % 17))
        id = made(server)
        assert assert_whole(server, disk) == {first, id} - {None}
        if id:
            fitted += 1
            assert server.http.delete(f"/v1/videos/{id}").status_code == 200
    if type(disk) is Disk:
        assert 0 < fitted < tried

    disk.clear(server)
    again = made(server)
    assert again
    until(lambda: look(server, running)["expires_at"] is not None, 5)  # that it failed is written down
    assert assert_whole(server, disk) == {first, again}
    assert abs(descriptors(server.pid) - opened) <= 2
    note(
        Finding(
            14, "disk full", f"{tried + 4} videos", f"no room, also in the middle, or {tried} times 4 to 68 KiB",
            f"{fitted} just fitted, all others 507 or failed with storage_full; no partial file; "
            "the next one made as soon as there was room",
        )
    )  # fmt: skip


def test_what_is_deleted_makes_room(server: Served, disk: Disk, note: Callable[[Finding], None]) -> None:
    disk.clear(server)
    id = made(server)
    assert id
    if type(disk) is Disk:  # there is nothing to be freed in the other
        disk.fill(server)
        assert made(server) is None
    assert server.http.delete(f"/v1/videos/{id}").status_code == 200
    assert server.http.get(f"/v1/videos/{id}").status_code == 404
    again = ask(server)
    assert again.status_code == 200, again.text
    ending(server, again.json()["id"])
    disk.clear(server)
    note(Finding(14, "deleting on a full disk", "1 video", "no room", "deleted, and the next is taken in"))


def test_pictures_need_no_disk(disk: Disk, note: Callable[[Finding], None]) -> None:
    if type(disk) is not Disk:
        pytest.skip("needs a file system of its own, for which one must be allowed to mount")
    folders = {name: str(disk.folder) for name in ("TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HOME")}
    server = Served(env=folders)
    try:
        disk.fill(server)
        for i in range(20):
            answer = server.generate(n=4, response_format=("b64_json", "url")[i % 2])
            assert answer.status_code == 200, answer.text
            data = answer.json()["data"]
            assert len([item for item in data if item.get("b64_json") or item.get("url")]) == 4
        assert server.http.get(data[0]["url"]).content.startswith(b"\x89PNG")
        assert os.statvfs(disk.folder).f_bavail == 0
        assert server.metric("engine_restarts_total") == 0
    finally:
        server.kill()
        disk.clear(server)
    note(Finding(14, "pictures on a full disk", "80 pictures", "no room for anything", "all answered"))
