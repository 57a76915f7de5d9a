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

import losses
import rewards
from evaluation import metrics

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


def run_loss(name, batch, params, dtype=torch.float64):
    logp, row = flat(batch["logp"], dtype).requires_grad_(), rows_of(batch["logp"])
    if name == "drpo":
        options = {"kl_coef" if k == "kl_beta" else k: v for k, v in params.items()}
        group, correct = torch.tensor(batch["group"]), torch.tensor(batch["correct"])
        loss = losses.drpo_loss(logp, flat(batch["old_logp"], dtype), row, group, correct, **options)
    else:
        assert name in ("clipped", "gspo", "cispo"), f"loss {name} is not implemented"
        options = {"kl_coef" if k == "kl_beta" else k: v for k, v in params.items()}
        reduction, constant = options.pop("reduction"), options.pop("constant")
        lengths = torch.tensor([len(r) for r in batch["logp"]])
        loss, _ = losses.policy_loss(
            logp,
            flat(batch["old_logp"], dtype),
            torch.tensor(batch["advantage"], dtype=dtype)[row],
            losses.response_weights(lengths, reduction, constant)[row],
            row,
            sampler_logp=flat(batch["sampler_logp"], dtype),
            ref_logp=flat(batch["ref_logp"], dtype),
            **options,
        )
    loss.backward()
    return {"loss": loss.item(), "grad_logp": ragged_like(logp.grad, batch["logp"])}


def run_kl(name, batch, params):
    logp, ref = (torch.tensor(batch[k], dtype=torch.float64) for k in ("logp", "ref_logp"))
    return losses.kl_estimate(logp, ref, name).tolist()


def run_weight(name, batch, params):
    if name == "drpo_weights":
        return rewards.drpo_weights(batch, **params)
    old, row = flat(batch["old_logp"]), rows_of(batch["old_logp"])
    if name == "gspo_ratio":
        got = losses.sequence_ratio(flat(batch["logp"]), old, row)
    else:
        assert name == "tis", f"weight {name} is not implemented"
        by_row = row if params["level"] == "sequence" else None
        got = losses.tis_weight(old, flat(batch["sampler_logp"]), params["cap"], by_row)
    got = ragged_like(got, batch["old_logp"])
    return got if params.get("level") == "token" else [r[0] for r in got]


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
