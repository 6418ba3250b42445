"""Labels of an EAGLE-3 draft, whose candidates depend on where their round began.

From every place of the text a round runs along it. At each step a candidate is drawn and judged.
Then the text goes on, as if its own token had been the candidate: with the probability that
verification found it so. So states come as often as the engine meets them: those from the target's
features at every place, those behind one candidate where it stands, and so on.

Text is not mixed with draft tokens: rounds that are right for long are rare enough already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.engine.admission import Pair
from specdec.lossless.sampling import Draw, uniform
from specdec.model.eagle import EagleDecoder
from specdec.policies.base import TOKEN_SIGNALS
from specdec.policies.signals import read_signals
from specdec.training.eagle_texts import ROUNDS, EagleTexts
from specdec.training.examples import Example
from specdec.training.judging import judge
from specdec.training.labels import Labels, LabelSettings, Part, row_sampling

MOST = 8
"""Most candidates of a round that are judged.

Raised, there are a few more of those far from the target's last feature, and labelling takes a
step more.
"""

_WANTED = frozenset(TOKEN_SIGNALS)


def eagle_labels(
    pair: Pair,
    draft: EagleDecoder,
    batch: Sequence[tuple[Example, Part]],
    settings: LabelSettings,
    first_row: int,
) -> Labels:
    """Label rounds from every place of some examples; see `collect`. Rows begin at `first_row`."""
    texts = EagleTexts(pair.target, draft, MOST)
    rows = enumerate(batch, first_row)
    return Labels.cat([_row(pair, texts, e, part, settings, row) for row, (e, part) in rows])


def _row(
    pair: Pair, texts: EagleTexts, example: Example, part: Part, settings: LabelSettings, row: int
) -> Labels:
    """The labels of one text, by position."""
    draft, prompt, n = texts.draft, len(example.prompt_ids), len(example.output_ids)
    params = row_sampling([example], settings.sampling, "label", draft.device)
    output = torch.tensor(example.output_ids, device=draft.device)
    # The draft needs a token with a feature, and one behind it.
    places = torch.arange(max(0, 2 - prompt), n)
    if not len(places):
        return Labels.none(draft.features.width)
    judging, read = texts.read(example)
    done: list[Labels] = []
    for starts in torch.split(places, ROUNDS):
        slots: Sequence[int] = texts.begin(starts.tolist(), prompt)
        since = starts.to(draft.device)
        states: Tensor = read[since + prompt - 2]
        for step in range(MOST):
            at = since + step
            normed = draft.normed(states)
            logits = draft.model.logits(normed)[:, : pair.vocab_size]
            target_logits = pair.target.logits(judging[at.to(judging.device)])
            # Rounds meet at a position: each has numbers of its own.
            own = params.rows(torch.zeros_like(at)).in_round(since)
            verified = target_logits[:, : pair.vocab_size].to(draft.device)
            judged = judge(verified, logits, own, at, settings.verification, output[at])
            signals = read_signals(logits, judged.candidates, normed, _WANTED)
            which = torch.full_like(at, row), torch.full_like(at, int(part))
            token_signals = signals[:, list(TOKEN_SIGNALS)]
            done.append(Labels.of_judged(judged, normed, token_signals, at, *which))
            assert judged.stood is not None
            going = uniform(own.seed, at, Draw.ACCEPT) < judged.stood
            on = (going & (at + 1 < n)).nonzero()[:, 0]
            if step + 1 == MOST or not len(on):
                break
            slots, since = [slots[i] for i in on.tolist()], since[on]
            states = texts.go_on([(slot, 1) for slot in slots], output[at[on]], states[on])
    labels = Labels.cat(done)
    return labels.where(labels.position.argsort(stable=True))
