from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepbatch.errors import EngineDied, InvalidValue, NotFound, SetupError, StorageFull
from stepbatch.server import video_store
from stepbatch.server.video_store import VARIANTS, VideoStore, is_video_id, new_video_id
from stepbatch.server.wall_clock import WallClock

ABOUT = {"model": "m", "prompt": "a cat \u00e9"}


class Clock:
    """Unix seconds that stand still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def opened(
    folder: Path, clock: Clock | None = None, max_bytes: int = 10_000, ttl: float = 100.0
) -> Iterator[VideoStore]:
    store = VideoStore(folder, ttl, max_bytes, WallClock(clock or Clock(), clock or Clock()))
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[VideoStore]:
    with opened(tmp_path / "videos", clock) as store:
        yield store


def add(store: VideoStore) -> str:
    return store.add(new_video_id(), ABOUT).id


def make(store: VideoStore, size: int = 300, **more: Any) -> str:
    """A finished video whose three files have so many bytes together."""
    id = add(store)
    for part in store.parts(id).values():
        part.write_bytes(bytes(size // 3))
    store.finish(id, more)
    return id


def ids(store: VideoStore) -> list[str]:
    return [record.id for record in store.page(None, 100, newest_first=False)[0]]


def names(store: VideoStore) -> list[str]:
    return sorted(path.name for path in store.files.iterdir())


def test_a_video_s_way(store: VideoStore, clock: Clock) -> None:
    id = add(store)
    first = store.get(id).answer()
    assert first == {
        "id": id,
        "object": "video",
        "created_at": 1_000_000,
        "completed_at": None,
        "expires_at": None,
        "status": "queued",
        "progress": 0,
        "error": None,
        "remixed_from_video_id": None,
        **ABOUT,
    }
    assert store.advance(id, 40)
    assert (store.get(id).status, store.get(id).progress) == ("in_progress", 40)
    for variant, part in store.parts(id).items():
        part.write_bytes(variant.encode())
    clock.now += 7
    store.finish(id, {"fps": 8})
    assert store.get(id).answer() == first | {
        "completed_at": 1_000_007,
        "expires_at": 1_000_107,
        "status": "completed",
        "progress": 100,
        "fps": 8,
    }
    assert names(store) == sorted(f"{id}.{extension}" for extension, _ in VARIANTS.values())
    assert {variant: store.path(id, variant).read_bytes() for variant in VARIANTS} == {v: v.encode() for v in VARIANTS}


def test_an_ending_stays(store: VideoStore) -> None:
    made, failed = make(store), add(store)
    store.fail(failed, InvalidValue("too long", "prompt"))
    for id in (made, failed):
        before = store.get(id)
        assert not store.advance(id, 5)
        store.fail(id, EngineDied("later"))
        assert store.get(id) == before
    assert store.path(made, "video").exists()
    error = {"code": "invalid_value", "message": "too long", "param": "prompt", "type": "invalid_request_error"}
    assert (store.get(failed).status, store.get(failed).error) == ("failed", error)


def test_a_failure_leaves_no_files(store: VideoStore) -> None:
    id = add(store)
    store.parts(id)["video"].write_bytes(b"half")
    store.path(id, "video").write_bytes(b"whole")  # it was put in its place, and then its record couldn't be written
    store.fail(id, EngineDied("x"))
    assert names(store) == []


def test_what_is_deleted_is_gone_whenever_it_was(store: VideoStore) -> None:
    waiting, writing, made = add(store), add(store), make(store)
    store.parts(writing)["video"].write_bytes(b"half")
    for id in (waiting, writing, made):
        store.delete(id)
        assert not store.advance(id, 50)
        store.fail(id, EngineDied("x"))
        for call in (store.get, store.delete):
            with pytest.raises(NotFound):
                call(id)
    for part in store.parts(writing).values():
        part.write_bytes(b"all of it")
    store.finish(writing, {})  # by a server that didn't know
    assert ids(store) == names(store) == []


@pytest.mark.parametrize("id", ["", "x", "../videos.sqlite3", "video_", "video_" + "g" * 32, "\ud800", "video_%"])
def test_what_is_no_id_is_not_found(store: VideoStore, id: str) -> None:
    with pytest.raises(NotFound):
        store.get(id)


def test_records_and_files_survive_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        made, failed = make(store, fps=8), add(store)
        store.fail(failed, EngineDied("x"))
        before = [store.get(id) for id in (made, failed)]
    with opened(tmp_path) as store:
        assert [store.get(id) for id in (made, failed)] == before
        assert len(store.path(made, "video").read_bytes()) == 100


def test_what_a_dead_server_left_has_failed(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        queued, running, made = add(store), add(store), make(store)
        store.advance(running, 60)
        store.parts(running)["video"].write_bytes(b"half")
    with opened(tmp_path) as store:
        for id, progress in ((queued, 0), (running, 60)):
            record = store.get(id)
            assert (record.status, record.progress, record.completed_at) == ("failed", progress, None)
            assert record.error is not None
            assert record.error["code"] == "server_died"
            assert record.expires_at is not None
        assert store.get(made).status == "completed"
        assert {name.split(".")[0] for name in names(store)} == {made}


def test_servers_that_share_a_folder_leave_each_other_s_work_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as one:
        mine = add(one)
        one.parts(mine)["video"].write_bytes(b"half")
        with opened(tmp_path) as other:  # sweeps
            theirs = add(other)
            assert other.get(mine).status == one.get(theirs).status == "queued"
            assert one.parts(mine)["video"].exists()
            other.delete(mine)
            assert not one.advance(mine, 10)
        assert one.get(theirs).status == "failed"  # noticed by reading it
        another = VideoStore(tmp_path, 100, 10_000, WallClock(Clock(), Clock()))
        left = add(another)
        another.close()
        records, _ = one.page(None, 10, newest_first=True)
        assert [record.status for record in records] == ["failed", "failed"]
        assert records[0].id == left


def test_files_that_nothing_speaks_of_are_swept(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        made = make(store)
        kept = names(store)
        for name in (f"{new_video_id()}.mp4", f"{made}.mp4.part", "x", "video_1.mp4.part"):
            (store.files / name).write_bytes(b"x")
    with opened(tmp_path) as store:
        assert names(store) == kept


def test_a_video_expires(store: VideoStore, clock: Clock) -> None:
    made, failed, waiting = make(store), add(store), add(store)
    store.fail(failed, EngineDied("x"))
    clock.now += 99.9
    assert ids(store) == sorted([made, failed, waiting])
    clock.now += 0.2
    assert ids(store) == [waiting]
    with pytest.raises(NotFound):
        store.get(made)
    assert len(names(store)) == 3
    store.tidy()
    assert names(store) == []
    assert store.get(waiting).status == "queued"


def test_the_oldest_finished_make_room(store: VideoStore, clock: Clock) -> None:
    late = add(store)  # the first that was asked for, and the last that is made
    made = []
    for _ in range(3):
        clock.now += 1
        made.append(make(store, 3000))
    clock.now += 1
    for part in store.parts(late).values():
        part.write_bytes(bytes(1500))
    store.finish(late, {})
    assert set(ids(store)) == {late, made[2]}  # 4500 and 3000 of 10000
    assert {name.split(".")[0] for name in names(store)} == {late, made[2]}
    make(store, 2499)
    assert len(ids(store)) == 3


def test_a_video_larger_than_all_room_is_refused_and_drives_out_nobody(store: VideoStore) -> None:
    made, large = make(store, 9000), add(store)
    for part in store.parts(large).values():
        part.write_bytes(bytes(3334))
    with pytest.raises(StorageFull, match="the video has 10002 bytes, and --video-disk-mb leaves 10000"):
        store.finish(large, {})
    store.fail(large, StorageFull("x"))
    assert store.get(made).status == "completed"
    assert {name.split(".")[0] for name in names(store)} == {made}


def test_files_that_are_not_there_leave_the_record_and_the_others_as_they_were(store: VideoStore) -> None:
    made, broken = make(store, 9000), add(store)
    store.parts(broken)["video"].write_bytes(bytes(9000))
    with pytest.raises(FileNotFoundError):
        store.finish(broken, {})
    assert store.get(broken).status == "queued"
    assert store.get(made).status == "completed"


@settings(max_examples=30)
@given(data=st.data(), count=st.integers(0, 25), limit=st.integers(1, 9), newest_first=st.booleans())
def test_pages_show_every_video_once_in_order_whatever_is_deleted_meanwhile(
    data: st.DataObject, count: int, limit: int, newest_first: bool
) -> None:
    with TemporaryDirectory() as folder, opened(Path(folder)) as store:
        there = [add(store) for _ in range(count)]
        assert there == sorted(there)
        seen: list[str] = []
        gone: set[str] = set()
        after, more = None, True
        while more:
            records, more = store.page(after, limit, newest_first)
            assert len(records) <= limit
            assert len(records) == limit or not more
            seen += [record.id for record in records]
            after = seen[-1] if seen else None
            left = [id for id in there if id not in gone]
            if left and data.draw(st.booleans()):
                gone.add(victim := data.draw(st.sampled_from(left)))  # the last one that was seen, perhaps
                store.delete(victim)
        assert seen == sorted(seen, reverse=newest_first)
        assert len(seen) == len(set(seen))
        assert set(there) - gone <= set(seen)


def test_ids_are_new_in_order_and_safe() -> None:
    made = [new_video_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert made == sorted(made)
    assert all(map(is_video_id, made))
    assert not is_video_id(made[0] + "\n")


def test_nobody_else_may_look(store: VideoStore) -> None:
    for path in (store.files, store.files.parent / "videos.sqlite3"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_a_record_that_can_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_store, "BUSY_SECONDS", 0.05)
    with opened(tmp_path) as store:
        holder = sqlite3.connect(tmp_path / "videos.sqlite3", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageFull, match="the video's record can't be written: database is locked"):
            add(store)
        holder.execute("ROLLBACK")
        holder.close()
        assert ids(store) == []


@pytest.mark.parametrize("kind", ["file", "no database", "another version"])
def test_a_folder_that_can_not_be_used_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "videos"
    if kind == "file":
        folder.write_text("x")
    else:
        folder.mkdir()
        database = folder / "videos.sqlite3"
        if kind == "no database":
            database.write_bytes(b"x" * 5000)
        else:
            connection = sqlite3.connect(database)
            connection.execute("PRAGMA user_version = 99")
            connection.close()
    with pytest.raises(SetupError, match=f"--video-dir: can't keep videos in {folder}: "):
        VideoStore(folder, 100, 100)


@contextmanager
def full(store: VideoStore) -> Iterator[None]:
    """While the disk has no room for what the store writes down."""
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    try:
        yield
    finally:
        store._database.execute("PRAGMA max_page_count = 1000000")


LONG = {"prompt": "a cat" * 1000}  # longer than a page


def test_what_has_failed_is_told_and_removed_though_it_can_not_be_written(store: VideoStore) -> None:
    id = add(store)
    for part in store.parts(id).values():
        part.write_bytes(b"some")
    error = StorageFull("x" * 5000)
    with full(store):
        with pytest.raises(StorageFull, match="the video's record can't be written: database or disk is full"):
            store.fail(id, error)
        assert names(store) == []
        assert (store.get(id).status, store.get(id).error) == ("failed", error.fields)
        assert [record.status for record in store.page(None, 9, newest_first=True)[0]] == ["failed"]
        with pytest.raises(StorageFull):
            store.add(new_video_id(), LONG)
    assert store._database.execute("SELECT status FROM videos").fetchall() == [("queued",)]
    store.fail(id, error)
    assert store._database.execute("SELECT status FROM videos").fetchall() == [("failed",)]
    assert store.get(id).error == error.fields


def test_files_go_though_their_record_can_not(store: VideoStore, clock: Clock) -> None:
    deleted, expired = make(store), make(store)
    holder = sqlite3.connect(store.files.parent / "videos.sqlite3", isolation_level=None)
    store._database.execute("PRAGMA busy_timeout = 10")
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageFull):
        store.delete(deleted)
    assert names(store) == sorted(store.path(expired, variant).name for variant in VARIANTS)
    clock.now += 100
    with pytest.raises(StorageFull):
        store.tidy()
    assert names(store) == []
    holder.close()
    store.tidy()
    assert ids(store) == []


def test_a_dead_server_s_videos_have_failed_though_it_can_not_be_written(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path / "videos", clock) as store:
        id = add(store)
        store._database.execute("UPDATE videos SET run = 'dead'")
        holder = sqlite3.connect(tmp_path / "videos" / "videos.sqlite3", isolation_level=None)
        store._database.execute("PRAGMA busy_timeout = 10")
        holder.execute("BEGIN IMMEDIATE")
        error = store.get(id).error
        assert error
        assert error["code"] == "server_died"
        holder.close()
        assert store.get(id).status == "failed"
        assert store._database.execute("SELECT status FROM videos").fetchall() == [("failed",)]
