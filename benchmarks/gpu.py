"""Everything there is to measure on a GPU, in nine minutes, from a checkout.

Run with: python benchmarks/gpu.py [--parts NAME ...] [--models NAME ...] [--budget-seconds N] [--output FOLDER]

What each part measures:
  card     the device's own ceilings: copies, multiplications, attention
  steps    milliseconds a step at several sizes and widths, beside diffusers' transformer with the same weights, eager
           and compiled; how far the predictions are apart; seconds an image, stage by stage; what a server finds at
           its start: how many pictures share a step, and whether decoding goes on beside steps
  burst    64 requests to a server, 4 and 12 at a time, with batching and without
  offload  steps with the transformer's blocks in the CPU's memory, with 1 and 8 pictures in flight

Models are full-size, with random weights that are made on the device, so nothing is downloaded. The package need not be
installed, but what it builds on must be: torch, diffusers, transformers, accelerate, safetensors, tokenizers,
huggingface-hub, numpy, pillow, msgspec and rich; for burst also fastapi, starlette, uvicorn, h11, pyzmq,
prometheus-client, python-multipart and aiohttp.

Each part of each model runs in a process of its own, within its share of the time that is left, and what it measures is
in the folder at once, so that what goes wrong or is cut short costs nothing else. With --device cpu --quick all of it
runs without a GPU in a minute or two, with small models, to see that it does.
"""

import os
import sys
import time
from pathlib import Path

BEGAN = time.monotonic()  # before what takes long to import

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here.parent / "src"))  # the checkout's, whatever is installed
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:1], str(here), os.environ.get("PYTHONPATH", "")])
    from parts.gpu_run import main

    sys.exit(main(sys.argv[1:], __doc__ or "", BEGAN))
