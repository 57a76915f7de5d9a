"""The real vLLM engine (its CPU build on CI) in the trainer's process; skipped where it is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

DATA = os.path.join(ROOT, "tests", "data")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


def test_problems_to_measured_length_control(tiny, script, tmp_path):
    """Real problems in, two optimizer steps with vLLM, a budget sweep out: all by command lines."""
    rows = tmp_path / "train.jsonl"
    script(
        *(
            "data.py",
            os.path.join(DATA, "math_train_small.jsonl.gz"),
            "--budgets",
            "uniform:100:4000",
            "--mode",
            "exact",
        ),
        *("--max-prompt-tokens", "900", "--tokenizer", tiny, "--out", rows),
    )
    with open(rows) as f:
        budgets = [json.loads(line)["budget"] for line in f]
    assert 100 <= min(budgets) < 400 and 3500 < max(budgets) <= 4000
    flags = [
        "--sampler",
        "vllm",
        "--steps",
        "2",
        "--prompts-per-step",
        "2",
        "--group-size",
        "2",
        "--lr",
        "1e-3",
    ]
    done = script(
        *(
            "train_grpo.py",
            "--model",
            tiny,
            "--data",
            rows,
            *flags,
            "--max-tokens",
            "4000",
            "--out",
            tmp_path / "run",
        )
    )
    assert "sampler vllm" in done.stdout
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        metrics = [json.loads(line) for line in f]
    # the engine's log-probs of its own samples are the trainer's, after the update too (float32)
    assert len(metrics) == 2 and all(m["logp_gap_max"] < 1e-4 for m in metrics)
    model = tmp_path / "run" / "checkpoint-2"
    out = tmp_path / "evaluation"
    script(
        *(
            "evaluate.py",
            "--model",
            model,
            "--data",
            os.path.join(DATA, "math500_small.jsonl"),
            "--budgets",
            "16,32",
        ),
        *("--n", "2", "--limit", "5", "--sampler", "vllm", "--out", out),
    )
    with open(out / "results.json") as f:
        results = json.load(f)
    budgets = results["datasets"]["math500_small"]["budgets"]
    assert budgets["16"]["n"] == budgets["32"]["n"] == 10 and budgets["32"]["mean_length"] > 0
    assert results["sampler"] == "vllm" and results["versions"]["vllm"]
    assert (out / "violins.png").stat().st_size > 5000
    script("evaluate.py", "--samples", out / "samples.jsonl", "--out", tmp_path / "again")
    with open(tmp_path / "again" / "results.json") as f:
        assert json.load(f)["datasets"] == results["datasets"]


STALE = """
import sys
import sampler, train_grpo
real, calls = sampler.VLLMSampler.sync, []
def sync(self, model):
    calls.append(1)
    if len(calls) != 2:  # the push after the first training step is lost
        real(self, model)
sampler.VLLMSampler.sync = sync
sys.exit(train_grpo.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("lr", ["1e-3", "1e-7"])
def test_a_lost_weight_update_stops_the_run(tiny, script, tmp_path, lr):
    """Also at a learning rate whose single step hides in the noise of the log-probs."""
    data = os.path.join(DATA, "math_train_small.jsonl.gz")
    # long enough that some of the random model's responses end by themselves: equal ones teach nothing
    flags = ["--budgets", "fixed:300", "--max-tokens", "600", "--prompts-per-step", "2", "--group-size", "4"]
    flags += ["--sampler", "vllm", "--steps", "2", "--lr", lr, "--out", tmp_path / "run"]
    environment = os.environ | {"PYTHONPATH": ROOT}
    done = script("-c", STALE, "--model", tiny, "--data", data, *flags, check=False, env=environment)
    assert done.returncode != 0
    assert "does not hold the trainer's weights" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_two_processes_with_an_engine_each(tiny, script, tmp_path):
    data = os.path.join(DATA, "math_train_small.jsonl.gz")
    flags = ["--budgets", "fixed:300", "--max-tokens", "600", "--prompts-per-step", "2", "--group-size", "4"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "no"]
    command = [
        *launch,
        "train_grpo.py",
        "--model",
        tiny,
        "--data",
        data,
        *flags,
        "--sampler",
        "vllm",
        "--steps",
        "2",
    ]
    # Sharded: each engine is filled with weights that both processes put together.
    script(*command, "--fsdp", "--lr", "1e-3", "--check-sync", "1", "--out", tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        metrics = [json.loads(line) for line in f]
    assert len(metrics) == 2 and all(m["logp_gap_max"] < 1e-4 for m in metrics)


EARLY = """
import sys
import sampler
engine = sampler.load_sampler(sys.argv[1], "vllm", 64)
seen, open_ = {}, []
def finished(i, responses):
    seen[i] = responses
    open_.append(engine.llm.llm_engine.has_unfinished_requests())
caps = [3, 40, 8, 30]
prompts = [[5 + i, 6] for i in range(4)]
made = engine.generate(prompts, 2, caps, seed=1, finished=finished, expected=[1, 9, 2, 8])
assert [seen[i] for i in range(4)] == made and len(seen) == 4
assert all(len(r["ids"]) <= cap and len(r["logps"]) == len(r["ids"]) for cap, g in zip(caps, made) for r in g)
assert open_[0] and not open_[-1], open_
print("early")
"""


def test_groups_are_handed_out_while_others_are_written(tiny, script):
    done = script("-c", EARLY, tiny, env=os.environ | {"PYTHONPATH": ROOT})
    assert done.stdout.strip().endswith("early")


CACHE = """
import sys, torch
import sampler
engine, model = sampler.load_sampler(sys.argv[1], "vllm", 1024), sampler.load_model(sys.argv[1])
prompt = list(range(5, 305))  # more than one block of the cache

def gap():  # between the engine's log-probs and those of a plain forward pass
    r = engine.generate([prompt], 1, 8, seed=1)[0][0]
    with torch.no_grad():
        logp = model(torch.tensor([prompt + r["ids"]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    logp = logp.gather(-1, torch.tensor(r["ids"])[:, None])[:, 0]
    return (logp - torch.tensor(r["logps"])).abs().max().item()

engine.sync(model)
print(gap())
torch.manual_seed(0)
for p in model.parameters():
    p.data += 0.05 * torch.randn_like(p)
reset, engine.llm.reset_prefix_cache = engine.llm.reset_prefix_cache, lambda: True
engine.sync(model)  # the weights are new, what was cached of the prompt is not
print(gap())
engine.llm.reset_prefix_cache = reset
engine.sync(model)
print(gap())
engine.llm.reset_prefix_cache = lambda: False
try:
    engine.sync(model)
except RuntimeError as error:
    print(error)
"""


def test_the_prefix_cache_is_dropped_with_the_old_weights(tiny, script):
    """Without the reset the engine answers from keys and values of the old weights: the gap shows it."""
    done = script("-c", CACHE, tiny, env=os.environ | {"PYTHONPATH": ROOT})
    *gaps, message = done.stdout.strip().splitlines()[-4:]
    before, stale, after = map(float, gaps)
    assert before < 1e-4 and after < 1e-4 and stale > 1e-2
    assert "did not drop its prefix cache" in message


SLEEP = """
import inspect, sys, torch, vllm
import sampler, train_grpo
from argparse import Namespace
assert {"level"} <= set(inspect.signature(vllm.LLM.sleep).parameters)
assert {"tags"} <= set(inspect.signature(vllm.LLM.wake_up).parameters)
assert "enable_sleep_mode" in inspect.signature(vllm.EngineArgs).parameters
engine, model = sampler.load_sampler(sys.argv[1], "vllm", 256), sampler.load_model(sys.argv[1])
order, llm, inner = [], engine.llm, engine.engine_model()
def noted(owner, name):
    real = getattr(owner, name)
    def call(*words, **options):
        order.append(" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
        return real(*words, **options)
    setattr(owner, name, call)
for owner, name in (llm, "sleep"), (llm, "wake_up"), (inner, "load_weights"), (llm, "reset_prefix_cache"):
    noted(owner, name)
args = Namespace(max_tokens=16, temperature=1.0, seed=0, dtype="float32", micro_tokens=4096)
for _ in range(2):
    engine.rest()
    assert llm.llm_engine.is_sleeping()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    engine.sync(model)
    assert not llm.llm_engine.is_sleeping()
    train_grpo.check_sync(engine, model, [5, 6, 7], args, torch.device("cpu"))
engine.sync(model)
print("; ".join(order))
"""


def test_the_engine_sleeps_and_wakes_in_the_right_order(tiny, script):
    """The real calls on the real engine; its CPU worker keeps its memory, so what they free is not tested."""
    done = script("-c", SLEEP, tiny, env=os.environ | {"PYTHONPATH": ROOT})
    night = (
        "sleep level=2; wake_up tags=['weights']; load_weights; wake_up tags=['kv_cache']; reset_prefix_cache"
    )
    assert done.stdout.strip().splitlines()[-1] == f"{night}; {night}; load_weights; reset_prefix_cache"


@pytest.mark.slow
def test_a_signal_while_the_engine_samples(tiny, tmp_path):
    data = os.path.join(DATA, "math_train_small.jsonl.gz")
    flags = ["--budgets", "fixed:300", "--max-tokens", "600", "--prompts-per-step", "2", "--group-size", "4"]
    flags += ["--sampler", "vllm", "--steps", "50", "--out", str(tmp_path / "run")]
    command = [sys.executable, "train_grpo.py", "--model", tiny, "--data", data, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.terminate()
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped by a signal after step" in told
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        steps = len(list(f))
    assert (tmp_path / "run" / f"checkpoint-{steps}").is_dir()
