"""Things broken on purpose: kills, signals, full disks, closed screens, dead processes, numbers that fool."""

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import checkpoints
import faults
import kill_often
import logbook
import sampler
import toy
import train_grpo
from data import BadInput

FLAGS = "--data toy --limit 12 --wording tulu --max-tokens 24 --prompts-per-step 4 --group-size 4 --lr 1e-3"
FLAGS = [*FLAGS.split(), "--sampler", "hf", "--require-think"]
BUDGETS = ["--budgets", "bucket:8,16", "--reward", "peaked_exact", "--advantage", "gdpo"]


@pytest.fixture(scope="session")
def eager(tmp_path_factory):
    """A toy model that guesses: a few hesitations, </think>, a digit. One answer in ten is right, of any length."""
    folder = str(tmp_path_factory.mktemp("models") / "eager")
    tokenizer, rng = toy.make_tokenizer(), np.random.default_rng(0)
    model = toy.make_model(tokenizer, 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        texts = [
            f"<think> {'wait ' * rng.integers(0, 14)}</think> {rng.integers(0, 10)} <eos>" for _ in range(32)
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def metrics(out):
    with open(Path(out) / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def timeless(line):
    return {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per", "peak"))}


def equal(a, b):
    """Whether two trainer states are the same, tensor by tensor, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_run(a, b, step):
    """Weights, optimizer, memory and metrics of two runs after `step` steps are bit for bit the same."""
    one, two = (Path(out) / f"checkpoint-{step}" for out in (a, b))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    states = [checkpoints.load_state(str(folder)) for folder in (one, two)]
    assert all(equal(states[0][key], states[1][key]) for key in ("step", "optimizer", "memory", "run"))
    whole, broken = metrics(a), metrics(b)
    assert [m["step"] for m in broken] == list(range(step))
    assert list(map(timeless, whole)) == list(map(timeless, broken))


# Resuming ---------------------------------------------------------------------------------------------------

MODES = {
    "hapo, budgets drawn anew": "--reward hapo_linear --budgets bucket:8,16 --resample-budgets",
    "palu, dynamic sampling": "--reward palu --reward-args l_max=24 --budgets none --dynamic-sampling correct",
    "curriculum": "--reward curriculum_band --budgets none --budget-schedule step --schedule-args start=16 period=2",
    "laser_d": "--reward laser_d --budgets none --method-args every=3 size=8 samples=2 low=8 step=8",
    "reference samples": "--reward o1_pruner --budgets none --reference-samples 2",
    "minibatches, cosine": "--reward peaked_exact --budgets bucket:8,16 --minibatches 2 --lr-schedule cosine",
}


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact(eager, tmp_path, mode):
    """5 steps are 3, the end of everything in memory, and 2 more; memory, draws and optimizer included."""
    flags = ["--model", eager, *FLAGS, *MODES[mode].split(), "--steps", "5", "--save-every", "3"]
    assert train_grpo.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-5")
    assert train_grpo.main(["--resume", "--out", str(tmp_path / "broken")]) == 0
    same_run(tmp_path / "whole", tmp_path / "broken", 5)
    state = checkpoints.load_state(str(tmp_path / "whole" / "checkpoint-5"))
    remembered = {"hapo": "history", "palu": "palu", "laser_d": "laser", "reference": "reference"}
    wanted = [name for word, name in remembered.items() if mode.startswith(word)]
    assert all(state["memory"].get(name) for name in wanted), "the mode had nothing to remember"


# Kills and signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_random_signals(eager, tmp_path, name):
    """In CI 8 of kill -9 and 3 of the others, to forked processes that run main(); then fifty of the real ones."""
    times = 8 if name == "SIGKILL" else 3
    number = getattr(signal, name)
    kill_often.torment(eager, str(tmp_path), number, times, kill_often.Forked, steps=40, seed=1)
    kill_often.compare(eager, str(tmp_path), kill_often.Forked, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_fifty_random_signals(eager, tmp_path, name):
    records = kill_often.torment(eager, str(tmp_path), getattr(signal, name), 50)
    kill_often.compare(eager, str(tmp_path))
    print(kill_often.summary(records))
