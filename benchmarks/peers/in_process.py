"""The pipeline in this process, without a server: what one that batches whole calls could serve at most.

Run with: python benchmarks/peers/in_process.py --model-path DIR --requests FILE

All requests are there at once, so every call is as full as it can be: those of one signature, 8 at a time. Pictures are
compressed and put in answers, as the servers do. Prints the seconds that it took, as JSON.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from shared import MAX_PICTURES, Body, answer, arguments, draw, groups, load


def main() -> None:
    """Draw all, after a first call that is not counted."""
    options = arguments(__doc__, "--requests")
    bodies = [Body.model_validate_json(line) for line in Path(options.requests).read_text().splitlines()]
    calls = [[bodies[index] for index in group] for group in groups(bodies)]
    pipeline = load(options.model_path, options.num_threads)
    draw(pipeline, calls[0][:MAX_PICTURES])
    began = time.perf_counter()
    sizes = [len(answer(pictures)) for call in calls for pictures in draw(pipeline, call)]
    print(json.dumps({"seconds": time.perf_counter() - began, "answers": len(sizes)}))


if __name__ == "__main__":
    main()
