"""Length control without RL: real sampling on the toy's model, numbers by hand, checkpoints that load."""

import importlib.util
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import data
import evaluate
from evaluation import baselines, compare, engines
from evaluation.samples import read_samples
from studies import edits
from toy import task as toy
from toy.prepare import make_model

DATA = os.path.join(ROOT, "tests", "data")
GOLDEN = [0.05, 0.6, 0.35]  # of the end token and two others, at every position


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of the toy's model before any warm-up: it stops about every 28 tokens, with both stop tokens."""
    folder, tokenizer = str(tmp_path_factory.mktemp("models") / "toy"), toy.make_tokenizer()
    make_model(tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sampler(model):
    return engines.open_sampler(model, "hf", 512)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows = toy.problems("toy", "train", 6)
    return [data.encode_prompt(tokenizer, row["problem"]) for row in rows]


@pytest.fixture(scope="module")
def ask(sampler, tokenizer, prompts):
    """ask(method, n, budget, ...) -> the responses to all prompts in one list, ids as plain lists."""

    def function(method, n, budget, room=400, scale=1.0, **options):
        baseline = baselines.Baseline(method, sampler, tokenizer, room, **options)
        baseline.scales[budget] = scale
        made = flat(baseline.generate(prompts, n, budget, 0, temperature=1.0, top_p=1.0))
        return [response | {"ids": response["ids"].tolist()} for response in made]

    return function


def load_model(folder):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def flat(groups):
    return [completion for group in groups for completion in group]


# ------------------------------------------------------------------------------------------------------------
# Stop-token scaling in the samplers


def golden_model(folder: str, tokenizer) -> list[int]:
    """A model that draws every token with GOLDEN's probabilities; returns the three ids, end token first."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), [tokenizer.eos_token_id, 20, 21]
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    # The residual is all ones, so that the logits are the sums of the head's rows.
    torch.nn.init.ones_(model.model.embed_tokens.weight)
    torch.nn.init.ones_(model.model.norm.weight)
    with torch.no_grad():
        model.lm_head.weight[:, 0] = -40.0
        model.lm_head.weight[ids, 0] = torch.tensor(GOLDEN).log()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ids


def by_hand(k: float, temperature: float) -> list[float]:
    odds = np.array([GOLDEN[0] * k, *GOLDEN[1:]]) ** (1 / temperature)
    return (odds / odds.sum()).tolist()


def check_golden(sampler, ids):
    def draw(n, temperature, scale):
        bias = baselines.stop_bias([*sampler.stop_ids, 4], scale) or None
        made = sampler.generate([[5, 6]], n, [1], temperature, 1, logit_bias=bias)
        return [response | {"ids": response["ids"].tolist()} for response in flat(made)]

    cases = [(1.0, 1.0, GOLDEN), (2.0, 1.0, [0.0952, 0.5714, 0.3333]), (4.0, 1.0, [0.1739, 0.5217, 0.3043])]
    cases += [(3.0, 0.5, by_hand(3, 0.5)), (0.25, 1.0, by_hand(0.25, 1))]
    for k, temperature, wanted in cases:
        assert by_hand(k, temperature) == pytest.approx(wanted, abs=1e-4)
        made = draw(2000, temperature, k)
        drawn = [response["ids"][0] for response in made]
        for token, p in zip(ids, wanted, strict=True):
            # five standard errors of a share of 2000 draws
            assert drawn.count(token) / 2000 == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 2000))
        # the log-probs are those of the distribution that was sampled from
        for response in made:
            want = wanted[ids.index(response["ids"][0])]
            assert math.exp(response["logps"][0]) == pytest.approx(want, abs=2e-4)
    # greedy: the end token's odds only have to pass the best other
    assert draw(1, 0.0, 11.0)[0]["ids"] == [ids[1]]
    assert draw(1, 0.0, 13.0)[0]["ids"] == [ids[0]]


def test_stop_scale_golden(tmp_path, tokenizer):
    ids = golden_model(str(tmp_path), tokenizer)
    sampler = engines.open_sampler(str(tmp_path), "hf", 64)
    check_golden(sampler, ids)
    made = flat(sampler.generate([[5]], 50, [40], 1.0, 2, stop_ids=[ids[2]]))
    for response in made:  # another stop token in place of the sampler's own
        assert (response["ids"][-1] == ids[2]) == (not response["truncated"])
        assert ids[2] not in response["ids"][:-1]
    assert any(ids[0] in response["ids"] for response in made)


def test_stop_bias_by_hand():
    assert baselines.stop_bias([7, 3], 1.0) == {}
    assert baselines.stop_bias([7, 3], 2.0) == {3: math.log(2), 7: math.log(2)}


VLLM = """
import sys
from evaluation import engines
import test_baselines
from toy import task as toy
from toy.prepare import make_model
ids = test_baselines.golden_model(sys.argv[1], toy.make_tokenizer())
engine = engines.open_sampler(sys.argv[1], "vllm", 64)
test_baselines.check_golden(engine, ids)
made = test_baselines.flat(engine.generate([[5]], 20, [40], 1.0, 2, stop_ids=[ids[2], ids[0]]))
assert {int(response["ids"][-1]) for response in made} == {ids[0], ids[2]}
print("golden")
"""


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_stop_scale_golden_in_vllm(script, tmp_path):
    path = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    done = script("-c", VLLM, tmp_path / "golden", env=os.environ | {"PYTHONPATH": path})
    assert done.stdout.strip().endswith("golden")


# ------------------------------------------------------------------------------------------------------------
# Decoding


def test_budget_forcing(sampler, tokenizer, ask, monkeypatch):
    end, wait = (
        tokenizer.convert_tokens_to_ids("</think>"),
        tokenizer.encode("wait", add_special_tokens=False),
    )
    stops, made = {end, *sampler.stop_ids}, ask("s1", 4, 60)
    assert len(made) == 24 and sum(c["waits"] for c in made) > 10
    for c in made:
        at = c["ids"].index(end)
        thinking, answer = c["ids"][:at], c["ids"][at + 1 :]
        # nothing but "Wait" stands where it wanted to stop, and the end came at the budget
        assert not stops & set(thinking) and thinking.count(wait[0]) >= c["waits"]
        # (an end token just before the budget leaves no place for "Wait": `</think>` is forced there)
        assert 60 - len(wait) - 1 <= at <= 60 and (at < 60 or c["forced"])
        assert c["injected"] == c["waits"] * len(wait) + c["forced"]
        assert 1 <= len(answer) <= 512
        assert (answer[-1] in sampler.stop_ids) == (not c["truncated"])
    assert ask("s1", 4, 60) == made  # one seed, one result
    monkeypatch.setattr(baselines, "WAITS", 1)
    few = ask("s1", 4, 60)
    assert {c["waits"] for c in few} == {0, 1} and any(c["ids"].index(end) < 50 for c in few)


def test_final_text_of_hard_truncation(tokenizer, ask, monkeypatch):
    monkeypatch.setattr(baselines, "FINAL_TEXTS", ("Think for",))
    end, final = (
        tokenizer.convert_tokens_to_ids("</think>"),
        tokenizer.encode("Think for", add_special_tokens=False),
    )
    made = ask("truncate", 4, 30, answer_tokens=9)
    assert any(c["forced"] for c in made) and not all(c["forced"] for c in made)
    for c in made:
        at = c["ids"].index(end)
        assert len(c["ids"]) <= 30 + 1 + len(final) + 9 and at <= 30 and c["waits"] == 0
        if c["forced"]:
            assert c["ids"][at + 1 : at + 3] == final and c["injected"] == 3


def test_cut_and_none(ask):
    cut = ask("cut", 4, 20)
    assert all(len(c["ids"]) == 20 for c in cut if c["truncated"])
    assert max(len(c["ids"]) for c in cut) == 20
    free = ask("none", 4, None)
    # the same seed, so the cut responses are the beginnings of the free ones
    assert [c["ids"][:20] for c in free] == [c["ids"] for c in cut]


def test_stop_scale_sets_the_mean_length(sampler, tokenizer, prompts, ask):
    def length(k):
        return np.mean([len(c["ids"]) for c in ask("stop_scale", 8, 40, scale=k)])

    assert length(20.0) < length(1.0) < length(0.05)
    baseline = baselines.Baseline("stop_scale", sampler, tokenizer, 400)
    k, mean = baselines.fit_scale(baseline, prompts, 12, {"temperature": 1.0, "top_p": 1.0, "seed": 0})
    assert k > 1 and abs(mean - 12) < 4 and baseline.scales == {12: k}


class Fake:
    """A baseline whose responses are length(k) tokens long."""

    def __init__(self, length):
        self.length, self.scales, self.asked = length, {}, []

    def generate(self, prompts, n, budget, seed):
        self.asked.append(self.scales[budget])
        return [[{"ids": range(round(self.length(self.scales[budget])))}] * n for _ in prompts]


def test_scale_is_found_by_bisection():
    fake = Fake(lambda k: 100 / k)
    k, mean = baselines.fit_scale(fake, [[1]], 400, {"seed": 0})
    # log k = -1.386: 0, -4, -2, -1, -1.5, -1.25, -1.375, which is near enough.
    assert np.log(fake.asked) == pytest.approx([0, -4, -2, -1, -1.5, -1.25, -1.375])
    assert mean == 396 and k == fake.asked[-1] == fake.scales[400]
    deaf = Fake(lambda k: 7)
    assert baselines.fit_scale(deaf, [[1]], 400, {"seed": 0}, tries=4)[1] == 7 and len(deaf.asked) == 4
    jump = Fake(lambda k: 50 if k < 1 else 10)  # no k gives 30
    assert baselines.fit_scale(jump, [[1]], 30, {"seed": 0})[1] in (10, 50)


def test_caps_by_hand(tokenizer, monkeypatch):
    monkeypatch.setattr(baselines, "FINAL_TEXTS", ("Think for",))  # two tokens

    def caps(method, budget, room=1000, **options):
        options = {"answer_tokens": 50} | options
        return baselines.Baseline(method, None, tokenizer, room, **options).caps(budget)

    assert caps("none", None) == (1000, 1000)
    assert caps("none", None, max_tokens=30) == (30, 30)
    assert caps("s1", 100) == (100, 153)  # 100 + </think> + 2 of the question + 50
    assert caps("s1", 980) == (980, 1000)
    assert caps("truncate", 100, answer_tokens=20) == (100, 123)
    assert caps("cut", 100) == (100, 100)
    assert caps("stop_scale", 100) == (200, 200)
    for method, budget in [("s1", 997), ("cut", 1001)]:
        with pytest.raises(data.BadInput, match=f"--budgets {budget}"):
            caps(method, budget)


def test_texts_that_the_tokenizer_can_write(tokenizer, tiny):
    assert tokenizer.decode(baselines.first_writable(tokenizer, baselines.WAIT_TEXTS)) == "wait"
    assert baselines.first_writable(tokenizer, baselines.FINAL_TEXTS) == []
    pieces = data.load_tokenizer(tiny)
    assert pieces.decode(baselines.first_writable(pieces, baselines.WAIT_TEXTS)) == "Wait"
    with pytest.raises(data.BadInput, match="cannot write 'Hmm'"):
        baselines.first_writable(tokenizer, ("Hmm",))


def test_sweep(model, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--budgets", "16,32", "--n", "2", "--limit", "5", "--sampler", "hf", "--out", str(out)]
    flags += ["--temperature", "1", "--max-tokens", "60", "--seed", "1"]
    assert baselines.main(["sweep", "--model", model, "--data", "toy", *flags]) == 0
    told = capsys.readouterr().out.splitlines()
    table = [
        re.split(r"\s{2,}", line.strip()) for line in told if re.match(r" *(asked for|\d+|none)  ", line)
    ]
    assert table[0] == ["asked for", *baselines.METHODS]
    for method in baselines.METHODS:
        rows = list(read_samples(str(out / method / "samples.jsonl")))
        results = json.loads((out / method / "results.json").read_text())
        keys = ["none"] if method == "none" else ["16", "32"]
        assert results["baseline"] == method and results["mode"] == "none"
        cells = results["datasets"]["toy"]["budgets"]
        assert list(cells) == keys
        for key in keys:
            cell = [row for row in rows if str(row["budget"] or "none") == key]
            assert len(cell) == cells[key]["n"] == 10 and {row["baseline"] for row in cell} == {method}
            assert cells[key]["mean_length"] == pytest.approx(np.mean([row["length"] for row in cell]))
            accuracy = np.mean([row["correct"] for row in cell])
            assert cells[key]["accuracy"] == accuracy
            text = f"{accuracy:.1%} at {cells[key]['mean_length']:.0f}"
            assert any(line[0] == key and text in line for line in table), (text, table)
            assert not any("Think" in row["prompt"] for row in cell)
        if method != "cut":
            assert not any(row["correct"] for row in rows if row["finish_reason"] == "length")
    assert sum(row["waits"] for row in read_samples(str(out / "s1" / "samples.jsonl"))) > 0
    assert baselines.main(["sweep", "--model", model, "--data", "toy", *flags]) == 2  # nothing is overwritten
    assert "holds a run of none" in capsys.readouterr().err
    # The one that was asked for no length stands beside the others at every budget.
    folders = [str(out / method) for method in ("none", "s1", "cut")]
    assert compare.main([*folders, "--out", str(tmp_path / "both")]) == 0
    budgets = json.loads((tmp_path / "both" / "compare.json").read_text())["datasets"]["toy"]["budgets"]
    assert list(budgets) == ["16", "32"]
    assert all(list(cell["figures"]) == ["none", "s1", "cut"] for cell in budgets.values())
    free = budgets["16"]["figures"]["none"]
    assert free["accuracy"] == budgets["32"]["figures"]["none"]["accuracy"] and free["abs_error"] is None
    assert compare.main([folders[1], folders[0], "--out", str(tmp_path / "other")]) == 0
    assert "asked for" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """The same model after an update of every weight."""
    folder, torch_model = str(tmp_path_factory.mktemp("models") / "tuned"), load_model(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)
    torch_model.save_pretrained(folder)
    data.load_tokenizer(model).save_pretrained(folder)
    return folder


def weights(folder):
    return load_model(str(folder)).state_dict()


def test_merge(model, tuned, tmp_path, capsys):
    a, b = weights(model), weights(tuned)
    for name, keep, scale in [("all", 1, 1), ("nothing", 0, 1), ("dler", 0.25, 0.7)]:
        flags = ["--keep", str(keep), "--scale", str(scale), "--out", str(tmp_path / name)]
        assert baselines.main(["merge", "--base", model, "--tuned", tuned, *flags]) == 0
    for name, wanted in (("all", b), ("nothing", a)):
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in weights(tmp_path / name).items())
    merged = weights(tmp_path / "dler")
    names = [name for name, _ in load_model(model).named_parameters()]  # tied weights once
    delta = torch.cat([(b[key] - a[key]).flatten() for key in names])
    done = torch.cat([(merged[key] - a[key]).flatten() for key in names])
    largest = delta.abs() >= delta.abs().sort(descending=True).values[round(0.25 * len(delta)) - 1]
    assert int(largest.sum()) == pytest.approx(len(delta) / 4, rel=1e-3)
    assert torch.allclose(done, torch.where(largest, 0.7 * delta, 0), atol=1e-7)
    assert f"merge: {int(largest.sum())} of {len(delta)} updates kept (25.0%)" in capsys.readouterr().out
    flags = ["--base", model, "--tuned", model, "--out", str(tmp_path / "same")]
    assert baselines.main(["merge", *flags]) == 0  # what did not move is not counted
    assert "merge: 0 of " in capsys.readouterr().out
    assert data.load_tokenizer(str(tmp_path / "dler")).encode("wait") == toy.make_tokenizer().encode("wait")


def test_thinkedit_golden():
    weight, v = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2.0, 0.0])  # its length does not matter
    assert edits.remove_direction(weight, v).tolist() == [[0, 2], [0, 4]]


@pytest.fixture(scope="module")
def spoken(sampler, tmp_path_factory):
    """Saved samples of the toy's model."""
    path, rows = tmp_path_factory.mktemp("samples") / "samples.jsonl", toy.problems("toy", "train", 20)
    words = toy.make_tokenizer()
    prompts = [data.encode_prompt(words, row["problem"]) for row in rows]
    made = sampler.generate(prompts, 2, [60] * len(rows), 1.0, 5)
    with open(path, "w") as f:
        for row, group in zip(rows, made, strict=True):
            request = {"problem": row, "prompt": row["problem"], "budget": None, "mode": None}
            responses = [engines.to_text(response, words) for response in group]
            for sample in evaluate.to_samples(request, responses):
                f.write(json.dumps(sample | {"correct": True}) + "\n")
    return str(path)


def test_thinkedit(model, tokenizer, spoken, tmp_path, capsys):
    out, heads = tmp_path / "edited", 3
    flags = ["--samples", spoken, "--heads", str(heads), "--long", "20", "--short", "10", "--out", str(out)]
    assert baselines.main(["thinkedit", "--model", model, *flags]) == 0
    assert f"{heads} heads edited" in capsys.readouterr().out
    about = json.loads((out / "thinkedit.json").read_text())
    chosen = {(layer, head): value for layer, head, value in about["layer_head_contribution"]}
    groups = ([], [])
    for row in read_samples(spoken):
        ids = tokenizer.encode(row["response"].split("</think>")[0], add_special_tokens=False)
        prompt = data.encode_prompt(tokenizer, row["prompt"])
        if "</think>" in row["response"] and ids and not 10 <= len(ids) <= 20:
            groups[len(ids) < 10].append((prompt + ids, len(prompt)))
    assert [len(group) for group in groups] == [about["long"], about["short"]] and all(groups)
    # By another way: the residuals behind the attention, and W_o times each head's output, token by token.
    before, after = load_model(model), AutoModelForCausalLM.from_pretrained(str(out))
    residual, outputs = by_token(before, groups)
    for layer in range(2):
        v = residual[0][layer] - residual[1][layer]
        v = v / v.norm()
        old, new = (m.model.layers[layer].self_attn.o_proj.weight.detach() for m in (before, after))
        for head in range(4):
            part = slice(32 * head, 32 * head + 32)
            contribution = -(outputs[layer][part] @ old[:, part].T @ v).item()
            if (layer, head) in chosen:
                assert chosen[layer, head] == pytest.approx(contribution, abs=1e-5)
                assert (v @ new[:, part]).abs().max() < 1e-6 < (v @ old[:, part]).abs().max()
            else:
                assert contribution <= min(chosen.values()) and torch.equal(old[:, part], new[:, part])
    kept = [key for key in before.state_dict() if "o_proj" not in key]
    assert all(torch.equal(before.state_dict()[key], after.state_dict()[key]) for key in kept)


def by_token(model, groups):
    """Residuals of long and short responses [2][layers][d]; heads' mean outputs of short ones [layers][d]."""
    seen, residual, outputs = {}, [], []
    for i, layer in enumerate(model.model.layers):
        keep = lambda module, x, y, i=i: seen.update({i: (x[0][0], y[0])})  # noqa: E731
        layer.self_attn.o_proj.register_forward_hook(keep)
    for group in groups:
        sums, outputs = [0, 0], [0, 0]
        for ids, start in group:
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            at = slice(start - 1, len(ids) - 1)
            for i in range(2):
                sums[i] = sums[i] + (hidden[i][0] + seen[i][1])[at].mean(0) / len(group)
                outputs[i] = outputs[i] + seen[i][0][at].mean(0) / len(group)
        residual.append(sums)
    return residual, outputs


# ------------------------------------------------------------------------------------------------------------
# Selection and the command line


def effort(length, correct, budget, problem="p"):
    row = {"id": f"{problem}-{budget}", "problem": problem, "answer": "1", "kind": "math", "source": "x"}
    row |= {"response": f"{length} </think> 1", "length": length, "correct": correct, "budget": budget}
    return row | {"finish_reason": "stop", "mode": "exact", "prompt": "p Think for 5 tokens."}


def test_tops(tmp_path, capsys):
    samples = [effort(400, False, 1), effort(900, True, 2), effort(1500, True, 3)]
    samples += [effort(10, False, 1, "q"), effort(7, True, 1, "r"), effort(7, True, 2, "r")]
    samples += [effort(None, True, 1, "s")]
    path, out = tmp_path / "samples.jsonl", tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert baselines.main(["tops", "--samples", str(path), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["problem"], row["length"], row["effort"]) for row in rows] == [("p", 900, 2), ("r", 7, 1)]
    assert rows[0]["messages"][1]["content"] == "900 </think> 1" and rows[0]["budget"] is None
    assert "Think for" not in rows[0]["prompt"] and rows[0]["messages"][0]["content"] == rows[0]["prompt"]
    assert "2 of 4 problems" in capsys.readouterr().out
    assert [row["problem"] for row in data.load_problems(str(out))] == ["p", "r"]


BAD = [
    ("sweep --model {model} --data toy --budgets 16,x --out {out}", ["--budgets", "'x'"]),
    ("sweep --model {model} --data toy --budgets none --out {out}", ["--budgets", "none"]),
    ("sweep --model {model} --data toy --budgets 16 --methods s1,s2 --out {out}", ["'s2'", "truncate"]),
    ("sweep --model {model} --data toy --budgets 16 --n 0 --out {out}", ["--n (0)", "1 or more"]),
    ("sweep --model {model} --data toy --budgets 16 --temperature nan --out {out}", ["--temperature (nan)"]),
    ("sweep --model {model} --data toy --budgets 600 --methods cut --out {out}", ["--budgets 600", "cut"]),
    ("sweep --model {model} --data toy --budgets 16 --out /proc/none", ["--out /proc/none", "written"]),
    ("merge --base {model} --tuned {model} --out /proc/none", ["--out /proc/none", "written"]),
    ("sweep --model {out} --data toy --budgets 16 --out {out}", ["{out}"]),
    ("sweep --model {model} --data toy --budget 16 --out {out}", ["--budget"]),
    ("merge --base {model} --tuned {model} --keep 1.5 --out {out}", ["--keep (1.5)", "0 to 1"]),
    ("merge --base {data} --tuned {model} --out {out}", ["--base", "{data}"]),
    ("merge --base {model} --tuned {tiny} --out {out}", ["different models"]),
    ("merge --base {model} --tuned {model} --out {data}", ["--out {data} exists"]),
    ("thinkedit --model {model} --samples {spoken} --out {out}", ["0 thoughts longer than 1000", "--long"]),
    ("thinkedit --model {model} --samples {spoken} --long 1 --short 9 --out {out}", ["--short (9)"]),
    ("tops --samples {spoken} --out {out}", ["--out", ".jsonl"]),
    ("tops --samples {math} --out {out}.jsonl", ["line 1", "response"]),
    ("tops --samples {out} --out {out}.jsonl", ["{out}"]),
    ("juggle", ["juggle", "sweep"]),
]


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_bad_input(line, words, model, tiny, spoken, tmp_path, capsys):
    names = {"model": model, "tiny": tiny, "spoken": spoken, "data": DATA, "out": str(tmp_path / "out")}
    names["math"] = os.path.join(DATA, "math_train_small.jsonl.gz")
    assert baselines.main(line.format(**names).split()) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("evaluation.baselines: error: ")
    assert all(word.format(**names) in message for word in words), message
    assert os.listdir(tmp_path) == []


def test_help_needs_no_torch(script):
    look = "import sys; from evaluation import baselines; code = baselines.main(['sweep', '--help'])"
    done = script("-c", f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {look}")
    assert "--answer-tokens" in done.stdout and done.stdout.strip().endswith("False")
