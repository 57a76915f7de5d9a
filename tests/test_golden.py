"""Every test vector of tests/data/golden.json, and of the file in the environment variable GOLDEN, if set.

The schema: a list "cases" of {kind, name, note, batch, params, expected, tol}. A case passes when every
number has |got - expected| <= tol max(1, |expected|) in float64 and null is nan. An unknown name fails.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import rewards

FILES = [Path(__file__).parent / "data" / "golden.json"]
if os.environ.get("GOLDEN"):
    FILES.append(Path(os.environ["GOLDEN"]))


def run_reward(name, batch, params):
    return rewards.REWARDS[name](batch, **params)


def run_advantage(name, batch, params):
    return rewards.ADVANTAGES[name](batch["rewards"], batch, **params)


def run_weight(name, batch, params):
    return {"drpo_weights": rewards.drpo_weights}[name](batch, **params)


def run_schedule(name, batch, params):
    return {"curriculum_budget": rewards.curriculum_budget}[name](batch["step"], **params)


# One runner per kind: (name, batch, params) -> the shape of "expected". The kinds loss and kl, and the
# weights tis and gspo_ratio, belong to losses.py, the kind metric to evaluate.py.
RUNNERS = {
    "reward": run_reward,
    "advantage": run_advantage,
    "weight": run_weight,
    "schedule": run_schedule,
}
ELSEWHERE = {("weight", "tis"), ("weight", "gspo_ratio")}


def load_cases():
    cases = []
    for path in FILES:
        for number, case in enumerate(json.loads(path.read_text())["cases"]):
            if case["kind"] in RUNNERS and (case["kind"], case["name"]) not in ELSEWHERE:
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
