from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.engine.ending import Decode, Ending, StopSearch, find_ending
from specdec.lossless.grammars import RowGrammar
from specdec.request import SamplingParams

EOS = frozenset({90, 91})


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(i) for i in ids)


def ending(text: str | Sequence[int], known: int = 0, **sampling: object) -> Ending | None:
    output = [ord(c) for c in text] if isinstance(text, str) else text
    params = SamplingParams(**{"max_new_tokens": 50, **sampling})  # type: ignore[arg-type]
    return found(output, params, decode, known)


@dataclass
class Row:
    sampling: SamplingParams
    stops: StopSearch | None
    grammar: RowGrammar | None = None


def found(
    output: Sequence[int],
    params: SamplingParams,
    decode: Decode,
    known: int = 0,
    prompt: Sequence[int] = (),
) -> Ending | None:
    stops = StopSearch(params.stop, prompt, decode) if params.stop else None
    for token in output[:known] if stops else ():
        assert stops.add(token) is None
    return find_ending(output[known:], known, Row(params, stops), EOS)


def test_an_output_without_an_end_goes_on() -> None:
    assert ending("abc", stop=("x",), stop_token_ids=(1,)) is None
    assert ending("") is None


@pytest.mark.parametrize("eos", sorted(EOS))
def test_end_of_sequence_is_the_last_token(eos: int) -> None:
    assert ending([97, eos, 98]) == Ending(2, "stop", eos)
    assert ending([97, eos, 98], ignore_eos=True) is None


def test_a_stop_token_ends_even_if_end_of_sequence_is_ignored() -> None:
    assert ending([97, 90, 98], stop_token_ids=(90,), ignore_eos=True) == Ending(2, "stop", 90)


def test_length_ends_exactly_at_max_new_tokens() -> None:
    assert ending("abcd", max_new_tokens=5) is None
    assert ending("abcde", max_new_tokens=5) == Ending(5, "length")
    assert ending("abcdefg", max_new_tokens=5) == Ending(5, "length")


def test_a_stop_at_the_last_allowed_token_is_a_stop() -> None:
    assert ending([97, 90], max_new_tokens=2) == Ending(2, "stop", 90)
    assert ending("ab", max_new_tokens=2, stop=("b",)) == Ending(2, "stop", "b")


def test_a_stop_string_ends_with_the_token_that_completes_it() -> None:
    assert ending("hello world", stop=("o w",)) == Ending(7, "stop", "o w")
    assert ending("hello", stop=("lx", "ll", "lo")) == Ending(4, "stop", "ll")


def test_a_stop_string_may_begin_among_the_tokens_known_before() -> None:
    assert ending("hello world", known=6, stop=("lo wor",)) == Ending(9, "stop", "lo wor")


def test_a_stop_string_inside_one_token_is_found() -> None:
    def words(ids: Sequence[int]) -> str:
        return "".join(["one two", "three; four", "five"][i] for i in ids)

    params = SamplingParams(max_new_tokens=9, stop=(";",))
    assert found([0, 1, 2], params, words) == Ending(2, "stop", ";")


def test_of_two_stop_strings_in_one_token_the_first_in_the_text_is_named() -> None:
    params = SamplingParams(max_new_tokens=9, stop=("two", "one"))

    def text(ids: Sequence[int]) -> str:
        return "one two" * len(ids)

    assert found([0], params, text) == Ending(1, "stop", "one")


def test_characters_of_several_bytes_are_found_though_each_byte_is_a_token() -> None:
    def from_bytes(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    output = [*"voilà, déjà vu".encode()]
    params = SamplingParams(max_new_tokens=50, stop=("déjà",))
    assert found(output, params, from_bytes) == Ending(len("voilà, déjà".encode()), "stop", "déjà")


def test_a_stop_string_does_not_begin_in_the_prompt() -> None:
    params = SamplingParams(max_new_tokens=50, stop=("\n\n",))
    prompt, output = [ord("\n")] * 3, [ord(c) for c in "\na\n\nb"]
    assert found(output, params, decode, prompt=prompt) == Ending(4, "stop", "\n\n")


def test_a_token_costs_the_same_in_a_long_output() -> None:
    """Also in one of bytes that are no characters, and of tokens without text."""
    for token in (97, 0x80, 0):
        lengths: list[int] = []

        def from_bytes(ids: Sequence[int], seen: list[int] = lengths) -> str:
            seen.append(len(ids))
            return bytes(i for i in ids if i).decode(errors="replace")

        search = StopSearch(("b",), [token] * 500, from_bytes)
        assert not any(search.add(token) for _ in range(500))
        lengths.clear()
        assert not any(search.add(token) for _ in range(500))
        assert search.add(98) == "b"
        assert max(lengths) <= 100
        assert sum(lengths) <= 500 * 100


@given(
    text=st.text("abZ", max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    stop=st.text("ab", min_size=1, max_size=3),
    most=st.integers(1, 12),
)
def test_the_end_does_not_depend_on_how_many_tokens_a_round_commits(
    text: str, cuts: list[int], stop: str, most: int
) -> None:
    """Z is an end of sequence."""
    at_once = ending(text, stop=(stop,), max_new_tokens=most)
    output = [ord(letter) for letter in text]
    params = SamplingParams(max_new_tokens=most, stop=(stop,))
    row, step, known = Row(params, StopSearch((stop,), (), decode)), None, 0
    for cut in sorted({*(min(cut, len(text)) for cut in cuts), len(text)}):
        step = step or find_ending(output[known:cut], known, row, EOS)
        known = cut
    assert step == at_once
    ends = [text.index(stop) + len(stop)] if stop in text else []
    ends += [text.index("Z") + 1] if "Z" in text else []
    first = min([*ends, most])
    assert (at_once.length if at_once else None) == (first if first <= len(text) else None)
