"""The loss of a draft, and its way back through an LM head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from specdec.training.scores import LOGIT_ROWS

LEAST_TAIL = 1e-6
"""Below this the tail's probability is not believed: it is 1 minus a sum in float32.

Raised, more of a sure draft's gradient is lost.
"""


def distill_loss(
    logits: Tensor, tokens: Tensor, top_ids: Tensor, top_probs: Tensor, ce_weight: float
) -> Tensor:
    """Loss of each position: ce_weight * CE(token) + KL(p || q) over top-k and tail.

    Args:
        logits: of the draft, float32 [n, V].
        tokens: the target's, int64 [n].
        top_ids, top_probs: the target's top-k, int64 and float32 [n, k].
        ce_weight: factor on the cross-entropy.

    Returns:
        float32 [n], in nats.

    Example:
        p = (0.5, 0.3 | tail 0.2) and q = (0.5, 0.25 | tail 0.25) are
        0.3 ln(0.3/0.25) + 0.2 ln(0.2/0.25) = 0.0101 apart.
    """
    total = torch.logsumexp(logits, -1)
    # One gather: its gradient is a tensor as large as the logits.
    picked = logits.gather(1, torch.cat([top_ids, tokens[:, None]], 1)) - total[:, None]
    log_q, cross_entropy = picked[:, :-1], -picked[:, -1]
    q_tail = (1 - log_q.exp().sum(-1)).clamp(min=LEAST_TAIL)
    p_tail = (1 - top_probs.sum(-1)).clamp(min=0)
    divergence = (torch.xlogy(top_probs, top_probs) - top_probs * log_q).sum(-1)
    divergence = divergence + torch.xlogy(p_tail, p_tail) - p_tail * q_tail.log()
    return ce_weight * cross_entropy + divergence


def backward_through_head(
    hidden: Tensor, head: nn.Module, losses: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """Add gradients of a sum of losses; returns the losses [n].

    The LM head runs in chunks, each with its own backward pass to the hidden states, so that only
    LOGIT_ROWS rows of logits exist at a time and none is computed twice.

    Args:
        hidden: [n, hidden], with a graph behind it.
        head: makes logits of them; its own weights stay as they are.
        losses: of float32 logits of some rows, and which rows.
    """
    states = hidden.detach()
    gradients, found = list[Tensor](), list[Tensor]()
    for begin in range(0, len(states), LOGIT_ROWS):
        rows = slice(begin, begin + LOGIT_ROWS)
        chunk = states[rows].requires_grad_()
        each = losses(head(chunk).float(), rows)
        gradients += torch.autograd.grad(each.sum(), [chunk])
        found.append(each.detach())
    torch.autograd.backward([hidden], [torch.cat(gradients).to(hidden.dtype)])
    return torch.cat(found)
