"""What plain transformers generate, to compare the engine with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from specdec.lossless.sampling import SamplingBatch, coupled_choice, probabilities
from specdec.request import Request
from tests.specdec.workloads import (
    Prompt,
)

CPU = torch.device("cpu")


def letters(ids: Sequence[int]) -> str:
    """A decode function: one printable character a token."""
    return "".join(chr(33 + i) for i in ids)


LENGTHS = (1, 200, 3, 17, 64, 65, 130, 2, 40, 90, 128, 129, 7, 33, 24, 25, 12, 180, 5, 50)


@dataclass
class Reference:
    """What transformers' own greedy `generate` says."""

    prompts: list[Prompt]
    outputs: list[Prompt]
    eos: int


def generate(model: PreTrainedModel, prompt: Prompt, n: int, eos: int | None = None) -> Prompt:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=n,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return tuple(out[0, len(prompt) :].tolist())


@torch.inference_mode()
def least_margin(model: PreTrainedModel, prompt: Prompt, output: Prompt) -> float:
    """The smallest gap between the two top logits along an output."""
    logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    top = logits.topk(2).values
    return float((top[:, 0] - top[:, 1]).min())


@torch.inference_mode()
def largest_gap(model: PreTrainedModel, prompt: Prompt, output: Prompt) -> float:
    """By how much a token of an output is less likely than the likeliest one at most, in logits."""
    logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    return float((logits.amax(1) - chosen).max())


@torch.inference_mode()
def sampled_by_hand(model: PreTrainedModel, request: Request) -> Prompt:
    """Target-only sampling, one plain forward a token: what `coupled` must reproduce."""
    batch = SamplingBatch.of([request.sampling], CPU)
    text = list(request.prompt_ids)
    for at in range(request.sampling.max_new_tokens):
        logits = model(torch.tensor([text]), use_cache=False).logits[:, -1]
        p = probabilities(logits, batch)
        text.append(int(coupled_choice(p, batch.seed, torch.tensor([at]))))
    return tuple(text[len(request.prompt_ids) :])
