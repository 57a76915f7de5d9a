"""Log-probs of sampled tokens and their gradient, a chunk at a time: [tokens x vocabulary] never exists.

A vocabulary of 150,000 makes the logits the largest thing in training by far. With p = softmax(z),
z = W h / T and g = dloss/dlogp, the gradients are known as soon as g is, while the chunk's p is at hand:

    dlogp/dz = onehot - p,    dh = g W^T (onehot - p) / T,    dW = g (onehot - p) h^T / T

Three matrix products a chunk, as plain autograd needs; nothing is recomputed, nothing is kept.
"""

import torch

LOGITS = {"cpu": 2**24, "cuda": 2**27}  # of one chunk: 64 MiB and 512 MiB in float32


class ChunkedHead:
    """The output layer `weight` [V, d] over hidden states [T, d], of which it takes a slice after the other:

    for part in head.parts():
        logp = head.logps(part, target)                 float32 [t], nats; target [t]
        entropy = head.backward(part, target, g)        g = dloss/dlogp [t]; float32 [t], nats
    head.finish()                                       on from the hidden states, through the model
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, temperature: float):
        self.output, self.parameter, self.temperature = hidden, weight, temperature
        self.hidden, self.weight = hidden.detach(), weight.detach().to(hidden.dtype)
        self.size = max(1, LOGITS[hidden.device.type] // len(weight))
        rows = min(self.size, len(hidden))
        # Allocated once: on a CPU fresh pages for every chunk would cost a tenth of the time.
        self.logits = hidden.new_empty(rows, len(weight))
        self.p = hidden.new_empty(rows, len(weight), dtype=torch.float32)
        self.d_hidden = self.d_weight = None

    def parts(self) -> list[slice]:
        return [slice(i, i + self.size) for i in range(0, max(1, len(self.hidden)), self.size)]

    @torch.no_grad()
    def logps(self, part: slice, target: torch.Tensor) -> torch.Tensor:
        """Log-probs of `target` [t]."""
        h = self.hidden[part]
        z = torch.mm(h, self.weight.T, out=self.logits[: len(h)]).float()
        # Divided in float32, after the product: in any type the same with and without gradient.
        self.z = z.div_(self.temperature) if self.temperature != 1 else z
        p = torch.softmax(z, -1, out=self.p[: len(h)])
        # logsumexp without another pass over the exponentials: the top's p = e^z / sum is never 0.
        self.logp = z.gather(-1, target[:, None])[:, 0] - (z.amax(-1) - p.amax(-1).log())
        return self.logp.clone()

    @torch.no_grad()
    def backward(self, part: slice, target: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Adds the gradient of a loss with dloss/dlogp = g; entropies [t]. Follows logps() of its part."""
        h, p = self.hidden[part], self.p[: len(target)]
        if self.d_hidden is None:
            self.d_hidden = torch.empty_like(self.hidden)
            if self.parameter.requires_grad:  # in float32, for many chunks add up in it
                if (held := self.parameter.grad) is None:
                    held = torch.zeros_like(self.weight, dtype=torch.float32)
                self.d_weight = held.float()
        # p - onehot in float32, then rounded: for a token of p = 0.9999 the difference is all that matters.
        p[torch.arange(len(target), device=p.device), target] -= 1
        rounded, slope = p.to(h.dtype), (-g / self.temperature)[:, None]
        mean = rounded @ self.weight
        self.d_hidden[part] = slope * mean
        if self.d_weight is not None and h.dtype == torch.float32:
            self.d_weight.addmm_(p.T, slope * h)
        elif self.d_weight is not None:
            self.d_weight += rounded.T @ (slope * h).to(h.dtype)
        # sum (p - onehot) z: in float32 one row of the product at hand, which is too rough in bfloat16.
        exact = h.dtype == torch.float32
        rest = (mean * h).sum(-1) / self.temperature if exact else torch.linalg.vecdot(p, self.z)
        return -self.logp - rest

    def finish(self) -> None:
        """Hands the gradients on: to the weight's, and from the hidden states back through the model."""
        if self.d_weight is not None:
            self.parameter.grad = self.d_weight.to(self.parameter.dtype)
        self.output.backward(self.d_hidden)
