"""The parameters of OpenAI's batch API and of vLLM: what is taken, and what asks for nothing.

Clients write bodies with every parameter in them, at its default. A value that changes nothing is
no reason to refuse a request; any other that is not supported is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RowError, nearest

SAMPLING = (
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    # that vLLM added to the API
    "top_k",
    "min_p",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "repetition_penalty",
    "min_tokens",
    "bad_words",
    "allowed_token_ids",
    # what is asked of single tokens
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    # transformers' own
    "no_repeat_ngram_size",
    "logprobs_mode",
    "prompt_logprobs",
)
"""Parameters that go into a row's sampling under their own names."""

OF_PROMPT = ("truncate_prompt_tokens",)
"""Parameters of how a prompt becomes tokens."""

OF_CHAT = (
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    *("tools", "tool_choice"),
)
"""Parameters of how messages are put into the chat template."""

OF_RESPONSE = ("logprobs", "return_token_ids", "include_reasoning", "parallel_tool_calls")
"""Parameters of what a response tells."""

TOP = "top_logprobs"
"""One more of chats: `/v1/completions` has the number in `logprobs`."""

EFFORT = "reasoning_effort"
"""One more: a variable of the chat template, by its own name."""

IGNORED = frozenset(
    {
        # ---- who asks, when, and at what price
        "model",  # the one that this job has answers all
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "priority",
        "request_id",
        "session_id",
        "moderation",  # of a service that judges beside the model
        # ---- caches: they make nothing else of it
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "cache_salt",
        "skip_reading_prefix_cache",
        # ---- ways to do what is refused below by its own parameter
        "stream_options",
        "stream_interval",
        "length_penalty",  # of beams, as the next one
        "early_stopping",
        "flat_logprobs",
        "return_tokens_as_token_ids",
        "prompt_logprob_start",
        "truncation_side",
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        "spaces_between_special_tokens",
        "media_io_kwargs",
        "mm_processor_kwargs",
        # ---- of servers with other endpoints, or that show experts
        "return_token_offsets",
        "return_mm_kwargs",
        "routed_experts_prompt_start",
    }
)
"""Parameters without influence on what is generated here, whatever their value."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    TOP: (0,),
    "logprob_token_ids": ([],),
    "prompt_logprob_token_ids": ([],),
    "tools": ([],),  # of plain prompts, as the next one
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "structural_tag": (),
    "repetition_detection": ({},),
    "logits_processors": ([],),
    "trace_decode_token_ids": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "watermarking": (False,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "thinking_token_budget": (-1,),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
    "documents": ([],),
    "chat_template": (),
    "detokenize": (True,),
    "return_prompt_text": (False,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "extra_args": ({},),
}
"""Parameters that are not supported, and the values with which they ask for nothing."""

SPECIAL_TOKENS = "add_special_tokens"
"""One more, which asks for nothing when true of a plain prompt and when false of a chat."""


@dataclass(frozen=True)
class Parameters:
    """What becomes of each parameter of an endpoint.

    Attributes:
        served: what they ask for is done, or refused for its value.
        ignored: they have no influence here.
        neutral: those that are not supported, with the values that ask for nothing.
    """

    served: frozenset[str]
    ignored: frozenset[str]
    neutral: Mapping[str, tuple[Any, ...]]

    def check(self, body: Mapping[str, Any]) -> None:
        """Refuse the first parameter that is unknown, or not supported and not neutral.

        Args:
            body: of a request, without nulls.

        Raises:
            RowError: names it, and what is taken instead.
        """
        for name, value in body.items():
            if name in self.served or name in self.ignored:
                continue
            if name not in self.neutral:
                hint = nearest(name, sorted(self.served))
                raise RowError("UnsupportedParameter", f"{name}: unknown parameter; {hint}")
            if not any(_same(value, each) for each in self.neutral[name]):
                fine = " and ".join(map(short, self.neutral[name]))
                said = f"{name} {short(value)} is not supported"
                raise RowError(
                    "UnsupportedParameter", said + f"; only {fine} is taken" * bool(fine)
                )


def short(value: Any) -> str:
    """A value as JSON, as far as a message has room."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and a == b
