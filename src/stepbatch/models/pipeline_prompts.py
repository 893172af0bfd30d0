"""How many tokens a pipeline's tokenizers make of a prompt, and how many it would keep."""

from __future__ import annotations

from typing import Any

from stepbatch.errors import InvalidValue
from stepbatch.models.pipeline_calls import Call
from stepbatch.request import GenerationRequest

FEW = 77  # tokens, as CLIP has them, whatever a request asks for
ENDLESS = 100_000  # tokenizers without a limit say a larger number


class Prompts:
    """What a pipeline reads of a request's texts.

    Args:
        call: For texts alone, if there is one.
    """

    def __init__(self, call: Call) -> None:
        own, parts = vars(call.pipeline), call.pipeline.components
        self.adjustable = "max_sequence_length" in call.defaults
        self._tokenizers: dict[str, Any] = {
            name: part
            for name, part in parts.items()
            if "tokenizer" in name and part and parts.get(name.replace("tokenizer", "text_encoder"), True) is not None
        }
        self._chat = call.quirks.chat
        self._longest = call.quirks.longest or ENDLESS + 1
        self._ahead = call.quirks.before.format_map(own)
        template = own.get("prompt_template_encode")
        self._template = template if isinstance(template, str) else ""
        self._before: int = own.get("prompt_template_encode_start_idx", 0)  # tokens of the template that are cut off
        instruction = call.defaults.get("complex_human_instruction")
        self._instruction = "\n".join(instruction) if isinstance(instruction, list) else ""

    def longest(self, request: GenerationRequest) -> tuple[str, int] | None:
        """The tokenizer that keeps most of a prompt, and how many tokens; nothing where it isn't known."""
        limits: dict[str, int] = {}
        for name, tokenizer in self._tokenizers.items():
            limit: int = min(tokenizer.model_max_length, self._longest)
            if limit > FEW and self.adjustable:
                assert request.max_sequence_length is not None
                limit = request.max_sequence_length
            if limit > ENDLESS:
                return None
            limits[name] = limit
        return max(limits.items(), key=lambda item: item[1], default=None)

    def check(self, request: GenerationRequest) -> None:
        """Raise ``InvalidValue`` for a text that would be cut off."""
        longest = self.longest(request)
        if longest is None:
            return
        name, limit = longest
        for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
            count = 0 if text is None else self._count(self._tokenizers[name], text, field == "prompt")
            if count > limit:
                raise InvalidValue(f"{field} has {count} tokens and at most {limit} are allowed", field)

    def lengths(self, request: GenerationRequest) -> tuple[int, ...]:
        """How many tokens each tokenizer makes of each of the request's texts."""
        texts = [(request.prompt, True), (request.negative_prompt, False)]
        return tuple(
            self._count(tokenizer, text, positive)
            for text, positive in texts
            if text is not None
            for tokenizer in self._tokenizers.values()
        )

    def _count(self, tokenizer: Any, text: str, positive: bool) -> int:
        if self._chat:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
        elif self._template:
            text = self._template.format(text)
        if positive:
            text = self._ahead + text
        instructed = self._instruction and positive
        ids = tokenizer(self._instruction + text if instructed else text, verbose=False).input_ids
        # of what comes with an instruction, one token more is kept than the instruction leaves
        before = len(tokenizer(self._instruction, verbose=False).input_ids) - 2 if instructed else self._before
        return len(ids) - before
