"""Labels of EAGLE-3 drafts: rounds from every place, each judged in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.lossless.sampling import SamplingBatch, probabilities
from specdec.request import Request, SamplingParams
from specdec.simulate.record import record
from specdec.simulate.transcripts import Text
from specdec.training import eagle_labels
from specdec.training.eagle_labels import MOST
from specdec.training.examples import Example
from specdec.training.head import HeadSettings, train_head
from specdec.training.judging import Judged, judge
from specdec.training.labelling import collect
from specdec.training.labels import Labels, LabelSettings, Part
from tests.specdec.eagle_drafts import (
    FITTED,
    Weights,
    eagle_pair,
    fitted_weights,
    foreseeable_target,
    fused,
    plain_draft,
    save,
    target_states,
)
from tests.specdec.simulate.test_record import GREEDY, SAMPLED, texts_of
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import prompts


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return foreseeable_target()


@pytest.fixture(scope="module")
def weights(target: PreTrainedModel) -> Weights:
    return fitted_weights(FITTED, target)


@pytest.fixture(scope="module")
def pair(
    target: PreTrainedModel, weights: Weights, tmp_path_factory: pytest.TempPathFactory
) -> TinyPair:
    folder = tmp_path_factory.mktemp("eagle") / "draft"
    return eagle_pair(target, save(folder, FITTED, weights, "speculators"))


def texts(pair: TinyPair, sampling: SamplingParams) -> list[Text]:
    each = enumerate(prompts([7, 1, 12, 5, 9], seed=3))
    own = replace(sampling, max_new_tokens=12)
    return texts_of(pair, [Request(f"row {i}", ids, own) for i, ids in each])


def labelled(pair: TinyPair, rows: list[Text], sampling: SamplingParams) -> Labels:
    examples = [
        (Example(r.request.id, r.request.prompt_ids, r.output_ids), Part.TUNE) for r in rows
    ]
    return Labels.cat(list(collect(pair, examples, LabelSettings(sampling), batch=3)))


def by_hand(
    text: Text, at: int, target: PreTrainedModel, weights: Weights
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each step from `at` along the text: normed states, the draft's logits, the target's."""
    tokens = [*text.request.prompt_ids, *text.output_ids]
    start = len(text.request.prompt_ids)
    with torch.no_grad():
        judging = target(torch.tensor([tokens])).logits[0, start - 1 : -1]
    x = fused(weights, target_states(target, tokens[: start + at - 1]))
    found = []
    for place in range(at, min(at + MOST, len(text.output_ids))):
        logits, made = plain_draft(weights, FITTED, target, tokens[1 : start + place], x)
        last = made[-1] * (made[-1].pow(2).mean() + 1e-6).rsqrt() * weights["norm.weight"]
        found.append((last, logits[-1], judging[place]))
        x = torch.cat([x, made[-1:]])
    return found


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_label_is_of_a_round_along_the_text(
    pair: TinyPair, target: PreTrainedModel, weights: Weights, sampling: SamplingParams
) -> None:
    rows = texts(pair, sampling)
    labels = labelled(pair, rows, sampling)
    params = SamplingBatch.of([sampling], torch.device("cpu"))
    later = 0
    for number, text in enumerate(rows):
        mine = labels.where(labels.row == number)
        # A token with a feature and one behind it come first.
        first = max(0, 2 - len(text.request.prompt_ids))
        places = range(first, len(text.output_ids))
        assert sorted(mine.position.tolist()) == mine.position.tolist()
        assert sorted(set(mine.position.tolist())) == list(places)
        steps = {at: by_hand(text, at, target, weights) for at in places}
        for at in places:
            own = mine.where(mine.position == at)
            # The round that begins here, and then those that began earlier, as far as they got.
            rounds = [
                steps[since][at - since] for since in range(at, max(first, at - MOST + 1) - 1, -1)
            ]
            states = torch.stack([state for state, _, _ in rounds])
            gaps = (own.hidden.float()[:, None] - states).abs().amax(-1)
            which = gaps.argmin(-1).tolist()
            assert gaps.amin(-1).max() < 0.02
            assert which[0] == 0 and which == sorted(set(which))
            later += len(which) - 1
            for label, (_, draft, judging) in enumerate(rounds[i] for i in which):
                p, q = (probabilities(x[None], params)[0] for x in (judging, draft))
                raw = torch.log_softmax(draft, -1)
                token = int((raw - own.signals[label, 0]).abs().argmin())
                assert raw[token] == pytest.approx(float(own.signals[label, 0]), abs=1e-2)
                assert float(own.accepted[label]) == pytest.approx(
                    min(1.0, float(p[token] / q[token])), abs=2e-2
                )
                overlap = float(torch.minimum(p, q).sum())
                known = own.knowable[label].tolist()
                assert known == pytest.approx([overlap, float(own.accepted[label])], abs=2e-2)
    assert later > 5, "the test needs rounds that go on"


def test_no_number_is_drawn_twice(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that meet at a position have seeds of their own."""
    drawn: list[tuple[int, int]] = []

    def watched(p: Tensor, q: Tensor, rows: SamplingBatch, at: Tensor, *how: Any) -> Judged:
        drawn.extend(zip(rows.seed.tolist(), at.tolist(), strict=True))
        return judge(p, q, rows, at, *how)

    monkeypatch.setattr(eagle_labels, "judge", watched)
    labels = labelled(pair, texts(pair, SAMPLED), SAMPLED)
    assert len(drawn) == len(labels) == len(set(drawn))
    assert len(set(labels.position.tolist())) < len(labels) / 2


def test_greedy_rounds_go_on_where_the_engine_s_would(pair: TinyPair) -> None:
    rows = texts(pair, GREEDY)
    labels = labelled(pair, rows, GREEDY)
    for number, (text, transcript) in enumerate(zip(rows, record(pair, rows), strict=True)):
        n, first = len(text.output_ids), max(0, 2 - len(text.request.prompt_ids))
        runs = enumerate(transcript.runs[first:n].tolist(), first)
        expected = sum(1 + min(run, MOST - 1, n - 1 - at) for at, run in runs)
        assert int((labels.row == number).sum()) == expected


def test_a_text_too_short_for_a_round_has_none(pair: TinyPair) -> None:
    rows = [(Example("a", (5,), (7,)), Part.TRAIN), (Example("b", (5,), (7, 8)), Part.TRAIN)]
    (labels,) = collect(pair, rows, LabelSettings(SAMPLED))
    assert labels.row.tolist() == [1] and labels.position.tolist() == [1]
    (none,) = collect(pair, rows[:1], LabelSettings(SAMPLED))
    assert len(none) == 0 and none.hidden.shape == (0, FITTED.hidden)


def test_labels_repeat_and_a_head_is_as_wide_as_the_draft(pair: TinyPair) -> None:
    rows = texts(pair, SAMPLED)
    labels, again = (labelled(pair, rows, SAMPLED) for _ in range(2))
    assert torch.equal(labels.signals, again.signals)
    assert torch.equal(labels.accepted, again.accepted)
    parts = torch.tensor([int(Part.TRAIN), int(Part.TUNE)], dtype=torch.int8)
    split = replace(labels, part=parts[(labels.row % 2).long()])
    head = train_head(split, HeadSettings(depth=1, epochs=1))
    assert head.width == FITTED.hidden
