"""Every test vector of tests/data/golden.json, and of the file in the environment variable GOLDEN, if set.

The schema: a list "cases" of {kind, name, note, batch, params, expected, tol}. A case passes when every
number has |got - expected| <= tol max(1, |expected|) in float64 and null is nan. An unknown name fails.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
import metrics
import rewards

FILES = [Path(__file__).parent / "data" / "golden.json"]
if os.environ.get("GOLDEN"):
    FILES.append(Path(os.environ["GOLDEN"]))


def run_reward(name, batch, params):
    return rewards.REWARDS[name](batch, **params)


def run_advantage(name, batch, params):
    return rewards.ADVANTAGES[name](batch["rewards"], batch, **params)


def flat(ragged):
    return None if ragged is None else torch.tensor([v for r in ragged for v in r], dtype=torch.float64)


def rows_of(ragged):
    return torch.tensor([i for i, r in enumerate(ragged) for _ in r], dtype=torch.long)


def ragged_like(values, ragged):
    values = iter(values.tolist())
    return [[next(values) for _ in r] for r in ragged]


def run_loss(name, batch, params):
    logp, row = flat(batch["logp"]).requires_grad_(), rows_of(batch["logp"])
    if name == "drpo":
        options = {"kl_coef" if k == "kl_beta" else k: v for k, v in params.items()}
        group, correct = torch.tensor(batch["group"]), torch.tensor(batch["correct"])
        loss = losses.drpo_loss(logp, flat(batch["old_logp"]), row, group, correct, **options)
    else:
        assert name in ("clipped", "gspo", "cispo"), f"loss {name} is not implemented"
        options = {"kl_coef" if k == "kl_beta" else k: v for k, v in params.items()}
        reduction, constant = options.pop("reduction"), options.pop("constant")
        lengths = torch.tensor([len(r) for r in batch["logp"]])
        loss, _ = losses.policy_loss(
            logp,
            flat(batch["old_logp"]),
            torch.tensor(batch["advantage"], dtype=torch.float64)[row],
            losses.response_weights(lengths, reduction, constant)[row],
            row,
            sampler_logp=flat(batch["sampler_logp"]),
            ref_logp=flat(batch["ref_logp"]),
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
