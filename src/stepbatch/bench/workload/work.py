"""The requests of a run: what each asks for, and, in a trace, when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from stepbatch.bench.options import DatasetOptions, LoadOptions, RequestOptions
from stepbatch.bench.workload.datasets import read
from stepbatch.bench.workload.entries import Entry, Task
from stepbatch.bench.workload.files import parse_json
from stepbatch.bench.workload.inputs import ImageFile, Inputs
from stepbatch.bench.workload.profiles import draw, read_profiles
from stepbatch.errors import OptionError

__all__ = ["ImageFile", "Task", "WorkItem", "build", "digest"]

FLAGS = ("width", "height", "num_inference_steps", "guidance_scale", "num_frames", "fps")


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


def build(dataset: DatasetOptions, wanted: RequestOptions) -> list[WorkItem]:
    """The requests that the flags ask for: the same ones every time.

    What a dataset says gives way to the flags, and these to a profile that is drawn for the request. Two flags always
    have a value, so that it is the dataset's that holds: its task, and its number of outputs unless ``--n`` is over 1.
    A dataset that begins anew goes on in time, too: a trace's next round comes one mean gap after its last request.
    Where a task takes images and the dataset has none, they are made up; where the dataset has one and names no task,
    the task takes it.

    Raises:
        OptionError: a flag, a file or a line of it says what can't be; the message names it.
    """
    if (wanted.width is None) != (wanted.height is None):
        raise OptionError("--width and --height go together")
    flags = {name: value for name in FLAGS if (value := getattr(wanted, name)) is not None}
    flags |= {"n": wanted.n} if wanted.n > 1 else {}
    extra, profiles = _extra_body(wanted.extra_body), read_profiles(wanted.random_request_config)
    entries = read(dataset, wanted.task)
    count = dataset.num_prompts or len(entries)
    drawn = [profile.fields for profile in draw(profiles, count, dataset.seed or 0)] if profiles else [{}] * count
    inputs = Inputs()
    items = []
    for index, (entry, profile) in enumerate(zip(_rounds(entries, count), drawn, strict=True)):
        seed = {} if dataset.seed is None else {"seed": dataset.seed + index}
        fields = {**entry.said(), **seed, **flags, **profile}
        fields.setdefault("task", wanted.task.replace("text", "image") if "images" in fields else wanted.task)
        fields["extra"] = {**entry.extra, **profile.get("extra", {}), **extra}
        items.append(_item(index, fields, inputs))
    return items


def _extra_body(text: str) -> dict[str, Any]:
    value = parse_json(text, "--extra-body", is_file=False) if text else {}
    if not isinstance(value, dict):
        raise OptionError(f"--extra-body must be a JSON object, not {value!r:.80}")
    return value


def _rounds(entries: Sequence[Entry], count: int) -> list[Entry]:
    """So many entries, from the first again after the last."""
    last = entries[-1].timestamp
    period = 0.0 if last is None or len(entries) == 1 else last * len(entries) / (len(entries) - 1)
    found = []
    for index in range(count):
        entry = entries[index % len(entries)]
        if entry.timestamp is not None:
            later = entry.timestamp + period * (index // len(entries))
            entry = msgspec.structs.replace(entry, timestamp=later)
        found.append(entry)
    return found


def _item(index: int, fields: dict[str, Any], inputs: Inputs) -> WorkItem:
    paths = fields.pop("images", ())
    if not fields["task"].endswith("video"):
        fields.pop("num_frames", None)
        fields.pop("fps", None)
    if fields["task"].startswith("image"):
        files = [inputs.read(Path(path)) for path in paths]
        fields["images"] = tuple(files) or (inputs.make(index, fields.get("width"), fields.get("height")),)
    return WorkItem(**fields)


def digest(items: Sequence[WorkItem], load: LoadOptions) -> dict[str, str]:
    """What tells whether two runs did the same work: a digest of each part of it, and of ``all``.

    Goals of latency and warm-up are no part of it.
    """
    parts = {
        "prompts": [item.prompt for item in items],
        "sizes": [(item.width, item.height, item.num_frames, item.fps) for item in items],
        "steps": [item.num_inference_steps for item in items],
        "guidance": [item.guidance_scale for item in items],
        "outputs": [item.n for item in items],
        "tasks": [item.task for item in items],
        "images": [[image.digest for image in item.images] for item in items],
        "seeds": [item.seed for item in items],
        "extra": [item.extra for item in items],
        "load": [_load(load), *(item.timestamp for item in items)],
    }
    digests = {name: _digest(part) for name, part in parts.items()}
    return {**digests, "all": _digest(digests)}


def _load(load: LoadOptions) -> tuple[float, float, int]:
    return load.request_rate, load.burstiness, load.max_concurrency


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
