"""evaluate.py: saved samples, real sampling, resuming, and what it refuses."""

import contextlib
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from conftest import same

import data
import evaluate
from data import BadInput
from evaluation import engines, metrics
from toy import task as toy
from toy.prepare import make_model

ROOT = Path(__file__).parent.parent
PICTURES = ("violins", "accuracy", "error")
DATA = Path(__file__).parent / "data"
SAMPLES = DATA / "samples_small.jsonl"


def write(path: Path, rows: list) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def sample(**fields) -> dict:
    row = {"id": "a", "sample": 0, "source": "s", "problem": "1+1", "answer": "2", "kind": "math"}
    row |= {"prompt": "1+1", "budget": 10, "mode": "exact", "response": "2", "length": 9}
    return row | {"finish_reason": "stop", "correct": True} | fields


def table_of(rows) -> dict:
    table = {}
    for row in rows:
        metrics.add(table, row)
    return table


def run(*args) -> int:
    return evaluate.main([str(a) for a in args])


def read(out) -> dict:
    def refuse(text):
        raise AssertionError(f"{text} in results.json")

    return json.loads((Path(out) / "results.json").read_text(), parse_constant=refuse)


# ------------------------------------------------------------------------------------------------------------
# The command on saved samples


def test_reading_keeps_no_text(tmp_path):
    # 40 MB of responses: what stays in memory is a few numbers each.
    long = write(tmp_path / "long.jsonl", [sample(id=i, response="x" * 20_000) for i in range(2000)])
    tracemalloc.start()
    table = table_of(evaluate.read_samples(long))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table["s"]["cells"][10]["length"]) == 2000 and peak < 3e6


def test_command_rebuilds_from_samples(tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "evaluate.py",
        "--samples",
        str(SAMPLES),
        "--out",
        str(out),
        "--trained-budgets",
        "16,32",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = read(out)
    assert results["trained_budgets"] == [16, 32] and results["samples"] == str(SAMPLES)
    assert results["pictures"] == [f"{name}.png" for name in PICTURES]
    for name in results["pictures"]:
        image = (out / name).read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 10_000
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["16", "6", "50.0%", "28.9%", "16.0", "0.0%", "12.5%", "33.3%", "33.3%", "16.7%"] in lines
    assert str(out) in done.stdout
    assert set(os.listdir(out)) == {*results["pictures"], "results.json", "report.html"}


def test_gzip_and_unknown_lengths_and_several_sets(tmp_path):
    rows = [sample(id=i, source=s, budget=b) for i in range(3) for s in ("one", "two/x") for b in (10, 20)]
    rows += [sample(source="old", budget=None, mode=None, length=None, finish_reason=None)]
    path = write(tmp_path / "s.jsonl.gz", rows)
    assert run("--samples", path, "--out", tmp_path / "out") == 0
    results = read(tmp_path / "out")
    assert set(results["datasets"]) == {"one", "two/x", "old"}
    assert {f"{kind}_two_x.png" for kind in PICTURES} <= set(results["pictures"])
    assert not any("old" in name for name in results["pictures"])  # no lengths, nothing to draw
    # An evaluation that replaces it leaves none of its pictures behind.
    assert run("--samples", SAMPLES, "--out", tmp_path / "out", "--overwrite") == 0
    assert not list((tmp_path / "out").glob("*_two_x.png"))


def test_regrade_checks_the_answers_and_keeps_the_disagreements(tmp_path):
    assert run("--samples", SAMPLES, "--regrade", "--out", tmp_path / "out") == 0
    results = read(tmp_path / "out")
    assert results["verify"]["checked"] == 18 and results["verify"]["changed"] == 1
    # The one stored verdict that is wrong: a right answer of the run without a budget.
    same(results["datasets"]["toy"]["budgets"]["none"]["accuracy"], 4 / 6)
    same(results["datasets"]["toy"]["budgets"]["16"]["accuracy"], 0.5)
    (row,) = [json.loads(line) for line in open(tmp_path / "out" / "disagreements.jsonl")]
    assert (row["id"], row["budget"], row["correct"], row["regraded"]) == ("p2", None, False, True)
    # Verdicts that are missing are made.
    rows = [sample(correct=None), sample(id="b", response=r"so \boxed{3}", correct=None)]
    assert run("--samples", write(tmp_path / "s.jsonl", rows), "--regrade", "--out", tmp_path / "new") == 0
    assert read(tmp_path / "new")["datasets"]["s"]["budgets"]["10"]["accuracy"] == 0.5


def bad_samples(tmp_path: Path) -> dict:
    def file(name, *rows):
        return write(tmp_path / name, rows)

    lengthless, textless = ({k: v for k, v in sample().items() if k != key} for key in ("length", "response"))
    nan = '{"id": 1, "source": "s", "budget": 5, "length": NaN, "finish_reason": null, "correct": true}'
    (tmp_path / "fake.jsonl.gz").write_text("not gzip")
    return {
        "no such file": ["--samples", tmp_path / "nope.jsonl"],
        "holds no samples": ["--samples", file("empty.jsonl")],
        "line 2 is no JSON": ["--samples", file("broken.jsonl", sample(), '{"id": 1')],
        "line 1: it is a list": ["--samples", file("list.jsonl", "[1]")],
        "no field length": ["--samples", file("missing.jsonl", lengthless)],
        "budget is 0": ["--samples", file("zero.jsonl", sample(budget=0))],
        "length is nan": ["--samples", file("nan.jsonl", nan)],
        "correct is None": ["--samples", file("ungraded.jsonl", sample(correct=None))],
        "no field response": ["--regrade", "--samples", file("textless.jsonl", textless)],
        "cannot be read": ["--samples", tmp_path / "fake.jsonl.gz"],
    }


def test_bad_samples_are_refused_in_one_line(tmp_path, capsys):
    for words, args in bad_samples(tmp_path).items():
        assert run(*args, "--out", tmp_path / "out") == 2, words
        error = capsys.readouterr().err
        assert error.startswith("evaluate.py: error: ") and error.count("\n") == 1 and words in error, error
        assert not (tmp_path / "out").exists(), words


BAD_FLAGS = {
    "not none": [],
    "not --model and --samples": ["--samples", SAMPLES, "--model", "m"],
    "leave out --n": ["--samples", SAMPLES, "--n", "3"],
    "leave out --protocol": ["--samples", SAMPLES, "--protocol", "l1"],
    "go together": ["--base-url", "http://localhost:1/v1", "--data", "toy", "--budgets", "8"],
    "--sampler is for --model": ["--base-url", "u", "--api-model", "m", "--sampler", "hf", "--data", "toy"],
    "choose one": ["--model", "m", "--data", "toy", "--budgets", "8", "--resume", "--overwrite"],
    "--concurrency (0)": ["--model", "m", "--data", "toy", "--budgets", "8", "--concurrency", "0"],
    "is no budget; give token counts above 0": ["--model", "m", "--data", "toy", "--budgets", "none,x"],
    "--out /proc/none": ["--samples", SAMPLES, "--out", "/proc/none"],
    "leave out --data": ["--samples", SAMPLES, "--data", "toy"],
    "leave out --limit": ["--samples", SAMPLES, "--limit", "3"],
    "--regrade needs --samples": ["--model", "m", "--data", "toy", "--budgets", "8", "--regrade"],
    "--data is missing": ["--model", "m", "--budgets", "8"],
    "--budgets is missing": ["--model", "m", "--data", "toy"],
    "'abc' is no budget": ["--model", "m", "--data", "toy", "--budgets", "8,abc"],
    "'0' is no budget": ["--model", "m", "--data", "toy", "--budgets", "0"],
    "'-5' is no budget": ["--model", "m", "--data", "toy", "--budgets=-5"],
    "'' is no budget": ["--model", "m", "--data", "toy", "--budgets", "8,"],
    "--n (0)": ["--model", "m", "--data", "toy", "--budgets", "8", "--n", "0"],
    "--limit (-1)": ["--model", "m", "--data", "toy", "--budgets", "8", "--limit", "-1"],
    "--max-tokens (0)": ["--model", "m", "--data", "toy", "--budgets", "8", "--max-tokens", "0"],
    "--top-p (0.0)": ["--model", "m", "--data", "toy", "--budgets", "8", "--top-p", "0"],
    "--temperature (nan)": ["--model", "m", "--data", "toy", "--budgets", "8", "--temperature", "nan"],
    "token counts only": ["--samples", SAMPLES, "--trained-budgets", "none"],
    "names 'toy' twice": ["--model", "m", "--data", "toy,toy", "--budgets", "8"],
    "no_such_file.jsonl": ["--model", "m", "--data", "no_such_file.jsonl", "--budgets", "8"],
    "./no_model": ["--model", "./no_model", "--data", "toy", "--budgets", "8"],
}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(words, tmp_path, capsys):
    out = [] if "--out" in BAD_FLAGS[words] else ["--out", tmp_path / "out"]
    assert run(*BAD_FLAGS[words], *out) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: error: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_not_written_over(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--samples", SAMPLES, "--out", out) == 0
    before = (out / "results.json").read_bytes()
    assert run("--samples", SAMPLES, "--out", out) == 2
    assert "holds an evaluation" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before
    # Generations cost hours: figures of other samples never move in beside them.
    (out / "samples.jsonl").write_bytes(SAMPLES.read_bytes())
    assert run("--samples", SAMPLES, "--out", out, "--overwrite") == 2
    assert run("--samples", out / "samples.jsonl", "--out", out, "--overwrite") == 0
    assert (out / "samples.jsonl").read_bytes() == SAMPLES.read_bytes()
    assert run("--samples", SAMPLES, "--out", SAMPLES) == 2


def test_help_is_quick_and_loads_no_library():
    code = "import sys, evaluate\ntry: evaluate.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'matplotlib', 'math_verify') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------
# Sampling with a real model: the toy's architecture and tokenizer, random weights


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tokenizer = toy.make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def opened(folder: str):
    return engines.open_sampler(folder, "hf", 512)


WORDS = {"tokenizer": toy.make_tokenizer(), "context": 512, "wording": "tulu"}  # what evaluate() is told


def test_plan_fits_prompt_and_response_into_the_context(model_folder):
    tokenizer = toy.make_tokenizer()
    problems = toy.problems("toy", "test", 3)
    requests = list(evaluate.plan(problems, [None, 16, 300], "exact", "tulu", tokenizer, 512))
    assert [r["budget"] for r in requests] == [None] * 3 + [16] * 3 + [300] * 3
    assert "Think for 16 tokens." in requests[3]["prompt"] and "Think" not in requests[0]["prompt"]
    assert all(r["max_tokens"] == 32 for r in requests[3:6])  # twice the budget
    for r in (*requests[:3], *requests[6:]):  # 8192 and 600 give way to the context
        assert r["max_tokens"] == 512 - len(r["ids"])
    in_max = list(evaluate.plan(problems, [16], "max", "tulu", tokenizer, 512, max_tokens=50))
    assert all(r["max_tokens"] == 50 and "up to 16" in r["prompt"] for r in in_max)
    for budget, cap in ((512, None), (16, 512), (64, 32)):
        with pytest.raises(BadInput, match="context of 512|below the budget"):
            list(evaluate.plan(problems, [budget], "exact", "tulu", tokenizer, 512, cap))


def test_sampling_in_process(model_folder, tmp_path):
    sampler = opened(model_folder)
    problems = toy.problems("toy", "test", 3) + toy.problems("toy_ood", "test", 2)
    lines, what = [], (sampler, problems, [None, 8, 12], "exact", 2)
    options = WORDS | {"temperature": 1.0, "top_p": 1.0, "max_tokens": 24, "log": lines.append}
    options |= {"trained_budgets": [8], "model": model_folder}
    drawn, generate = [], sampler.generate
    sampler.generate = lambda *args, **more: drawn.append(generate(*args, **more)) or drawn[-1]
    results = evaluate.evaluate(*what, str(tmp_path / "a"), **options)
    sampler.generate = generate
    assert results == read(tmp_path / "a") and set(results["datasets"]) == {"toy", "toy_ood"}
    assert results["versions"]["torch"] and results["sampler"] == "hf" and results["verify"]["checked"] == 30
    assert any("30/30 samples" in line for line in lines)
    rows = [json.loads(line) for line in open(tmp_path / "a" / "samples.jsonl")]
    assert len(rows) == (3 + 2) * 3 * 2
    completions = [c for call in drawn for group in call for c in group]
    for row, completion in zip(rows, completions, strict=True):
        # The end token counts, is part of no text, and is absent where the response was cut off.
        assert row["length"] == len(completion["ids"]) <= 24
        assert "<eos>" not in row["response"] and (row["mode"] == "exact") == (row["budget"] is not None)
        assert ("thinking_length" in row) == ("</think>" in row["response"])
        assert not (row["correct"] and row["finish_reason"] == "length")
    # The same seed samples the same, and the saved samples alone give the same figures and pictures.
    assert evaluate.evaluate(*what, str(tmp_path / "b"), **options) == results
    assert run("--samples", tmp_path / "a" / "samples.jsonl", "--out", tmp_path / "c") == 0
    rebuilt = read(tmp_path / "c")
    assert rebuilt.pop("samples") and rebuilt.pop("versions") and results.pop("versions")
    assert rebuilt == results
    for name in results["pictures"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_samples_are_on_disk_after_every_batch(model_folder, tmp_path, monkeypatch):
    sampler = opened(model_folder)
    monkeypatch.setattr(evaluate, "BATCH", 4)
    assert run("--samples", SAMPLES, "--out", tmp_path) == 0
    path, seen = tmp_path / "samples.jsonl", []

    def log(line):
        seen.append(path.read_text().count("\n"))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        problems = toy.problems("toy", "test", 6)
        evaluate.evaluate(sampler, problems, [8], "exact", 2, str(tmp_path), max_tokens=16, log=log, **WORDS)
    # What the folder held of an earlier evaluation does not pass for the figures of this one.
    assert seen == [4, 8] and not (tmp_path / "results.json").exists()
    assert run("--samples", path, "--out", tmp_path / "rest") == 0


class Stopped(Exception):
    pass


def test_a_sweep_that_was_stopped_goes_on_to_the_same_end(model_folder, tmp_path, monkeypatch):
    """Killed in its third batch, with half a line on disk: resumed it equals the one that was not stopped."""
    monkeypatch.setattr(evaluate, "BATCH", 4)
    sampler, problems = opened(model_folder), toy.problems("toy", "test", 5)
    what, options = (sampler, problems, [8, 12], "exact", 2), WORDS | {"max_tokens": 16}
    whole = evaluate.evaluate(*what, str(tmp_path / "whole"), log=lambda line: None, **options)

    def stop(line):
        if " 12/20 " in line:
            raise Stopped

    out, calls, generate = tmp_path / "cut", [], sampler.generate
    with pytest.raises(Stopped):
        evaluate.evaluate(*what, str(out), log=stop, **options)
    with open(out / "samples.jsonl", "a") as f:
        f.write('{"id": "toy-test-4", "samp')
    assert not (out / "results.json").exists()
    # Other settings would mix two kinds of samples in one figure.
    for key, other in (("temperature", 0.9), ("seed", 1), ("require_think", True)):
        with pytest.raises(BadInput, match=f"{key} was"):
            evaluate.evaluate(*what, str(out), resume=True, **options | {key: other})
    with pytest.raises(BadInput, match="data was"):
        evaluate.evaluate(sampler, problems[:4], *what[2:], str(out), resume=True, **options)
    sampler.generate = lambda *args, **more: calls.append(1) or generate(*args, **more)
    resumed = evaluate.evaluate(*what, str(out), resume=True, log=lambda line: None, **options)
    assert len(calls) == 2  # of the five batches the last two were missing
    for name in ("samples.jsonl", "results.json", "report.html"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert resumed == whole and whole["verify"]["checked"] == 20 and not (out / "unfinished.json").exists()
    # A finished one is left as it is.
    assert evaluate.evaluate(*what, str(out), resume=True, **options) == whole and len(calls) == 2


def test_what_makes_a_run_again(model_folder, tmp_path):
    sampler, problems = opened(model_folder), toy.problems("toy", "test", 2)
    about = WORDS | {"model": model_folder, "max_tokens": 9, "log": lambda line: None}
    results = evaluate.evaluate(sampler, problems, [8], "exact", 1, str(tmp_path), **about)
    assert results["template"] == WORDS["tokenizer"].chat_template and results["versions"]["math-verify"]
    expected = {"temperature": 0.6, "top_p": 0.95, "seed": 0, "n": 1, "max_tokens": 9, "asked": [8]}
    assert {key: results[key] for key in expected} == expected
    assert {"checked", "timeouts", "parse_failures"} <= set(results["verify"])
    assert results["data"] == engines.hash_data(problems) and results["data"]["toy"]["problems"] == 2
    # One other letter, one other hash.
    assert engines.hash_data([problems[0], problems[1] | {"answer": "x"}]) != results["data"]


def test_protocols_fill_in_what_was_not_given(tmp_path):
    def args(*words):
        parsed = evaluate.parse_args(["--model", "m", "--out", str(tmp_path / "new"), *words])
        evaluate.check_args(parsed)
        return parsed

    l1 = args("--protocol", "l1")
    assert (l1.n, l1.temperature, l1.top_p, l1.require_think, l1.wording) == (16, 0.6, 0.95, True, "l1")
    assert l1.budgets == [512, 1024, 2048, 3600] and l1.data == "aime2025,math500,amc,olympiadbench"
    own = args("--protocol", "l1", "--n", "2", "--data", "toy", "--mode", "max", "--no-require-think")
    assert (own.n, own.data, own.mode, own.require_think) == (2, "toy", "max", False)
    ai2 = args("--protocol", "ai2")
    assert ai2.budgets[0] == 100 and ai2.budgets[-1] == 10240 and ai2.wording == "tulu" and ai2.n == 1
    plain = args("--data", "toy", "--budgets", "8")
    assert (plain.n, plain.mode, plain.temperature, plain.require_think) == (1, "exact", 0.6, False)
    # Every set that a protocol names is one that data.py knows.
    assert {s for p in evaluate.PROTOCOLS.values() for s in p["data"].split(",")} <= set(data.PRESETS)


def test_instruction_of_aime2025_stands_apart():
    problem = {"id": "1", "problem": "1+1?", "answer": "2", "kind": "math", "source": "aime2025"}
    requests = evaluate.plan([problem, problem | {"source": "amc"}], [512], "exact", "l1", None, None)
    one, two = (request["prompt"] for request in requests)
    assert one.startswith("1+1?\n\nLet's") and two.startswith("1+1? Let's") and one[6:] == two[5:]


def test_command_samples_a_model(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    problems = write(tmp_path / "own.jsonl", [{"problem": "add 1 2 3", "answer": "6", "source": "elsewhere"}])
    command = [
        "--model",
        model_folder,
        "--data",
        f"toy,{problems}",
        "--budgets",
        "16,8",
        "--mode",
        "max",
        "--n",
        "2",
    ]
    command += [
        "--wording",
        "tulu",
        "--sampler",
        "hf",
        "--limit",
        "2",
        "--max-tokens",
        "20",
        "--out",
        str(out),
    ]
    code = subprocess.run(
        [sys.executable, "evaluate.py", *command], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert code.returncode == 0, code.stderr
    results = read(out)
    # A set goes by the name it was asked for, whatever its rows say about their origin.
    assert (
        set(results["datasets"]) == {"toy", "own"}
        and results["mode"] == "max"
        and results["model"] == model_folder
    )
    assert list(results["datasets"]["toy"]["budgets"]) == ["8", "16"]
    assert results["datasets"]["toy"]["budgets"]["8"]["n"] == 4
    assert len(open(out / "samples.jsonl").readlines()) == (2 + 1) * 2 * 2
    # Refusals that need the model's tokenizer and context, still before its weights.
    rest = ["--model", model_folder, "--data", "toy", "--out", tmp_path / "b"]
    assert run(*rest, "--budgets", "600") == 2 and "context of 512" in capsys.readouterr().err
    assert run(*rest, "--budgets", "8", "--max-tokens", "600") == 2
    assert run(*rest, "--budgets", "64", "--max-tokens", "32") == 2
    os.remove(os.path.join(model_folder, "tokenizer.json"))
    assert run(*rest, "--budgets", "8") == 2 and "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------------------------------------------------
# Servers


@contextlib.contextmanager
def serve(answer, owner="somebody"):
    """A real HTTP server on loopback; `answer(request as dict, its number)` -> (status, reply)."""
    seen, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, status, body):
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self.reply(200, {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": owner}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(request)
                number = len(seen)
            self.reply(*answer(request, number))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def completion(request, tokens=9, **message):
    """What such a server sends for one request: the sum of the digits, thought about for `tokens`."""
    digits = toy.digits_of(request["messages"][0]["content"].splitlines()[0])
    message = {"role": "assistant", "content": str(sum(digits) % 10)} | message
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def api(url, out, *more):
    flags = ["--base-url", url, "--api-model", "m", "--data", "toy", "--limit", "4", "--budgets", "8,16"]
    return run(*flags, "--n", "2", "--concurrency", "2", "--out", out, *more)


def test_a_busy_server_is_asked_again(tmp_path):
    pytest.importorskip("openai")
    running, most = [0], [0]

    def answer(request, number):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1
        if number in (2, 5):
            return (503, 429)[number == 5], {"error": {"message": "busy"}}
        return 200, completion(request, reasoning_content="hm, one moment")

    with serve(answer) as (url, seen):
        assert api(url, tmp_path / "out") == 0
    assert len(seen) == 4 * 2 * 2 + 2 and most[0] == 2  # two were refused; two at a time
    assert {r["max_tokens"] for r in seen} == {16, 32} and all(r["temperature"] == 0.6 for r in seen)
    assert len({r["seed"] for r in seen}) == 16  # a request that was refused comes with its own seed again
    results = read(tmp_path / "out")
    assert results["model"] == "m" and results["base_url"] == url and results["versions"]["openai"]
    rows = [json.loads(line) for line in open(tmp_path / "out" / "samples.jsonl")]
    assert all(r["length"] == 9 and r["correct"] and r["finish_reason"] == "stop" for r in rows)
    assert rows[0]["response"].startswith("hm, one moment</think>")


@pytest.mark.parametrize("owner, told", [("vllm", True), ("somebody", False)])
def test_only_a_vllm_server_is_told_to_leave_the_folders_defaults(tmp_path, owner, told):
    pytest.importorskip("openai")
    with serve(lambda request, number: (200, completion(request)), owner) as (url, seen):
        assert api(url, tmp_path / "out") == 0
    assert {r.get("repetition_penalty") for r in seen} == ({1.0} if told else {None})
    assert {r.get("skip_special_tokens") for r in seen} == ({False} if told else {None})


def test_a_server_that_breaks_off_loses_one_batch(tmp_path, capsys):
    pytest.importorskip("openai")

    def answer(request, number):
        return (200, completion(request)) if number <= 10 else (400, {"error": {"message": "no credit left"}})

    with serve(answer) as (url, seen):
        assert api(url, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "no credit left" in error and "--resume" in error and error.count("\n") == 1
        # Eight responses are a batch here, of which the first is whole.
        assert len(open(tmp_path / "out" / "samples.jsonl").readlines()) == 8
        asked = len(seen)
        seen.clear()
        assert api(url, tmp_path / "out") == 2 and "--resume" in capsys.readouterr().err
        assert api(url, tmp_path / "out", "--resume") == 0
        assert 10 < asked <= 16 and len(seen) == 8
    budgets = read(tmp_path / "out")["datasets"]["toy"]["budgets"]
    assert [cell["n"] for cell in budgets.values()] == [8, 8] and budgets["8"]["accuracy"] == 1


def test_servers_that_know_one_name_of_the_cap_and_count_their_thoughts(tmp_path, capsys):
    pytest.importorskip("openai")

    def answer(request, number):
        if "max_tokens" in request:
            return 400, {"error": {"message": "'max_tokens' is not supported: use 'max_completion_tokens'"}}
        reply = completion(request)
        reply["usage"]["completion_tokens_details"] = {"reasoning_tokens": 7}
        return 200, reply

    with serve(answer) as (url, seen):
        assert api(url, tmp_path / "out") == 0
        assert api(url, tmp_path / "b", "--api-model", "other") == 2
        assert "has m" in capsys.readouterr().err and not (tmp_path / "b").exists()
    cell = read(tmp_path / "out")["datasets"]["toy"]["budgets"]["8"]
    same([cell["thinking_length"], cell["mean_length"]], [7.0, 9.0])
    assert api("http://127.0.0.1:9/v1", tmp_path / "c") == 2
    assert "is the server up" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_answers_that_are_none(tmp_path, capsys):
    """Of 16 requests 7 get an answer that is none: told in a line each, and asked again by --resume."""
    pytest.importorskip("openai")
    broken = {
        2: lambda reply: reply | {"choices": None},
        4: lambda reply: reply | {"choices": []},
        6: lambda reply: with_choice(reply, finish_reason="content_filter"),
        8: lambda reply: with_choice(reply, finish_reason="error"),
        10: lambda reply: with_choice(reply, finish_reason="abort"),
        12: lambda reply: with_choice(reply, finish_reason=None),
        14: lambda reply: with_choice(reply, message=None),
    }

    def answer(request, number):
        if number == 16:
            return 422, {"error": {"message": "this prompt only"}}
        return 200, broken.get(number, dict)(completion(request))

    with serve(answer) as (url, seen):
        assert api(url, tmp_path / "out") == 0
        told = capsys.readouterr()
        assert told.err == "" and told.out.count("--resume asks again") == 8 + 1
        assert "finish_reason content_filter" in told.out and "an answer without choices" in told.out
        assert "status 422" in told.out and "8 responses are missing" in told.out
        rows = [json.loads(line) for line in open(tmp_path / "out" / "samples.jsonl")]
        assert len(rows) == 8 and read(tmp_path / "out")["missing"] == 8 and len(seen) == 16
        broken.clear()
        assert api(url, tmp_path / "out") == 2  # an evaluation is not written over
        assert api(url, tmp_path / "out", "--resume") == 0
        assert len(seen) == 16 + 8
    rows = [json.loads(line) for line in open(tmp_path / "out" / "samples.jsonl")]
    assert len({(r["id"], r["budget"], r["sample"]) for r in rows}) == len(rows) == 16
    results = read(tmp_path / "out")
    assert results["missing"] is None and results["verify"]["checked"] == 16
    assert [cell["n"] for cell in results["datasets"]["toy"]["budgets"].values()] == [8, 8]
    assert not (tmp_path / "out" / "unfinished.json").exists()


def with_choice(reply, **fields):
    return reply | {"choices": [reply["choices"][0] | fields]}


@pytest.mark.parametrize(
    "fields, response, finish",
    [
        ({"finish_reason": "length", "message": {"content": None}}, "", "length"),
        ({"message": {"content": "4", "reasoning": "hm"}}, "hm</think>4", "stop"),
        ({"finish_reason": "length", "message": {"content": None, "reasoning": "hm"}}, "hm", "length"),
        ({"finish_reason": "eos"}, "T", "stop"),
        ({"finish_reason": "end_turn"}, "T", "stop"),
        ({"finish_reason": "tool_calls"}, "T", "stop"),
        ({"finish_reason": "max_tokens"}, "T", "length"),
        ({"finish_reason": "MAX_TOKENS"}, "T", "length"),
        (
            {"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}},
            "ab",
            "stop",
        ),
        ({"message": {"content": [{"type": "image"}]}}, "", "stop"),
    ],
)
def test_answers_as_servers_write_them(fields, response, finish):
    pytest.importorskip("openai")
    fields = dict(fields)
    message = {"role": "assistant", "content": "T"} | fields.pop("message", {})
    reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": None}
    reply["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"} | fields]
    with serve(lambda request, number: (200, reply)) as (url, _):
        server = engines.Server(url, "m", 1)
        ((found,),) = server.respond(
            [{"prompt": "p", "problem": {}, "max_tokens": 5}], 1, 1.0, 1.0, 0, "</think>"
        )
    assert found == {"response": response, "length": None, "finish_reason": finish}


# ------------------------------------------------------------------------------------------------------------
# Smaller things


def test_a_byte_order_mark_in_saved_samples(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(sample()).encode() + b"\r\n")
    assert [row["id"] for row in evaluate.read_samples(str(path))] == ["a"]


def test_out_is_checked_before_anything_is_loaded(tmp_path, capsys):
    """A folder below a file, and a place where nothing can be written: neither data nor model is opened."""
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        assert run("--model", "no_such", "--data", "no_such", "--budgets", "8", "--out", out) == 2
        error = capsys.readouterr().err
        assert f"--out {out}" in error and error.count("\n") == 1, error
    evaluate.check_writable(str(tmp_path / "new" / "below"))
    assert not (tmp_path / "new").exists()


def test_another_end_of_thinking(tmp_path, tiny):
    tokenizer = data.load_tokenizer(tiny)
    for text, mark, wanted in (
        ("so 1 </think> 2 </think> 3", "</think>", "so 1 </think> 2 </think>"),
        ("hm [/THINK] 3", "[/THINK]", "hm [/THINK]"),
        ("hm [/THINK]\n\n3", "[/THINK]", "hm [/THINK]"),
        ("never closed", "[/THINK]", None),
        ("hm [/THINK", "[/THINK]", None),
    ):
        ids = engines.np.array(tokenizer.encode(text))
        found = engines.thinking_length(ids, tokenizer, mark)
        if wanted is None:
            assert found is None
        else:  # the shortest beginning that has it, though its last token may reach beyond
            assert tokenizer.decode(ids[:found]).startswith(wanted)
            assert tokenizer.decode(ids[: found - 1]).count(mark) < text.count(mark)
    # A box inside the thinking of such a model is no answer.
    rows = [
        sample(id=i, response=r, correct=None)
        for i, r in enumerate([r"\boxed{2} [/THINK] 3", "3 [/THINK] 2"])
    ]
    path = write(tmp_path / "s.jsonl", rows)
    assert run("--samples", path, "--regrade", "--think-end", "[/THINK]", "--out", tmp_path / "out") == 0
    found = read(tmp_path / "out")
    assert found["datasets"]["s"]["budgets"]["10"]["accuracy"] == 0.5 and found["think_end"] == "[/THINK]"
    flags = ["--regrade", "--require-think", "--out", tmp_path / "strict"]
    assert run("--samples", path, *flags) == 0  # without its name no thinking was closed
    assert read(tmp_path / "strict")["datasets"]["s"]["budgets"]["10"]["accuracy"] == 0


def test_a_checkpoint_is_asked_as_its_run_asked(tmp_path):
    """Without --wording the run's own sentence; a flag wins, a protocol has its own, other models get l1."""
    (tmp_path / "args.json").write_text(json.dumps({"wording": "Use {N} tokens."}))
    problems, model = [{"source": "own"}], str(tmp_path / "checkpoint-2")
    assert evaluate.pick_wording(None, problems, None, model) == "Use {N} tokens."
    assert evaluate.pick_wording("tulu", problems, None, model) == "tulu"
    assert evaluate.pick_wording(None, problems, "l1", model) == "l1"
    assert evaluate.pick_wording(None, problems, None, str(tmp_path / "model")) == "l1"
    assert evaluate.pick_wording(None, [{"source": "toy"}], None, model) == "Use {N} tokens."
    for text, wording in (('{"wording": "tulu"}', "tulu"), ("{", "l1"), ("[]", "l1")):
        (tmp_path / "args.json").write_text(text)
        assert evaluate.pick_wording(None, problems, None, model) == wording
    (tmp_path / "args.json").write_text(
        '{"wording": "l1"}'
    )  # a sentence that the toy's tokenizer cannot write
    assert evaluate.pick_wording(None, [{"source": "toy"}], None, model) == "tulu"
