"""Promise 7: whoever hangs up is worked for no longer, whatever phase that is in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.pictures import file, image

from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig

from .inside import WIDTH, Inside, inside, until
from .record import Finding

pytestmark = pytest.mark.anyio

STEP_MS = 250.0  # so long that a busy machine comes to hear of a disconnection within one
STEPS = 2  # that who hangs up may still be in
SECONDS = 2.0  # until there is nothing left
PICTURE = ("image", ("x.png", file(image(size=(256, 256))), "image/png"))


@dataclass(frozen=True)
class Call:
    """A request that is hung up on."""

    prompt: str
    raw: bytes
    sent: int  # bytes of it
    start: float  # seconds from the storm's beginning
    patience: float  # seconds that it waits for an answer
    abrupt: bool  # whether the connection is reset, not closed


def storm(count: int, url: httpx.URL, rng: random.Random) -> list[Call]:
    """Pictures and edits, some hung up on while they are still being sent."""
    client, calls = httpx.Client(base_url=url), []
    for i in range(count):
        fields: dict[str, Any] = {"prompt": f"prompt {i}", "num_inference_steps": rng.randint(1, 8), "size": "64x64"}
        if i % 3:
            made = client.build_request("POST", "/v1/images/generations", json=fields | {"n": rng.choice([1, 1, 3])})
        else:
            made = client.build_request("POST", "/v1/images/edits", data=fields, files=[PICTURE])
        head = f"POST {made.url.path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in made.headers.items())
        raw = head.encode() + b"\r\n" + made.read()
        sent = rng.randint(len(head) + 2, len(raw)) if rng.random() < 0.25 else len(raw)
        start, patience = rng.uniform(0, count / 25), rng.uniform(0, 1.5)
        calls.append(Call(fields["prompt"], raw, sent, start, patience, rng.random() < 0.5))
    return calls


async def make(call: Call, site: Inside, hung_up: dict[str, int]) -> None:
    await asyncio.sleep(call.start)
    _, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(call.raw[: call.sent])
    await writer.drain()
    await asyncio.sleep(call.patience)
    hung_up[call.prompt] = len(site.engine.units)
    if call.abrupt:
        writer.transport.abort()
    else:
        writer.close()


def steps_after(site: Inside, prompt: str, moment: int) -> int:
    """How many denoising steps with a request began later; the moment is a number of units that had begun."""
    return sum(unit.kind == "denoise" and prompt in unit.prompts for unit in site.engine.units[moment:])


async def nothing_is_left(site: Inside) -> None:
    """All is back to what it was before."""
    stats = site.engine.stats
    async with asyncio.timeout(SECONDS):
        while stats.running or stats.waiting or len(asyncio.all_tasks()) != site.tasks:
            await asyncio.sleep(0.01)
            stats = site.engine.stats
    assert await site.metric("num_requests_running") == await site.metric("num_requests_waiting") == 0
    assert await site.metric("backlog_seconds") == 0


@asynccontextmanager
async def serving(step_ms: float = STEP_MS, videos: bool = False, **settings: Any) -> AsyncIterator[Inside]:
    model = ModelConfig(backend="fake", fake_step_ms=step_ms, fake_videos=videos)
    batching = BatchingConfig(dynamic_batch_max_size=WIDTH, scheduling_policy="fcfs")
    async with inside(EngineConfig(model=model, batching=batching), **settings) as site:
        yield site


async def test_who_hangs_up_leaves_the_batch_or_the_queue(
    size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    count = size(60, 500)
    async with serving() as site:
        hung_up: dict[str, int] = {}
        calls = storm(count, site.http.base_url, random.Random("storm"))
        await asyncio.gather(*(make(call, site, hung_up) for call in calls))
        await nothing_is_left(site)
        late = {prompt: steps_after(site, prompt, moment) for prompt, moment in hung_up.items()}
        assert max(late.values()) <= STEPS, late
        assert sum(await outcomes(site)) == count
        never = sum(not site.engine.with_prompt(prompt) for prompt in hung_up)
        assert 0 < never < count
        queued, steps = await queue_hangs_up(site, count)
    note(
        Finding(
            7, "cancel storm", f"{count} pictures and edits", "each hung up on: while sending, waiting or running",
            f"gone within {max(late.values())} steps; of {queued} that waited {steps} were begun; gauges, tasks back "
            f"within {SECONDS:g} s",
        )
    )  # fmt: skip


async def outcomes(site: Inside) -> list[float]:
    """How many requests ended in each way."""
    lines = (await site.http.get("/metrics")).text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith("stepbatch:requests_total{")]


async def queue_hangs_up(site: Inside, count: int) -> tuple[int, int]:
    """Behind a batch that is full, all who wait hang up; returns how many, and how many were begun all the same."""
    site.engine.forget()
    ahead = [asyncio.ensure_future(site.generate(prompt=f"{i}", num_inference_steps=500)) for i in range(WIDTH)]
    await until(lambda: site.engine.stats.running == WIDTH)
    prompts = [f"waiting {i}" for i in range(count)]
    waiting = [asyncio.ensure_future(site.generate(prompt=prompt)) for prompt in prompts]
    await until(lambda: site.engine.stats.waiting == count)
    for call in waiting:
        call.cancel()
    steps = len(site.engine.units)
    await until(lambda: len(site.engine.units) > steps + STEPS and not site.engine.stats.waiting, SECONDS)
    for call in ahead:
        call.cancel()
    await asyncio.wait([*waiting, *ahead])
    await nothing_is_left(site)
    begun = sum(bool(site.engine.with_prompt(prompt)) for prompt in prompts)
    assert begun == 0
    return count, begun


def kept(folder: Path) -> list[Path]:
    """All files, however deep, but those that SQLite has beside its own for a while."""
    return sorted(path for path in folder.rglob("*") if not path.name.endswith(("-wal", "-shm")))


async def test_a_video_that_is_deleted_is_made_no_further(
    tmp_path: Path, size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    count, rng, deleted = size(24, 120), random.Random("videos"), dict[str, int]()

    async def make_and_delete(i: int) -> None:
        await asyncio.sleep(rng.uniform(0, count / 12))
        body = {"prompt": f"video {i}", "size": "32x32", "num_frames": 5, "num_inference_steps": rng.randint(1, 8)}
        answer = await site.http.post("/v1/videos", json=body)
        await asyncio.sleep(rng.uniform(0, 1.5))
        deleted[f"video {i}"] = len(site.engine.units)
        assert (await site.http.delete(f"/v1/videos/{answer.json()['id']}")).status_code == 200

    async with serving(videos=True, video_dir=str(tmp_path)) as site:
        files = kept(tmp_path)
        assert tmp_path / "files" in files
        await asyncio.gather(*(make_and_delete(i) for i in range(count)))
        await nothing_is_left(site)
        assert sum(await outcomes(site)) == count
        late = max(steps_after(site, prompt, moment) for prompt, moment in deleted.items())
        assert late <= STEPS
        assert kept(tmp_path) == files
    note(
        Finding(
            7, "videos deleted", f"{count} videos", "each deleted: waiting, running or being written",
            f"gone within {late} steps; gauges and tasks back within {SECONDS:g} s, no file left",
        )
    )  # fmt: skip
