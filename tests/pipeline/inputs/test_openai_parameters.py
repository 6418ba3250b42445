"""Every parameter of OpenAI's and vLLM's requests is served, ignored or refused by its name."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from openai.types.chat import completion_create_params as of_chat
from openai.types.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from pipeline.errors import RowError
from pipeline.inputs.openai_parameters import Parameters
from pipeline.inputs.openai_requests import CHAT, COMPLETIONS, PARAMETERS, RESPONSES

OF_VLLM = """
model frequency_penalty presence_penalty logit_bias logprobs max_tokens n seed stop stream
stream_options temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking
length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids
prompt_logprobs logprob_token_ids bad_words echo add_special_tokens response_format
structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids
routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params
ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval
"""
"""Fields of both `ChatCompletionRequest` and `CompletionRequest`, November 2026."""

CHATS_OF_VLLM = """
messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
parallel_tool_calls add_generation_prompt continue_final_message documents chat_template
chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text
"""

RESPONSES_OF_VLLM = """
background include input instructions max_output_tokens max_tool_calls metadata model logit_bias
parallel_tool_calls previous_response_id prompt reasoning service_tier store stream temperature
text tool_choice tools top_logprobs top_p top_k truncation user skip_special_tokens
include_stop_str_in_output prompt_cache_key request_id mm_processor_kwargs priority cache_salt
enable_response_messages previous_input_messages previous_response structured_outputs
repetition_penalty seed stop ignore_eos vllm_xargs
"""


def names(*lists: str) -> list[str]:
    return " ".join(lists).split()


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        (CHAT, [*of_chat.CompletionCreateParamsBase.__annotations__, "stream"]),
        (COMPLETIONS, [*CompletionCreateParamsBase.__annotations__, "stream"]),
        (RESPONSES, [*ResponseCreateParamsBase.__annotations__, "stream"]),
        (CHAT, names(OF_VLLM, CHATS_OF_VLLM)),
        (COMPLETIONS, names(OF_VLLM, "prompt suffix prompt_embeds")),
        (RESPONSES, names(RESPONSES_OF_VLLM)),
    ],
)
def test_none_is_unknown(url: str, asked: Iterable[str]) -> None:
    known = PARAMETERS[url]
    assert not {*asked} - known.served - known.ignored - known.neutral.keys()


@pytest.mark.parametrize("known", PARAMETERS.values(), ids=PARAMETERS)
def test_each_has_one_fate_and_one_that_is_not_supported_is_refused_by_name(
    known: Parameters,
) -> None:
    assert not known.served & known.ignored
    assert not (known.served | known.ignored) & known.neutral.keys()
    for name, fine in known.neutral.items():
        for value in fine:
            known.check({name: value})
        with pytest.raises(RowError, match=f": {name} .* is not supported") as refused:
            known.check({name: "odd"})
        assert refused.value.error_class == "UnsupportedParameter"
