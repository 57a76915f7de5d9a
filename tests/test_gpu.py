"""tests/gpu on a machine without a GPU: it runs to its end in tiny sizes, so that it cannot rot."""

import importlib.util
import json
import os
import subprocess

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU: run tests/gpu/check.sh itself")


def run(name, *words, **env):
    command = ["bash", os.path.join(ROOT, "tests", "gpu", name), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_one_gpu(script):
    names = ["versions", "logps", "attention", "optimizers", "memory", "trainer", "throughput"]
    *lines, last = run("check.sh", *names)
    found = json.loads(last)
    assert found["cuda"] is False and [line.split()[:2] for line in lines] == [[name, "ok"] for name in names]
    assert set(found["parts"]["trainer"]["ok"]) == {"adamw", "adamw8bit", "lora"}
    failed = script("tests/gpu/check.py", "nosuch", check=False)
    assert failed.returncode == 2 and "unknown part nosuch" in failed.stderr


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vllm")
def test_the_engine():
    line, last = run("check.sh", "engine")
    found = json.loads(last)["parts"]["engine"]["ok"]
    assert found["gap_after_sync"] < 1e-4 < found["gap_before_sync"]


def test_without_an_engine_the_rest_goes_on():
    if importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    line, last = run("check.sh", "engine")
    assert json.loads(last)["parts"]["engine"]["skipped"] == "no vllm"


def test_several_gpus():
    lines = run("check_multi.sh", "2", ONLY="--fsdp")
    assert lines[-1] == "all of it held" and len(lines) == 3
