"""The wall clock jumps by an hour, and nothing is the worse for it."""

from __future__ import annotations

import ast
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .inside import is_own
from .record import Finding
from .serving import Served, run_first, until

SOURCE = Path(__file__).parents[2] / "src" / "stepbatch"
FLIGHT = 8
JUMPS = """
import random, time
wall = time.time
time.time = lambda: wall() + random.choice((-3600, 0, 3600))
time.time_ns = lambda: int(time.time() * 1e9)
"""

# Where the wall clock is read, and what for; anything that waits, or lasts, goes by the monotonic one.
STAMPS = {
    "bench/environment.py",  # when a benchmark ran
    "bench/load/wire.py",  # Retry-After as a date
    "server/app.py",  # "created" of the model
    "server/generate.py",  # "created" of an answer
    "server/video_store.py",  # ids in order of creation
    "server/wall_clock.py",  # what outlives the process
}
WALL_CLOCK = {"time", "time_ns", "now", "utcnow", "today", "localtime", "ctime"}


def readers() -> Iterator[str]:
    """The files that read the wall clock."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in WALL_CLOCK and isinstance(node.value, ast.Name):
                if node.value.id in ("time", "datetime", "date"):
                    yield path.relative_to(SOURCE).as_posix()
            elif isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not {name.name for name in node.names} & WALL_CLOCK, path


def test_the_wall_clock_is_read_for_stamps_alone() -> None:
    assert set(readers()) == STAMPS


def test_a_clock_that_jumps_ends_nothing_early(
    serve: Callable[..., Served], tmp_path: Path, size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    rounds = size(2, 30)
    server = serve("--fake-step-ms", "20", "--dynamic-batch-max-size", "4", env=run_first(tmp_path, JUMPS))
    url = server.generate(prompt="to be fetched", response_format="url").json()["data"][0]["url"]
    off: set[int] = set()  # by how many hours
    with ThreadPoolExecutor(FLIGHT) as crowd:
        for round_ in range(rounds):
            prompts = [f"{round_} {i}" for i in range(FLIGHT)]
            asking = [crowd.submit(server.generate, prompt=p, timeout=60, num_inference_steps=20) for p in prompts]
            for prompt, answer in zip(prompts, (one.result() for one in asking), strict=True):
                assert answer.status_code == 200, answer.text
                assert is_own(answer, prompt)
                off.add(round((answer.json()["created"] - time.time()) / 3600))
        assert server.http.get(url).status_code == 200
        assert server.http.get("/ready").status_code == 200
        assert server.metric("engine_restarts_total") == 0
        last = crowd.submit(server.generate, num_inference_steps=40)
        until(lambda: server.metric("num_requests_running"))
        server.signal(signal.SIGTERM)
        assert last.result().status_code == 200
    assert server.process.wait(10) == 0
    assert len(off) > 1  # it did jump
    figure = f"{rounds * FLIGHT} of {rounds * FLIGHT} in time, a url still there, no restart, drained"
    note(Finding(15, "clock", f"{FLIGHT} in flight with timeouts", "wall clock +-1 h, at every reading", figure))
