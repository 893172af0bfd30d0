"""Serve diffusion models with requests that share every denoising step.

What is exported here is imported on first use, so that ``import stepbatch`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepbatch.config import BatchingConfig, DefaultsConfig, EngineConfig, ModelConfig, ServerConfig
    from stepbatch.engine.client import AsyncEngine
    from stepbatch.engine.engine import Engine
    from stepbatch.engine.local import load_engine
    from stepbatch.engine.messages import Output
    from stepbatch.errors import RequestError, SetupError, StepbatchError
    from stepbatch.image import InputImage
    from stepbatch.request import GenerationRequest

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine",
    "BatchingConfig",
    "DefaultsConfig",
    "Engine",
    "EngineConfig",
    "GenerationRequest",
    "InputImage",
    "ModelConfig",
    "Output",
    "RequestError",
    "ServerConfig",
    "SetupError",
    "StepbatchError",
    "__version__",
    "load_engine",
]

_MODULES = {
    "AsyncEngine": "engine.client",
    "BatchingConfig": "config",
    "DefaultsConfig": "config",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "GenerationRequest": "request",
    "InputImage": "image",
    "ModelConfig": "config",
    "Output": "engine.messages",
    "RequestError": "errors",
    "ServerConfig": "config",
    "SetupError": "errors",
    "StepbatchError": "errors",
    "load_engine": "engine.local",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
