"""What of diffusers' pipelines can't be read from their call signatures, by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline

Kind = Literal["text", "images", "strength", "mask"]  # of a request: what it brings beside its prompt


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """One pipeline's exceptions.

    ``each``: every prompt of a call can have its own image. Otherwise a call with images is for one request.
    ``many``: a request may bring several images.
    ``also_text``: the image may be left out.
    ``alone``: every call is for one request, as what it draws depends on company.
    ``pads``: prompts are padded to the longest of the call, and it isn't sure that no pad is seen, so that only prompts
    of as many tokens may share one.
    ``chat``: the prompt is put in the tokenizer's chat template.
    ``before``: what stands in front of the prompt, with the pipeline's attributes filled in; its tokens count.
    ``longest``: how many tokens are kept of a text, where neither its tokenizer nor the call says so.
    ``guidance_off``: up to this there is no guidance.
    ``channels``: how many the transformer must have.
    ``fps``: what its videos are meant to be played at, where its call doesn't say; ``num_frames`` likewise.
    ``frames_multiple``: where it makes fewer lengths of videos than its VAE's factor says.
    """

    each: bool = False
    many: bool = False
    also_text: bool = False
    alone: bool = False
    pads: bool = False
    chat: bool = False
    before: str = ""
    longest: int | None = None
    guidance_off: float = 1.0
    channels: tuple[int, ...] = ()
    fps: int = 16
    num_frames: int | None = None
    frames_multiple: int | None = None


QUIRKS: dict[str, Quirks] = {
    "AllegroPipeline": Quirks(fps=15, num_frames=88),
    "AnimateDiffPipeline": Quirks(fps=8),
    "AnimateDiffSDXLPipeline": Quirks(fps=8),
    "BriaFibo2Pipeline": Quirks(pads=True, many=True, also_text=True),
    "BriaFiboPipeline": Quirks(pads=True),
    "CogVideoXImageToVideoPipeline": Quirks(each=True, fps=8, num_frames=49, frames_multiple=8),
    "CogVideoXPipeline": Quirks(fps=8, num_frames=49, frames_multiple=8),
    "CogView4ControlPipeline": Quirks(pads=True),
    "CogView4Pipeline": Quirks(pads=True),
    "Cosmos2_5_PredictBasePipeline": Quirks(also_text=True),
    "Cosmos3OmniPipeline": Quirks(also_text=True),
    "DreamLiteMobilePipeline": Quirks(pads=True, also_text=True),
    "DreamLitePipeline": Quirks(pads=True, also_text=True),
    "Flux2KleinKVPipeline": Quirks(many=True, also_text=True),
    "Flux2KleinPipeline": Quirks(many=True, also_text=True),
    "Flux2Pipeline": Quirks(many=True, also_text=True),
    "FluxKontextPipeline": Quirks(also_text=True),
    "GlmImagePipeline": Quirks(pads=True, many=True, also_text=True),
    "HeliosPipeline": Quirks(also_text=True),
    "HeliosPyramidPipeline": Quirks(also_text=True),
    "HunyuanDiTPAGPipeline": Quirks(longest=256),
    "HunyuanDiTPipeline": Quirks(longest=256),
    "HunyuanVideoImageToVideoPipeline": Quirks(fps=24),
    "HunyuanVideoPipeline": Quirks(fps=24),
    "IFPipeline": Quirks(longest=77),
    "Kandinsky3Img2ImgPipeline": Quirks(longest=128),
    "Kandinsky3Pipeline": Quirks(longest=128),
    "Kandinsky5T2IPipeline": Quirks(pads=True),
    "Kandinsky5T2VPipeline": Quirks(pads=True, fps=24),
    "Kandinsky6TI2VAPipeline": Quirks(also_text=True),
    "LattePipeline": Quirks(alone=True, longest=120, fps=8),
    "LongCatImageEditPipeline": Quirks(longest=512),
    "LongCatImagePipeline": Quirks(longest=512),
    "LTXConditionPipeline": Quirks(also_text=True),
    "LTXImageToVideoPipeline": Quirks(each=True),
    "Lumina2Pipeline": Quirks(before="{system_prompt} <Prompt Start> "),
    "MochiPipeline": Quirks(fps=30),
    "NucleusMoEImagePipeline": Quirks(pads=True),
    "QwenImage21Pipeline": Quirks(many=True, also_text=True),
    "QwenImageEditPlusPipeline": Quirks(many=True),
    "StableDiffusion3InpaintPipeline": Quirks(channels=(16, 33)),
    "StableDiffusionInstructPix2PixPipeline": Quirks(each=True),
    "StableDiffusionXLInstructPix2PixPipeline": Quirks(each=True),
    "StableVideoDiffusionPipeline": Quirks(num_frames=25),
    "ZImageImg2ImgPipeline": Quirks(chat=True, guidance_off=0.0),
    "ZImageInpaintPipeline": Quirks(chat=True, guidance_off=0.0),
    "ZImageOmniPipeline": Quirks(chat=True, guidance_off=0.0, many=True, also_text=True),
    "ZImagePipeline": Quirks(chat=True, guidance_off=0.0),
}

NAMED: dict[str, dict[str, Any]] = {  # checkpoints that the defaults of their pipeline's call are not meant for
    "flux.1-schnell": {"num_inference_steps": 4, "max_sequence_length": 256},
    "flux.1-kontext-dev": {"guidance_scale": 2.5},
    "qwen-image-edit-2509": {"num_inference_steps": 40},
    "qwen-image-edit-2511": {"num_inference_steps": 40},
    "sd-turbo": {"num_inference_steps": 1, "guidance_scale": 0.0},
    "sdxl-turbo": {"num_inference_steps": 1, "guidance_scale": 0.0, "width": 512, "height": 512},
    "stable-diffusion-3.5-large-turbo": {"num_inference_steps": 4, "guidance_scale": 0.0},
    "z-image-turbo": {"num_inference_steps": 9, "guidance_scale": 0.0},
}

# By class and setting of its own: checkpoints with that setting, which the call's defaults are not meant for either.
CONFIGURED: dict[str, dict[str, dict[str, Any]]] = {
    "WanImageToVideoPipeline": {"expand_timesteps": {"fps": 24}},
    "WanPipeline": {
        "boundary_ratio": {"num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
        "expand_timesteps": {"fps": 24},
    },
}

FRAMES = ("num_frames", "frames", "video_length")  # what calls name the same thing
RATES = ("frame_rate", "fps")
FIXED: dict[str, Any] = {"use_resolution_binning": False}  # of any call: not another size than what is asked for

BROUGHT = ("prompt", "image", "mask_image")  # what calls may want that has no default
# Calls with these, which have defaults, are for what requests can't bring, or make no pictures.
UNSERVED = (
    "audio_duration_s", "conditioning_frames", "control_image", "control_video", "noise_level",
    "num_waveforms_per_prompt",
)  # fmt: skip

RELATED: tuple[tuple[str, ...], ...] = (  # that can work with the same parts, where diffusers' own lists are silent
    ("LTXPipeline", "LTXImageToVideoPipeline"),
    ("LTX2Pipeline", "LTX2ImageToVideoPipeline"),
)


def siblings(own: type[DiffusionPipeline]) -> list[str]:
    """Classes that may work with the same parts for other kinds of requests, ``own`` left out."""
    families = [
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    ]
    keys = [key for family in families for key, cls in family.items() if cls is own]
    found = [family[key].__name__ for key in keys[:1] for family in families if key in family]
    found += [name for group in RELATED if own.__name__ in group for name in group]
    return [name for name in dict.fromkeys(found) if name != own.__name__]
