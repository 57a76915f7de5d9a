"""docs/serving.md against a real vLLM server on loopback."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import pytest
from conftest import ROOT

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
    assert (path, python, words[3]) == ("PYTHONPATH=.", "python", "out/toy/checkpoint-250")
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
    asked = data.budget_prompt("add 3 6 3", 32, "exact", "math", "tulu")
    assert found["question"]("add 3 6 3", 32) == asked
    text, length = found["ask"]("add 3 6 3", 8)
    assert 0 < length <= 16 and len(toy.make_tokenizer().encode(text)) in (length, length - 1)


def position_of_close(text: str) -> int | None:
    """Number of the token `</think>` in the response, from 1."""
    words = text.split()
    return words.index("</think>") + 1 if "</think>" in words else None


def test_a_hard_cap_over_http(server):
    found = snippet("cap", server)
    for budget in (20, 40):
        text, length = found["ask_at_most"]("add 3 6 3", budget)
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
