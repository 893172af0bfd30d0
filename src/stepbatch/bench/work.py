"""The requests of a run: what each asks for, and, in a trace, when."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Task = Literal["text-to-image", "image-to-image", "text-to-video", "image-to-video"]


class ImageFile(msgspec.Struct, frozen=True):
    """An image that goes with a request."""

    name: str
    data: bytes
    digest: str  # SHA-256 of the data, hex


class WorkItem(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a run."""

    prompt: str
    task: Task = "text-to-image"
    width: int | None = None  # pixels
    height: int | None = None  # pixels
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    n: int = 1
    seed: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    images: tuple[ImageFile, ...] = ()
    extra: dict[str, Any] = {}  # laid over the body
    timestamp: float | None = None  # of a trace: seconds after the start
    slo_ms: float | None = None  # of a trace: what is asked of its latency

    @property
    def is_video(self) -> bool:
        return self.task.endswith("video")

    def asked(self) -> dict[str, Any]:
        """What was asked for, for the record: images by digest, nothing that wasn't given."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__ if name != "images"}
        given = {name: value for name, value in fields.items() if value not in (None, {})}
        return given | ({"images": [image.digest for image in self.images]} if self.images else {})
