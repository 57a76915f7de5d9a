import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import kl_estimate, policy_loss, response_weights, tis_weight, token_logps


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
