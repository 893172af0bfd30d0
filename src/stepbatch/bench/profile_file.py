"""A model's costs on a machine as a file: what ``stepbatch profile`` writes and ``stepbatch bench simulate`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from stepbatch.engine.cost import Costs
from stepbatch.engine.measured import StepPoint
from stepbatch.errors import SetupError
from stepbatch.model_info import ModelInfo

__all__ = ["ProfileFile", "StepPoint", "read_profile"]


class ProfileFile(msgspec.Struct, frozen=True, kw_only=True):
    """What steps and the rest cost, where that was measured, and how."""

    name: str  # of the model
    costs: Costs
    model: ModelInfo  # what it said of itself: defaults, guidance, how long sequences are
    device: str = ""
    dtype: str = ""
    environment: dict[str, Any] = {}
    points: list[StepPoint] = []


def read_profile(path: Path) -> ProfileFile:
    """Read a profile.

    Raises:
        SetupError: it can't be read, or is no profile.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=ProfileFile)
    except OSError as error:
        raise SetupError(f"can't read {path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise SetupError(f"{path} is no profile: {error}") from error
