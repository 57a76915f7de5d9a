"""The loss of train_grpo.py: by hand, against TRL's own, and whatever the split of the batch."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import methods
import train_grpo
from rewards import ADVANTAGES
from scaling import model as net
from train_grpo import micro_batches, policy_loss, to_tensors, token_weights


def arguments(*flags):
    """The flags of train_grpo.py for an update on the CPU; later ones win."""
    common = ["--dtype", "float32", "--tis-cap", "0", "--micro-tokens", "4096", "--max-tokens", "64"]
    return train_grpo.build_parser().parse_args([*common, *flags])


def tokens(logp, advantage, old=None, **more):
    """What policy_loss reads of a micro-batch, for flat tokens [T], each of weight 1; more: changes."""
    one = torch.ones_like(logp).detach()
    t = {"old_logp": old, "sampler_logp": one * math.nan, "ref_logp": None, "advantage": advantage}
    return t | {"weight": one, "mask": one, "sequence_ratio": None} | more


def close(got, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(got).double(), torch.tensor(expected).double(), rtol=tolerance, atol=tolerance
    )


# By hand ----------------------------------------------------------------------------------------------------


def test_reductions_by_hand():
    close(token_weights([1, 3], "token_mean", 10), [1 / 4, 1 / 4])
    close(token_weights([1, 3], "sequence_mean", 10), [1 / 2, 1 / 6])
    close(token_weights([1, 3], "constant", 10), [1 / 20, 1 / 20])
    for reduction in ("token_mean", "sequence_mean", "constant"):
        assert np.isfinite(token_weights([0, 0], reduction, 10)).all()


def test_clip_by_hand():
    # ratios 2 and 0.5: a good action is not pushed beyond 1.2, a bad one not below 0.8: no gradient
    logp = torch.tensor([2.0, 0.5]).log().requires_grad_()
    loss, stats = policy_loss(logp, tokens(logp, torch.tensor([1.0, -1.0]), torch.zeros(2)), arguments())
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 + 0.8)
    assert logp.grad.tolist() == [0.0, 0.0] and stats["clip_fraction"] == 2
    # in the other direction nothing is clipped: a good action that became rarer is pulled back in full
    logp = torch.tensor([2.0, 0.5]).log().requires_grad_()
    loss, stats = policy_loss(logp, tokens(logp, torch.tensor([-1.0, 1.0]), torch.zeros(2)), arguments())
    loss.backward()
    assert loss.item() == pytest.approx(2 - 0.5)
    close(logp.grad, [2.0, -0.5])
    assert stats["clip_fraction"] == 0


def test_dual_clip_and_cispo_by_hand():
    logp, bad = torch.tensor([10.0]).log().requires_grad_(), torch.tensor([-1.0])
    loss, _ = policy_loss(logp, tokens(logp, bad, torch.zeros(1)), arguments("--dual-clip", "3"))
    loss.backward()
    assert loss.item() == pytest.approx(3) and logp.grad.item() == 0
    # CISPO: the ratio 10 is cut to 1.2 and is a weight alone: -1.2 A logp
    logp = torch.tensor([10.0]).log().requires_grad_()
    loss, stats = policy_loss(logp, tokens(logp, bad, torch.zeros(1)), arguments("--ratio", "cispo"))
    loss.backward()
    assert loss.item() == pytest.approx(1.2 * math.log(10)) and logp.grad.item() == pytest.approx(1.2)
    assert stats["clip_fraction"] == 1


def test_kl_by_hand():
    logp, ref = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    t = tokens(logp, torch.zeros(1), ref_logp=ref)
    for estimator, expected in (("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))):
        flags = arguments("--kl-coef", "0.1", "--kl-estimator", estimator)
        loss, stats = policy_loss(logp, t, flags)
        assert stats["kl"].item() == pytest.approx(expected) and loss.item() == pytest.approx(0.1 * expected)


def test_kl_of_a_token_that_the_reference_finds_impossible_is_bounded():
    """k3 at a log-ratio of -20 is 4.9e8 nats unbounded; as verl's low_var_kl: 10, and no gradient."""
    logp = torch.tensor([-20.0]).requires_grad_()
    flags = arguments("--kl-coef", "1")
    loss, _ = policy_loss(logp, tokens(logp, torch.zeros(1), ref_logp=torch.zeros(1)), flags)
    loss.backward()
    assert loss.item() == 10 and logp.grad.item() == 0


def test_importance_weight_by_hand():
    old = torch.tensor([0.0, 0.0, -100.0, 0.0])
    sampler = torch.tensor([-1.0, 1.0, 100.0, math.nan])  # nan: forced, no correction
    t = tokens(old, torch.ones(4), old, sampler_logp=sampler, mask=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    for i, expected in enumerate([2.0, math.exp(-1), 0.0, 1.0]):
        one = {k: v if v is None else v[i : i + 1] for k, v in t.items()}
        assert policy_loss(old[i : i + 1], one, arguments("--tis-cap", "2"))[0].item() == pytest.approx(
            -expected
        )
    assert policy_loss(old, t, arguments())[1]["logp_gap"].item() == 2  # of the tokens that have a loss


def test_masked_importance_weight_by_hand():
    """Weights of e, 1/e, 1.65 and 1 (forced); beyond [1/2, 2] they are 0, not cut."""
    old, gap = torch.zeros(4), torch.tensor([1.0, -1.0, 0.5, math.nan])
    t = tokens(old, torch.ones(4), old, sampler_logp=-gap)
    args = arguments("--tis-cap", "2", "--tis-mode", "token_mask")
    logp = old.clone().requires_grad_()
    policy_loss(logp, t, args)[0].backward()
    close(-logp.grad, [0, 0, math.exp(0.5), 1])


@pytest.mark.parametrize("later", [False, True])  # the first minibatch of a step, or one after it
def test_importance_weight_of_a_response_by_hand(tiny, monkeypatch, later):
    """exp of the SUM over the tokens with a loss, cut or masked; in chunks of one token as in one."""
    model, found = load(tiny), []
    cases = [("sequence", [0.3, 0.2], math.exp(0.5)), ("sequence", [0.9, 0.9], 2),
             ("sequence_mask", [0.9, 0.9], 0), ("sequence", [-0.9, -0.9], math.exp(-1.8)),
             ("sequence_mask", [-0.9, -0.9], 0), ("sequence_mask", [0.9, -0.7], math.exp(0.2)),
             ("sequence", [50.0, 50.0], 2)]  # fmt: skip
    for chunk in (10_000, 1):
        monkeypatch.setitem(net.LOGITS, "cpu", chunk * model.config.vocab_size)
        for mode, gaps, expected in cases:
            args = arguments("--tis-cap", "2", "--tis-mode", mode)
            r = {
                "prompt_ids": [7, 8],
                "ids": np.array([5, 6, 9, 7], np.int32),
                "advantage": 1.0,
                "weight": 0.5,
            }
            r |= {"logps": np.zeros(4, np.float32), "mask": np.array([0, 1, 1, 0], np.float32)}
            train_grpo.add_logps(model, [r], "old_logps", args)
            # The first token was forced; the last one was sampled, and has no loss.
            r["logps"] = r["old_logps"] - np.array([math.nan, *gaps, 9.0], np.float32)
            if not later:
                del r["old_logps"]
            other = r | {"logps": r["logps"] + 3, "advantage": 0.0}  # a neighbour in the micro-batch
            sums = train_grpo.backward(model, [other, r], args)
            assert sums["loss"].item() == pytest.approx(-expected, abs=1e-5), (mode, gaps)
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            model.zero_grad()
    for one, two in zip(found[:7], found[7:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert found[0].norm() > 0 == found[2].norm()


def test_sequence_ratio_by_hand(tiny):
    """GSPO's ratio is exp of the mean over the tokens with a loss; the loss of a response is -ratio A."""
    model, args = load(tiny), arguments("--ratio", "sequence")
    for moved, expected in (([9.0, 0.2, -0.1], math.exp(0.05)), ([0, 0.9, 0.9], 1.2), ([0, 89.0, 89.0], 1.2)):
        r = {"prompt_ids": [7, 8], "ids": np.array([5, 6, 9], np.int32), "logps": np.zeros(3, np.float32)}
        r |= {
            "mask": np.array([0, 1, 1], np.float32),
            "advantage": 1.0,
            "weight": 0.5,
        }  # the first was forced
        train_grpo.add_logps(model, [r], "old_logps", args)
        r["old_logps"] = r["old_logps"] - np.array(moved, np.float32)
        sums = train_grpo.backward(model, [r], args)
        assert sums["loss"].item() == pytest.approx(-expected, abs=1e-5)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_extreme_log_ratios_stay_finite():
    logp = torch.tensor([0.0, -1000.0], requires_grad=True)
    t = tokens(logp, torch.tensor([-1.0, 1.0]), torch.tensor([-1000.0, 0.0]))
    loss, _ = policy_loss(logp, t, arguments())
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logp.grad).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000), ratio=st.sampled_from(["token", "cispo"]), kl=st.sampled_from(["0", "0.1"])
)
def test_float32_agrees_with_float64_and_is_finite(seed, ratio, kl):
    torch.manual_seed(seed)
    logp, old = -torch.rand(8, dtype=torch.float64) * 3, -torch.rand(8, dtype=torch.float64) * 3
    rest = {"ref_logp": old - 0.2, "sampler_logp": old + 0.1, "weight": torch.full((8,), 0.125).double()}
    t = tokens(logp, torch.randn(8, dtype=torch.float64), old, **rest)
    flags = arguments("--ratio", ratio, "--kl-coef", kl, "--tis-cap", "2")
    exact, _ = policy_loss(logp, t, flags)
    single, _ = policy_loss(logp.float(), {k: v if v is None else v.float() for k, v in t.items()}, flags)
    assert math.isfinite(single) and abs(single - exact) <= 2e-6 * max(1, abs(exact))


# TRL --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl(tiny, tmp_path_factory):
    """TRL's own GRPOTrainer. A case replaces sampling, the models' forward passes, the rewards."""
    import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import GRPOConfig, GRPOTrainer
    config = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=6, num_generations=3,
        num_iterations=2,  # so that it compares with the policy that sampled
        use_bias_correction_kl=False,  # its k3 can be weighted by the ratio, ours cannot
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": "a"}] * 6)
    functions = [lambda **_: None, lambda **_: None]
    trainer = GRPOTrainer(tiny, reward_funcs=functions, args=config, train_dataset=rows)
    trainer.current_gradient_accumulation_steps, trainer.ref_model = 1, "reference"
    trainer.model.train()
    return trainer


def trl_loss(trl, rewards, logp, old, ref, sampler, lengths, loss_type, level, delta, beta, high, tis):
    """(advantages [N], loss) by its own code, of rewards [K, N] and padded log-probs [N, L]."""
    mode, cap = tis
    trl.loss_type, trl.importance_sampling_level, trl.args.delta = loss_type, level, delta
    trl.beta, trl.epsilon_high, trl.max_completion_length = beta, high, logp.shape[1]
    trl.use_vllm, trl.vllm_importance_sampling_mode = bool(cap), mode
    trl.vllm_importance_sampling_clip_max = cap
    trl.vllm_importance_sampling_clip_min = 1 / cap if "mask" in mode else None
    trl.reward_funcs = [lambda row=row, **_: row.tolist() for row in rewards]
    trl.reward_func_names, trl.reward_weights = (
        [str(k) for k in range(len(rewards))],
        torch.ones(len(rewards)),
    )
    trl.reward_processing_classes = [None] * len(rewards)
    passes = {trl.model: old, "reference": ref, "policy": logp}
    trl._get_per_token_logps_and_entropies = lambda model, *_, **__: (
        passes[model],
        torch.zeros_like(logp),
        None,
    )
    ids = [[1] * n for n in lengths.tolist()]
    told = [
        [None if x != x else x for x in row[:n]] for row, n in zip(sampler.tolist(), lengths, strict=True)
    ]
    texts = ["a"] * len(ids)
    trl._generate = lambda prompts: ([[1]] * len(ids), ids, None, texts, told, {}, None, None)
    torch.set_default_dtype(torch.float64)  # of the tensors that it makes
    try:
        inputs = trl._generate_and_score_completions([{"prompt": "a"}] * len(ids))
        return inputs["advantages"], trl._compute_loss("policy", inputs)
    finally:
        torch.set_default_dtype(torch.float32)


def ragged(seed):
    """Lengths [6] and padded log-probs [6, L]: of the policy, of the one that sampled, reference, sampler."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (6,), generator=generator)
    shape, double = (6, int(lengths.max())), {"generator": generator, "dtype": torch.float64}
    logp = (-2 + 0.5 * torch.randn(shape, **double)).requires_grad_()
    old, ref, sampler = (logp.detach() + scale * torch.randn(shape, **double) for scale in (0.4, 0.3, 0.3))
    sampler[0, 0] = math.nan  # a token that was not sampled
    rewards = (
        torch.randint(-8, 9, (2, 6), generator=generator) / 8
    )  # exact in float32, which TRL keeps them in
    return lengths, rewards.double(), logp, old, ref, sampler


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("tis", [("token", 0), ("token", 1.5), ("token_mask", 1.5), ("sequence", 1.5),
                                 ("sequence_mask", 1.8)])  # fmt: skip
@pytest.mark.parametrize(
    "flags, theirs",
    [
        ("--loss-reduction token_mean", {"loss_type": "dapo"}),
        ("--loss-reduction token_mean --clip-high 0.28", {"loss_type": "bnpo", "high": 0.28}),
        ("--loss-reduction sequence_mean", {"loss_type": "grpo"}),
        ("--loss-reduction constant", {"loss_type": "dr_grpo"}),
        ("--loss-reduction token_mean --dual-clip 1.4", {"loss_type": "dapo", "delta": 1.4}),
        ("--loss-reduction sequence_mean --ratio sequence", {"loss_type": "grpo", "level": "sequence"}),
        ("--loss-reduction token_mean --ratio sequence", {"loss_type": "dapo", "level": "sequence"}),
        # TRL cuts the ratio from above alone, at epsilon_high itself.
        ("--ratio cispo --clip-low 1 --clip-high 0.3", {"loss_type": "cispo", "high": 1.3}),
    ],
)  # fmt: skip
def test_advantage_loss_and_gradient_are_trls(trl, flags, theirs, tis, kl, seed):
    """From rewards to the loss, on ragged batches, in float64; gradients by each token's log-prob."""
    lengths, rewards, padded, old, ref, sampler = ragged(seed)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).double()
    mode, cap = tis
    theirs_mode = mode if "mask" in mode else mode + "_truncate"
    rest = {"level": "token", "delta": None, "high": 0.2, "beta": kl, "tis": (theirs_mode, cap)} | theirs
    trl.scale_rewards, trl.multi_objective_aggregation = "group", "sum_then_normalize"
    trls, expected = trl_loss(trl, rewards, padded, old, ref, sampler, lengths, **rest)
    (want,) = torch.autograd.grad(expected, padded)

    args = arguments(*flags.split(), "--kl-coef", str(kl), "--max-tokens", str(mask.shape[1]))
    args.tis_cap, args.tis_mode = cap, mode
    advantage = torch.from_numpy(ADVANTAGES["grpo"](rewards.sum(0).view(2, 3).numpy(), eps=1e-4).ravel())
    assert (advantage - trls).abs().max() < 1e-6
    row, column = mask.nonzero(as_tuple=True)
    flat = padded.detach()[row, column].requires_grad_()
    weight = torch.from_numpy(token_weights(lengths.tolist(), args.loss_reduction, args.max_tokens))
    t = tokens(flat, advantage[row], old[row, column], sampler_logp=sampler[row, column], weight=weight[row])
    t |= {"row": row, "ref_logp": ref[row, column] if kl else None}
    if args.ratio == "sequence":
        t["sequence_ratio"] = train_grpo.sequence_ratio(flat.detach(), t, 6)
    t["sequence_gap"] = train_grpo.response_sums((t["old_logp"] - t["sampler_logp"]).nan_to_num(0), t, 6)
    loss, _ = policy_loss(flat, t, args)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    both = torch.stack([flat.grad, want[row, column]])
    if args.ratio == "sequence" and cap and "token" in mode:
        # As in verl each token's gradient has its own importance weight; in TRL all share their mean.
        both = torch.zeros(2, 6, dtype=torch.float64).index_add(1, row, both) / lengths
    assert (both[0] - both[1]).abs().max() < 1e-6 and want.abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name, constants, scale",
    [("grpo", {"eps": 1e-4}, "group"), ("dr_grpo", {}, "none"), ("batch_norm", {"eps": 1e-4}, "batch"),
     ("gdpo", {}, "normalize_then_sum")],
)  # fmt: skip
def test_advantages_are_trls(trl, name, constants, scale, seed):
    lengths, rewards, *logps = ragged(seed)
    if (
        scale == "batch"
    ):  # TRL divides by the spread of the rewards, we by that of reward - mean of the group:
        rewards[:, 3:] = rewards[:, :3].flip(1)  # equal where the groups have one mean
    rewards[:, 3:] = 0.25 if seed == 2 and scale != "batch" else rewards[:, 3:]  # a group that is all alike
    trl.scale_rewards = "group" if name == "gdpo" else scale
    trl.multi_objective_aggregation = "normalize_then_sum" if name == "gdpo" else "sum_then_normalize"
    rest = {
        "loss_type": "dapo",
        "level": "token",
        "delta": None,
        "beta": 0.0,
        "high": 0.2,
        "tis": ("token", 0),
    }
    trls, _ = trl_loss(trl, rewards, *logps, lengths, **rest)
    table = rewards.view(2, 2, 3).numpy()  # [K, P, G]
    ours = ADVANTAGES[name](table if name == "gdpo" else table.sum(0), **constants)
    np.testing.assert_allclose(ours.ravel(), trls.numpy(), atol=1e-6)
    assert np.abs(ours).max() > 0.1


# The split --------------------------------------------------------------------------------------------------


def random_batch(n=7, seed=0, vocabulary=500):
    """Responses as the loop hands them over; one of them has tokens that a method forced."""
    rng, batch = np.random.default_rng(seed), []
    for i in range(n):
        length = int(rng.integers(1, 30))
        r = {"prompt_ids": rng.integers(5, vocabulary, int(rng.integers(1, 12))).tolist(), "group": i // 2}
        r |= {"ids": rng.integers(5, vocabulary, length).astype(np.int32), "advantage": float(rng.normal())}
        r |= {"logps": rng.normal(-6, 0.1, length).astype(np.float32), "correct": i % 2, "truncated": 0}
        batch.append(r)
        batch[-1]["mask"] = np.ones(length, np.float32)
    batch[0]["mask"][:2] = 0
    return batch


def load(path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()


def after_update(path, batch, *flags):
    """(all weights in one row, diagnostics) after an update of the model in `path`."""
    model, args = load(path), arguments("--lr", "1e-3", *flags)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # Adam would make much of gradients near 0
    method = methods.Method(args, None)
    stats = train_grpo.update(model, None, optimizer, [dict(r) for r in batch], method, args)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), stats


@pytest.mark.parametrize("flags", ["--loss-reduction token_mean", "--loss-reduction sequence_mean",
                                   "--loss-reduction constant --ratio sequence --minibatches 2",
                                   "--tis-cap 2 --tis-mode sequence --minibatches 2"])  # fmt: skip
def test_update_does_not_depend_on_micro_batches(tiny, flags):
    batch = random_batch()
    whole, stats = after_update(tiny, batch, "--micro-tokens", "100000", *flags.split())
    for size in ("60", "1"):
        split, split_stats = after_update(tiny, batch, "--micro-tokens", size, *flags.split())
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)
        assert split_stats["loss"] == pytest.approx(stats["loss"], abs=1e-6)
        assert split_stats["entropy"] == pytest.approx(stats["entropy"], rel=1e-5)
        assert split_stats["padding"] <= stats["padding"]


def test_gradient_is_that_of_the_plain_model(tiny):
    """Without chunks, micro-batches and flat rows: the sum of w A log p over response tokens, by autograd."""
    model, batch, args = load(tiny), random_batch(), arguments("--temperature", "0.7")
    weights = token_weights([r["mask"].sum() for r in batch], "token_mean", 64)
    loss = 0.0
    for r, weight in zip(batch, weights, strict=True):
        r["weight"] = weight
        ids = torch.tensor([*r["prompt_ids"], *r["ids"]])
        logp = (model(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        logp = logp[len(r["prompt_ids"]) - 1 :].gather(-1, torch.from_numpy(r["ids"]).long()[:, None])[:, 0]
        loss = loss - (weight * r["advantage"] * logp * torch.from_numpy(r["mask"])).sum()
    loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for micro in micro_batches(batch, 80):
        train_grpo.backward(model, micro, args)
    for name, p in model.named_parameters():
        assert (p.grad - want[name]).norm() <= 1e-5 * want[name].norm(), name


def test_a_response_without_trained_tokens_teaches_nothing_and_breaks_nothing(tiny):
    batch = random_batch(3)
    for r in batch:
        r["mask"] = np.zeros(len(r["ids"]), np.float32)
    before = torch.cat([p.detach().flatten() for p in load(tiny).parameters()])
    for ratio in ("token", "sequence", "cispo"):
        after, stats = after_update(tiny, batch, "--ratio", ratio, "--minibatches", "2")
        assert torch.equal(after, before) and stats["loss"] == stats["grad_norm"] == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 400))
def test_micro_batches_lose_nothing(n, limit):
    batch = random_batch(n, seed=n)
    parts = micro_batches(batch, limit)
    assert sorted(id(r) for part in parts for r in part) == sorted(map(id, batch))
    sizes = [max(map(train_grpo.size, part)) for part in parts]
    assert sizes == sorted(sizes, reverse=True)  # what needs most memory comes first
    for part, width in zip(parts, sizes, strict=True):
        assert len(part) == 1 or len(part) * width <= limit


def test_tensors_by_hand():
    a = {"prompt_ids": [7, 8], "ids": np.array([1, 2], np.int32), "logps": np.array([-1, -2], np.float32)}
    b = {"prompt_ids": [9], "ids": np.array([3], np.int32), "logps": np.array([np.nan], np.float32)}
    a |= {"advantage": 0.5, "weight": 0.25, "mask": np.array([0, 1], np.float32)}
    b |= {"advantage": np.array([-1.0]), "weight": 0.125, "mask": np.ones(1, np.float32)}
    t = to_tensors([a, b])
    assert t["ids"].tolist() == [[7, 8, 1, 2], [9, 3, 0, 0]]
    assert t["row"].tolist() == [0, 0, 1] and t["column"].tolist() == [1, 2, 0]  # predicted one place before
    assert t["target"].tolist() == [1, 2, 3] and t["mask"].tolist() == [0, 1, 1]
    assert t["weight"].tolist() == [0, 0.25, 0.125] and t["advantage"].tolist() == [0.5, 0.5, -1]
    assert t["sampler_logp"][:2].tolist() == [-1, -2] and t["sampler_logp"][2].isnan()
    assert t["old_logp"] is None and t["ref_logp"] is None
