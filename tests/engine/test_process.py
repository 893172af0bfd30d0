"""What goes wrong in the engine process, from its parent's side."""

import asyncio

import pytest

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine.client import AsyncEngine
from stepbatch.errors import EngineDied, OutOfMemory
from stepbatch.request import GenerationRequest
from stepbatch.testing import FakeRunner

pytestmark = pytest.mark.anyio

TOKENS = 16  # of what ``draw`` asks for


async def draw(engine: AsyncEngine, prompt: str = "x", side: int = 64) -> bool:
    """Whether the picture is right."""
    request = GenerationRequest(prompt=prompt, width=side, height=side, guidance_scale=0.0, seed=7)
    [output] = await engine.submit(request).outputs()
    return output.pixels == FakeRunner.pixels(prompt, 7, side, side)


async def test_more_jobs_than_there_is_memory_for_are_all_done_by_the_same_process() -> None:
    model = ModelConfig(backend="fake", fake_step_ms=2, fake_memory_tokens=3 * TOKENS)
    engine = AsyncEngine(EngineConfig(model=model))
    await engine.start()
    try:
        assert all(await asyncio.gather(*(draw(engine, f"{number}") for number in range(20))))
        with pytest.raises(OutOfMemory):
            await draw(engine, side=128)
        assert await draw(engine)
        assert engine.restarts == 0
    finally:
        await engine.stop()


async def test_a_device_that_is_lost_is_found_again_by_a_new_process() -> None:
    engine = AsyncEngine(EngineConfig(model=ModelConfig(backend="fake", fake_step_ms=20)))
    await engine.start()
    try:
        lost, other = asyncio.create_task(draw(engine, "[lost]")), asyncio.create_task(draw(engine, "other"))
        with pytest.raises(EngineDied):
            await lost
        assert await other
        assert engine.restarts == 2
    finally:
        await engine.stop()
