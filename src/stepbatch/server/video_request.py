"""``POST /v1/videos``: fields, and perhaps an image, as what they ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stepbatch.config import LimitsConfig
from stepbatch.duration import frames_in, parse_seconds
from stepbatch.errors import InvalidValue, RequestError
from stepbatch.image import InputImage
from stepbatch.image_files import read_picture
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest
from stepbatch.server.body import Share
from stepbatch.server.fields import GENERATIONS, USUALLY_IDLE, VIDEOS
from stepbatch.server.forms import FormLimits
from stepbatch.server.schema import USUAL_LIMITS, blame_size, check_known, generation_of, has_size, known_fields

REFERENCE = "input_reference"


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """What a body asked for."""

    generation: GenerationRequest
    ignored: tuple[str, ...]  # fields that were given and have no effect
    has_size: bool  # width and height came as size
    has_seconds: bool  # num_frames came as seconds

    def blame(self, error: RequestError) -> RequestError:
        """The same error, naming the field that the caller gave."""
        if error.param == "images":
            hint = "" if self.generation.images else f"; upload it as {REFERENCE}"
            return type(error)(error.message + hint, REFERENCE)
        if error.param == "num_frames" and self.has_seconds:
            return type(error)(error.message, "seconds")
        return blame_size(error, self.generation, self.has_size)


def form_limits(limits: LimitsConfig) -> FormLimits:
    """What a form may bring."""
    return FormLimits(
        body_bytes=limits.max_upload_bytes,
        text_bytes=limits.max_body_bytes,
        file_bytes=limits.max_image_bytes,
        parts=limits.max_form_parts,
        files={REFERENCE: 1},
        check_name=_check_name,
    )


def parse_video(
    values: Mapping[str, Any],
    info: ModelInfo,
    idle: Collection[str] = USUALLY_IDLE,
    limits: LimitsConfig = USUAL_LIMITS,
) -> VideoRequest:
    """Turn fields into what they ask for, as ``parse`` does. Null counts as absent.

    Raises:
        UnknownParameter: a field that is neither read nor on a list of ignored ones.
        ModelNotFound: another model than the served one.
        InvalidValue: a value of the wrong type, out of range or not served; ``param`` names the field.
    """
    given, ignored = known_fields(values, info, VIDEOS, idle)
    if not info.makes_videos:
        raise InvalidValue(f"the model makes pictures; ask for them at {GENERATIONS}", "model")
    if REFERENCE in given:
        raise _not_uploaded()
    seconds = parse_seconds(given["seconds"]) if "seconds" in given else None
    generation = generation_of(given, idle, limits)
    return VideoRequest(
        generation=generation if seconds is None else _lasting(generation, seconds, info),
        ignored=tuple(ignored),
        has_size=has_size(given),
        has_seconds=seconds is not None and generation.num_frames is None,
    )


def check_before_decoding(wanted: VideoRequest, info: ModelInfo) -> None:
    """Refuse what no image could make right, before it costs time: a tiny one takes its place.

    Raises:
        InvalidValue: the request can't be served.
    """
    width = wanted.generation.width or info.defaults.width  # an automatic one is the image's own affair
    height = wanted.generation.height or info.defaults.height
    tried = replace(wanted.generation, width=width, height=height, images=(InputImage(1, 1, bytes(3)),))
    try:
        tried.resolve(info)
    except InvalidValue as error:
        raise replace(wanted, generation=tried).blame(error) from None


def with_image(wanted: VideoRequest, data: bytes, max_pixels: int, share: Share) -> VideoRequest:
    """The same with an image for its first frame. This decodes it, which takes its time.

    Raises:
        InvalidValue: the file can't be read.
        Overloaded, PayloadTooLarge: there is no room for it.
    """
    image = read_picture(data, max_pixels, REFERENCE, REFERENCE).on_white()
    share.take(len(image.pixels))
    return replace(wanted, generation=replace(wanted.generation, images=(image,)))


def _lasting(generation: GenerationRequest, seconds: float, info: ModelInfo) -> GenerationRequest:
    fps = generation.fps or info.defaults.fps
    assert fps is not None
    frames = frames_in(seconds, fps, info)
    if generation.num_frames not in (None, frames):
        at = f"{seconds:g} seconds at {fps} frames a second are {frames} frames"
        raise InvalidValue(f"seconds disagrees with num_frames, so give one or the other: {at}", "seconds")
    return replace(generation, num_frames=frames)


def _check_name(name: str) -> None:
    if name.split("[")[0] == REFERENCE:  # an object's fields, as OpenAI's client writes them in a form
        raise _not_uploaded()
    check_known(name, VIDEOS)


def _not_uploaded() -> InvalidValue:
    way = "upload it as a file, in multipart/form-data"
    return InvalidValue(f"{REFERENCE} can't be an address, a file's id or base64: {way}", REFERENCE)
