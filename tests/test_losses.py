import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import head_loss, kl_estimate, policy_loss, response_weights, tis_weight, token_logps


def close(got, expected, tol=1e-6):
    assert torch.allclose(got.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=tol, atol=tol)


# Hand-worked ------------------------------------------------------------------------------------------------


def test_reductions_by_hand():
    lengths = torch.tensor([1, 3])
    close(response_weights(lengths, "token_mean"), [1 / 4, 1 / 4])
    close(response_weights(lengths, "sequence_mean"), [1 / 2, 1 / 6])
    close(response_weights(lengths, "constant", 10), [1 / 20, 1 / 20])
    with pytest.raises(ValueError, match="constant"):
        response_weights(lengths, "constant")


def test_clip_by_hand():
    # ratios 2 and 0.5: a good action is not pushed beyond 1.2, a bad one not below 0.8: no gradient
    logp = torch.tensor([2.0, 0.5]).log().requires_grad_()
    one = torch.ones(2)
    loss, stats = policy_loss(logp, torch.zeros(2), torch.tensor([1.0, -1.0]), one, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 + 0.8)
    assert logp.grad.tolist() == [0.0, 0.0] and stats["clip_fraction"] == 2
    # in the other direction nothing is clipped: a good action that became rarer is pulled back in full
    logp = torch.tensor([2.0, 0.5]).log().requires_grad_()
    loss, stats = policy_loss(logp, torch.zeros(2), torch.tensor([-1.0, 1.0]), one, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2 - 0.5)
    close(logp.grad, [2.0, -0.5])
    assert stats["clip_fraction"] == 0


def test_kl_by_hand():
    logp, ref = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert kl_estimate(logp, ref, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(logp, ref, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(logp, ref, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))


def test_tis_by_hand():
    close(
        tis_weight(torch.tensor([0.0, 0.0, -100.0]), torch.tensor([-1.0, 1.0, 100.0]), 2.0),
        [2.0, math.exp(-1), 0.0],
    )


# Log-probs --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 23), chunk=st.integers(1, 9), temperature=st.sampled_from([0.6, 1.0, 1.7]))
def test_chunked_logps_equal_full_logits(tokens, chunk, temperature):
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    head = torch.randn(31, 8, requires_grad=True)
    targets, g = torch.randint(0, 31, (tokens,)), torch.randn(tokens)
    before = hidden.detach().clone(), head.detach().clone(), targets.clone()
    logp, entropy = token_logps(hidden, head, targets, temperature, chunk)
    got = torch.autograd.grad((logp * g).sum(), (hidden, head))
    full = (hidden @ head.T / temperature).log_softmax(-1)
    want = torch.autograd.grad((full[torch.arange(tokens), targets] * g).sum(), (hidden, head))
    torch.testing.assert_close(logp, full[torch.arange(tokens), targets])
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, head, targets), strict=True))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 23), chunk=st.integers(1, 9), temperature=st.sampled_from([0.6, 1.0, 1.7]),
    tied=st.booleans(),
)  # fmt: skip
def test_gradient_formed_in_the_forward_pass(tokens, chunk, temperature, tied):
    """Loss, log-probs, entropies and gradients of head_loss are those of the full logits."""
    torch.manual_seed(tokens)
    head = torch.randn(31, 8, requires_grad=True)
    words, targets = torch.randint(0, 31, (2, tokens))
    free = torch.randn(tokens, 8, requires_grad=True)
    # tied: the rows of the head are the embeddings, too, so both ways of the gradient meet in one tensor
    hidden = head[words].tanh() if tied else free * 1.0
    old, advantage, weight = torch.randn(tokens) - 3, torch.randn(tokens), torch.rand(tokens)
    row, leaves = torch.arange(tokens) // 4, [head] if tied else [head, free]

    def loss_of(logp, part=slice(None)):
        rest = old[part], advantage[part], weight[part], row[part]
        return policy_loss(logp, *rest, ref_logp=old[part] - 0.3, kl_coef=0.1)[0]

    full = (hidden @ head.T / temperature).log_softmax(-1)
    want_loss = loss_of(full[torch.arange(tokens), targets])
    want = torch.autograd.grad(3 * want_loss, leaves, retain_graph=True)
    loss, logp, entropy = head_loss(hidden, head, targets, loss_of, temperature, chunk)
    got = torch.autograd.grad(3 * loss, leaves)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logp, full[torch.arange(tokens), targets].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1).detach(), rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1e-6)


def test_head_loss_in_bfloat16_and_with_a_frozen_head():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(40, 64), torch.randn(501, 64) * 0.3, torch.randint(0, 501, (40,))
    linear = lambda logp, part: (logp * torch.linspace(-1, 1, 40)[part]).sum()  # noqa: E731
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss, logp, entropy = head_loss(leaves[0].to(dtype), leaves[1], targets, linear, 1.0, 7)
        loss.backward()
        assert leaves[1].grad.dtype == torch.float32
        runs.append([logp, entropy, *[leaf.grad for leaf in leaves]])
    for exact, rough in zip(*runs, strict=True):
        assert (exact - rough).norm() < 0.01 * exact.norm()
    frozen = hidden.clone().requires_grad_()
    head_loss(frozen, head, targets, linear, 1.0, 7)[0].backward()
    torch.testing.assert_close(frozen.grad, runs[0][2])


def test_logits_never_exist_as_a_whole():
    """The largest tensor made by head_loss, forward and backward, is a chunk's logits or the head itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.most = max(self.most, tensor.numel())
            return out

    hidden, head = torch.randn(300, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Largest() as seen:
        loss, *_ = head_loss(hidden, head, torch.randint(0, 1000, (300,)), lambda lp, _: lp.sum(), 1.0, 10)
        loss.backward()
    assert seen.most == 10 * 1000 and head.grad.shape == head.shape


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    ratio=st.sampled_from(["token", "sequence", "cispo"]),
    kl=st.sampled_from([0.0, 0.1]),
)
def test_float32_agrees_with_float64_and_is_finite(seed, ratio, kl):
    torch.manual_seed(seed)
    row = torch.tensor([0] * 3 + [1] * 5)
    logp, old = -torch.rand(8, dtype=torch.float64) * 3, -torch.rand(8, dtype=torch.float64) * 3
    advantage = torch.randn(2, dtype=torch.float64)[row]
    weight = response_weights(torch.tensor([3, 5]), "token_mean")[row]
    options = {"ratio": ratio, "kl_coef": kl, "tis_cap": 2.0}
    exact, _ = policy_loss(logp, old, advantage, weight, row, ref_logp=old, sampler_logp=old + 0.1, **options)
    single, _ = policy_loss(
        logp.float(), old.float(), advantage.float(), weight, row,
        ref_logp=old.float(), sampler_logp=(old + 0.1).float(), **options,
    )  # fmt: skip
    assert math.isfinite(single) and abs(single - exact) <= 2e-6 * max(1, abs(exact))


def test_extreme_log_ratios_stay_finite():
    logp = torch.tensor([0.0, -1000.0], requires_grad=True)
    loss, _ = policy_loss(
        logp, torch.tensor([-1000.0, 0.0]), torch.tensor([-1.0, 1.0]), torch.ones(2), torch.zeros(2).long()
    )
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logp.grad).all()
