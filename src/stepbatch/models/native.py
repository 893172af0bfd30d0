"""The models that run natively, and how the right one is found."""

from __future__ import annotations

import msgspec

from stepbatch.config import EngineConfig
from stepbatch.errors import InvalidValue, NotNative, OptionError
from stepbatch.image import InputImage
from stepbatch.models.base import Model
from stepbatch.models.checkpoint import find_checkpoint, read_index
from stepbatch.models.flux import Flux, FluxKontext
from stepbatch.models.qwen_image import QwenImage
from stepbatch.models.qwen_image_edit import QwenImageEdit, QwenImageEditPlus
from stepbatch.models.sizing import sizing_of
from stepbatch.models.wan import Wan
from stepbatch.models.z_image import ZImage
from stepbatch.request import GenerationRequest

NATIVE: dict[str, type[Model]] = {  # the pipeline's class in model_index.json
    "FluxImg2ImgPipeline": Flux,
    "FluxInpaintPipeline": Flux,
    "FluxKontextPipeline": FluxKontext,
    "FluxPipeline": Flux,
    "QwenImageEditPipeline": QwenImageEdit,
    "QwenImageEditPlusPipeline": QwenImageEditPlus,
    "QwenImageImg2ImgPipeline": QwenImage,
    "QwenImageInpaintPipeline": QwenImage,
    "QwenImagePipeline": QwenImage,
    "WanPipeline": Wan,
    "ZImageImg2ImgPipeline": ZImage,
    "ZImageInpaintPipeline": ZImage,
    "ZImagePipeline": ZImage,
}


def load_model(config: EngineConfig) -> Model:
    """Load the checkpoint at ``config.model.model_path``.

    Raises:
        CheckpointError: it is missing, incomplete or pickled.
        NotNative: its pipeline has no native model.
        OptionError: the device or a default is not to be had.
    """
    folder = find_checkpoint(config.model)
    pipeline = read_index(folder, weights=config.model.load_format != "dummy")["_class_name"]
    if pipeline not in NATIVE:
        raise NotNative(f"{config.model.model_path} is a {pipeline}, which has no native model")
    model = NATIVE[pipeline](config, folder)
    _check_defaults(model)
    model.info = msgspec.structs.replace(model.info, sizing=sizing_of(model))
    return model


def _check_defaults(model: Model) -> None:
    """Raise ``OptionError`` if a request that says nothing could not be served."""
    info = model.info
    from_text = {"text-to-image", "text-to-video"}.intersection(info.tasks)
    images = () if from_text else (InputImage(64, 64, bytes(3 * 64 * 64)),)
    names = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "negative_prompt", "num_frames", "fps")
    values = {name: getattr(info.defaults, name) for name in names}
    try:
        model.check(GenerationRequest(prompt="any", images=images, **values).resolve(info))
    except InvalidValue as error:
        raise OptionError(f"the default {error.message}") from error
