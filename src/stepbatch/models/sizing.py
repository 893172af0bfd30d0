"""How long a model's sequences are, found out by asking it, for those who have no tokenizer."""

from __future__ import annotations

import msgspec

from stepbatch.image import InputImage
from stepbatch.model_info import Sizing
from stepbatch.models.base import Model
from stepbatch.request import GenerationRequest

SAMPLE = "a small red star above a large blue circle on a white background, in the light of an early morning"
REPEATED = 4  # how often, in the longer of two prompts


def sizing_of(model: Model) -> Sizing:
    """What ``info`` says of the lengths of a model's sequences."""
    info, space = model.info, model.space
    image = (InputImage(64, 64, bytes(3 * 64 * 64)),) if "editing" in info.tasks else ()
    width, height = info.defaults.width, info.defaults.height
    request = GenerationRequest(prompt=SAMPLE, images=image, width=width, height=height).resolve(info)
    short, long = (model.prompt(text, request) for text in (SAMPLE, SAMPLE * REPEATED))
    longest = 0 < short.length == long.length
    prompt = character = 0.0
    if short.length and not longest:
        tokens = model.prompt_tokens(short)
        character = (model.prompt_tokens(long) - tokens) / (len(SAMPLE) * (REPEATED - 1))
        prompt = tokens - character * len(SAMPLE)
    sizing = Sizing(
        token=space.token,
        frame=space.frame,
        multiple=model.FILLED_UP_TO,
        prompt=prompt,
        character=character,
        longest=longest,
    )
    if not image:
        return sizing
    assert request.max_sequence_length is not None
    rest = sizing.picture(*request.size, request.frames) + sizing.text(SAMPLE, request.max_sequence_length)
    return msgspec.structs.replace(sizing, image=model.length(request, short) - rest)
