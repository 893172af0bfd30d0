import json
from pathlib import Path

from .record import RESULTS, Finding, save, table, written_table

PROMISES = 20
KILLED = Finding(1, "engine killed", "32 in flight", "kill -9, 2 times", "64 of 64 answered", 3.2)


def test_a_run_is_kept_and_a_later_one_replaces_what_it_tried(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    save([KILLED, Finding(12, "drain", "16 in flight", "SIGTERM", "16 of 16", 1.0)], path)
    save([Finding(1, "engine killed", "32 in flight", "kill -9, 50 times", "1,600 of 1,600 answered", 80.0)], path)
    rows = table(path).splitlines()[4:]
    assert rows == [
        "| 1 | engine killed | 32 in flight | kill -9, 50 times | 1,600 of 1,600 answered | 80 |",
        "| 12 | drain | 16 in flight | SIGTERM | 16 of 16 | 1 |",
    ]


def test_the_committed_run_has_tried_every_promise() -> None:
    rows = json.loads(RESULTS.read_text())["findings"]
    assert {row["number"] for row in rows} == set(range(1, PROMISES + 1))
    assert all(row["load"] and row["figure"] for row in rows)


def test_the_document_has_the_committed_run() -> None:
    assert written_table() == table(RESULTS)
