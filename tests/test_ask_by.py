"""Asking by sentences of one's own, a template's variable or an effort; the protocol of docs/adherence.md."""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import pytest
from conftest import FREEZE, ROOT, TOY, same
from test_evaluate import read, run, sample, table_of, write

import data
import evaluate
import train_grpo
from evaluation import baselines, compare, engines, metrics, report
from integrations import card

MODEL = os.path.join(FREEZE, "model")
TEMPLATE = """{% for m in messages %}<user> {{ m.content }} {% endfor %}{% if thinking_budget %}Think for \
{{ thinking_budget }} tokens. {% endif %}{% if reasoning_effort %}Think for \
{{ {'low': 8, 'high': 32}[reasoning_effort] }} tokens. {% endif %}<think>"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The small taught model; its template asks in words for what its variables say."""
    folder = tmp_path_factory.mktemp("taught") / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def samples_of(folder) -> list[dict]:
    return [json.loads(line) for line in open(folder / "samples.jsonl", encoding="utf-8")]


def test_what_a_request_carries():
    assert engines.control("sentence", 512) == engines.control("thinking-token-budget", None) == {}
    assert engines.control("thinking-token-budget", 512) == {"thinking_token_budget": 512}
    assert engines.control("template:thinking_budget", 9) == {"chat_template_kwargs": {"thinking_budget": 9}}
    assert engines.control("effort", "low") == {"reasoning_effort": "low"}


def test_a_template_that_writes_the_sentence_gives_the_same(model, tmp_path):
    """By sentence, by variable and by effort; greedy responses to equal prompts are equal."""
    common = ["--model", model, "--data", "toy", "--limit", "6", "--temperature", "0", "--sampler", "hf"]
    common += ["--max-tokens", "80"]
    ways = {"spoken": "sentence", "variable": "template:thinking_budget"}
    for name, way in ways.items():
        assert run(*common, "--budgets", "none,8,32", "--ask-by", way, "--out", tmp_path / name) == 0
    assert run(*common, "--ask-by", "effort:low,high", "--out", tmp_path / "effort") == 0
    rows = {name: samples_of(tmp_path / name) for name in (*ways, "effort")}
    key = ("budget", "id", "response", "length", "mode")
    assert [[r[k] for k in key] for r in rows["spoken"]] == [[r[k] for k in key] for r in rows["variable"]]
    assert [r["response"] for r in rows["effort"]] == [r["response"] for r in rows["spoken"] if r["budget"]]
    assert all("Think" not in r["prompt"] for name in ("variable", "effort") for r in rows[name])
    assert [r["effort"] for r in rows["effort"]] == ["low"] * 6 + ["high"] * 6
    # How it was asked stands in the results, in the report and in the table of a comparison.
    found = read(tmp_path / "variable")
    assert found["ask_by"] == found["datasets"]["toy"]["ask_by"] == "template:thinking_budget"
    assert "template:thinking_budget" in (tmp_path / "variable" / "report.html").read_text()
    budgets = read(tmp_path / "effort")["datasets"]["toy"]["budgets"]
    assert list(budgets) == ["low", "high"] and budgets["low"]["abs_error"] is None
    assert (
        budgets["low"]["mean_length"]
        == read(tmp_path / "spoken")["datasets"]["toy"]["budgets"]["8"]["mean_length"]
    )
    assert compare.main([*(str(tmp_path / n) for n in ways), "--out", str(tmp_path / "both")]) == 0
    both = json.loads((tmp_path / "both" / "compare.json").read_text())
    assert both["datasets"]["toy"]["ask_by"] == ways
    # Saved samples are enough, whatever they were asked by.
    assert run("--samples", tmp_path / "effort" / "samples.jsonl", "--out", tmp_path / "again") == 0
    assert read(tmp_path / "again")["datasets"] == read(tmp_path / "effort")["datasets"]


def test_more_room_for_the_answer_and_none_for_nonsense(model, tmp_path, capsys):
    tokenizer, problems = data.load_tokenizer(model), [sample(budget=None)]
    plan = [problems, [None, 512, 4096], "exact", "l1", tokenizer, 10**6]
    caps = [[r["max_tokens"] for r in evaluate.plan(*plan, None, way)]
            for way in ("sentence", "thinking-token-budget")]  # fmt: skip
    assert caps == [[8192, 1024, 8192], [8192, 8192 + 512, 8192 + 4096]]
    # The run without a budget may be as long as any other.
    assert next(evaluate.plan(problems, [None, 16384], "exact", "l1", None, None))["max_tokens"] == 32768
    rest = ["--model", model, "--data", "toy", "--sampler", "hf", "--out", tmp_path / "no"]
    for words, told in (
        (["--budgets", "8", "--ask-by", "nicely"], "--ask-by 'nicely': it is one of sentence"),
        (["--budgets", "8", "--ask-by", "template:"], "it is one of"),
        (["--budgets", "8", "--ask-by", "template:tokens_left"], "no variable tokens_left"),
        (["--budgets", "8", "--ask-by", "effort:low,high"], "without a number"),
        (["--budgets", "8", "--ask-by", "thinking-token-budget"], "needs vLLM"),
        (["--budgets", "8", "--sentence", "Be brief."], "a sentence with {N} in it"),
        (["--ask-by", "sentence"], "--budgets is missing"),
    ):
        assert run(*rest, *words) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_a_sentence_of_ones_own_everywhere(model, tmp_path, capsys):
    """data.py, evaluate.py and the baselines ask in the same words; the toy's tokenizer changes nothing."""
    problem = write(tmp_path / "p.jsonl", [{"problem": "add 1 2 3", "answer": "6"}])
    words = "Use at most {N} tokens."
    assert (
        data.main(
            [problem, "--budgets", "fixed:16", "--sentence", words, "--out", str(tmp_path / "rows.jsonl")]
        )
        == 0
    )
    asked = json.loads((tmp_path / "rows.jsonl").read_text())["prompt"]
    assert asked.endswith("Use at most 16 tokens.")
    for flag in ("--sentence", "--wording"):
        rest = ["--budgets", "16", "--limit", "1", "--sampler", "hf", "--out", tmp_path / flag]
        assert run("--model", model, "--data", f"{problem},toy", flag, words, *rest) == 0
        prompts = [row["prompt"] for row in samples_of(tmp_path / flag)]
        assert prompts[0] == asked and prompts[1].endswith("Use at most 16 tokens.")
        assert read(tmp_path / flag)["wording"] == words
    sweep = ["sweep", "--model", model, "--data", problem, "--budgets", "16", "--methods", "none,cut"]
    out = tmp_path / "base"
    assert (
        baselines.main(
            [*sweep, "--wording", "tulu", "--max-tokens", "30", "--sampler", "hf", "--out", str(out)]
        )
        == 0
    )
    # AI2's wording has no instruction beside its sentence.
    assert samples_of(out / "cut")[0]["prompt"] == "add 1 2 3"
    # One table: a line per budget, a column per method, accuracy at mean length.
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    at = lines.index(["asked", "for", "none", "cut"])
    assert [line[0] for line in lines[at + 1 : at + 3]] == ["16", "none"]


def test_a_sentence_of_ones_own_in_training(tmp_path):
    """The rows, the evaluation during training and the model card ask in the same words."""
    words = [
        "--sentence",
        "Use at most {N} tokens.",
        "--eval-data",
        f"{FREEZE}/rows.jsonl",
        "--eval-every",
        "1",
    ]
    train_grpo.main([*TOY, *words, "--steps", "1", "--out", str(tmp_path / "run")])
    asked = samples_of(tmp_path / "run" / "eval")[0]
    assert asked["prompt"].endswith(f" Use at most {asked['budget']} tokens.")
    assert read(tmp_path / "run" / "eval")["wording"] == words[1]
    assert card.main([str(tmp_path / "run" / "checkpoint-1")]) == 0
    assert "Use at most N tokens." in (tmp_path / "run" / "checkpoint-1" / "README.md").read_text()


def test_problems_of_the_protocol_are_fixed_by_their_texts(tmp_path):
    rows = [{"problem": f"{i} + {i}?", "answer": str(2 * i), "id": f"p{i}"} for i in range(40)]
    rows.append({"problem": "3 + 3?", "answer": "6", "id": "again"})
    first = evaluate.load_data(write(tmp_path / "a.jsonl", rows), 10, 0, drawn=True)
    turned = evaluate.load_data(write(tmp_path / "b.jsonl", rows[-2::-1]), 10, 0, drawn=True)
    assert [p["id"] for p in first] == [p["id"] for p in turned]
    lowest = sorted(range(40), key=lambda i: zlib.crc32(f"{i} + {i}?".encode()))[:10]
    assert [p["id"] for p in first] == [f"p{i}" for i in lowest]


def test_protocol_on_a_small_real_architecture(tiny, tmp_path):
    sets = f"{ROOT}/tests/data/math500_small.jsonl,{ROOT}/tests/data/lsat_small.jsonl"
    flags = [
        "--data",
        sets,
        "--budgets",
        "none,8,16",
        "--max-tokens",
        "24",
        "--limit",
        "3",
        "--sampler",
        "hf",
    ]
    assert run("--model", tiny, "--protocol", "adherence", *flags, "--out", tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert (found["protocol"], found["n"], found["temperature"], found["top_p"]) == (
        "adherence",
        4,
        0.6,
        0.95,
    )
    assert [d["problems"] for d in found["data"].values()] == [3, 3]
    text = (tmp_path / "out" / "adherence.md").read_text()
    assert report.markdown_table(found) in text and "ask_by sentence; wording l1; mode exact; n 4" in text
    rows = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| ")][2:]
    names = ("math500_small", "lsat_small", "mean")
    assert rows == [[f"| {n}", b, "24" if n == "mean" else "12"] for n in names for b in ("8", "16", "none")]
    # A later evaluation without the protocol leaves no table of it behind.
    assert run("--model", tiny, *flags, "--n", "1", "--out", tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out" / "adherence.md").exists()


def test_accuracy_lost():
    rows = [
        sample(id=i, budget=b, correct=i < right, length=9)
        for b, right in ((10, 1), (None, 3))
        for i in range(4)
    ]
    datasets, _ = metrics.summarise(table_of(rows))
    table = report.markdown_table({"datasets": metrics.jsonable(datasets)}).splitlines()
    assert table[2] == "| s | 10 | 4 | 25.0% | 9 |  | -10.0% | 10.0% | 100.0% | 0.0% | 0.0% | +50.0% |"
    assert table[3] == "| s | none | 4 | 75.0% | 9 |  |  |  |  |  | 0.0% |  |"


def test_the_page_says_what_the_protocol_does(tmp_path):
    page = Path(ROOT, "docs", "adherence.md").read_text(encoding="utf-8")
    results = json.loads(Path(ROOT, "docs", "adherence.json").read_text(encoding="utf-8"))
    assert page.endswith(f"{report.markdown_table(results)}\n\n{page.rpartition(chr(10) * 2)[2]}")
    preset, shown = evaluate.PROTOCOLS["adherence"], " ".join(page.split())
    budgets = preset["budgets"].removeprefix("none,").split(",")
    assert f"{', '.join(budgets[:-1])} and {budgets[-1]} tokens, and once none" in shown
    assert (
        f"**Problems**: {preset['limit']} each of MATH-500" in shown
        and "temperature 0.6, top-p 0.95" in shown
    )
    assert preset["n"] * preset["limit"] * 3 * (len(budgets) + 1) == 9600 and "9,600 in all" in shown
    words = re.search(r"<!-- toy -->\n```sh\npython evaluate.py (.+?)\n", page)[1].split()
    args = evaluate.parse_args([*words, "--out", str(tmp_path / "out")])
    evaluate.check_args(args)
    assert (results["asked"], results["n"], results["model"]) == (args.budgets, args.n, args.model)
    assert results["data"]["toy"]["problems"] == args.limit
    # The very problems: what is asked today is what was asked then.
    problems = evaluate.load_data(args.data, args.limit, args.seed, drawn=True)
    assert engines.hash_data(problems) == results["data"]


def test_length_deviation_of_lifebench():
    # (80 - 100) / 100, 0 and (150 - 100) / 100 on average: the signed error of results.json.
    rows = [sample(id=i, length=n, budget=100) for i, n in enumerate([80, 100, 150])]
    datasets, _ = metrics.summarise(table_of(rows))
    same(datasets["s"]["budgets"]["100"]["signed_error"], 0.1)
