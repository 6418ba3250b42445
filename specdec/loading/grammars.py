"""Grammars over a model's tokens, by llguidance.

Of the libraries that make masks of grammars, llguidance needs nothing else, rolls back, takes JSON
Schema, regular expressions and Lark, and makes a mask in some 50 µs. xgrammar, the other one that
is well kept, brings Triton and tvm-ffi with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
from numpy.typing import NDArray

from specdec.lossless.grammars import Matcher

_KEPT = 256
"""Compiled grammars that are kept: some megabytes each at most. Jobs with more compile again."""


class ModelGrammars:
    """Makes matchers for the tokens of a model; see `Grammars`.

    Args:
        tokenizer: the target's (transformers).
        vocab_size: tokens of the models.
        eos_token_ids: the tokens that end an output.

    Attributes:
        size: tokens of the model or of its tokenizer, whichever are more.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._eos = tokenizer, sorted(eos_token_ids)
        self.size = max(vocab_size, len(tokenizer))
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def check(self, grammar: str) -> str | None:
        try:
            matcher = self._compiled(grammar)
        except ValueError as error:  # a tokenizer that is none of the library `tokenizers`
            return str(error)
        return matcher.get_error() if matcher.is_error() else None

    def matcher(self, grammar: str) -> Matcher:
        return self._compiled(grammar).deep_copy()

    def fill(self, matchers: Sequence[Any], words: NDArray[np.int32]) -> None:
        whole = llguidance.numpy.allocate_token_bitmask(len(matchers), self.size)
        numbered = [(matcher, i) for i, matcher in enumerate(matchers)]
        llguidance.numpy.fill_next_token_bitmask_par(self._executor, numbered, whole)
        words[:] = whole[:, : words.shape[1]]

    @functools.cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor()

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance wants it, which takes a second to make."""
        eos = self._eos or None
        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self.size, eos_token=eos)

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._tokens, grammar, log_level=0)
