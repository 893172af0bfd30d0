"""``POST /v1/images/edits``: a form with files as what it asks for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

from stepbatch.config import LimitsConfig
from stepbatch.errors import InvalidValue
from stepbatch.image import InputImage
from stepbatch.image_files import read_picture
from stepbatch.model_info import ModelInfo
from stepbatch.server.body import Share
from stepbatch.server.fields import EDITS, USUALLY_IDLE
from stepbatch.server.forms import Form, FormLimits
from stepbatch.server.schema import USUAL_LIMITS, ImageRequest, check_known, from_texts, parse


def form_limits(limits: LimitsConfig, info: ModelInfo) -> FormLimits:
    """What an edit may bring."""
    return FormLimits(
        body_bytes=limits.max_upload_bytes,
        text_bytes=limits.max_body_bytes,
        file_bytes=limits.max_image_bytes,
        parts=limits.max_form_parts,
        files={"image": info.max_images, "mask": 1},
        check_name=partial(check_known, route=EDITS),
    )


def parse_edit(
    form: Form, info: ModelInfo, idle: Collection[str] = USUALLY_IDLE, limits: LimitsConfig = USUAL_LIMITS
) -> tuple[ImageRequest, float | None]:
    """What a form's texts ask for, as ``parse`` has it, and the strength, which goes with the images.

    Raises:
        RequestError: as ``parse`` does; or there is no image.
    """
    values = from_texts(form.texts)
    strength = values.pop("strength", None)
    wanted = parse(values, info, idle, limits)
    if "image" not in form.files:
        raise InvalidValue("image is required: upload a file, or several", "image")
    return wanted, strength


def check_before_decoding(wanted: ImageRequest, strength: float | None, form: Form, info: ModelInfo) -> None:
    """Refuse what no picture could make right, before any of them costs time: tiny ones take their places.

    Raises:
        InvalidValue: the request can't be served.
    """
    width = wanted.generation.width or info.defaults.width  # an automatic one is the images' own affair
    height = wanted.generation.height or info.defaults.height
    masked = "mask" in form.files or (strength is None and _may_be_its_own_mask(form, info))
    try:
        images = (InputImage(1, 1, bytes(3)),) * len(form.files["image"])
        mask = InputImage(1, 1, bytes(1)) if masked else None
        tried = replace(wanted.generation, width=width, height=height, images=images, mask=mask, strength=strength)
        tried.resolve(info)
    except InvalidValue as error:
        raise wanted.blame(error) from None


def _may_be_its_own_mask(form: Form, info: ModelInfo) -> bool:
    """Whether an image's holes say what to fill, as with OpenAI's DALL-E 2: where nothing else can be done with it."""
    return len(form.files["image"]) == 1 and "inpainting" in info.tasks and "editing" not in info.tasks


def with_images(
    wanted: ImageRequest, strength: float | None, form: Form, info: ModelInfo, max_pixels: int, share: Share
) -> ImageRequest:
    """The same with the form's images and mask. This decodes them, which takes its time.

    Raises:
        InvalidValue: a file can't be read, or they don't go together.
        Overloaded, PayloadTooLarge: there is no room for them.
    """
    files = form.files["image"]
    images, mask = [], None
    for number, data in enumerate(files, start=1):
        picture = read_picture(data, max_pixels, f"image {number}" if len(files) > 1 else "image", "image")
        images.append(picture.on_white())
        share.take(len(images[-1].pixels))
    if "mask" in form.files:
        mask = read_picture(form.files["mask"][0], max_pixels, "mask", "mask").as_mask()
    elif strength is None and _may_be_its_own_mask(form, info):
        mask = picture.as_mask() if picture.has_holes else None
    share.take(len(mask.pixels) if mask else 0)
    try:
        generation = replace(wanted.generation, images=tuple(images), mask=mask, strength=strength)
    except InvalidValue as error:
        raise wanted.blame(error) from None
    return replace(wanted, generation=generation)
