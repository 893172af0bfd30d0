from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stepbatch.server.runs import Runs

HOLD = """
import sys, time
from pathlib import Path
from stepbatch.server.runs import Runs
print(Runs(Path(sys.argv[1])).id, flush=True)
time.sleep(60)
"""


def test_a_run_lasts_until_it_is_closed(tmp_path: Path) -> None:
    one, other = Runs(tmp_path), Runs(tmp_path)
    assert not one.ended(one.id)
    assert not one.ended(other.id)
    assert one.ended("0" * 16)  # never was
    other.close()
    assert one.ended(other.id)
    one.close()


def test_a_run_that_was_killed_is_over(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        run = process.stdout.readline().strip()
        assert not runs.ended(run)
        runs.sweep()
        assert (tmp_path / f"{run}.run").exists()
    finally:
        process.kill()
        process.communicate()
    assert runs.ended(run)
    runs.sweep()
    assert sorted(path.name for path in tmp_path.glob("*.run")) == [f"{runs.id}.run"]
    assert runs.ended(run)
    runs.close()


def test_however_many_begin_and_look_at_once_none_looks_over(tmp_path: Path) -> None:
    first = Runs(tmp_path)

    def begin(_: int) -> Runs:
        runs = Runs(tmp_path)
        runs.sweep()
        assert not runs.ended(first.id)
        return runs

    with ThreadPoolExecutor(8) as pool:
        others = list(pool.map(begin, range(40)))
        assert not any(pool.map(lambda runs: first.ended(runs.id), others * 5))
    for runs in (first, *others):
        runs.close()
    assert list(tmp_path.glob("*.run")) == []
