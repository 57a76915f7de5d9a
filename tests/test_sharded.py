"""Shards (FSDP2), adapters (LoRA), 8-bit moments: the same training, saved whole and gone on with exactly."""

import json
import os

import pytest
import torch
from conftest import ROOT, TIMES
from safetensors.torch import load_file

WORKER = os.path.join(ROOT, "tests", "two_processes.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def updates(tiny, script, tmp_path_factory):
    """updates(processes, flags): what two_processes.py found, and the folder of its checkpoint; made once."""
    known = {}

    def run(processes, flags):
        if (processes, flags) not in known:
            path = tmp_path_factory.mktemp("updates") / "out.pt"
            script(*(LAUNCH if processes == 2 else []), WORKER, tiny, path, *flags.split())
            known[processes, flags] = torch.load(path, weights_only=True), f"{path}.run/checkpoint-2"
        return known[processes, flags]

    return run


def distance(a, b):
    assert set(a) == set(b)
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.mark.parametrize("flags", ["", "--fsdp", "--fsdp --lora 4 --gradient-checkpointing"])
def test_two_processes_learn_what_one_does(updates, flags):
    """Over updates of two optimizer steps; in the last one a process has no response of its own."""
    one, _ = updates(1, "--lora 4" if "--lora" in flags else "")
    two, _ = updates(2, flags)
    assert two["processes"] == 2 and distance(two["first"], one["first"]) < 1e-5
    for name in ("first_loss", "first_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-5) and one[name] != 0
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-6)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-3)
    assert distance(two["weights"], one["weights"]) < 1e-4  # AdamW makes much of gradients near 0


def test_shards_in_bfloat16_follow_the_plain_run(updates):
    one, _ = updates(1, "--dtype bfloat16")
    two, _ = updates(2, "--fsdp --dtype bfloat16")
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-3)
    assert two["first_norm"] == pytest.approx(one["first_norm"], rel=1e-2)


CASES = [(1, ""), (1, "--lora 4"), (1, "--optim adamw8bit"), (1, "--optim adamw8bit --lora 4"), (2, "--fsdp"),
         (2, "--fsdp --dtype bfloat16"), (2, "--fsdp --lora 4 --gradient-checkpointing")]  # fmt: skip


@pytest.mark.parametrize("processes, flags", CASES)
def test_what_is_saved_is_whole_exact_and_goes_on(updates, processes, flags):
    """A checkpoint holds the float32 weights bit for bit; what goes on from it is what was not disturbed."""
    found, folder = updates(processes, flags)
    written = load_file(os.path.join(folder, "model.safetensors"))
    assert {weight.dtype for weight in written.values()} == {torch.float32}
    assert set(written) <= set(found["weights"]) and len(written) > 20
    if "--lora" not in flags:  # those of adapters are merged
        assert all(torch.equal(weight, found["masters"][name]) for name, weight in written.items())
        rounded = [torch.equal(w, w.bfloat16().float()) for w in written.values() if w.dim() > 1]
        assert not any(rounded)
    assert distance(found["again"], found["weights"]) == 0
    assert distance(found["first"], found["weights"]) > 1e-4


def test_only_adapters_learn(updates):
    found, folder = updates(1, "--lora 4")
    state = torch.load(os.path.join(folder, "trainer_state.pt"), weights_only=True)
    assert state["adapter"] and all(".lora_" in name for name in state["adapter"])
    moved = {name for name, w in found["weights"].items() if not torch.equal(w, found["first"][name])}
    assert moved and not [name for name in moved if "embed" in name or "norm" in name]


FLAGS = "--budgets bucket:8,16 --max-tokens 24 --prompts-per-step 4 --group-size 4 --sampler hf --lr 1e-3"
FLAGS += " --kl-coef 0.01 --minibatches 2"


@pytest.mark.parametrize(
    "processes, flags",
    [(1, "--lora 2 --optim adamw8bit"), (2, "--fsdp --dtype bfloat16")],
)
def test_a_resumed_run_is_the_run(tiny, script, tmp_path, processes, flags):
    """The real script: 4 steps equal 2 and 2 more, and what it saves is a plain model."""
    rows = os.path.join(ROOT, "tests", "data", "math_train_small.jsonl.gz")
    command = [*(LAUNCH if processes == 2 else []), "train_grpo.py", "--model", tiny, "--data", rows]
    command += [*FLAGS.split(), *flags.split()]
    script(*command, "--steps", "4", "--out", tmp_path / "whole")
    script(*command, "--steps", "2", "--out", tmp_path / "parts")
    script(*command, "--steps", "4", "--resume", "--out", tmp_path / "parts")
    runs = []
    for name in ("whole", "parts"):
        with open(tmp_path / name / "metrics.jsonl") as f:
            steps = [json.loads(line) for line in f]
        runs.append([{k: v for k, v in m.items() if not k.startswith(TIMES)} for m in steps])
    assert len(runs[0]) == 4 and runs[0] == runs[1]
    whole, parts = (
        load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("whole", "parts")
    )
    assert distance(whole, parts) == 0 and distance(whole, load_file(f"{tiny}/model.safetensors")) > 0
