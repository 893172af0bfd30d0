"""The model that comes with the package: what it was trained on, its language, a burst of requests to show it."""

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "shapes"
