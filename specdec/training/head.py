"""Train an acceptance head on labels, make its probabilities true, and measure them.

The loss is SpecDec++'s weighted cross-entropy (arXiv 2405.19715, §3.2): a rejection missed costs w
times as much as an acceptance missed. It biases the head towards P / (P + w (1 - P)), which ln w
added to the logit takes back. What error is left after that (of too few data, or of training text
that was mixed with draft tokens) a scale and a shift of the logit may mend. They are fitted on the
tuning rows and folded into the last linear layers, so that inference has nothing to do for them.

Everything reported is measured on rows that neither training nor tuning has seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.measure.calibration import Array, Flags
from specdec.policies.base import TOKEN_SIGNALS, Signal
from specdec.policies.estimating import EstimatingPolicy
from specdec.policies.estimators import ONLINE, online_estimator
from specdec.policies.memory import RowHistory
from specdec.policies.signals import AcceptanceHead
from specdec.training.labels import Labels, Part
from specdec.training.reliability import fit_platt, reliability, sigmoid

OUTPUTS = ("before", "after")
"""The estimates of a head or an online estimator: without and with knowing the candidate."""

POSITION_CLASSES = (0, 8, 32, 128, 512)
"""First output position of each class that acceptance is reported by."""

_SCORE_ROWS = 8192
"""Labels that a head judges in one forward. More take more memory and no less time."""


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How a head is trained; the first two are SpecDec++'s.

    Attributes:
        depth: D, residual blocks.
        reject_weight: w_rej / w_acc.
        epochs: most passes over the labels; training stops after `patience` passes without a lower
            loss on the tuning rows, and keeps the best.
        batch: most positions of a step; fewer where there would be less than 100 steps in an epoch.
        learning_rate: for hidden states of unit size; divided by their root mean square.
        seed: of the order of positions.
    """

    depth: int = 3
    reject_weight: float = 6.0
    epochs: int = 20
    patience: int = 4
    batch: int = 512
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Epoch:
    """A pass over the labels: its number from 1, and the loss on both parts."""

    number: int
    train_loss: float
    tune_loss: float


# ---------------------------------------------------------------------- training


def weighted_loss(logits: Tensor, accepted: Tensor, reject_weight: float) -> Tensor:
    """Mean of -(y ln s + w (1 - y) ln (1 - s)), s the sigmoid of the logit.

    Args:
        logits: [n, 2]; accepted: [n], probabilities y; reject_weight: w.
    """
    y = accepted[:, None]
    loss = y * F.logsigmoid(logits) + reject_weight * (1 - y) * F.logsigmoid(-logits)
    return -loss.mean()


def train_head(
    labels: Labels,
    settings: HeadSettings = HeadSettings(),
    progress: Callable[[Epoch], None] = lambda epoch: None,
) -> AcceptanceHead:
    """A head trained on the labels to train on; both its outputs together.

    Args:
        labels: those to tune on tell when to stop.
        settings: how.
        progress: called after each epoch.
    """
    train, tune = labels.of(Part.TRAIN), labels.of(Part.TUNE)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = AcceptanceHead(labels.hidden.shape[1], settings.depth, settings.reject_weight)
    _begin(head, train)
    size = min(settings.batch, max(32, len(train) // 100))
    # Adam moves each weight by about the rate, and so a logit by the rate times the state's size.
    peak = settings.learning_rate / max(1.0, float(train.hidden.float().square().mean().sqrt()))
    optimizer = torch.optim.AdamW(head.parameters(), peak, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(train) / size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=steps + 1, pct_start=0.1
    )
    best, best_loss, best_epoch = copy.deepcopy(head.state_dict()), math.inf, 0
    for epoch in range(1, settings.epochs + 1):
        total = 0.0
        order = torch.randperm(len(train), generator=generator)
        for chosen in torch.split(order, size):
            batch = train.where(chosen)
            logits = head(batch.hidden.float(), batch.signals)
            loss = weighted_loss(logits, batch.accepted, settings.reject_weight)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        held = weighted_loss(raw_logits(head, tune), tune.accepted, settings.reject_weight).item()
        progress(Epoch(epoch, total / len(train), held))
        if held < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(head.state_dict()), held, epoch
        elif epoch - best_epoch >= settings.patience:
            break
    head.load_state_dict(best)
    return head.eval().requires_grad_(False)


def _begin(head: AcceptanceHead, train: Labels) -> None:
    """Start from the best that can be said without hidden states.

    The candidate's own signals tell most, and steps as small as hidden states need would take long
    to find that out.
    """
    for layer, inputs in ((head.before, 0), (head.after, train.signals.shape[1])):
        nn.init.zeros_(layer.weight)
        signals = F.pad(train.signals[:, :inputs], (0, 1), value=1.0)
        weights = torch.zeros(inputs + 1, requires_grad=True)
        _minimise(weights, signals, train.accepted, head.reject_weight)
        with torch.no_grad():
            layer.weight[0, head.width :] = weights[:-1]
            layer.bias[0] = weights[-1]


def _minimise(weights: Tensor, x: Tensor, accepted: Tensor, reject_weight: float) -> None:
    """Minimise the weighted loss of logits x w in place; a faint pull towards 0 decides ties."""
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = weighted_loss((x @ weights)[:, None], accepted, reject_weight)
        loss = loss + 1e-4 * weights.square().sum()
        torch.autograd.backward(loss)
        return loss.item()

    optimizer.step(closure)  # type: ignore[no-untyped-call]


@torch.no_grad()
def raw_logits(head: AcceptanceHead, labels: Labels) -> Tensor:
    """float32 [n, 2], as trained: with the bias of the weights."""
    columns = (torch.split(each, _SCORE_ROWS) for each in (labels.hidden, labels.signals))
    chunks = zip(*columns, strict=True)
    return torch.cat([head(hidden.float(), signals) for hidden, signals in chunks])


# ------------------------------------------------------------------- calibration


def calibrate(head: AcceptanceHead, labels: Labels) -> tuple[AcceptanceHead, dict[str, Any]]:
    """A head whose de-biased logits are scaled and shifted, if that makes them truer.

    Whether it does is asked of the tuning rows, crosswise: of each half with what fits the other
    half. A few rows can be fitted well without meaning anything.

    Args:
        head: left as it is.
        labels: those to tune on are used.

    Returns:
        The head, and for each output the scale and shift, whether they are `applied`, and the
        crosswise ECE and log-loss without and with them.
    """
    tune = labels.of(Part.TUNE)
    logits, accepted = head_logits(head, tune), tune.acceptance
    half = np.unique(tune.row.numpy(), return_inverse=True)[1] % 2 == 0
    result, found = copy.deepcopy(head), {}
    bias = math.log(head.reject_weight)
    for i, name in enumerate(OUTPUTS):
        x = logits[:, i]
        crosswise = x.copy()
        for fitted, asked in ((half, ~half), (~half, half)):
            a, b = fit_platt(x[fitted], accepted[fitted])
            crosswise[asked] = a * x[asked] + b
        plain, mended = reliability(sigmoid(x), accepted), reliability(sigmoid(crosswise), accepted)
        scale, shift = fit_platt(x, accepted)
        better = all(mended[key] < plain[key] for key in ("ece", "log_loss"))
        found[name] = {
            "scale": scale,
            "shift": shift,
            "applied": better and scale > 0,
            "tune": {key: plain[key] for key in ("ece", "log_loss")},
            "tune_calibrated": {key: mended[key] for key in ("ece", "log_loss")},
        }
        if found[name]["applied"]:
            # a (x + ln w) + b as x' + ln w: the layer's output x' is a x + (a - 1) ln w + b.
            layer: nn.Linear = getattr(result, name)
            layer.weight.data *= scale
            layer.bias.data.mul_(scale).add_((scale - 1) * bias + shift)
    return result, found


# ------------------------------------------------------------------- measurement


def evaluate_head(
    as_trained: AcceptanceHead, saved: AcceptanceHead, labels: Labels
) -> dict[str, Any]:
    """How good a head's probabilities are on rows it has not seen, and what is to be had free.

    The free estimators learn from the rows that the head was trained and tuned on, then predict the
    same held-out rows as the head.

    Returns:
        By part ("held_out", "other" if there are such rows): counts, acceptance by class of
        position, and `estimators`: by name and output what `reliability` says. Of the head there
        are three: "as trained", "de-biased", and "head", the one to save. And `ceiling`, by output:
        see `ceilings`.
    """
    report = {}
    for part in (Part.HELD_OUT, Part.OTHER):
        measured = labels.of(part)
        if not len(measured):
            continue
        logits = {
            "as trained": raw_logits(as_trained, measured).double().numpy(),
            "de-biased": head_logits(as_trained, measured),
            "head": head_logits(saved, measured),
        }
        estimators = {
            name: {
                output: reliability(sigmoid(each[:, i]), measured.acceptance)
                for i, output in enumerate(OUTPUTS)
            }
            for name, each in logits.items()
        }
        learned = labels.of(Part.TRAIN, Part.TUNE)
        estimators |= free_estimators(learned, measured)
        report[part.name.lower()] = {
            **describe_labels(measured),
            "estimators": estimators,
            "ceiling": ceilings(measured),
        }
    return report


def ceilings(measured: Labels) -> dict[str, dict[str, Any]]:
    """`reliability` by output, of who knows both models' distributions: none knows more."""
    knowable = measured.knowable.double().numpy()
    return {
        output: reliability(knowable[:, i], measured.acceptance) for i, output in enumerate(OUTPUTS)
    }


def describe_labels(labels: Labels) -> dict[str, Any]:
    """Rows, positions, acceptance rate, and both by class of position."""
    position, accepted = labels.position.numpy(), labels.acceptance
    index = np.digitize(position, POSITION_CLASSES) - 1
    classes = {}
    for i, first in enumerate(POSITION_CLASSES):
        if (chosen := accepted[index == i]).size:
            rate = float(chosen.mean())
            classes[str(first)] = {"positions": chosen.size, "acceptance_rate": rate}
    return {
        "rows": labels.rows,
        "positions": len(labels),
        "acceptance_rate": float(accepted.mean()),
        "by_first_position": classes,
    }


def free_estimators(learned: Labels, measured: Labels) -> dict[str, dict[str, dict[str, Any]]]:
    """`reliability` by online estimator and output, after it has learned from other rows.

    Both see what the engine would show them: hard verdicts, and each row's rate of acceptance so
    far, here as if every position had been judged.
    """
    rate = float(learned.acceptance.mean())
    (shown, typical, verdicts), (signals, typical_measured, _) = (
        _online_view(labels, rate) for labels in (learned, measured)
    )
    result = {}
    for name in ONLINE:
        estimator = online_estimator(name)
        for chosen in np.array_split(np.arange(len(learned)), max(1, len(learned) // 16)):
            estimator.learn(shown[chosen], typical[chosen], verdicts[chosen])
        predicted = estimator.predict(signals, typical_measured)
        result[name] = {
            output: reliability(each, measured.acceptance)
            for output, each in zip(OUTPUTS, predicted, strict=True)
        }
    return result


def _online_view(labels: Labels, rate: float) -> tuple[Array, Array, Flags]:
    """Signals [n, len(Signal)], typical rates [n] and verdicts [n] as an online estimator sees."""
    signals = np.zeros((len(labels), len(Signal)))
    signals[:, list(TOKEN_SIGNALS)] = labels.signals.numpy()
    verdicts = np.random.default_rng(0).random(len(labels)) < labels.acceptance
    weight = EstimatingPolicy.PRIOR_WEIGHT
    typical = np.empty(len(labels))
    history, current = RowHistory(), -1
    for i, (row, stood) in enumerate(zip(labels.row.tolist(), verdicts, strict=True)):
        if row != current:
            history, current = RowHistory(), row
        typical[i] = (history.accepted + weight * rate) / (history.judged + weight)
        history.add(1, int(stood))
    return signals, typical.clip(0.02, 0.98), verdicts


def early_look(labels: Labels) -> dict[str, Any]:
    """What the first labels say: acceptance by position, and what the free estimators know.

    They learn from one half of the rows and are measured on the other.

    Returns:
        What `describe_labels` says, `auc` by estimator, and `ceiling`, the most that AUC can be;
        None with fewer than two rows.
    """
    half = labels.row < labels.row.float().median()
    learned, measured = labels.where(half), labels.where(~half)
    auc: dict[str, float | None] = dict.fromkeys(ONLINE)
    most: float | None = None
    if len(learned) and len(measured):
        found = free_estimators(learned, measured)
        auc = {name: outputs["after"]["auc"] for name, outputs in found.items()}
        most = ceilings(measured)["after"]["auc"]
    return {**describe_labels(labels), "auc": auc, "ceiling": most}


def head_logits(head: AcceptanceHead, labels: Labels) -> Array:
    """float64 [n, 2], de-biased, as the engine reads them."""
    logits: Array = raw_logits(head, labels).double().numpy() + math.log(head.reject_weight)
    return logits
