"""Special tokens in what a row brings: plain text where the job asks for that."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline.config.job import InputConfig
from pipeline.errors import UserError
from pipeline.inputs.prompts import PromptRenderer
from tests.pipeline.tiny_tokenizers import CHATML, chat_like, llama_like


def llama() -> PreTrainedTokenizerFast:
    """Special tokens in the vocabulary, and a space in front of each piece between them."""
    made = llama_like()
    made.chat_template = CHATML.replace("<|im_end|>", "</s>")
    return made


TOKENIZERS = {"byte level": chat_like(), "SentencePiece": llama()}
TEXTS = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "</s>", "<think>", "a", " ", "\n", "é", "<"]),
    max_size=12,
).map("".join)


def ids_of(tokenizer: Any, row: dict[str, Any], escape: bool, **how: Any) -> list[int]:
    config = InputConfig(paths=("x",), escape_special_tokens=escape, **how)
    return [*PromptRenderer(config, tokenizer).prompt_ids(row)]


def special(tokenizer: Any, ids: list[int]) -> list[int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return [index for index in ids if index in added and added[index].special]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_messages_hold_no_special_token_and_the_template_all_of_its_own(
    kind: str, texts: list[str]
) -> None:
    tokenizer = TOKENIZERS[kind]
    messages = [{"role": "user", "content": text} for text in texts]
    harmless = [{"role": "user", "content": "a"}] * len(texts)
    made, plain = (
        ids_of(tokenizer, {"m": each}, True, messages_column="m") for each in (messages, harmless)
    )
    assert special(tokenizer, made) == special(tokenizer, plain)
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "".join(tokenizer.decode(made).split()) == "".join(shown.split())
    # The tokens are the usual ones where there was nothing to escape.
    usual = ids_of(tokenizer, {"m": messages}, False, messages_column="m")
    if len(special(tokenizer, usual)) == len(special(tokenizer, plain)):
        assert made == usual


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "how",
    [
        {"prompt_column": "p"},
        {"template": "<|im_start|>Q: {{ p }} {% for x in q %}{{ x }}{% endfor %}"},
    ],
)
def test_plain_prompts_and_templates(kind: str, how: dict[str, str]) -> None:
    tokenizer = TOKENIZERS[kind]
    bad = {"p": "<|im_end|><|im_start|></s><s> x", "q": ["<|im_end|>", "</s>"]}
    made, plain = (ids_of(tokenizer, row, True, **how) for row in (bad, {"p": "x", "q": []}))
    assert special(tokenizer, made) == special(tokenizer, plain)
    assert "".join(tokenizer.decode(made).split()).endswith(
        "x<|im_end|></s>"[: None if "q" in str(how) else 1]
    )


def test_escapes_of_json_and_what_looks_like_a_mark_open_nothing() -> None:
    tokenizer = TOKENIZERS["byte level"]
    text = json.dumps([{"role": "user", "content": "<|im_end|>"}]).replace("<", "\\u003c")
    other = [{"role": "user", "content": "\ufdd0abt0\ufdd1"}]
    made, plain = (ids_of(tokenizer, {"m": m}, True, messages_column="m") for m in (text, other))
    assert special(tokenizer, made) == special(tokenizer, plain)
    assert tokenizer.decode(made).count("<|im_end|>") == 2


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    class Slow:
        chat_template, bos_token = None, None

    with pytest.raises(UserError, match=r"^input\.escape_special_tokens: .* no fast form"):
        PromptRenderer(
            InputConfig(paths=("x",), prompt_column="p", escape_special_tokens=True), Slow()
        )
