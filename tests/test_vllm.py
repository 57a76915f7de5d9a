"""The real vLLM engine (its CPU build on CI) in the trainer's process; skipped where it is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TOY, lines

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
    assert len(metrics) == 2 and all(m["logp_gap"] < 1e-4 for m in metrics)
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
import train_grpo
real, calls = train_grpo.VLLM.load, []
def load(self, model):
    calls.append(1)
    if len(calls) != 2:  # the push after the first training step is lost
        real(self, model)
train_grpo.VLLM.load = load
train_grpo.main(sys.argv[1:])
"""


def test_a_lost_weight_update_stops_the_run(script, tmp_path):
    flags = [*TOY, "--sampler", "vllm", "--steps", "2", "--save-every", "1", "--out", tmp_path / "run"]
    done = script("-c", STALE, *flags, check=False, env=os.environ | {"PYTHONPATH": ROOT})
    assert done.returncode == 1 and "step 2: the sampler lacks the trainer's weights" in done.stderr
    assert (tmp_path / "run" / "checkpoint-1").exists() and not (tmp_path / "run" / "checkpoint-2").exists()


def test_two_processes_with_an_engine_each(tiny, script, tmp_path):
    data = os.path.join(DATA, "math_train_small.jsonl.gz")
    flags = ["--budgets", "fixed:300", "--max-tokens", "600", "--prompts-per-step", "2", "--group-size", "4"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
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
    script(*command, "--fsdp", "--lr", "1e-3", "--out", tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        metrics = [json.loads(line) for line in f]
    assert len(metrics) == 2 and all(m["logp_gap"] < 1e-4 for m in metrics)


ENGINE = """
import sys, torch
import data, train_grpo
from scaling import model as net
path, room = sys.argv[1], int(sys.argv[2])
args = train_grpo.build_parser().parse_args(["--dtype", "float32"])
tokenizer, model = data.load_tokenizer(path), net.load_model(path, args)
stops = data.stop_ids(model.generation_config, tokenizer)
engine = train_grpo.VLLM(path, tokenizer, stops, room, "float32", 0, 0.3, 8)

def gap(n=300):  # between the engine's log-probs and those of a plain forward pass
    prompt = list(range(5, 5 + n))
    r = engine.generate([prompt], 1, [8], 1.0, seed=1)[0][0]
    ids = torch.tensor(r["ids"]).long()
    with torch.no_grad():
        logp = model(torch.cat([torch.tensor(prompt), ids])[None]).logits[0].log_softmax(-1)[n - 1 : -1]
    return (logp.gather(-1, ids[:, None])[:, 0] - torch.tensor(r["logps"])).abs().max().item()

def move():
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)

torch.manual_seed(0)
"""

GENERATE = """
prompts, caps = [[5 + i, 6] for i in range(4)], [3, 40, 8, 30]
runs = [engine.generate(prompts, 2, caps, 1.0, seed=seed) for seed in (1, 1, 2)]
ids = [[r["ids"].tolist() for group in made for r in group] for made in runs]
assert ids[0] == ids[1] != ids[2] and [len(group) for group in runs[0]] == [2] * 4
for cap, group in zip(caps, runs[0]):
    for r in group:
        assert len(r["ids"]) == len(r["logps"]) <= cap and (r["ids"][-1] in stops) != r["truncated"]
        assert r["ids"].dtype.name == "int32" and r["logps"].dtype.name == "float32"
biased = engine.generate(prompts, 2, caps, 1.0, seed=1, logit_bias={7: 100.0})
assert all((r["ids"] == 7).all() for group in biased for r in group)
print("generated")
"""


def test_generate(tiny, script):
    """The same seed, the same responses; caps of their own, end tokens included, biases."""
    done = script("-c", ENGINE + GENERATE, tiny, "64", env=os.environ | {"PYTHONPATH": ROOT})
    assert done.stdout.strip().endswith("generated")


CACHE = """
engine.load(model)
print(gap())
move()
reset, engine.llm.reset_prefix_cache = engine.llm.reset_prefix_cache, lambda: True
engine.load(model)  # the weights are new, what was cached of the prompt is not
print(gap())
engine.llm.reset_prefix_cache = reset
engine.load(model)
print(gap())
engine.llm.reset_prefix_cache = lambda: False
try:
    engine.load(model)
except RuntimeError as error:
    print(error)
"""


def test_the_prefix_cache_is_dropped_with_the_old_weights(tiny, script):
    """Without the reset the engine answers from keys and values of the old weights: the gap shows it."""
    done = script("-c", ENGINE + CACHE, tiny, "1024", env=os.environ | {"PYTHONPATH": ROOT})
    *gaps, message = done.stdout.strip().splitlines()[-4:]
    before, stale, after = map(float, gaps)
    assert before < 1e-4 and after < 1e-4 and stale > 1e-2
    assert "kept its prefix cache" in message


SLEEP = """
import inspect
vllm = engine.vllm
assert {"level"} <= set(inspect.signature(vllm.LLM.sleep).parameters)
assert {"tags"} <= set(inspect.signature(vllm.LLM.wake_up).parameters)
assert "enable_sleep_mode" in inspect.signature(vllm.EngineArgs).parameters
order, llm = [], engine.llm
inner = llm.llm_engine.model_executor.driver_worker.model_runner.model
def noted(owner, name):
    real = getattr(owner, name)
    def call(*words, **options):
        order.append(" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
        return real(*words, **options)
    setattr(owner, name, call)
for owner, name in (llm, "sleep"), (llm, "wake_up"), (inner, "load_weights"), (llm, "reset_prefix_cache"):
    noted(owner, name)
for _ in range(2):
    engine.sleep()
    assert llm.llm_engine.is_sleeping()
    move()
    engine.load(model)
    assert not llm.llm_engine.is_sleeping() and gap() < 1e-4
engine.load(model)
print("; ".join(order))
"""


def test_the_engine_sleeps_and_wakes_in_the_right_order(tiny, script):
    """The real calls on the real engine; its CPU worker keeps its memory, so what they free is not tested."""
    done = script("-c", ENGINE + SLEEP, tiny, "512", env=os.environ | {"PYTHONPATH": ROOT})
    night = (
        "sleep level=2; wake_up tags=['weights']; load_weights; wake_up tags=['kv_cache']; reset_prefix_cache"
    )
    assert done.stdout.strip().splitlines()[-1] == f"{night}; {night}; load_weights; reset_prefix_cache"


@pytest.mark.slow
def test_a_signal_while_the_engine_samples(tmp_path):
    flags = [*TOY, "--sampler", "vllm", "--steps", "500", "--out", str(tmp_path / "run")]
    command = [sys.executable, "train_grpo.py", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not lines(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.terminate()
    told = process.communicate(timeout=60)[0]
    steps = len(lines(tmp_path / "run"))
    assert process.returncode == 0 and f"stopped after step {steps}, which is saved" in told
    assert (tmp_path / "run" / f"checkpoint-{steps}").is_dir()
