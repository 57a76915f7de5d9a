"""Log-probs of the sampled tokens and their gradient, a chunk of tokens at a time: [tokens x vocabulary] never exists.

A vocabulary of 150,000 makes the logits the largest thing in training by far. With p = softmax(z), z = W h / T and
g = dloss/dlogp, the gradients are known as soon as g is, while the chunk's p is still at hand:

    dlogp/dz = onehot - p,    dh = g W^T (onehot - p) / T,    dW = g (onehot - p) h^T / T

Three matrix products a chunk, as plain autograd needs; nothing is recomputed, nothing is kept.
"""

import torch

LOGITS = {"cpu": 2**24, "cuda": 2**27}  # of one chunk: 64 MiB and 512 MiB in float32


class ChunkedHead:
    """The output layer over hidden states [T, d] with weight [V, d].

    for part in head.parts():                        slices of [T]
        logp, entropy = head.logps(part, target)     float32 [t], nats
        head.backward(part, g)                       g = dloss/dlogp [t]; must follow logps() of the same part
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, temperature: float):
        self.hidden, self.weight, self.temperature = (
            hidden.detach(),
            weight.detach().to(hidden.dtype),
            temperature,
        )
        self.size = max(1, LOGITS[hidden.device.type] // len(weight))
        rows = min(self.size, len(hidden))
        # Allocated once: on a CPU fresh pages for every chunk would cost a tenth of the time.
        self.logits = hidden.new_empty(rows, len(weight))
        self.p = hidden.new_empty(rows, len(weight), dtype=torch.float32)
        self.d_hidden = self.d_weight = None

    def parts(self) -> list[slice]:
        return [slice(i, i + self.size) for i in range(0, max(1, len(self.hidden)), self.size)]

    @torch.no_grad()
    def logps(self, part: slice, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of `target` [t] and entropies [t]."""
        h = self.hidden[part]
        z = torch.mm(h, self.weight.T, out=self.logits[: len(h)])
        # Divided in float32, after the product: with and without gradient the same numbers, whatever type h has.
        z = z.float().div_(self.temperature)
        p = torch.softmax(z, -1, out=self.p[: len(h)])
        top, at = z.max(-1, keepdim=True)
        norm = (top - p.gather(-1, at).log())[:, 0]  # logsumexp without another pass; p at the top is never 0
        logp = z.gather(-1, target[:, None])[:, 0] - norm
        return logp, norm - torch.linalg.vecdot(p, z)

    @torch.no_grad()
    def backward(self, part: slice, target: torch.Tensor, g: torch.Tensor, learn_weight: bool = True) -> None:
        """Adds the gradient of a loss with dloss/dlogp = g to d_hidden [T, d] and d_weight [V, d]."""
        h = self.hidden[part]
        if self.d_hidden is None:
            self.d_hidden = torch.empty_like(self.hidden)
            # float32: many chunks add up in it.
            self.d_weight = torch.zeros_like(self.weight, dtype=torch.float32) if learn_weight else None
        # p - onehot in float32 before it is rounded: for a token of p = 0.9999 all that matters is the difference.
        p = self.p[: len(h)]
        p[torch.arange(len(h), device=p.device), target] -= 1
        p, g = p.to(h.dtype), (-g / self.temperature)[:, None]
        self.d_hidden[part] = g * (p @ self.weight)
        if self.d_weight is not None and h.dtype == torch.float32:
            self.d_weight.addmm_(p.T, g * h)
        elif self.d_weight is not None:
            self.d_weight += p.T @ (g * h).to(h.dtype)
