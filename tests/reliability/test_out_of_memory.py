"""Promise 5: what doesn't fit is done in parts, and a device that is lost is found again by a new process."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import pytest

from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine.engine import Engine
from stepbatch.engine.messages import FromEngine, Output, Submit
from stepbatch.engine.meter import Encoded
from stepbatch.errors import RequestError
from stepbatch.request import GenerationRequest, Job
from stepbatch.testing import FakeRunner

from .inside import Inside, assert_failed, inside, is_own, until
from .record import Finding

pytestmark = pytest.mark.anyio

WIDE = 12  # jobs that come at once, and that a step would have
ROOM = 5  # jobs that there is memory for
TOKENS = 2  # of each
MODEL = ModelConfig(backend="fake", fake_step_ms=2, fake_memory_tokens=ROOM * TOKENS)
TOGETHER = BatchingConfig(dynamic_batch_max_size=WIDE, max_encodes_per_step=WIDE, max_decodes_per_step=WIDE)


@pytest.fixture
async def site() -> AsyncIterator[Inside]:
    async with inside(EngineConfig(model=MODEL, batching=TOGETHER)) as running:
        yield running


async def burst(site: Inside, *more: str) -> int:
    """Ask for as many at once as would share a step, and see that each gets its own; returns the widest step begun."""
    site.engine.forget()
    prompts = [f"prompt {i}" for i in range(WIDE)]
    answers = await site.together([{"prompt": prompt} for prompt in (*prompts, *more)])
    assert all(is_own(answer, prompt) for answer, prompt in zip(answers, prompts, strict=False))
    return max(len(unit.prompts) for unit in site.engine.units if unit.kind == "denoise")


async def test_what_does_not_fit_is_done_in_parts_and_the_next_steps_are_narrower(
    site: Inside, size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    assert await site.metric("step_token_limit") == math.inf
    assert await burst(site) == WIDE
    learned = await site.metric("step_token_limit")
    assert TOKENS <= learned <= ROOM * TOKENS
    bursts = size(5, 200)
    for _ in range(bursts):
        assert await burst(site) <= ROOM
    assert await site.metric("step_token_limit") == learned
    large = await site.generate(prompt="as large as can be", size="128x128")
    assert_failed(large, 500, "out_of_memory")
    assert await burst(site) <= ROOM
    assert site.engine.restarts == 0
    note(
        Finding(
            5, "out of memory", f"{bursts + 2} bursts of {WIDE}", f"room for {ROOM} in a step; one too large by itself",
            f"{(bursts + 2) * WIDE:,} of {(bursts + 2) * WIDE:,} finish in one process, "
            f"steps of {ROOM} at most after the first; the one alone gets 500",
        )
    )  # fmt: skip


async def test_a_lost_device_is_found_again_and_only_who_lost_it_fails(
    site: Inside, size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    rounds = size(1, 10)
    for killed in range(2, 2 * rounds + 1, 2):
        await burst(site)  # so that the memory's limit is known
        site.engine.forget()
        prompts = [f"innocent {i}" for i in range(ROOM - 2)]
        *others, lost = await site.together([{"prompt": prompt} for prompt in (*prompts, "[lost]")])
        assert_failed(lost, 503, "engine_died")
        assert all(is_own(answer, prompt) for answer, prompt in zip(others, prompts, strict=True))
        await until(lambda killed=killed: site.engine.restarts == killed)
    note(
        Finding(
            5, "device errors", f"{rounds} batches of {ROOM - 1}", "one loses the device",
            f"{2 * rounds} restarts, {rounds * (ROOM - 2)} of {rounds * (ROOM - 2)} others finish",
        )
    )  # fmt: skip


class Cramped(FakeRunner):
    """Has no room for more than two jobs where it is told."""

    where = ""

    def encode(self, jobs: Sequence[Job]) -> Encoded:
        self._squeeze("encode", jobs)
        return super().encode(jobs)

    def decode(self, jobs: Sequence[Job], seconds: float = math.inf) -> list[bytes | RequestError | None]:
        self._squeeze("decode", jobs)
        return super().decode(jobs, seconds)

    def _squeeze(self, where: str, jobs: Sequence[Job]) -> None:
        if where == self.where and len(jobs) > 2:
            raise MemoryError("as if there were no more")


@pytest.mark.parametrize("where", ["encode", "decode"])
def test_so_it_is_where_encoding_or_decoding_does_not_fit(where: str) -> None:
    runner, said = Cramped(replace(MODEL, fake_memory_tokens=None, fake_step_ms=0)), list[FromEngine]()
    runner.where = where
    engine = Engine(runner, EngineConfig(batching=TOGETHER), said.append)
    for i in range(WIDE):
        request = GenerationRequest(prompt=f"prompt {i}", width=16, height=16, seed=i)
        engine.submit(Submit(f"{i}", request, [0], time.monotonic()))
    while not engine.idle:
        engine.step()
    drawn = {message.request_id: message.pixels for message in said if isinstance(message, Output)}
    assert drawn == {f"{i}": FakeRunner.pixels(f"prompt {i}", i, 16, 16) for i in range(WIDE)}
