"""Models, natively and as diffusers' pipelines. Each is imported where it is asked for: together they take seconds."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it says at import which image processors it can't have
