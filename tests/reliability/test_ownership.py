"""Promise 8: whoever asks gets the picture that was asked for, whatever else is drawn, given up, or killed."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from stepbatch.config import BatchingConfig, EngineConfig, WarmupConfig
from stepbatch.demo.checker import matches
from stepbatch.demo.scenes import Scene, sample_scene
from stepbatch.engine import supervisor

from .inside import Inside, inside, pictures
from .record import Finding

pytestmark = pytest.mark.anyio

CONCURRENT = 24
CONFIG = EngineConfig(batching=BatchingConfig(dynamic_batch_max_size=16), warmup=WarmupConfig(warmup=False))
UNREAD = 0.2  # at most: few steps at a small size are not what the model draws best
COMPARED = 0.15  # of the pictures that can be read: what they show doesn't tell of which seed they are
OF_EACH = 3  # of those made twice, and of those that were being made when the engine was killed, if there are so many


def different_scenes(count: int) -> list[Scene]:
    rng = random.Random("ownership")
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, pairs=0.2)
        scenes.setdefault(scene.prompt(), scene)
    return list(scenes.values())


def request_for(scene: Scene, index: int) -> dict[str, Any]:
    """Of three sizes, in two or three steps, one in seven guided, one in ten twice: as few steps as can be read."""
    return {
        "prompt": scene.prompt(),
        "size": ("128x128", "144x128", "128x144")[index % 3],
        "num_inference_steps": 2 + index // 3 % 2,
        "guidance_scale": 0.0 if index % 7 else 1.5,
        "seed": 2 * index,
        "n": 1 if index % 10 else 2,
    }


@dataclass
class Storm:
    """Requests, some of which are given up, while the engine is killed now and then."""

    site: Inside
    scenes: list[Scene]
    kills: int
    rng: random.Random = field(default_factory=lambda: random.Random("storm"))
    answers: dict[int, httpx.Response] = field(default_factory=dict)
    cancelled: int = 0
    killed: set[int] = field(default_factory=set)  # requests that the engine worked on when it was killed

    async def blow(self) -> None:
        gate = asyncio.Semaphore(CONCURRENT)
        await asyncio.gather(*(self._ask(index, gate) for index in range(len(self.scenes))))

    async def _ask(self, index: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            patience = self.rng.uniform(0, 1) if self.rng.random() < 0.15 else None
            try:
                async with asyncio.timeout(patience):
                    self.answers[index] = await self.site.generate(**request_for(self.scenes[index], index))
            except TimeoutError:
                self.cancelled += 1
        ended, every = len(self.answers) + self.cancelled, len(self.scenes) // (self.kills + 1)
        if self.site.engine.pid and ended % every == 0 and ended <= self.kills * every:
            self.killed |= {i for i, scene in enumerate(self.scenes) if self._worked_on(scene.prompt())}
            os.kill(self.site.engine.pid, signal.SIGKILL)

    def _worked_on(self, prompt: str) -> bool:
        handle = self.site.engine.asked.get(prompt)
        return bool(handle and handle.in_engine and not handle.ended and self.site.engine.with_prompt(prompt))

    def sample(self, read: list[tuple[int, int]]) -> set[tuple[int, int]]:
        """Some of these pictures, by request and output, that are to be compared though they can be read."""
        chosen = set(self.rng.sample(read, math.ceil(COMPARED * len(read))))
        twice = [one for one in read if request_for(self.scenes[one[0]], one[0])["n"] > 1]
        killed = [one for one in read if one[0] in self.killed]
        for some in (twice, killed):
            assert some
            chosen.update(self.rng.sample(some, min(OF_EACH, len(some))))
        return chosen


async def test_every_picture_is_its_own(
    size: Callable[[int, int], int], note: Callable[[Finding], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checker reads every picture; where it can't, and in a sample, the picture must be the one drawn alone."""
    count, kills = size(24, 2000), size(1, 20)
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, str(Path(__file__).with_name("cramped.py"))))
    async with inside(CONFIG) as site:
        storm = Storm(site, different_scenes(count), kills)
        await storm.blow()
        refused = {i: answer for i, answer in storm.answers.items() if answer.status_code != 200}
        assert {answer.json()["error"]["code"] for answer in refused.values()} <= {"engine_died"}
        assert len(refused) <= kills // 2  # who was killed twice
        assert site.engine.restarts >= kills
        limit = await site.metric("step_token_limit")
        assert limit < 16 * 64  # it has been out of memory
        answered = sorted(storm.answers.keys() - refused.keys())
        drawn = {(i, output): one for i in answered for output, one in enumerate(pictures(storm.answers[i]))}
        read = [(i, output) for (i, output), one in drawn.items() if matches(one, storm.scenes[i])]
        unread, compared = drawn.keys() - set(read), storm.sample(read)
        assert len(unread) < UNREAD * len(drawn)
        assert len(compared) >= 6
        different = {one: await difference_from_solo(site, drawn[one], storm.scenes[one[0]], *one)
                     for one in sorted(unread | compared)}  # fmt: skip
        worst = max(different.values())
        assert worst <= 1, different
    note(
        Finding(
            8, "ownership", f"{count:,} requests of the bundled model, {CONCURRENT} at once",
            f"{storm.cancelled} cancelled, {kills} kills, steps out of memory",
            f"{len(read):,} pictures read as theirs; {len(compared)} of them and {len(unread)} not readable within "
            f"{worst} of 255 of the solo run; {len(refused)} got 503",
        )
    )  # fmt: skip


async def difference_from_solo(site: Inside, picture: Image.Image, scene: Scene, index: int, output: int) -> int:
    """How far a picture is from the same one drawn by itself, in 255ths."""
    asked = request_for(scene, index)
    [alone] = pictures(await site.generate(**asked | {"n": 1, "seed": asked["seed"] + output}))
    return int(np.abs(np.asarray(alone).astype(int) - np.asarray(picture)).max())
