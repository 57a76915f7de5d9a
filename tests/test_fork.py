"""Forking is copying: the loop, and the few files it reads, train alone in an empty folder."""

import importlib.util
import os
import shutil

import pytest
from conftest import FREEZE, ROOT, lines

NEEDED = """train_grpo.py rewards.py verifier.py data.py methods/__init__.py scaling/__init__.py
    scaling/model.py scaling/shared_prompt.py""".split()
SAMPLERS = {"hf": ["toy/__init__.py", "toy/hf_sampler.py"], "vllm": []}
FLAGS = """--model model --data rows.jsonl --budgets bucket:16,32 --wording tulu --require-think --steps 2
    --max-tokens 48 --prompts-per-step 4 --group-size 4 --micro-tokens 2048 --lr 1e-3 --kl-coef 0.1""".split()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_fork_trains(script, tmp_path, sampler):
    if sampler == "vllm" and not importlib.util.find_spec("vllm"):
        pytest.skip("vllm is not installed")
    for name in NEEDED + SAMPLERS[sampler]:
        os.makedirs(tmp_path / os.path.dirname(name), exist_ok=True)
        shutil.copy(os.path.join(ROOT, name), tmp_path / name)
    shutil.copytree(os.path.join(FREEZE, "model"), tmp_path / "model")
    shutil.copy(os.path.join(FREEZE, "rows.jsonl"), tmp_path)
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    script("train_grpo.py", *FLAGS, "--sampler", sampler, "--out", "out", cwd=tmp_path, env=alone)
    steps = lines(tmp_path / "out")
    assert len(steps) == 2 and steps[1]["kl"] > 0 and steps[1]["grad_norm"] > 0
    assert max(m["logp_gap"] for m in steps) < 1e-4
    assert os.path.exists(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
