from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.texts import Texts
from specdec.engine.ending import StopSearch
from specdec.request import NO_CHARACTER, Completion, Request, SamplingParams
from tests.pipeline.tiny_tokenizers import KINDS, SPECIAL, decoding, llama_like

tokenizer_of = cache(decoding)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def done(ids: Sequence[int], why: str = "stop", reason: int | str | None = None) -> Completion:
    return Completion("a", 1, tuple(ids), why, reason)  # type: ignore[arg-type]


def asked(prompt: Sequence[int], **sampling: Any) -> Request:
    return Request("a", tuple(prompt), SamplingParams(**sampling))


def plain(tokenizer: Any, ids: Sequence[int], skip: bool = True) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip))


@st.composite
def rows(draw: st.DrawFn, kind: str) -> tuple[list[int], list[int]]:
    """Prompt and output of whole characters, special tokens among them."""
    tokenizer = tokenizer_of(kind)
    atoms = st.sampled_from([*KINDS[kind][1], *((token,) for token in SPECIAL)])

    def ids(least: int) -> list[int]:
        drawn = draw(st.lists(atoms, min_size=least, max_size=60))
        return [i for atom in drawn for i in tokenizer.convert_tokens_to_ids(list(atom))]

    return ids(1), ids(0)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prompt_and_completion_are_the_text_of_all_tokens(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    prompt, output = data.draw(rows(kind))
    text = Texts(tokenizer).completion(asked(prompt), done(output))
    assert plain(tokenizer, prompt) + text == plain(tokenizer, prompt + output)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bytes_that_are_no_characters_end_nothing(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    prompt, _ = data.draw(rows(kind))
    output = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    text = Texts(tokenizer).completion(asked(prompt), done(output))
    whole = plain(tokenizer, prompt + output)
    if whole.startswith(plain(tokenizer, prompt)):
        assert plain(tokenizer, prompt) + text == whole
    search = StopSearch(("no such text",), prompt, Texts(tokenizer).decode)
    assert not any(search.add(token) for token in output)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_stop_string_is_found_by_the_token_that_completes_it(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(kind)
    prompt, output = data.draw(rows(kind))
    before = plain(tokenizer, prompt, skip=False)
    shown = [
        plain(tokenizer, prompt + output[:n], skip=False)[len(before) :]
        for n in range(len(output) + 1)
    ]
    begin = data.draw(st.integers(0, len(shown[-1])))
    stop = shown[-1][begin : begin + data.draw(st.integers(1, 12))] or "nowhere"
    texts = Texts(tokenizer)
    search = StopSearch((stop, "no such text"), prompt, texts.decode)
    found = next((n for n, token in enumerate(output, 1) if search.add(token)), None)
    assert found == next((n for n, text in enumerate(shown) if stop in text), None)
    if found is None:
        return
    text = texts.completion(asked(prompt), done(output[:found], reason=stop))
    if not {*prompt, *output[:found]} & {*tokenizer.all_special_ids}:
        assert text == shown[found][: shown[found].find(stop)]
    elif stop in SPECIAL:
        assert stop not in text


def test_the_first_space_of_a_completion_stays() -> None:
    tokenizer = llama_like()
    texts = Texts(tokenizer)
    prompt = list(tokenizer("The capital of France is")["input_ids"])
    output = ids_of(tokenizer, "Paris")
    assert texts.completion(asked(prompt), done(output)) == " Paris"
    search = StopSearch((" Paris",), prompt, texts.decode)
    assert [search.add(token) for token in output] == [None] * 5 + [" Paris"]
    code = list(tokenizer("def f():\n")["input_ids"])
    four = [tokenizer.convert_tokens_to_ids("▁")] * 4 + ids_of(tokenizer, "x")[1:]
    assert texts.completion(asked(code), done(four)) == "    x"


@pytest.mark.parametrize("kind", ["ByteLevel", "Llama", "Gemma"])
@pytest.mark.parametrize("letter", ["é", "€", "😀"])
def test_a_text_ends_before_half_of_a_character(kind: str, letter: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = [atom for atom in KINDS[kind][1] if plain(tokenizer, ids(tokenizer, atom)) == letter]
    whole = ids(tokenizer, tokens[0])
    prompt = [tokenizer.convert_tokens_to_ids(KINDS[kind][1][4][0])]
    for kept in range(1, len(whole)):
        for before in ([], whole):
            output = [*before, *whole[:kept]]
            text = Texts(tokenizer).completion(asked(prompt), done(output, "length"))
            assert text == (letter if before else "")
    assert Texts(tokenizer).completion(asked(prompt), done(whole, "length")) == letter


def test_what_a_token_has_before_half_of_a_character_stays() -> None:
    tokenizer = tokenizer_of("ByteLevel")
    first, second = KINDS["ByteLevel"][1][-1]
    output = ids(tokenizer, (first,))
    texts = Texts(tokenizer)
    assert plain(tokenizer, ids(tokenizer, (first, second))) == "a é"
    assert texts.completion(asked([5]), done(output, "length")) == "a "
    search = StopSearch(("a ",), [5], texts.decode)
    assert search.add(output[0]) == "a "


def test_a_character_that_stands_for_none_stays_if_it_is_whole() -> None:
    tokenizer = llama_like()
    output = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in b"\xef\xbf\xbd"]
    prompt = list(tokenizer("x")["input_ids"])
    texts = Texts(tokenizer)
    assert texts.completion(asked(prompt), done(output, "length")) == NO_CHARACTER
    assert texts.completion(asked(prompt), done(output[:2], "length")) == ""


def test_a_prompt_may_end_in_half_of_a_character() -> None:
    for kind in ("ByteLevel", "Llama"):
        tokenizer = tokenizer_of(kind)
        atom = next(a for a in KINDS[kind][1] if plain(tokenizer, ids(tokenizer, a)) == "€")
        whole = ids(tokenizer, atom)
        text = Texts(tokenizer).completion(asked([*whole, *whole[:2]]), done(whole[2:]))
        assert text == "€"


def test_text_before_a_stop_string_with_special_tokens() -> None:
    tokenizer = llama_like()
    texts = Texts(tokenizer)
    prompt = list(tokenizer("hi")["input_ids"])
    output = [*ids_of(tokenizer, "so</s>far<|im_start|>user"), *ids_of(tokenizer, "no")]
    shown = texts.decode([*prompt, *output])
    assert shown == "<s> hi so</s> far<|im_start|> user no"
    search = StopSearch(("<|im_start|> user",), prompt, texts.decode)
    found = next(n for n, token in enumerate(output, 1) if search.add(token))
    stopped = done(output[:found], reason="<|im_start|> user")
    assert texts.completion(asked(prompt), stopped) == " so far"
    # A stop string may begin in the middle of a special token, which is in no text.
    assert texts.completion(asked(prompt), done(output[:found], reason="start|> us")) == " so far"
    assert texts.completion(asked(prompt), done(output[:found], reason="ar<|im")) == " so f"


def test_a_stop_string_that_is_a_special_token_is_a_stop_token() -> None:
    texts = Texts(llama_like())
    asked = SamplingParams(stop=("<|im_start|>", "<|im_start|>x", "</s>"), stop_token_ids=(9, 1))
    made = texts.with_special_stops(asked)
    assert (made.stop, made.stop_token_ids) == (asked.stop, (9, 1, 3))
    assert texts.with_special_stops(SamplingParams(stop=("a",))) == SamplingParams(stop=("a",))


@pytest.mark.parametrize("text", [" Paris", "Paris", "  Paris", "", "a\nb", " é"])
def test_a_completion_becomes_the_tokens_that_give_its_text(text: str) -> None:
    tokenizer = llama_like()
    texts, prompt = Texts(tokenizer), list(tokenizer("in France")["input_ids"])
    found = texts.output_ids(prompt, text)
    assert texts.completion(asked(prompt), done(found)) == text


def ids(tokenizer: Any, atom: Sequence[str]) -> list[int]:
    return list(tokenizer.convert_tokens_to_ids(list(atom)))


def test_bad_words_become_the_tokens_that_they_are() -> None:
    texts = Texts(llama_like())
    banned = texts.with_bad_words(SamplingParams(bad_words=(" ab", (3, 4)))).bad_words
    assert [word if word == (3, 4) else texts.decode(word) for word in banned] == [
        "ab",
        " ab",
        (3, 4),
    ]
    plain = SamplingParams(bad_words=((3, 4),))
    assert texts.with_bad_words(plain) is plain


def test_a_bad_word_is_banned_behind_a_space_however_many_tokens_it_is_there() -> None:
    tokens = {letter: i for i, letter in enumerate(["a", "b", "Ġ", "Ġa", "Ġab"])}
    backend = Tokenizer(models.BPE(tokens, [("Ġ", "a"), ("Ġa", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = Texts(PreTrainedTokenizerFast(tokenizer_object=backend))
    asked = SamplingParams(bad_words=("ab",))
    assert texts.with_bad_words(asked).bad_words == ((0, 1), (4,))


def test_a_text_is_not_cut_at_a_stop_string_among_its_first_min_tokens() -> None:
    tokenizer = llama_like()
    output = ids_of(tokenizer, "a b a b a b")
    texts, request = Texts(tokenizer), asked([5], min_tokens=len(output) - 1)
    assert texts.completion(request, done(output, reason="b")).count("b") == 2


def test_a_text_may_show_its_special_tokens_and_its_stop_string() -> None:
    tokenizer = llama_like()
    ids = ids_of(tokenizer, "ab<|im_start|>cd")
    texts = Texts(tokenizer)
    for how, reason, text in [
        ({}, 1, "abcd"),
        ({"skip_special_tokens": False}, 1, "ab<|im_start|>cd"),
        ({"skip_special_tokens": False}, "c", "ab<|im_start|>"),
        ({"include_stop_str_in_output": True}, "c", "abc"),
        ({"include_stop_str_in_output": True}, "d", "abcd"),
    ]:
        made = texts.completion(asked([5], **how), done(ids, reason=reason))
        assert made.replace(" ", "") == text
