"""Promise 4: what the model chokes on fails by itself, and what kills the engine does so twice at most."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig

from .inside import WIDTH, Inside, assert_failed, inside, is_own, until
from .record import Finding

pytestmark = pytest.mark.anyio

Amount = tuple[int, tuple[str, ...]]

PHASES = ("check", "encode", "denoise", "decode")
TOGETHER = BatchingConfig(dynamic_batch_max_size=WIDTH, max_encodes_per_step=WIDTH, max_decodes_per_step=WIDTH)


@pytest.fixture
async def site() -> AsyncIterator[Inside]:
    model = ModelConfig(backend="fake", fake_step_ms=2)
    async with inside(EngineConfig(model=model, batching=TOGETHER)) as running:
        yield running


async def batch_with(site: Inside, poison: str, place: int) -> httpx.Response:
    """The answer to one of eight that come at once, of which the others get their pictures."""
    site.engine.forget()
    prompts = [f"innocent {i}" for i in range(WIDTH)]
    prompts[place] = poison
    answers = await site.together([{"prompt": prompt} for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert prompt == poison or is_own(answer, prompt), answer.text
    return answers[place]


async def test_one_that_raises_fails_alone(
    site: Inside, size: Callable[[int, int], int], note: Callable[[Finding], None]
) -> None:
    rounds = size(1, 25)
    for i in range(rounds):
        for phase in PHASES:
            answer = await batch_with(site, poison := f"[raise-{phase}]", i % WIDTH)
            assert_failed(answer, 500, "generation_failed")
            assert phase == "check" or len(site.engine.with_prompt(poison, phase)[0].prompts) == WIDTH
    assert site.engine.restarts == 0
    tried = rounds * len(PHASES)
    note(
        Finding(
            4, "poison", f"{tried} batches of 8", "one raises: in the check, encoding, denoising or decoding",
            f"{7 * tried:,} of {7 * tried:,} others finish; {tried} of {tried} get their own 500, not to be retried",
        )
    )  # fmt: skip


async def test_one_that_kills_the_engine_does_so_twice_and_no_other_is_lost(
    site: Inside, size: Callable[[Amount, Amount], Amount], note: Callable[[Finding], None]
) -> None:
    rounds, phases = size((1, PHASES[::2]), (5, PHASES))
    for i in range(rounds):
        for phase in phases:
            before, poison = site.engine.restarts, f"[die-{phase}]"
            answer = await batch_with(site, poison, i)
            assert_failed(answer, 503, "engine_died")
            await until(lambda before=before: site.engine.restarts == before + 2)
            suspected = [prompt for prompt, handle in site.engine.asked.items() if handle.suspects]
            assert len(suspected) == (1 if phase == "check" else WIDTH)  # those that were in the unit of work
            again = [unit for unit in site.engine.with_prompt(poison) if unit.process > before]
            assert all(unit.prompts == [poison] for unit in again)
    tried = rounds * len(phases)
    note(
        Finding(
            4, "a killer", f"{tried} batches of 8", "one ends the engine process wherever it is worked on",
            f"{2 * tried} restarts: two each, the second alone; {7 * tried} of {7 * tried} others finish",
        )
    )  # fmt: skip
