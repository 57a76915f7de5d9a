"""docs/serving.md against a real `vllm serve` on loopback, and hard_cap.py inside the real engine."""

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


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    """Address of a server started with the commands of docs/serving.md; only model and port are ours."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    text = re.search(r"<!-- serve -->\n```sh\n(.+?)\n```", PAGE, re.S)[1]
    cache, path, python, *words = shlex.split(text.replace("\\\n", " "))
    assert (path, python, words[3]) == ("PYTHONPATH=.", "python", "out/toy/checkpoint-250")
    command = [sys.executable, *words[:3], model_folder, *words[4:], "--port", str(port)]
    env = os.environ | dict([cache.split("=")]) | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ROOT}
    path = tmp_path_factory.mktemp("server") / "log"
    with open(path, "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(480):
            assert process.poll() is None, path.read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):  # it died: the assertion above tells why
            os.killpg(process.pid, signal.SIGTERM)  # the engine is a child process of the server's
        process.wait(30)


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


def test_hard_cap_and_vllms_own_over_http(server):
    from openai import BadRequestError

    found = snippet("cap", server)
    for budget in (20, 40):
        for name, latest in (("ask_at_most", budget - 8), ("ask_at_most_2", budget - 7)):
            text, length = found[name]("add 3 6 3", budget)
            at = position_of_close(text)
            assert length <= budget and at is not None and at <= latest, (name, text)
    with pytest.raises(BadRequestError, match="think_cap"):
        found["ask_at_most"]("add 3 6 3", 8)


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


ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
from integrations.hard_cap import HardCap, force_close
llm = LLM(sys.argv[1], logits_processors=[HardCap], enforce_eager=True, dtype="float32", max_model_len=512)
tokenizer = llm.get_tokenizer()
caps = [None, 1, 2, 7, 30, 60]
params = [SamplingParams(n=4, max_tokens=50, seed=5, detokenize=False, extra_args=c and {"think_cap": c})
          for c in caps]
ids = tokenizer.encode("<user> add 3 6 3 <think>", add_special_tokens=False)
outputs = llm.generate([{"prompt_token_ids": ids}] * len(caps), params, use_tqdm=False)
print(json.dumps([[list(c.token_ids) for c in o.outputs] for o in outputs]))
"""


def test_hard_cap_in_the_engine(model_folder, script):
    env = os.environ | {"PYTHONPATH": ROOT, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = script("-c", ENGINE, model_folder, env=env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    free, *capped = json.loads(done.stdout.strip().splitlines()[-1])
    (end,) = toy.make_tokenizer().encode("</think>", add_special_tokens=False)
    # Without a cap this model goes on: what follows is the work of the cap.
    assert not all(end in ids[:30] for ids in free)
    for cap, group in zip([1, 2, 7, 30], capped, strict=False):
        for ids, same in zip(group, free, strict=True):
            assert end in ids[:cap] and len(ids) <= 50
            assert ids[: cap - 1] == same[: cap - 1]  # up to there nothing is changed
    assert capped[4] == free  # a cap beyond max_tokens does nothing


def test_forced_tokens_by_hand():
    import torch

    from integrations.hard_cap import force_close

    def forced(output, close=(7, 8, 9), cap=5):  # the three tokens of `</think>` as numbers 3, 4 and 5
        logits = force_close(list(close), cap, list(output), torch.zeros(10))
        return int(logits.argmax()) if logits.isinf().sum() == 9 else None

    assert [forced([1] * n) for n in range(7)] == [None, None, 7, 8, 9, None, None]
    assert forced([1, 1, 7]) == 8 and forced([1, 1, 7, 8]) == 9 and forced([1, 1, 7, 8, 9]) is None
    assert forced([7, 8, 9, 1, 1], cap=8) is None  # closed before, by the model itself
    assert forced([1, 7, 8, 1, 1], cap=8) == 7 and forced([1, 7, 8, 1], cap=7) == 7
    assert forced([1], close=(4,), cap=2) == 4 and forced([4], close=(4,), cap=2) is None
