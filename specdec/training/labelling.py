"""Label a target's text: draft candidates along it, and how probably they are accepted.

SpecDec++ (arXiv 2405.19715, §3.2): at each output position of a text z the draft draws a candidate
y ~ q(. | z_<i); its label is the probability that verification accepts it, min(1, p(y) / q(y)). To
show the head prefixes with draft tokens too, z takes a draft token instead of the target's with
probability r. That is for training only: a candidate is judged in the engine only after an accepted
prefix, which is distributed as the target's own text, so what is tuned and measured is unmixed.

p and q are the distributions after temperature, top-k, top-p and min-p, from the code that the
engine samples with. So are the random numbers: keyed by a seed of the example and of what is done,
the position and what the number is for, each drawn once. There are no rounds here, but for EAGLE-3
drafts, whose states depend on where a round began (specdec/training/eagle_labels.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from specdec.engine.admission import Pair
from specdec.lossless.sampling import Draw, probabilities, sample, uniform
from specdec.model.decoder import PackedDecoder
from specdec.model.eagle import EagleDecoder
from specdec.policies.base import TOKEN_SIGNALS
from specdec.policies.signals import read_signals
from specdec.training.eagle_labels import eagle_labels
from specdec.training.examples import Example
from specdec.training.judging import judge
from specdec.training.labels import Labels, LabelSettings, Part, row_sampling
from specdec.training.scores import target_states

_WANTED = frozenset(TOKEN_SIGNALS)

_LOGIT_ROWS = 128
"""Positions whose logits and distributions are in memory at once: 80 MB each at 150,000 tokens.

Raised, labelling takes more memory and hardly less time.
"""


def collect(
    pair: Pair,
    examples: Iterable[tuple[Example, Part]],
    settings: LabelSettings,
    *,
    batch: int = 32,
    first_row: int = 0,
) -> Iterator[Labels]:
    """Label every output position of the examples, some examples at a time.

    Args:
        pair: both models; a few forwards of each per batch of examples.
        examples: what the target continued, and what each row is for. Consumed as it goes, so they
            may be generated meanwhile.
        settings: how candidates are drawn and judged.
        batch: examples taken at a time; they share forwards.
        first_row: number of the first row; the others count on.

    Yields:
        The labels of each batch. A prompt that the context cannot hold has none.
    """
    source, rows = iter(examples), first_row
    # The draft must have room for every position that it proposes at.
    most = min(pair.context_length, pair.draft_context_length)
    while taken := list(islice(source, batch)):
        fitting = [(_cut(example, most), part) for example, part in taken]
        kept = [(example, part) for example, part in fitting if example is not None]
        if kept:
            yield _label(pair, kept, settings, rows)
        rows += len(kept)


def _cut(example: Example, positions: int) -> Example | None:
    room = positions + 1 - len(example.prompt_ids)
    return replace(example, output_ids=example.output_ids[:room]) if room > 0 else None


@torch.inference_mode()
def _label(
    pair: Pair, batch: Sequence[tuple[Example, Part]], settings: LabelSettings, first_row: int
) -> Labels:
    draft = pair.draft
    if draft is None:
        raise ValueError("labels need a pair with a draft")
    if isinstance(draft, EagleDecoder):
        return eagle_labels(pair, draft, batch, settings, first_row)
    mixed = _mixed(draft, pair.vocab_size, batch, settings)
    parts = torch.tensor([int(part) for _, part in batch])
    done: list[Labels] = []
    # Both models pack the same lengths the same way, so their positions correspond.
    forwards = zip(target_states(draft, mixed), target_states(pair.target, mixed), strict=True)
    for (pack, draft_hidden), (_, target_hidden) in forwards:
        owner, at = _positions([mixed[i] for i in pack], draft.device)
        params = row_sampling([mixed[i] for i in pack], settings.sampling, "label", draft.device)
        for chunk in torch.split(torch.arange(len(owner), device=draft.device), _LOGIT_ROWS):
            hidden = draft_hidden[chunk]
            draft_logits = draft.logits(hidden)[:, : pair.vocab_size]
            verifying = target_hidden[chunk.to(target_hidden.device)]
            target_logits = pair.target.logits(verifying)[:, : pair.vocab_size]
            judged = judge(
                target_logits.to(draft.device),
                draft_logits,
                params.rows(owner[chunk]),
                at[chunk],
                settings.verification,
            )
            signals = read_signals(draft_logits, judged.candidates, hidden, _WANTED)
            rows = torch.tensor(pack)[owner[chunk].cpu()] + first_row
            token_signals = signals[:, list(TOKEN_SIGNALS)]
            own = judged, hidden, token_signals, at[chunk], rows, parts[rows - first_row]
            done.append(Labels.of_judged(*own))
    return Labels.cat(done)


def _mixed(
    draft: PackedDecoder,
    vocab_size: int,
    batch: Sequence[tuple[Example, Part]],
    settings: LabelSettings,
) -> list[Example]:
    """The examples, those to train on with some output tokens replaced by draws of the draft."""
    result = [example for example, _ in batch]
    trained = [i for i, (_, part) in enumerate(batch) if part is Part.TRAIN]
    if not settings.mixing or not trained:
        return result
    examples = [result[i] for i in trained]
    for pack, states in target_states(draft, examples):
        packed = [examples[i] for i in pack]
        owner, at = _positions(packed, draft.device)
        params = row_sampling(packed, settings.sampling, "mix", draft.device)
        replaced = uniform(params.seed[owner], at, Draw.ACCEPT) < settings.mixing
        index = replaced.nonzero()[:, 0]
        if not len(index):
            continue
        drawn = []
        for chunk in torch.split(index, _LOGIT_ROWS):
            rows = params.rows(owner[chunk])
            q = probabilities(draft.logits(states[chunk])[:, :vocab_size], rows)
            drawn.append(sample(q, uniform(rows.seed, at[chunk], Draw.CANDIDATE)).clamp(min=0))
        tokens = torch.tensor([t for e in packed for t in e.output_ids], device=draft.device)
        tokens[index] = torch.cat(drawn)
        outputs = torch.split(tokens, [len(e.output_ids) for e in packed])
        for i, output in zip(pack, outputs, strict=True):
            result[trained[i]] = replace(examples[i], output_ids=tuple(output.tolist()))
    return result


def _positions(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [n] each: the example that each output position belongs to, and its number in it."""
    counts = [len(example.output_ids) for example in examples]
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    at = torch.cat([torch.arange(count) for count in counts])
    return owner.to(device), at.to(device)
