"""docs/serving.md against a real vLLM server on loopback."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import pytest
from conftest import FREEZE, ROOT

import data
from toy import task as toy
from toy.prepare import make_model

with open(os.path.join(ROOT, "docs", "serving.md"), encoding="utf-8") as f:
    PAGE = f.read()
NEEDED = ("vllm", "uvicorn", "watchfiles", "model_hosting_container_standards", "openai")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not all(map(importlib.util.find_spec, NEEDED)), reason="no vLLM server installed"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """The toy's model without any training: it hardly ever closes its thinking."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = toy.make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def serving(folder: str, log, hard_caps: bool = True):
    """Address of a server started with the command of docs/serving.md; only model and port are ours."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    text = re.search(r"<!-- serve -->\n```sh\n(.+?)\n```", PAGE, re.S)[1]
    cache, path, python, *words = shlex.split(text.replace("\\\n", " "))
    assert (path, python, words[3]) == ("PYTHONPATH=.", "python", "out/toy/checkpoint-300")
    at = words.index("--reasoning-config")  # a line that the page says to leave out where it is not needed
    words = words if hard_caps else words[:at] + words[at + 2 :]
    command = [sys.executable, *words[:3], folder, *words[4:], "--port", str(port)]
    env = os.environ | dict([cache.split("=")]) | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ROOT}
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        for _ in range(480):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it died: the assertion above tells why
            os.killpg(process.pid, signal.SIGTERM)  # the engine is a child process of the server's
        process.wait(30)


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    with serving(model_folder, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def snippet(name: str, url: str) -> dict:
    """The variables that a Python snippet of docs/serving.md leaves behind."""
    code = re.search(rf"<!-- {name} -->\n```python\n(.+?)```", PAGE, re.S)[1]
    assert "http://localhost:8000/v1" in code
    variables: dict = {}
    exec(compile(code.replace("http://localhost:8000/v1", url), name, "exec"), variables)
    return variables


def test_asking_for_a_budget_with_the_openai_client(server, capsys):
    found = snippet("ask", server)
    # The sentence of the page is the one that this model was trained on.
    asked = data.budget_prompt("add a +3 b +6 c +3", 32, "exact", "math", "tulu")
    assert found["question"]("add a +3 b +6 c +3", 32) == asked
    text, length = found["ask"]("add a +3 b +6 c +3", 8)
    assert 0 < length <= 16 and len(toy.make_tokenizer().encode(text)) in (length, length - 1)


def position_of_close(text: str) -> int | None:
    """Number of the token `</think>` in the response, from 1."""
    words = text.split()
    return words.index("</think>") + 1 if "</think>" in words else None


def test_a_hard_cap_over_http(server):
    found = snippet("cap", server)
    for budget in (20, 40):
        text, length = found["ask_at_most"]("add a +3 b +6 c +3", budget)
        at = position_of_close(text)
        assert length <= budget and at is not None and at <= budget - 7, text


def test_evaluate_measures_the_server(server, script, tmp_path):
    flags = ["--base-url", server, "--api-model", "l1", "--data", "toy", "--limit", "4", "--n", "2"]
    flags += ["--budgets", "8,16", "--max-tokens", "24", "--concurrency", "2", "--out", tmp_path / "out"]
    script("evaluate.py", *flags)
    tokenizer, ends = toy.make_tokenizer(), Counter()
    for row in map(json.loads, open(tmp_path / "out" / "samples.jsonl")):
        ends[row["finish_reason"]] += 1
        # The server leaves the end token out of the text and counts it, as the in-process samplers do.
        ended = row["finish_reason"] == "stop"
        most = len(tokenizer.encode(row["response"], add_special_tokens=False)) + ended
        assert most <= row["length"] <= 24 and (ended or row["length"] == 24)
    assert sum(ends.values()) == 16 and ends["length"] > 0


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> str:
    """A model that was taught the toy's task; its template asks in words for what its variables say."""
    folder = tmp_path_factory.mktemp("taught") / "model"
    shutil.copytree(os.path.join(FREEZE, "model"), folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<user> {{ m.content }} {% endfor %}"
        "{% if thinking_budget %}Think for {{ thinking_budget }} tokens. {% endif %}"
        "{% if reasoning_effort %}Think for {{ {'low': 16, 'high': 32}[reasoning_effort] }} tokens. "
        "{% endif %}<think>"
    )
    return str(folder)


def samples_of(folder) -> list[dict]:
    with open(folder / "samples.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def texts_of(rows) -> dict:
    return {(r.get("effort") or r["budget"], r["id"]): r["response"] for r in rows}


def test_one_model_asked_in_four_ways(taught, script, tmp_path):
    """By sentence, vLLM's thinking budget, a template's variable and an effort, measured on one server."""
    ways = {"sentence": "sentence", "budget": "thinking-token-budget", "variable": "template:thinking_budget"}
    known = shutil.copy(os.path.join(FREEZE, "rows.jsonl"), tmp_path / "toy.jsonl")  # what it was taught
    common = ["--data", known, "--limit", "10", "--temperature", "0", "--require-think"]
    with serving(taught, tmp_path / "log") as url:
        common = ["evaluate.py", "--base-url", url, "--api-model", "l1", *common]
        for name, way in ways.items():
            # By default the caps differ; where they do not fit the context, the server sets them.
            cap = [] if name == "budget" else ["--max-tokens", "64"]
            script(*common, *cap, "--budgets", "16,32", "--ask-by", way, "--out", tmp_path / name)
        script(*common, *cap, "--ask-by", "effort:low,high", "--out", tmp_path / "effort")
        assert script(*common, "--ask-by", "effort:9", "--out", tmp_path / "no", check=False).returncode == 2
    rows = {name: samples_of(tmp_path / name) for name in [*ways, "effort"]}
    # The template writes the sentence of the toy: greedy responses are the same, whoever writes it.
    spoken = texts_of(rows["sentence"])
    assert len(spoken) == 20 and texts_of(rows["variable"]) == spoken
    said = {
        (16 if effort == "low" else 32, i): text for (effort, i), text in texts_of(rows["effort"]).items()
    }
    assert said == spoken
    # vLLM closes the thinking after exactly as many tokens, or the model does before.
    for row in rows["budget"]:
        thought = row["response"].split().index("</think>")
        assert thought <= row["budget"] and "tokens" not in row["prompt"], row
    thoughts = [row["response"].split().index("</think>") - row["budget"] for row in rows["budget"]]
    assert thoughts.count(0) >= 10
    # One table of all three, which says how each was asked.
    done = script("-m", "evaluation.compare", *(tmp_path / name for name in ways), "--out", tmp_path / "all")
    table = [line.split() for line in done.stdout.splitlines() if line.strip().startswith(("16 ", "32 "))]
    found = [(row[0], row[2], row[3]) for row in table if row[1] == "10"]
    assert found == [(budget, name, way) for budget in ("16", "32") for name, way in ways.items()]
    compared = json.loads((tmp_path / "all" / "compare.json").read_text())["datasets"]["toy"]
    assert compared["ask_by"] == ways
    errors = {name: cell["abs_error"] for name, cell in compared["budgets"]["16"]["figures"].items()}
    assert errors["sentence"] == errors["variable"] and errors["budget"] < 0.3
    results = json.loads((tmp_path / "effort" / "results.json").read_text())
    assert results["ask_by"] == "effort" and list(results["datasets"]["toy"]["budgets"]) == ["low", "high"]


def test_vllms_thinking_budget_without_a_server(taught, script, tmp_path):
    known = shutil.copy(os.path.join(FREEZE, "rows.jsonl"), tmp_path / "toy.jsonl")
    words = [
        "--model",
        taught,
        "--data",
        known,
        "--limit",
        "6",
        "--budgets",
        "8,24,none",
        "--sampler",
        "vllm",
    ]
    script("evaluate.py", *words, "--ask-by", "thinking-token-budget", "--out", tmp_path / "out")
    rows = samples_of(tmp_path / "out")
    assert [row.get("ask_by") for row in rows] == ["thinking-token-budget"] * 12 + [None] * 6
    # The end of thinking comes on top of the budget.
    assert all(row["thinking_length"] <= row["budget"] + 1 for row in rows[:12])
    assert sum(row["thinking_length"] == row["budget"] + 1 for row in rows[:12]) >= 6
