"""The mathematics of the policy update: log-probs without logits, ratios, clipping, KL, importance weights.

Pure functions on tensors; nothing of the project is imported. Responses are ragged and never padded here: the
T response tokens of a (micro-)batch lie in one flat row, and `row[t]` says to which response token t belongs.
Every reduction is a fixed weight per response, computed once over the whole batch (all micro-batches and all
processes). A loss is then a plain weighted sum: it cannot depend on how the batch was split.

    >>> import torch
    >>> weight = response_weights(torch.tensor([2, 1]), "token_mean")  # 3 tokens in all: each counts a third
    >>> row, zero = torch.tensor([0, 0, 1]), torch.zeros(3)
    >>> loss, _ = policy_loss(zero, zero, torch.tensor([1.0, 1.0, -2.0]), weight[row], row)
    >>> round(loss.item(), 6)  # on policy all ratios are 1, and the advantages sum to 0
    0.0
"""

import math
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
# Log-probs of the sampled tokens


CPU_LOGITS, GPU_LOGITS = 2**24, 2**28  # logits that exist at once: 64 MiB and 1 GiB in float32


def chunk_size(head: torch.Tensor) -> int:
    """Tokens whose logits are computed at once: fewer, the larger the vocabulary is."""
    return max(1, (GPU_LOGITS if head.is_cuda else CPU_LOGITS) // len(head))


def _chunk_logps(hidden, head, targets, temperature):
    # The softmax is taken in float32, whatever the product before it was computed in.
    logits = (hidden @ head.T).float() / temperature
    norm = logits.logsumexp(-1)
    logp = logits.gather(-1, targets[:, None])[:, 0] - norm
    with torch.no_grad():
        entropy = norm - (logits.softmax(-1) * logits).sum(-1)
    return logp, entropy


def token_logps(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Log-probs [T] of `targets` [T] and entropies [T] (nats, no gradient); hidden [T, d], head [V, d].

    The head is applied to `chunk` tokens at a time and again in the backward pass: no [T, V] tensor is kept.
    """
    parts, chunk, head = [], chunk or chunk_size(head), head.to(hidden.dtype)
    for start in range(0, len(targets), chunk):
        args = hidden[start : start + chunk], head, targets[start : start + chunk], temperature
        # One chunk needs no recomputation: its logits are as small as a chunk's may be anyway.
        once = not torch.is_grad_enabled() or len(targets) <= chunk
        parts.append(_chunk_logps(*args) if once else checkpoint(_chunk_logps, *args, use_reentrant=False))
    if not parts:
        return hidden.new_zeros(0).float(), hidden.new_zeros(0).float()
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def head_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, loss_of: Callable,
    temperature: float = 1.0, chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss, log-probs [T], entropies [T]) of hidden states [T, d] and a head [V, d]; no [T, V] ever exists.

    loss_of(logp [t], part) is the loss (a sum) of the tokens `part` (a slice) with log-probs `logp`: each
    token's loss must depend on its own log-prob only. The loss has a gradient; the rest has none.
    """
    chunk = chunk or chunk_size(head)
    return _HeadLoss.apply(hidden, head, targets, loss_of, temperature, min(chunk, max(1, len(targets))))


class _HeadLoss(torch.autograd.Function):
    """Forward and backward of a chunk's head in one go: with p = softmax(z), z = W h / T, and g = dloss/dlogp

        dz = g (onehot - p),  dh = W^T dz / T,  dW = dz h^T / T

    are known as soon as logp is, while the chunk's p is at hand. autograd alone would keep all p, or make
    them twice. The product W^T p gives the entropy, too: sum p z = h (W^T p) / T.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, loss_of, temperature, chunk):
        weight, d_hidden = head.to(hidden.dtype), torch.empty_like(hidden)
        # float32: many small chunks add up in it.
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        logps, entropies = hidden.new_empty(2, len(targets), dtype=torch.float32)
        # Allocated once: on a CPU, fresh pages for every chunk would cost a tenth of the time.
        logits_of_chunk = hidden.new_empty(chunk, len(head))
        p_of_chunk = hidden.new_empty(chunk, len(head), dtype=torch.float32)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            h, target = hidden[part] / temperature, targets[part]
            z = torch.mm(h, weight.T, out=logits_of_chunk[: len(h)])
            p = torch.softmax(z, -1, dtype=torch.float32, out=p_of_chunk[: len(h)])
            top, where = z.max(-1, keepdim=True)
            norm = (top.float() - p.gather(-1, where).log())[:, 0]  # logsumexp; p at the top is never 0
            logp = z.gather(-1, target[:, None])[:, 0].float() - norm
            g, part_loss = _slope(loss_of, logp, part)
            loss += part_loss
            p = p.to(hidden.dtype)
            mean = p @ weight
            # bfloat16 would round this sum to a few hundredths: there it is made from the logits.
            energy = (
                (mean * h).sum(-1) if h.dtype == torch.float32 else torch.linalg.vecdot(p.float(), z.float())
            )
            logps[part], entropies[part] = logp, norm - energy
            g = (g / temperature)[:, None].to(h.dtype)
            d_hidden[part] = g * (weight[target] - mean)
            if d_head is not None:
                g = g * hidden[part]
                d_head.index_add_(0, target, g.float())
                if h.dtype == torch.float32:
                    d_head.addmm_(p.T, g, alpha=-1)
                else:
                    d_head -= p.T @ g
        # Handed over, not saved: autograd may keep them as they are instead of copying.
        ctx.gradients = d_hidden, None if d_head is None else d_head.to(head.dtype)
        ctx.mark_non_differentiable(logps, entropies)
        return loss, logps, entropies

    @staticmethod
    def backward(ctx, slope, *_):
        (d_hidden, d_head), ctx.gradients = ctx.gradients, None
        d_head = None if d_head is None else d_head.mul_(slope.to(d_head.dtype))
        return d_hidden.mul_(slope.to(d_hidden.dtype)), d_head, None, None, None, None


def _slope(loss_of, logp, part):
    # Derivative and value of the loss of one chunk's tokens.
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        loss = loss_of(logp, part)
        return torch.autograd.grad(loss, logp)[0], loss.detach()


# ------------------------------------------------------------------------------------------------------------
# Ingredients of the loss


def response_weights(lengths: torch.Tensor, reduction: str, constant: float | None = None) -> torch.Tensor:
    """Weight [N] that each token of a response gets; `lengths` [N], in tokens, are those of the WHOLE batch.

    token_mean: 1 / all tokens (DAPO, 2503.14476). sequence_mean: mean of response means (GRPO, 2402.03300).
    constant: 1 / (N * constant), blind to length (Dr. GRPO, 2503.20783; constant = the response cap).
    """
    lengths = lengths.double()
    if reduction == "token_mean":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    if reduction == "sequence_mean":
        return 1 / (len(lengths) * lengths.clamp(min=1))
    if reduction == "constant":
        if not constant or constant <= 0:
            raise ValueError(
                f"constant ({constant}) must be a positive number of tokens for reduction 'constant'"
            )
        return torch.full_like(lengths, 1 / (len(lengths) * constant))
    raise ValueError(f"reduction ({reduction!r}) must be token_mean, sequence_mean or constant")


def kl_estimate(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str = "k3") -> torch.Tensor:
    """Estimate of KL(policy || reference) per token [T], in nats: k1, k2 or k3 (Schulman's note)."""
    d = logp - ref_logp
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"estimator ({estimator!r}) must be k1, k2 or k3")


def row_sum(values: torch.Tensor, row: torch.Tensor, n: int) -> torch.Tensor:
    """Sums [n] of the flat token values [T] that belong to each response."""
    return torch.zeros(n, dtype=values.dtype, device=values.device).index_add(0, row, values)


def sequence_ratio(logp: torch.Tensor, old_logp: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """GSPO's ratio exp(mean of logp - old_logp over a response), spread over its tokens [T] (2507.18071)."""
    n = int(row.max()) + 1 if len(row) else 0
    tokens = row_sum(torch.ones_like(logp), row, n).clamp(min=1)
    return (row_sum(logp - old_logp, row, n) / tokens).exp()[row]


def tis_weight(
    old_logp: torch.Tensor, sampler_logp: torch.Tensor, cap: float, row: torch.Tensor | None = None
) -> torch.Tensor:
    """Truncated importance weight min(exp(old - sampler), cap) per token [T], without gradient.

    It corrects for a sampler whose numerics differ from the trainer's. With `row`: one weight per response,
    from the sum over its tokens.
    """
    gap = (old_logp - sampler_logp).detach()
    if row is not None and len(row):
        gap = row_sum(gap, row, int(row.max()) + 1)[row]
    # exp overflows float32 at 88; the cap makes everything above it equal anyway.
    return gap.clamp(max=60).exp().clamp(max=cap)


# ------------------------------------------------------------------------------------------------------------
# The loss


def policy_loss(
    logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, weight: torch.Tensor,
    row: torch.Tensor, *, ratio: str = "token", clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float | None = None,
    sampler_logp: torch.Tensor | None = None, tis_cap: float | None = None,
    ref_logp: torch.Tensor | None = None, kl_coef: float = 0.0, kl_estimator: str = "k3",
) -> tuple[torch.Tensor, dict]:  # fmt: skip
    """Weighted sum over T tokens of the clipped policy loss, and sums (not means) of its diagnostics.

    All tensors are flat [T]; `advantage` and `weight` (from response_weights) are spread over the tokens.
    -min(r A, clip(r, 1 - low, 1 + high) A), r per token (PPO, GRPO) or per sequence (GSPO); cispo:
    -stopgrad(clip(r)) A logp (2506.13585). Dual clip bounds the loss by -c A where A < 0 (1912.09729).
    """
    if ratio == "sequence":
        r = sequence_ratio(logp, old_logp, row)
    elif ratio in ("token", "cispo"):
        # Ratios beyond e^20 only come from a broken run; the clamp keeps them finite, so that it can be seen.
        r = (logp - old_logp).clamp(-20, 20).exp()
    else:
        raise ValueError(f"ratio ({ratio!r}) must be token, sequence or cispo")
    clipped = r.clamp(1 - clip_low, 1 + clip_high)
    if ratio == "cispo":
        loss = -clipped.detach() * advantage * logp
        outside = r.detach() != clipped.detach()
    else:
        loss = -torch.minimum(r * advantage, clipped * advantage)
        outside = (clipped * advantage < r * advantage).detach()
        if dual_clip is not None:
            loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    if tis_cap is not None and sampler_logp is not None:
        loss = loss * tis_weight(old_logp, sampler_logp, tis_cap)
    stats = {"clip_fraction": outside.sum(dtype=torch.float64)}
    if ref_logp is not None:
        kl = kl_estimate(logp, ref_logp, kl_estimator)
        loss = loss + kl_coef * kl
        stats["kl"] = kl.detach().sum(dtype=torch.float64)
    return (loss * weight.to(loss.dtype)).sum(), stats


def mixture_logp(logp: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """log(e^a + e^b pi) per token: a sampler that forces a token now and then (AdaptThink)."""
    return torch.logaddexp(a, b + logp)


def drpo_objective(
    score: torch.Tensor, length: torch.Tensor, group: torch.Tensor, correct: torch.Tensor, kl: torch.Tensor,
    *, lam: float = 0.1, tau: float = 10.0, l_max: float = 8192, kl_coef: float = 1e3, kl_delta: float = 1e-4,
) -> torch.Tensor:  # fmt: skip
    """DRPO (2510.04474 Eq. 7): shorter right answers weigh more, among the right ones only.

    Per response [N]: `score` s = mean logp, `length`, its question `group`, `correct`; `kl` is a number.
    Loss = -mean over questions of (sum of w s over right ones - tau log mean exp(s / tau) of wrong ones),
    w = softmax(-length / (l_max lam)). A question without both kinds adds 0; kl above kl_delta costs.
    """
    loss = score.new_zeros(())
    questions = group.unique()
    for question in questions:
        right = ((group == question) & (correct > 0)).nonzero()[:, 0]
        wrong = ((group == question) & (correct <= 0)).nonzero()[:, 0]
        if len(right) and len(wrong):
            weight = (-length[right] / (l_max * lam)).softmax(0)
            push_down = tau * ((score[wrong] / tau).logsumexp(0) - math.log(len(wrong)))
            loss = loss - ((weight * score[right]).sum() - push_down) / len(questions)
    return loss + kl_coef / 2 * (kl - kl_delta).clamp(min=0).square()


def drpo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    row: torch.Tensor,
    group: torch.Tensor,
    correct: torch.Tensor,
    **constants,
) -> torch.Tensor:
    """drpo_objective from the token values [T] of one batch; its KL is the mean of old_logp - logp."""
    length = row_sum(torch.ones_like(logp), row, len(group))
    score = row_sum(logp, row, len(group)) / length.clamp(min=1)
    return drpo_objective(score, length, group, correct, (old_logp - logp).mean(), **constants)


def drpo_weights(
    score: torch.Tensor,
    length: torch.Tensor,
    group: torch.Tensor,
    correct: torch.Tensor,
    kl: torch.Tensor,
    **constants,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, its derivative [N] by each token's logp) at the given scores: sum(weight logp) has its gradient.

    A question's answers may so lie in different micro-batches: only the N scores are needed all at once.
    """
    score, kl = score.detach().requires_grad_(), kl.detach().requires_grad_()
    loss = drpo_objective(score, length, group, correct, kl, **constants)
    by_score, by_kl = torch.autograd.grad(loss, (score, kl), allow_unused=True)
    by_score = torch.zeros_like(score) if by_score is None else by_score  # no question has both kinds
    return loss.detach(), by_score / length.clamp(min=1) - by_kl / length.sum().clamp(min=1)
