"""Speculative decoding of one row with plain transformers: the algorithm without the machinery.

The Engine does the same for many rows at once, with caches, and gives the same tokens. Here every
forward reads the whole text again, so that nothing but the algorithm is left.

    python examples/one_round.py TARGET DRAFT "Once upon a time"
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from specdec.lossless.sampling import Draw, SamplingBatch, coupled_choice, probabilities, uniform
from specdec.lossless.sampling import sample as draw_from
from specdec.request import SamplingParams


@torch.inference_mode()
def one_round(
    target,
    draft,
    tokens: list[int],
    start: int,
    k: int,
    how: SamplingParams,
    mode: str,
    number: int,
):
    """The tokens of one round: accepted candidates, then one token of the target's own.

    Args:
        target, draft: transformers causal language models over one vocabulary of V tokens.
        tokens: prompt and output so far.
        start: where the output begins in `tokens`.
        k: how many candidates to draft.
        how: temperature, top-k, top-p, min-p and the seed of all random numbers.
        mode: "rejection" or "coupled".
        number: how many rounds the row had before.
    """
    params = SamplingBatch.of([how], torch.device("cpu"))
    if mode == "rejection":  # a number is drawn once: what one round discards must not tell of it
        params = params.in_round(torch.tensor([number]))
    at = len(tokens) - start  # the output position that comes next

    # 1. Draft: k candidates, one after another, each from the draft's distribution q.
    text, q = list(tokens), []
    for i in range(k):
        q.append(probabilities(logits_of(draft, text)[-1:], params))  # [1, V]
        text.append(choose(q[i], params, at + i, mode, Draw.CANDIDATE))
    candidates = text[len(tokens) :]

    # 2. Verify: one target forward over all of it. The logits at a token say what follows it, so
    #    the last k + 1 judge the k candidates and give what comes after them.
    logits = logits_of(target, text)[-k - 1 :]  # [k + 1, V]
    p = [probabilities(row[None], params) for row in logits]  # (k + 1) x [1, V]

    # 3. Accept candidates from the left, up to the first that does not stand.
    for i, y in enumerate(candidates):
        if mode == "coupled" or how.temperature == 0:
            # The target makes its own choice with the same noise; y stands iff it is the same.
            own = choose(p[i], params, at + i, mode, Draw.BONUS)
            if own != y:
                return [*candidates[:i], own]
        elif uniform_at(params, at + i, Draw.ACCEPT) * q[i][0, y] >= p[i][0, y]:
            # Rejected, with probability 1 - p(y) / q(y): draw from what p has and q has not.
            rest = (p[i] - q[i]).clamp(min=0)  # [1, V]
            return [*candidates[:i], choose(rest, params, at + i, mode, Draw.BONUS)]

    # 4. All stand: the target's last logits give one more token for nothing.
    return [*candidates, choose(p[k], params, at + k, mode, Draw.BONUS)]


def logits_of(model, text: list[int]) -> Tensor:
    """[n, V]: what the model says after each of n tokens."""
    return model(torch.tensor([text])).logits[0]


def choose(weights: Tensor, params: SamplingBatch, at: int, mode: str, purpose: Draw) -> int:
    """A token from weights [1, V], by random numbers that are a function of seed and place.

    Coupled sampling has the same noise for draft and target, so that they often choose alike.
    """
    if mode == "coupled":
        return int(coupled_choice(weights, params.seed, torch.tensor([at])))
    return int(draw_from(weights, uniform_at(params, at, purpose)))


def uniform_at(params: SamplingBatch, at: int, purpose: Draw) -> Tensor:
    """One uniform number [1]; numbers for different purposes are independent."""
    return uniform(params.seed, torch.tensor([at]), purpose)


def generate(target, draft, prompt: list[int], k: int, how: SamplingParams, mode: str) -> list[int]:
    """Rounds until the output is long enough; returns the output.

    The first token comes with the prompt: a round without candidates.
    """
    tokens, number = list(prompt), 0
    while (left := how.max_new_tokens - len(tokens) + len(prompt)) > 0:
        candidates = min(k, left - 1) if len(tokens) > len(prompt) else 0
        tokens += one_round(target, draft, tokens, len(prompt), candidates, how, mode, number)
        number += 1
    return tokens[len(prompt) :]


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target_name, draft_name, text = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(target_name)
    models = [AutoModelForCausalLM.from_pretrained(name) for name in (target_name, draft_name)]
    params = SamplingParams(max_new_tokens=40, temperature=0.7, seed=1)
    prompt = tokenizer(text).input_ids
    output = generate(*models, prompt, k=4, how=params, mode="rejection")
    # Decoded together: alone, the output may lose its first space.
    print(tokenizer.decode([*prompt, *output], skip_special_tokens=True))
