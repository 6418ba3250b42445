from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.job import InputConfig, SamplingConfig
from pipeline.errors import RowError, UserError
from pipeline.inputs.prompts import PromptRenderer, required_columns
from pipeline.inputs.row_sampling import row_sampling, row_seed
from tests.conftest import TinyModels
from tests.pipeline.tiny_tokenizers import llama_like


@pytest.fixture(scope="module")
def tokenizer(tiny_models: TinyModels) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_models.target)


def renderer(tokenizer: Any, **how: str) -> PromptRenderer:
    return PromptRenderer(InputConfig(paths=("x",), **how), tokenizer)


def test_messages_go_through_the_chat_template_with_one_bos(tokenizer: Any) -> None:
    row = {"m": [{"role": "user", "content": "hi", "name": None}]}
    ids = renderer(tokenizer, messages_column="m").prompt_ids(row)
    assert tokenizer.decode(ids) == "<s><|user|>hi</s><|assistant|>"
    assert ids.count(tokenizer.bos_token_id) == 1


def test_messages_as_json_text(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    render = renderer(tokenizer, messages_column="m").prompt_ids
    assert render({"m": json.dumps(messages)}) == render({"m": messages})


CALLED = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "c", "name": "f", "content": "7"},
]
CALL = "m.tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        # Templates differ in what they take: most want arguments as an object,
        (f"{{{{ {CALL} | tojson }}}}", '{"a": 1}'),
        # some as text,
        (f"{{{{ 'call ' + {CALL} }}}}", 'call {"a": 1}'),
        # and some take for granted that there is a content.
        (f"{{{{ m.content + 'a=' ~ {CALL}['a'] }}}}", "a=1"),
    ],
)
def test_tool_calls_are_written_as_the_template_wants_them(call: str, text: str) -> None:
    tokenizer = llama_like(closes=False)
    loop = "{% for m in messages %}{% if m.tool_calls %}"
    other = "{% else %}{{ m.role[0] ~ m.content }}{% endif %}{% endfor %}"
    tokenizer.chat_template = loop + call + other
    made = renderer(tokenizer, messages_column="m")
    expected = tokenizer(f"uhi{text}t7", add_special_tokens=False)["input_ids"]
    assert list(made.prompt_ids({"m": CALLED})) == expected
    assert made.prompt_ids({"m": json.dumps(CALLED)}) == tuple(expected)


@pytest.mark.parametrize("prompt", ["hi", "<s>hi"])
def test_plain_prompts_have_one_bos(tokenizer: Any, prompt: str) -> None:
    ids = renderer(tokenizer, prompt_column="p").prompt_ids({"p": prompt})
    assert tokenizer.decode(ids) == "<s>hi"


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize(
    ("how", "row", "prompt"),
    [
        ({"prompt_column": "p"}, {"p": "hi"}, "<s> hi"),
        ({"prompt_column": "p"}, {"p": "<s>hi"}, "<s> hi"),
        ({"prompt_column": "p"}, {"p": " \n<s>hi"}, " \n<s> hi"),
        ({"prompt_column": "p"}, {"p": "<s>hi</s><s>you"}, "<s> hi</s><s> you"),
        ({"prompt_column": "p"}, {"p": "an <s>old</s> thing"}, "<s> an <s> old</s>  thing"),
        ({"template": "{{ p }}"}, {"p": "hi"}, "<s> hi"),
        ({"template": "\n<s>Q: {{ p }}"}, {"p": "hi"}, "\n<s> Q: hi"),
        ({"template": "Q: <s>{{ p }}"}, {"p": "hi"}, "Q: <s> hi"),
        ({"template": "Q: {{ p }}"}, {"p": "an <s>"}, "<s> Q: an <s>"),
        ({"messages_column": "p"}, {"p": [{"role": "user", "content": "hi"}]}, "<s> hi"),
    ],
)
def test_a_prompt_has_one_bos_and_no_end(
    closes: bool, how: dict[str, str], row: dict[str, Any], prompt: str
) -> None:
    """Whether the tokenizer appends an end of sequence or not."""
    tokenizer = llama_like(closes)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made = renderer(tokenizer, **how)
    assert tokenizer.decode(made.prompt_ids(row)) == prompt
    assert made.prompt_ids(row) == made.prompt_ids(row)


def test_template(tokenizer: Any) -> None:
    how = {"template": "{{ q }} {% for x in xs %}[{{ x }}]{% endfor %}\n"}
    config = InputConfig(paths=("x",), **how)
    assert required_columns(config) == ["q", "xs"]
    ids = PromptRenderer(config, tokenizer).prompt_ids({"q": "why", "xs": [1, 2]})
    assert tokenizer.decode(ids) == "<s>why [1][2]\n"


@pytest.mark.parametrize(
    ("how", "row", "error_class"),
    [
        ({"messages_column": "m"}, {"m": None}, "NullPrompt"),
        ({"messages_column": "m"}, {"m": []}, "EmptyMessages"),
        ({"messages_column": "m"}, {"m": "hello"}, "MalformedMessages"),
        ({"messages_column": "m"}, {"m": {"role": "user"}}, "MalformedMessages"),
        ({"messages_column": "m"}, {"m": ["hi"]}, "MalformedMessages"),
        ({"messages_column": "m"}, {"m": [{"role": "user"}]}, "MalformedMessages"),
        ({"messages_column": "m"}, {"m": [{"role": 1, "content": "x"}]}, "MalformedMessages"),
        ({"messages_column": "m"}, {"m": [{"role": "user", "content": 3}]}, "MalformedMessages"),
        ({"messages_column": "m"}, {"m": [{"role": "u", "content": None}]}, "MalformedMessages"),
        ({"messages_column": "m"}, {"m": CALLED}, "MalformedMessages"),  # of a template without
        ({"prompt_column": "p"}, {"p": None}, "NullPrompt"),
        ({"prompt_column": "p"}, {"p": ""}, "EmptyPrompt"),
        ({"prompt_column": "p"}, {"p": 7}, "MalformedPrompt"),
        ({"prompt_column": "p"}, {"p": "\ud800"}, "MalformedPrompt"),
        ({"template": "{{ p }}"}, {"p": ""}, "EmptyPrompt"),
        ({"template": "{{ p + 1 }}"}, {"p": "x"}, "TemplateError"),
        ({"template": "{{ p.missing }}"}, {"p": {"a": 1}}, "TemplateError"),
        ({"template": "{{ ''.__class__.__mro__ }}{{ p }}"}, {"p": "x"}, "TemplateError"),
        ({"template": "{{ range(10**9)|list }}{{ p }}"}, {"p": "x"}, "TemplateError"),
    ],
)
def test_bad_prompts_are_row_errors(
    tokenizer: Any, how: dict[str, str], row: dict[str, Any], error_class: str
) -> None:
    with pytest.raises(RowError) as caught:
        renderer(tokenizer, **how).prompt_ids(row)
    assert caught.value.error_class == error_class


def test_a_tokenizer_without_chat_template_is_the_users_error(tokenizer: Any) -> None:
    class Plain:
        chat_template = None

    with pytest.raises(UserError, match="has no chat template"):
        PromptRenderer(InputConfig(paths=("x",), messages_column="m"), Plain())


JOB = SamplingConfig(max_new_tokens=5, temperature=0.5, stop=("a",), seed=3)


def test_a_row_without_overrides_has_the_jobs_sampling() -> None:
    params = row_sampling(JOB, None, "a:0:0")
    assert (params.max_new_tokens, params.temperature, params.stop) == (5, 0.5, ("a",))
    assert params.seed == row_seed(3, "a:0:0")


@pytest.mark.parametrize("as_text", [False, True])
def test_a_row_overrides_what_it_says(as_text: bool) -> None:
    override = {"temperature": 0, "stop": "b", "seed": 7.0, "top_p": None, "n": 1}
    params = row_sampling(JOB, json.dumps(override) if as_text else override, "a:0:0")
    assert (params.temperature, params.stop, params.seed) == (0, ("b",), 7)
    assert params.max_new_tokens == 5


def test_a_blank_cell_of_a_csv_overrides_nothing() -> None:
    assert row_sampling(JOB, " ", "a:0:0") == row_sampling(JOB, None, "a:0:0")


def test_adjustments_of_a_row_in_every_form_that_columns_have() -> None:
    for biases in (
        {"5": 1.5, "7": None},
        [{"key": "5", "value": 1.5}],
        {5: 1.5},
    ):
        asked = {
            "logit_bias": biases,
            "bad_words": "damn",
            "allowed_token_ids": [5, 6],
            "min_tokens": 2.0,
            "frequency_penalty": 0.5,
        }
        params = row_sampling(JOB, asked, "a:0:0")
        assert params.logit_bias == {5: 1.5}
        assert (params.bad_words, params.allowed_token_ids) == (("damn",), (5, 6))
        assert (params.min_tokens, params.frequency_penalty) == (2, 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias must be numbers by token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias must be numbers from -100 to 100"),
        ({"bad_words": [""]}, "bad_words must be"),
        ({"min_tokens": 6}, "min_tokens must be 0 (off) to max_new_tokens, 5"),
        ({"allowed_token_ids": []}, "allowed_token_ids must be a list of at least one"),
        ({"temprature": 1}, "temprature: unknown; did you mean 'temperature'?"),
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": 0}, "top_p must be"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"stop": [1]}, "stop must be a list of str"),
        ({"stop": [""]}, "stop must be"),
        ({"stop": ["a", "\ufffd"]}, "holds U+FFFD"),
        ({"stop": "\ud800"}, "holds half of a character"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be a list of int"),
        ({"ignore_eos": "yes"}, "ignore_eos must be true or false"),
        ("{", "text, but not JSON"),
        ([1], "is a list, not an object"),
    ],
)
def test_bad_sampling_is_a_row_error(override: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        row_sampling(JOB, override, "a:0:0")
    assert caught.value.error_class == "InvalidSampling"
    assert message in caught.value.message


@given(st.lists(st.tuples(st.integers(), st.text(max_size=8)), max_size=50, unique=True))
def test_seeds_are_63_bits_and_differ(keys: list[tuple[int, str]]) -> None:
    def seeds() -> Iterator[int]:
        return (row_seed(job_seed, row_id) for job_seed, row_id in keys)

    assert all(0 <= seed < 2**63 for seed in seeds())
    assert len(set(seeds())) == len(keys)
