"""Every test vector of tests/data/golden.json, and of the file in the environment variable GOLDEN, if set.

The schema: a list "cases" of {kind, name, note, batch, params, expected, tol}. A case passes when every
number has |got - expected| <= tol max(1, |expected|) in float64 and null is nan. An unknown name fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
import train_grpo
from evaluation import metrics
from methods import drpo

FILES = [Path(__file__).parent / "data" / "golden.json"]
if os.environ.get("GOLDEN"):
    FILES.append(Path(os.environ["GOLDEN"]))


def run_reward(name, batch, params):
    return rewards.REWARDS[name](batch, **params)


def run_advantage(name, batch, params):
    return rewards.ADVANTAGES[name](batch["rewards"], batch, **params)


def flat(ragged, dtype=torch.float64):
    return None if ragged is None else torch.tensor([v for r in ragged for v in r], dtype=dtype)


def rows_of(ragged):
    return torch.tensor([i for i, r in enumerate(ragged) for _ in r], dtype=torch.long)


def ragged_like(values, ragged):
    values = iter(values.tolist())
    return [[next(values) for _ in r] for r in ragged]


def flags_of(params):
    """The trainer's flags for a case's params; what a case does not name is off."""
    args = train_grpo.build_parser().parse_args(["--tis-cap", "0"])
    names = {"kl_beta": "kl_coef"}
    vars(args).update(
        {names.get(k, k): v or 0 if k in ("dual_clip", "tis_cap") else v for k, v in params.items()}
    )
    return args


def flat_tensors(batch, dtype=torch.float64):
    """What policy_loss reads, of a case's ragged lists: flat tensors [T]."""
    row = rows_of(batch["logp"] if "logp" in batch else batch["old_logp"])
    t = {name: flat(batch.get(name), dtype) for name in ("old_logp", "ref_logp", "sampler_logp")}
    if t["sampler_logp"] is None:
        t["sampler_logp"] = torch.full(row.shape, np.nan, dtype=dtype)
    one = torch.ones(row.shape, dtype=dtype)
    return t | {"row": row, "mask": one, "weight": one, "advantage": one, "sequence_ratio": None}


def run_loss(name, batch, params, dtype=torch.float64):
    logp, t = flat(batch["logp"], dtype).requires_grad_(), flat_tensors(batch, dtype)
    row, n = t["row"], len(batch["logp"])
    if name == "drpo":
        options = {"kl_coef" if k == "kl_beta" else k: v for k, v in params.items()}
        length = torch.tensor([len(r) for r in batch["logp"]], dtype=dtype)
        score = torch.zeros(n, dtype=dtype).index_add(0, row, logp) / length
        group, correct = torch.tensor(batch["group"]), torch.tensor(batch["correct"])
        loss = drpo.objective(score, length, group, correct, (t["old_logp"] - logp).mean(), **options)
    else:
        assert name in ("clipped", "gspo", "cispo"), f"loss {name} is not implemented"
        lengths = [len(r) for r in batch["logp"]]
        weights = train_grpo.token_weights(lengths, params["reduction"], params["constant"])
        t["weight"] = torch.tensor(weights, dtype=dtype)[row]
        t["advantage"] = torch.tensor(batch["advantage"], dtype=dtype)[row]
        if name == "gspo":
            t["sequence_ratio"] = train_grpo.sequence_ratio(logp.detach(), t, n)
        loss, _ = train_grpo.policy_loss(logp, t, flags_of(params))
    loss.backward()
    return {"loss": loss.item(), "grad_logp": ragged_like(logp.grad, batch["logp"])}


def run_kl(name, batch, params):
    """The KL of single tokens: a loss of nothing else."""
    logp, found = [[v] for v in batch["logp"]], []
    for one, ref in zip(logp, batch["ref_logp"], strict=True):
        t = flat_tensors({"logp": [one], "old_logp": [one], "ref_logp": [[ref]]})
        t["advantage"] = 0 * t["advantage"]
        args = flags_of({"kl_coef": 1.0, "kl_estimator": name})
        found.append(train_grpo.policy_loss(flat([one]), t, args)[0].item())
    return found


def run_weight(name, batch, params):
    if name == "drpo_weights":
        return rewards.drpo_weights(batch, **params)
    if name == "gspo_ratio":
        ratio = train_grpo.sequence_ratio(flat(batch["logp"]), flat_tensors(batch), len(batch["old_logp"]))
        return [r[0] for r in ragged_like(ratio, batch["old_logp"])]
    assert name == "tis", f"weight {name} is not implemented"
    if params["level"] == "sequence":  # a response as one token
        batch = {name: [[sum(r)] for r in ragged] for name, ragged in batch.items()}
    # On policy the gradient of the loss is -weight.
    t, logp = flat_tensors(batch), flat(batch["old_logp"]).requires_grad_()
    train_grpo.policy_loss(logp, t, flags_of({"tis_cap": params["cap"]}))[0].backward()
    got = ragged_like(-logp.grad, batch["old_logp"])
    return got if params["level"] == "token" else [r[0] for r in got]


def run_schedule(name, batch, params):
    return {"curriculum_budget": rewards.curriculum_budget}[name](batch["step"], **params)


def run_metric(name, batch, params):
    return metrics.jsonable(metrics.METRICS[name](**batch, **params))


# One runner per kind: (name, batch, params) -> the shape of "expected".
RUNNERS = {
    "reward": run_reward,
    "advantage": run_advantage,
    "loss": run_loss,
    "kl": run_kl,
    "weight": run_weight,
    "schedule": run_schedule,
    "metric": run_metric,
}


def load_cases():
    cases = []
    for path in FILES:
        for number, case in enumerate(json.loads(path.read_text())["cases"]):
            cases.append(pytest.param(case, id=f"{path.stem}-{number}-{case['kind']}-{case['name']}"))
    return cases


def compare(got, expected, tol, where="result"):
    """Walks lists and dicts; null must be nan or None, every other number must be finite and near."""
    if isinstance(expected, dict):
        assert set(got) == set(expected), where
        for key in expected:
            compare(got[key], expected[key], tol, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for k, (g, e) in enumerate(zip(got, expected, strict=True)):
            compare(g, e, tol, f"{where}[{k}]")
    elif expected is None:
        assert got is None or np.isnan(got), f"{where}: {got}, not null"
    else:
        assert abs(got - expected) <= tol * max(1, abs(expected)), f"{where}: {got}, not {expected}"


@pytest.mark.parametrize("case", load_cases())
def test_case(case):
    got = RUNNERS[case["kind"]](case["name"], case["batch"], case["params"])
    if isinstance(got, np.ndarray):
        assert got.dtype == np.float64
    compare(got, case["expected"], case["tol"])


# The same losses in float32, as training computes them ------------------------------------------------------

LOSSES = [case for case in load_cases() if case.values[0]["kind"] == "loss"]


@pytest.mark.parametrize("case", LOSSES)
def test_loss_in_float32(case):
    got = run_loss(case["name"], case["batch"], case["params"], torch.float32)
    compare(got, case["expected"], max(1e-5, case["tol"]))


ROW = st.lists(st.floats(-4, -0.01), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.lists(ROW, min_size=1, max_size=4), seed=st.integers(0, 1000),
    name=st.sampled_from(["clipped", "drpo"]), ratio=st.sampled_from(["token", "sequence", "cispo"]),
    kl=st.sampled_from(["k1", "k2", "k3"]), dual_clip=st.sampled_from([None, 3.0]),
    reduction=st.sampled_from(["token_mean", "sequence_mean", "constant"]),
)  # fmt: skip
def test_float32_agrees_with_float64(rows, seed, name, ratio, kl, reduction, dual_clip):
    """Any lengths and options: to 1e-5 of the loss, or of 1 where its terms cancel."""
    rng = np.random.default_rng(seed)
    near = lambda: [[v + rng.normal(0, 0.3) for v in r] for r in rows]  # noqa: E731
    batch = {"logp": rows, "old_logp": near(), "sampler_logp": near(), "ref_logp": near()}
    batch |= {"advantage": rng.normal(size=len(rows)).tolist(), "group": [i // 2 for i in range(len(rows))]}
    batch |= {"correct": [i % 2 for i in range(len(rows))]}
    params = {"ratio": ratio, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": dual_clip, "kl_beta": 0.1}
    params |= {"kl_estimator": kl, "reduction": reduction, "constant": 12, "tis_cap": 2.0}
    params = {"lam": 0.1, "l_max": 16} if name == "drpo" else params
    exact, single = (run_loss(name, batch, params, t)["loss"] for t in (torch.float64, torch.float32))
    assert np.isfinite(exact) and abs(single - exact) <= 1e-5 * max(1, abs(exact))


# Another file -----------------------------------------------------------------------------------------------


def test_file_of_the_environment(tmp_path):
    """GOLDEN adds a file: right cases pass; wrong numbers and unknown names of any kind fail."""
    batch = {"correct": [[1, 0]], "truncated": [[0, 0]], "length": [[1200, 1200]], "budget": [1000]}
    common = {"note": "", "params": {}, "tol": 1e-6, "batch": batch}
    right = [{"kind": "reward", "name": "lcpo_exact", "expected": [[0.94, -0.06]]}]
    wrong = [{"kind": "reward", "name": "lcpo_exact", "expected": [[0.94, -0.05]]}]
    wrong += [{"kind": "reward", "name": "lcpo_exact", "expected": [[0.94, None]]}]
    wrong += [{"kind": kind, "name": "no_such_method", "expected": [[0.94, -0.06]]} for kind in RUNNERS]
    wrong += [{"kind": "no_such_kind", "name": "lcpo_exact", "expected": [[0.94, -0.06]]}]
    path = tmp_path / "extra.json"
    path.write_text(json.dumps({"cases": [common | case for case in right + wrong]}))
    command = [sys.executable, "-m", "pytest", __file__, "-k", "extra", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | {"GOLDEN": str(path)}, capture_output=True, text=True)
    # the unknown loss fails in float32 as well
    counts = f"{len(wrong) + 1} failed, {len(right)} passed"
    assert done.stdout.splitlines()[-1].startswith(counts), done.stdout
