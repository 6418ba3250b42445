"""Tiny tokenizers with every kind of decoder that `tokenizers` has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

Atom = tuple[str, ...]
"""Tokens that together are whole characters."""

SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>")


def _of_letters(text: str) -> Atom:
    """A text as the letters of its bytes in byte-level vocabularies."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tuple(cut.pre_tokenize_str(text)[0][0])


def _of_bytes(text: str) -> Atom:
    """A text as the byte tokens of SentencePiece."""
    return tuple(f"<0x{byte:02X}>" for byte in text.encode())


_WIDE = ("é", "€", "😀", "ก")
_SENTENCE: tuple[Atom, ...] = (
    *((piece,) for piece in ("▁", "a", "b", ".", "▁a", "▁Paris", "▁▁▁▁", "\n", "is")),
    *map(_of_bytes, _WIDE),
)
_BYTES: tuple[Atom, ...] = (
    *(_of_letters(letter) for letter in (*_WIDE, "a", " ", "\n", ".")),
    ("".join(_of_letters(" Paris")),),
    ("".join(_of_letters("a é")[:-1]), _of_letters("a é")[-1]),
)
_PIECES: tuple[Atom, ...] = tuple((piece,) for piece in ("▁", "▁a", "b", "▁Paris", ".", "é"))
_WORDS: tuple[Atom, ...] = tuple((p,) for p in ("a", "##b", "Paris", ".", "'", "##is", "é"))
_SUFFIXES: tuple[Atom, ...] = tuple((p,) for p in ("a", "b</w>", "Paris</w>", ".</w>", "é"))
_SOUNDS: tuple[Atom, ...] = tuple((p,) for p in ("a", "b", "|", "e", "é"))
_SPACES: tuple[Atom, ...] = tuple((p,) for p in (" ", "a", " b", "c ", " Paris ", "é"))

KINDS: dict[str, tuple[Any, tuple[Atom, ...]]] = {
    "ByteLevel": (decoders.ByteLevel(), _BYTES),
    "Llama": (
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        _SENTENCE,
    ),
    "Gemma": (
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        _SENTENCE,
    ),
    "Metaspace": (decoders.Metaspace(), _PIECES),
    "Metaspace, first": (decoders.Metaspace(prepend_scheme="first"), _PIECES),
    "Metaspace, never": (decoders.Metaspace(prepend_scheme="never"), _PIECES),
    "WordPiece": (decoders.WordPiece(), _WORDS),
    "WordPiece, as it is": (decoders.WordPiece(cleanup=False), _WORDS),
    "BPEDecoder": (decoders.BPEDecoder(), _SUFFIXES),
    "CTC": (decoders.CTC(), _SOUNDS),
    "Fuse": (decoders.Fuse(), _SPACES),
    "Strip": (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]), _SPACES),
    "Strip, each token": (decoders.Strip(" ", 1, 0), _SPACES),
    "Replace": (decoders.Replace("a", " x "), _SPACES),
    "none": (None, _SPACES),
}
"""A decoder of each kind, and what texts are made of there."""


def decoding(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer to decode with: it has the tokens of its kind's atoms, and special ones."""
    decoder, atoms = KINDS[kind]
    tokens = dict.fromkeys([*SPECIAL, *(token for atom in atoms for token in atom)])
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>"))
    if decoder is not None:
        backend.decoder = decoder
    return _fast(backend)


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_like(
    template: str = CHATML, special: Sequence[str] = (), plain: Sequence[str] = ("<think>",)
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as Qwen's, with special tokens behind the vocabulary.

    Args:
        template: its chat template.
        special: more special tokens than those of ChatML, one of which takes the space behind it.
        plain: tokens of their own that are not special.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, "ĊĊ", "Ġa"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
    ends = [AddedToken("<|im_start|>"), AddedToken("<|im_end|>", rstrip=True)]
    backend.add_special_tokens([*ends, *map(AddedToken, special)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.chat_template = template
    return made


def llama_like(closes: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it, with a token for each letter: its decoder strips a space.

    Args:
        closes: whether it appends an end of sequence to a text.
    """
    letters = [chr(code) for code in range(0x21, 0x7F)]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = KINDS["Llama"][0]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closes else "<s> $A",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return _fast(backend)


def save_llama_like(folder: Path, closes: bool = False) -> int:
    """Save a `llama_like` tokenizer; returns the size of its vocabulary."""
    tokenizer = llama_like(closes)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
