"""How well the bundled model draws: ``python -m stepbatch.demo.score``, read back by the checker."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.demo import MODEL_PATH
from stepbatch.demo.checker import mismatch
from stepbatch.demo.scenes import Scene, sample_scene
from stepbatch.engine.local import load_engine
from stepbatch.request import GenerationRequest

SIDES = range(128, 257, 16)  # pixels


def unseen(count: int, seed: int) -> Iterator[tuple[Scene, GenerationRequest]]:
    """Random scenes, singles and pairs by turns, each with a request of random size and from 6 to 20 steps."""
    rng = random.Random(f"score {seed}")
    for i in range(count):
        scene = sample_scene(rng, pairs=i % 2)
        yield (
            scene,
            GenerationRequest(
                prompt=scene.prompt(),
                width=rng.choice(SIDES),
                height=rng.choice(SIDES),
                num_inference_steps=rng.randint(6, 20),
                seed=rng.randrange(2**32),
            ),
        )


def main() -> None:
    """Draw, read back and print the share that is right, singles and pairs apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, default=MODEL_PATH)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--output", type=Path, help="a folder for the pictures that are wrong")
    options = parser.parse_args()
    engine = load_engine(
        EngineConfig(model=ModelConfig(model_path=str(options.model_path))),
    )
    right, drawn = Counter[str](), Counter[str]()
    for scene, request in unseen(options.count, options.seed):
        if options.guidance_scale is not None:
            request = GenerationRequest(
                **{f: getattr(request, f) for f in ("prompt", "width", "height", "num_inference_steps", "seed")},
                guidance_scale=options.guidance_scale,
            )
        output = engine.generate([request])[0][0]
        image = Image.frombytes("RGB", (output.width, output.height), output.pixels)
        kind = "pairs" if scene.relation else "singles"
        wrong = mismatch(image, scene)
        drawn[kind] += 1
        right[kind] += not wrong
        if wrong:
            print(f"{scene.prompt()} ({output.width}x{output.height}, {request.num_inference_steps} steps): {wrong}")
            if options.output:
                options.output.mkdir(parents=True, exist_ok=True)
                image.save(options.output / f"{scene.prompt()}.png")
    for kind in sorted(drawn):
        print(f"{kind}: {right[kind]} of {drawn[kind]} right")


if __name__ == "__main__":
    main()
