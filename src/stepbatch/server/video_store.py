"""Videos and what is known of them, kept on disk: a folder of files, and an SQLite database of records.

Several servers may share the folder. A record names the run of the server that makes its video; a video that isn't
finished when its run is over never will be, and counts as failed from then on.

Where the disk is full, what can't be written is told all the same, and files go before their records: that makes room.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepbatch.errors import NotFound, RequestError, ServerDied, SetupError, StorageFull
from stepbatch.server.runs import Runs
from stepbatch.server.wall_clock import WallClock

VARIANTS = {"video": ("mp4", "video/mp4"), "thumbnail": ("webp", "image/webp"), "spritesheet": ("jpg", "image/jpeg")}
ID = "video_[0-9a-f]{32}"
WAL_PAGES = 100  # of 4 KiB, that the log has before it is worked in; SQLite's own 1,000 may not have room
BUSY_SECONDS = 30.0  # how long another server's statement is waited for

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS videos (
    id TEXT PRIMARY KEY,            -- in order of creation
    run TEXT NOT NULL,
    status TEXT NOT NULL,
    progress INTEGER NOT NULL,      -- percent
    created_at INTEGER NOT NULL,    -- Unix seconds, as all times
    completed_at INTEGER,
    expires_at INTEGER,
    bytes INTEGER NOT NULL DEFAULT 0,
    error TEXT,                     -- JSON, as is what follows
    about TEXT NOT NULL
) WITHOUT ROWID
"""
_COLUMNS = "id, run, status, progress, created_at, completed_at, expires_at, error, about"
_UNFINISHED = "status IN ('queued', 'in_progress')"
_SERVER_DIED = ServerDied("the server ended before the video was made")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a video."""

    id: str
    run: str
    status: str  # queued, in_progress, completed, failed
    progress: int  # percent
    created_at: int  # Unix seconds, as the next two
    completed_at: int | None
    expires_at: int | None
    error: Mapping[str, Any] | None
    about: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        return self.status in ("completed", "failed")

    def answer(self) -> dict[str, Any]:
        """OpenAI's shape, and our fields around it."""
        return {
            "id": self.id,
            "object": "video",
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "expires_at": self.expires_at,
            "status": self.status,
            "progress": self.progress,
            "error": self.error,
            "remixed_from_video_id": None,
            **self.about,
        }


def new_video_id() -> str:
    """An id that can't be guessed and comes, in order of text, after those that were made before."""
    return f"video_{time.time_ns():016x}{secrets.token_hex(8)}"


def is_video_id(text: str) -> bool:
    """Whether it could be an id; then it is a safe name of a file too."""
    return re.fullmatch(ID, text) is not None


class VideoStore:
    """The folder. Every method takes a few milliseconds of disk, and one thread at a time may call them.

    Args:
        folder: Made if it isn't there.
        ttl_seconds: How long a finished video and its record are kept.
        max_bytes: Of all finished videos together; the oldest go first.
        clock: Of its records.

    Raises:
        SetupError: the folder can't be used.
    """

    def __init__(self, folder: Path, ttl_seconds: float, max_bytes: int, clock: WallClock | None = None) -> None:
        self.ttl_seconds = ttl_seconds
        self.max_bytes = max_bytes
        self.clock = clock or WallClock()
        self.files = folder / "files"
        self._failed: dict[str, dict[str, Any]] = {}  # errors that are not written down yet, by video
        try:
            self.files.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = _open(folder / "videos.sqlite3")
            self.runs = Runs(folder / "runs")
            self.tidy()
            self._sweep()
        except (OSError, sqlite3.Error, StorageFull) as error:
            raise SetupError(f"--video-dir: can't keep videos in {folder}: {error}") from error

    def add(self, id: str, about: Mapping[str, Any]) -> Record:
        """Keep the record of a video that is to be made.

        Raises:
            StorageFull: it can't be written.
        """
        values = (id, self.runs.id, "queued", 0, int(self.clock.now()), json.dumps(about))
        columns = "id, run, status, progress, created_at, about"
        self._write(f"INSERT INTO videos ({columns}) VALUES (?, ?, ?, ?, ?, ?)", values)
        return self.get(id)

    def advance(self, id: str, progress: int) -> bool:
        """Write down how far a video is, percent; returns whether there is still a record of it.

        Raises:
            StorageFull: it can't be written.
        """
        set_to = f"UPDATE videos SET status = 'in_progress', progress = ? WHERE id = ? AND {_UNFINISHED}"
        return self._write(set_to, (progress, id)).rowcount == 1

    def parts(self, id: str) -> dict[str, Path]:
        """Where the files of a video are written, by variant, before ``finish`` puts them in their places."""
        return {variant: self.files / f"{id}.{extension}.part" for variant, (extension, _) in VARIANTS.items()}

    def finish(self, id: str, more: Mapping[str, Any]) -> bool:
        """Put a video's files in their places, and ``more`` into its record; returns whether there is still one.

        Raises:
            StorageFull: it is larger than all videos together may be.
            OSError: the files can't be kept.
        """
        parts = self.parts(id)
        size = sum(part.stat().st_size for part in parts.values())
        if size > self.max_bytes:
            raise StorageFull(f"the video has {size} bytes, and --video-disk-mb leaves {self.max_bytes}")
        now, expires = int(self.clock.now()), int(self.clock.latest() + self.ttl_seconds)
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            row = self._database.execute(f"SELECT about FROM videos WHERE id = ? AND {_UNFINISHED}", (id,)).fetchone()
            gone = self._oldest_over(self.max_bytes - size) if row else [id]
            if row:
                for variant, part in parts.items():
                    os.replace(part, self.path(id, variant))
                about = json.dumps({**json.loads(row[0]), **more})
                values = (now, expires, size, about, id)
                self._database.execute(
                    "UPDATE videos SET status = 'completed', progress = 100, completed_at = ?, expires_at = ?, "
                    "bytes = ?, about = ? WHERE id = ?",
                    values,
                )
        self._unlink(gone)
        return row is not None

    def fail(self, id: str, error: RequestError) -> None:
        """Write down why there will be no video. One that is finished, or was deleted, is left as it is.

        Raises:
            StorageFull: it can't be written; it is told all the same, and this is to be called again.
        """
        if not self._database.execute("SELECT 1 FROM videos WHERE id = ? AND status = 'completed'", (id,)).fetchone():
            self._unlink([id])
        self._failed[id] = error.fields
        self._fail("id", id, error)
        del self._failed[id]

    def get(self, id: str) -> Record:
        """The record of a video; raises ``NotFound`` if there is none, or no longer."""
        if is_video_id(id):
            records = self._read(f"SELECT {_COLUMNS} FROM videos WHERE id = ? AND {self._alive()}", (id,))
            if records:
                return records[0]
        raise NotFound("there is no such video, or no longer")

    def page(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[Record], bool]:
        """Some records in order of creation, those behind ``after``, and whether there are more.

        Args:
            after: An id; its video may be gone.
        """
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        where = f"{self._alive()} AND id {beyond} ?" if after else self._alive()
        found = self._read(
            f"SELECT {_COLUMNS} FROM videos WHERE {where} ORDER BY id {order} LIMIT ?",
            (*([after] if after else []), limit + 1),
        )
        return found[:limit], len(found) > limit

    def delete(self, id: str) -> None:
        """Forget a video, finished or not.

        Raises:
            NotFound: there is none.
            StorageFull: its record can't be deleted; its files are.
        """
        self.get(id)
        self._unlink([id])
        self._write("DELETE FROM videos WHERE id = ?", (id,))

    def path(self, id: str, variant: str) -> Path:
        """Where a finished video's file is."""
        return self.files / f"{id}.{VARIANTS[variant][0]}"

    def tidy(self) -> None:
        """Delete what has expired, and give up what dead servers have left unfinished."""
        expired = f"NOT {self._alive()}"
        self._unlink(row[0] for row in self._database.execute(f"SELECT id FROM videos WHERE {expired}").fetchall())
        self._write(f"DELETE FROM videos WHERE {expired}")
        runs = self._database.execute(f"SELECT DISTINCT run FROM videos WHERE {_UNFINISHED}").fetchall()
        self._give_up(self._over(row[0] for row in runs))
        self.runs.sweep()

    def close(self) -> None:
        """Let go of the folder."""
        self._database.close()
        self.runs.close()

    def _alive(self) -> str:
        return f"(expires_at IS NULL OR expires_at > {int(self.clock.earliest())})"

    def _read(self, query: str, values: tuple[Any, ...]) -> list[Record]:
        """The records that a query finds, none of them waiting for a server that is dead."""
        records = [_record(row) for row in self._database.execute(query, values)]
        over = self._over({record.run for record in records if not record.finished})
        if over:
            with suppress(StorageFull):
                self._give_up(over)
            records = [_record(row) for row in self._database.execute(query, values)]
        return [self._told(record, over) for record in records]

    def _over(self, runs: Iterable[str]) -> set[str]:
        """Those of these runs that are over."""
        return {run for run in runs if self.runs.ended(run)}

    def _give_up(self, runs: Iterable[str]) -> None:
        """Fail what these runs have left unfinished."""
        for run in runs:
            self._fail("run", run, _SERVER_DIED)

    def _told(self, record: Record, over: Collection[str]) -> Record:
        """A record with its ending, also where there was no room to write that down; ``over`` are runs."""
        error = _SERVER_DIED.fields if record.run in over else self._failed.get(record.id)
        return record if record.finished or not error else replace(record, status="failed", error=error)

    def _fail(self, column: str, value: str, error: RequestError) -> None:
        self._write(
            f"UPDATE videos SET status = 'failed', error = ?, expires_at = ? WHERE {column} = ? AND {_UNFINISHED}",
            (json.dumps(error.fields), int(self.clock.latest() + self.ttl_seconds), value),
        )

    def _write(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Change one thing; raises ``StorageFull`` if that can't be written."""
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise StorageFull(f"the video's record can't be written: {error}") from error

    def _oldest_over(self, room: int) -> list[str]:
        """Delete the oldest finished videos until the rest fit in so many bytes; returns their ids."""
        query = "SELECT id, bytes FROM videos WHERE bytes > 0 ORDER BY completed_at, id"
        rows = self._database.execute(query).fetchall()
        held, gone = sum(size for _, size in rows), []
        for id, size in rows:
            if held <= room:
                break
            held -= size
            gone.append(id)
        self._database.executemany("DELETE FROM videos WHERE id = ?", [(id,) for id in gone])
        return gone

    def _unlink(self, ids: Iterable[str]) -> None:
        for id in ids:
            for variant, part in self.parts(id).items():
                part.unlink(missing_ok=True)
                self.path(id, variant).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove files that no record speaks of, or none that is alive: a server ended before it could."""
        names = sorted(path.name for path in self.files.iterdir())  # first: a file comes after its record
        kept = dict(self._database.execute("SELECT id, status FROM videos WHERE status != 'failed'"))
        for name in names:
            status = kept.get(name.split(".")[0])
            if status is None or (status == "completed" and name.endswith(".part")):
                (self.files / name).unlink(missing_ok=True)


def _open(path: Path) -> sqlite3.Connection:
    with ExitStack() as stack:
        database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        stack.enter_context(closing(database))
        os.chmod(path, 0o600)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"{path.name} is of another version of stepbatch")
        database.execute(_SCHEMA)
        database.execute(f"PRAGMA user_version = {_VERSION}")
        stack.pop_all()  # it can be used: from here on it's the store's to close
    return database


def _record(row: tuple[Any, ...]) -> Record:
    id, run, status, progress, created_at, completed_at, expires_at, error, about = row
    return Record(
        id=id,
        run=run,
        status=status,
        progress=progress,
        created_at=created_at,
        completed_at=completed_at,
        expires_at=expires_at,
        error=json.loads(error) if error else None,
        about=json.loads(about),
    )
