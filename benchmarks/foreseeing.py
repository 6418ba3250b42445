"""Estimators of acceptance that see more or less of both models; for `foresight.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.lossless.sampling import Draw, SamplingBatch, probabilities, sample, uniform
from specdec.model.features import Features
from specdec.policies.base import Signal
from specdec.policies.signals import read_signals
from specdec.request import SamplingParams
from specdec.training.judging import judge

LAGS = 8
"""How far behind the target's state may be; of more it is taken for so many."""

DRAWS = 3
"""Candidates at each place. More tell the same state's law better, and take more time."""

HIDDEN = 128
"""Width of a network. 256 is no better here."""


@dataclass
class Places:
    """One row's n places; `draft` and `target` are float16 states, the target's of two layers."""

    text: Tensor  # [n], what the target wrote
    draft: Tensor  # [n, width]
    target: Tensor  # [n, 2 * width]: of the middle layer, and the last
    signals: Tensor  # [n, DRAWS, 3]: LOG_Q, LOG_TOP, ENTROPY
    alpha: Tensor  # [n, DRAWS]
    beta: Tensor  # [n]
    stands: Tensor  # [n]: alpha of the text's token
    falls: Tensor  # [n]: alpha of a candidate that was rejected


class Numbered:
    """Takes the place of a head in a recording: numbers the draft's states, and keeps them."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.count = 0

    def debiased(self, hidden: Tensor, token_signals: Tensor) -> Tensor:
        numbers = torch.arange(self.count, self.count + len(hidden)).float()
        self.count += len(hidden)
        self.kept.append(hidden.half().clone())
        return torch.stack([numbers, numbers], -1)


class Noted:
    """Makes features of nothing; remembers the states that they would have been made of."""

    states: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        self.states = states
        return states[:, :1]


@torch.inference_mode()
def write(pair: Any, prompts: list[tuple[int, ...]], tokens: int, seed: int) -> list[Places]:
    """Let the target write, and the draft read along; what both say of each place.

    Args:
        tokens: of each row, at most; temperature 1.
    """
    models, inner, middle = (pair.draft, pair.target), Noted(), pair.target.layers // 2
    caches = [model.new_cache(0, 0) for model in models]
    caches[1].keep_features(Features((middle,), 1, inner))
    for cache in caches:
        cache.grow(len(prompts), max(map(len, prompts)) + tokens)
    each = [SamplingParams(tokens, 1.0, seed=seed + i) for i in range(len(prompts))]
    sampling = SamplingBatch.of(each, pair.draft.device)
    feed, places = [list(prompt) for prompt in prompts], [list[Any]() for _ in prompts]
    active = list(range(len(prompts)))
    while active:
        rows = [(slot, len(feed[slot])) for slot in active]
        packed = torch.tensor([token for slot in active for token in feed[slot]])
        last = torch.tensor([count for _, count in rows]).cumsum(0) - 1
        states = [m.forward(c, rows, packed)[last] for m, c in zip(models, caches, strict=True)]
        logits, verified = (
            model.logits(each)[:, : pair.vocab_size].float()
            for model, each in zip(models, states, strict=True)
        )
        at = torch.tensor([len(places[slot]) for slot in active])
        params = sampling.rows(torch.tensor(active))
        p, q = probabilities(verified, params), probabilities(logits, params)
        x = sample(p, uniform(params.seed, at, Draw.BONUS))
        drawn = []
        for draw in range(DRAWS):
            numbers = params.in_round(torch.full_like(at, draw))
            judged = judge(verified, logits, numbers, at, "rejection")
            signals = read_signals(logits, judged.candidates, states[0], frozenset(Signal))
            drawn.append((signals[:, :3], judged.accepted))
        # Of the text's token, and of a candidate that would have been rejected there.
        y = sample((q - p).clamp(min=0), uniform(params.seed, at, Draw.ACCEPT)).clamp(min=0)
        alphas = [p.gather(1, z[:, None]) / q.gather(1, z[:, None]) for z in (x, y)]
        columns = (
            x,
            states[0].half(),
            torch.cat([inner.states[last], states[1]], -1).clamp(-6e4, 6e4).half(),
            *(torch.stack(column, 1) for column in zip(*drawn, strict=True)),
            judged.knowable[:, 0],
            *(alpha[:, 0].nan_to_num(0.0).clamp(max=1) for alpha in alphas),
        )
        for place, slot in zip(zip(*columns, strict=True), active, strict=True):
            places[slot].append(place)
            feed[slot] = [int(place[0])]
        ends = pair.eos_token_ids
        active = [
            slot for slot in active if len(places[slot]) < tokens and feed[slot][0] not in ends
        ]
    return [Places(*map(torch.stack, zip(*row, strict=True))) for row in places]


# ------------------------------------------------------------------------- estimators


@dataclass(frozen=True)
class Sees:
    """What an estimator sees beside the cheap signals: columns of the states."""

    draft: bool = False
    target: str = ""  # "", "last", "both": the middle layer as well
    hard: bool = False  # fitted to 0 and 1, as if candidates had been verified


ESTIMATORS = {
    "cheap signals": Sees(),
    "draft's state, 0/1 labels": Sees(draft=True, hard=True),
    "draft's state": Sees(draft=True),
    "draft's, target's last": Sees(draft=True, target="last"),
    "draft's, target's middle and last": Sees(draft=True, target="both"),
}


@dataclass
class Examples:
    """n judged candidates: states, signals [n, 3], lags [n], alpha and beta [n]."""

    draft: Tensor
    target: Tensor
    signals: Tensor
    lags: Tensor
    alpha: Tensor
    beta: Tensor

    @classmethod
    def of(cls, rows: list[Places], lags: Tensor | int, draws: int = DRAWS) -> Examples:
        """Each place `draws` times; a lag for each, or drawn from 1 to LAGS for each anew."""
        found: list[tuple[Tensor, ...]] = []
        for row in rows:
            at = torch.arange(len(row.beta)).repeat_interleave(draws)
            draw = torch.arange(draws).repeat(len(row.beta))
            lag = torch.randint(1, LAGS + 1, at.shape) if lags is ANY else torch.full_like(at, lags)
            at, draw, lag = (x[at >= lag] for x in (at, draw, lag))
            states = row.draft[at], row.target[at - lag]
            found.append((*states, row.signals[at, draw], lag, row.alpha[at, draw], row.beta[at]))
        return cls(*(torch.cat(x) for x in zip(*found, strict=True)))

    def where(self, chosen: Tensor) -> Examples:
        return Examples(*(getattr(self, f.name)[chosen] for f in fields(self)))


ANY: Any = None


class Net(nn.Module):
    """A hidden layer over what is seen of the states; cheap signals go past it.

    Two of them, for before and after the draw, which differ in whether they see the candidate.
    """

    def __init__(self, sees: Sees, like: Examples) -> None:
        super().__init__()
        self.sees = sees
        x = self._states(like.where(torch.randperm(len(like.lags))[:20_000]))
        width = x.shape[1]
        self.mean, self.std = x.mean(0), x.std(0, correction=0) + 1e-3
        both = range(2 if width else 0)
        self.inner = nn.ModuleList(nn.Linear(width, HIDDEN) for _ in both)
        self.outer = nn.ModuleList(nn.Linear(HIDDEN, 1) for _ in both)
        self.direct = nn.ModuleList(nn.Linear(n + LAGS, 1) for n in (3, 5))
        for layer in (*self.outer, *self.direct):
            nn.init.zeros_(layer.weight)

    def _states(self, of: Examples) -> Tensor:
        parts = [of.draft] if self.sees.draft else []
        if self.sees.target:
            width = of.target.shape[1] // 2
            parts.append(of.target[:, width if self.sees.target == "last" else 0 :])
        return torch.cat(parts, -1).float() if parts else torch.empty(len(of.lags), 0)

    def forward(self, of: Examples) -> Tensor:
        """Logits [n, 2], before and after the draw."""
        log_q, log_top, entropy = of.signals.clamp(min=-12).unbind(-1)
        sure = log_top - torch.log((-torch.expm1(log_top)).clamp(min=1e-3))
        lags = F.one_hot(of.lags.clamp(max=LAGS) - 1, LAGS).float()
        before = torch.cat([torch.stack([sure, entropy, entropy.sqrt()], -1), lags], -1)
        after = torch.cat([before, torch.stack([log_q, log_q - log_top], -1)], -1)
        x = ((self._states(of) - self.mean) / self.std).clamp(-8, 8)
        logits = []
        for i, cheap in enumerate((before, after)):
            logits.append(self.direct[i](cheap))
            if x.shape[1]:
                seen = F.dropout(F.silu(self.inner[i](x)), 0.3, self.training)
                logits[i] = logits[i] + self.outer[i](seen)
        return torch.cat(logits, -1)


def loss_of(logits: Tensor, of: Examples) -> Tensor:
    """Cross-entropy with the soft labels, of both outputs."""
    return F.binary_cross_entropy_with_logits(logits, of.alpha[:, None].expand(-1, 2))


def fitted(sees: Sees, train: list[Places], tune: list[Places], seed: int = 0) -> Net:
    """A network fitted to rows at random lags; others say when to stop."""
    torch.manual_seed(seed)
    known, held = Examples.of(train, ANY), Examples.of(tune, ANY)
    net = Net(sees, known)
    best, least, waited = net.state_dict(), float("inf"), 0
    # What cheap signals say is found sooner than what states say.
    quick, slow = list(net.direct.parameters()), [*net.inner.parameters(), *net.outer.parameters()]
    groups: Any = [{"params": quick, "lr": 3e-3}, {"params": slow, "lr": 3e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.3)
    while waited < 3:
        known = Examples.of(train, ANY)
        if sees.hard:
            known.alpha = (torch.rand_like(known.alpha) < known.alpha).float()
        net.train()
        for chosen in torch.randperm(len(known.lags)).split(256):
            batch = known.where(chosen)
            optimizer.zero_grad()
            loss_of(net(batch), batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        net.eval()
        with torch.no_grad():
            now = float(loss_of(net(held), held))
        waited += 1
        if now < least:
            best, least, waited = {k: v.clone() for k, v in net.state_dict().items()}, now, 0
    net.load_state_dict(best)
    return net.requires_grad_(False)
