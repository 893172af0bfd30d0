"""Tokenizers for models that are made without a checkpoint: no vocabulary is fetched, texts get a believable length.

Bytes as in GPT-2, then the longest piece first: common words, three letters, two, a byte. Every piece has its own
number and nothing is unknown, so texts that differ have numbers that differ. Special tokens have the numbers of the
real tokenizers, and the prompts that Qwen-Image is trained with have as many tokens as the real one makes of them.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from string import ascii_letters, ascii_lowercase

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPACE = "Ġ"  # how a space begins a word once it is bytes
INSIDE = "##"  # before pieces that do not begin a word
LONGEST_WORD = 24  # bytes; what is longer is cut, since looking for the longest piece takes the square of it

WORDS = Path(__file__).parent / "words.txt"  # those of prompts
MARKS = ["(", '"', "),", ").", '",', '".', "...", "--", "'s", "'t", "'re"]

CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN_SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
QWEN_FIRST_SPECIAL = 151643


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """In place of the tokenizer of Qwen2.5-VL and Qwen3."""
    special = {token: QWEN_FIRST_SPECIAL + i for i, token in enumerate(QWEN_SPECIAL)}
    inner = _tokenizer(special, first_piece=0, prefix_space=False)
    return _finished(inner, 131072, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT)


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """In place of CLIP's tokenizer."""
    special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    inner = _tokenizer(special, first_piece=0, prefix_space=True)
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=list(special.items())
    )
    return _finished(inner, 77, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """In place of T5's tokenizer."""
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    inner = _tokenizer(special, first_piece=len(special), prefix_space=True)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=list(special.items()))
    return _finished(inner, 512, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _pieces() -> list[str]:
    """Every byte, so that nothing is unknown; then what makes texts short."""
    single = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = WORDS.read_text().split()
    words = [*words, *(word.capitalize() for word in words), *MARKS]
    pairs, triples = (["".join(letters) for letters in product(ascii_lowercase, repeat=n)] for n in (2, 3))
    after_space = [SPACE + piece for piece in [*ascii_letters, *pairs, *words]]
    inside = [INSIDE + piece for piece in [*single, *pairs, *triples]]
    return list(dict.fromkeys([*single, *words, *after_space, *inside]))


def _tokenizer(special: dict[str, int], first_piece: int, prefix_space: bool) -> Tokenizer:
    vocabulary = {piece: first_piece + i for i, piece in enumerate(_pieces())} | special
    assert len(set(vocabulary.values())) == len(vocabulary)
    inner = Tokenizer(
        models.WordPiece(
            vocabulary,
            unk_token=next(iter(special)),
            max_input_chars_per_word=LONGEST_WORD,
            continuing_subword_prefix=INSIDE,
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space),
            pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), behavior="isolated"),
        ]
    )
    inner.decoder = decoders.Sequence([decoders.Replace(INSIDE, ""), decoders.ByteLevel()])
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return inner


def _finished(inner: Tokenizer, longest: int, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **tokens,
    )
