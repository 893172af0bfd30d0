"""Whoever asks gets the picture that was asked for, whatever else is being drawn."""

import asyncio
import random

import numpy as np
import pytest
from PIL import Image

from stepbatch import AsyncEngine, EngineConfig, GenerationRequest
from stepbatch.config import BatchingConfig
from stepbatch.demo.checker import matches
from stepbatch.demo.scenes import Scene, sample_scene
from stepbatch.engine.messages import Output

pytestmark = pytest.mark.anyio

CONCURRENT = 100


def different_scenes(count: int) -> list[Scene]:
    rng = random.Random("ownership")
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, pairs=0.2)
        scenes.setdefault(scene.prompt(), scene)
    return list(scenes.values())


def request_for(scene: Scene, index: int) -> GenerationRequest:
    """Of three sizes and three numbers of steps, and one in seven guided: as few steps as can still be read."""
    width, height = [(128, 128), (144, 128), (128, 144)][index % 3]
    steps, guidance = 2 + index // 3 % 3, 0.0 if index % 7 else 1.5
    return GenerationRequest(
        prompt=scene.prompt(), width=width, height=height, num_inference_steps=steps, guidance_scale=guidance,
        seed=index,
    )  # fmt: skip


def image_of(output: Output) -> Image.Image:
    return Image.frombytes("RGB", (output.width, output.height), output.pixels)


async def draw(engine: AsyncEngine, request: GenerationRequest) -> Output:
    [output] = await engine.submit(request).outputs()
    return output


async def test_100_concurrent_requests_each_get_their_own_picture() -> None:
    """The checker reads every picture; where it can't, the picture must be the one drawn alone."""
    scenes = different_scenes(CONCURRENT)
    engine = AsyncEngine(EngineConfig(batching=BatchingConfig(dynamic_batch_max_size=16)))
    await engine.start()
    try:
        requests = [request_for(scene, i) for i, scene in enumerate(scenes)]
        outputs = await asyncio.gather(*(draw(engine, request) for request in requests))
        unread = [i for i, output in enumerate(outputs) if not matches(image_of(output), scenes[i])]
        assert len(unread) < 0.2 * CONCURRENT  # few steps at a small size: not what the model draws best
        for i in unread:
            alone = np.frombuffer((await draw(engine, requests[i])).pixels, np.uint8).astype(int)
            assert np.abs(alone - np.frombuffer(outputs[i].pixels, np.uint8)).max() <= 1
    finally:
        await engine.stop()
