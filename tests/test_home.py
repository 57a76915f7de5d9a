"""At home among its users' tools: trackers, the hub, learning curves, progress, everyday files."""

import ast
import base64
import contextlib
import http.server
import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from argparse import Namespace
from pathlib import Path

import logbook
import numpy as np
import pytest
from conftest import ROOT

import evaluate
import train_grpo
from data import annotate
from integrations import card, trackers
from toy import task as toy

SAMPLES = os.path.join(ROOT, "tests", "data", "samples_small.jsonl")
METRICS = {"step": 0, "reward": 0.5, "reward_std": 0.1, "accuracy": np.float64(0.75), "kl": None,
           "error_by_budget": {"16": {"abs": 0.25, "signed": float("nan")}}}  # fmt: skip


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None and importlib.util.find_spec(name).origin is not None


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> str:
    """Folder of a finished evaluation of a few saved samples."""
    out = str(tmp_path_factory.mktemp("evaluation") / "out")
    assert evaluate.main(["--samples", SAMPLES, "--out", out]) == 0
    return out


def log_run(name: str, out, evaluation: str, start: int = 0) -> None:
    """One step and one evaluation into a tracker, from `start` on."""
    from accelerate import PartialState

    PartialState(cpu=True)  # as the trainer does; the trackers' log needs it
    args = Namespace(log_with=name, out=str(out), reward="lcpo_exact", betas=[0.9, 0.999], data=None)
    tracker = trackers.start(args, start)
    trackers.log_step(tracker, METRICS | {"step": start})
    trackers.log_evaluation(
        tracker, evaluate.read_results(f"{evaluation}/results.json"), evaluation, start + 1
    )
    trackers.finish(tracker)


@pytest.mark.skipif(not installed("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_files(tmp_path, evaluation):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 1, 2, 1):  # the last one goes on from step 1: what came after it is written anew
        log_run("tensorboard", tmp_path, evaluation, start)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/accuracy")] == [(1, 0.75), (2, 0.75)]
    assert [e.value for e in events.Scalars("train/error_by_budget/16/abs")] == [0.25, 0.25]
    names = events.Tags()["scalars"]
    assert "train/kl" not in names and "train/error_by_budget/16/signed" not in names  # not known
    assert "train/step" not in names and any(n.startswith("eval/") and n.endswith("accuracy") for n in names)
    picture = events.Images(events.Tags()["images"][0])[-1]
    assert picture.step == 2 and picture.width > picture.height > 300


@pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed")
def test_wandb_offline(tmp_path, evaluation, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run").mkdir()
    log_run("wandb", tmp_path / "run", evaluation)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    for _ in range(100):  # wandb's own process writes the file, and may come a moment later
        data = record.read_bytes()
        if b"train/error_by_budget/16/abs" in data and b"lcpo_exact" in data:
            break
        time.sleep(0.1)
    assert b"train/error_by_budget/16/abs" in data and b"lcpo_exact" in data and b"train/kl" not in data
    assert len(list(folder.glob("files/media/images/violins*.png"))) >= 1
    run = (tmp_path / "run" / "tracker_id").read_text()
    assert run.startswith("run-") and run in record.name


@pytest.mark.skipif(not installed("trackio"), reason="trackio is not installed")
def test_trackio_on_this_machine(tmp_path, evaluation, script):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_home as t; t.log_run('trackio', *sys.argv[1:])"
    )
    (tmp_path / "run").mkdir()
    script("-c", code, tmp_path / "run", evaluation, env=os.environ | {"TRACKIO_DIR": str(tmp_path / "db")})
    assert b"train/error_by_budget/16/abs" in (tmp_path / "db" / "nanoL1.db").read_bytes() or any(
        b"train/error_by_budget/16/abs" in path.read_bytes() for path in (tmp_path / "db").glob("nanoL1.db*")
    )


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_there(name, tmp_path, monkeypatch, capsys):
    """Also where a folder of its name is: wandb leaves one behind."""
    import importlib.metadata

    real = importlib.metadata.version

    def version(asked):
        if asked == name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return real(asked)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert train_grpo.main(["--log-with", name, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"pip install {name}" in error and not (tmp_path / "run").exists()


# The hub ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub():
    """The part of the hub's protocol that an upload of small files speaks, on loopback; what was uploaded."""
    files, seen = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, self.headers.get("Authorization")))
            reply = {}
            if self.path == "/api/repos/create":
                reply = {"url": f"http://{self.headers['Host']}/me/short", "name": json.loads(body)["name"]}
            elif self.path == "/api/models/me/short/preupload/main":
                asked = json.loads(body)["files"]
                # "regular": the content comes with the commit (large files would go to a store of their own)
                reply = {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
                    ]
                }
            elif self.path == "/api/models/me/short/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                url = f"http://{self.headers['Host']}/me/short/commit/1"
                reply = {"commitUrl": url, "commitOid": "1", "success": True}
            elif self.path != "/api/validate-yaml":
                return self.answer(404, {"error": "no such place"})
            self.answer(200, reply)

        def do_GET(self):
            self.answer(404, {"error": "no such place"})

        def answer(self, status, reply):
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files, seen
    finally:
        server.shutdown()
        server.server_close()


def test_a_run_that_ends_on_the_hub(tiny, script, tmp_path):
    """Trained, evaluated, described and uploaded by one command, with the real huggingface_hub."""
    data = os.path.join(ROOT, "tests", "data", "math_train_small.jsonl.gz")
    flags = ["--budgets", "bucket:8,16", "--max-tokens", "24", "--prompts-per-step", "2", "--group-size", "2"]
    flags += ["--sampler", "hf", "--steps", "1", "--limit", "4", "--eval-data", data, "--eval-limit", "2"]
    flags += ["--eval-every", "1", "--push-to-hub", "me/short", "--out", tmp_path / "run"]
    flags += ["--log-with", "tensorboard"] if installed("tensorboard") else []
    with hub() as (url, files, seen):
        env = os.environ | {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = script("train_grpo.py", "--model", tiny, "--data", data, *flags, env=env)
    assert f"uploaded: {url}/me/short/commit/1" in done.stdout
    assert {token for path, token in seen if "commit" in path} == {"Bearer hf_secret"}
    folder = tmp_path / "run" / "checkpoint-1"
    assert set(files) == {p.name for p in folder.iterdir()} - set(card.STATE)
    assert {"README.md", "violins.png", "model.safetensors", "tokenizer.json"} <= set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    text = files["README.md"].decode()
    assert (
        "PROBLEM Let's think step by step and output the final answer within \\boxed{}. Think for N tokens."
        in text
    )
    assert "Budgets trained: 8, 16 tokens." in text and "--max-tokens 24" in text and "hf_secret" not in text
    cell = json.loads((tmp_path / "run" / "eval-1" / "results.json").read_text())
    cell = cell["datasets"]["math_train_small"]["budgets"]["8"]
    row = next(line for line in text.splitlines() if line.startswith("| math_train_small | 8 |"))
    assert row.split("|")[3:6] == [
        f" {cell['n']} ",
        f" {cell['accuracy']:.1%} ",
        f" {cell['mean_length']:.0f} ",
    ]


def test_card_of_another_evaluation(tmp_path, evaluation, capsys, monkeypatch):
    folder = tmp_path / "run" / "checkpoint-7"
    folder.mkdir(parents=True)
    rows = annotate(toy.problems("toy", "train", 500), "uniform:20:40", "both", "tulu", 1, 0)
    args = {"model": "owner/base", "steps": 7, "reward": "lcpo_max", "advantage": "grpo"}
    card.write_card(str(folder), args | {"temperature": 0.6, "command": ["--out", "a b"]}, rows)
    text = (folder / "README.md").read_text()
    assert "base_model: owner/base" in text and "Not measured yet." in text and "--out 'a b'" in text
    assert "PROBLEM\nThink for N tokens." in text and "PROBLEM\nThink for up to N tokens." in text
    assert "20 to 40 tokens (21 different ones)" in text and "tokens of the whole response" in text
    for _ in range(2):  # a second one replaces the first
        assert card.main([str(folder), "--eval", evaluation]) == 0
    text = (folder / "README.md").read_text()
    assert "Not measured" not in text and text.count("| data | asked for |") == 1
    assert all((folder / name).exists() for name in re.findall(r"!\[[^]]*\]\((.+?)\)", text))
    # Mistakes are told in one line, before anything is trained or sent.
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    assert card.main([str(tmp_path), "--eval", evaluation]) == 2 and "README.md" in capsys.readouterr().err
    for repo in ("noowner", "a/b/c", "a b/c"):
        assert (
            card.main([str(folder), "--push-to-hub", repo]) == 2 and "OWNER/NAME" in capsys.readouterr().err
        )
    (folder / "README.md").write_text("my own words")
    assert card.main([str(folder), "--eval", evaluation]) == 2 and card.BEGIN in capsys.readouterr().err


def test_trained_budgets_of_a_table():
    assert card.is_trained(16, [16, 32]) and not card.is_trained(24, [16, 32])
    assert card.is_trained(24, list(range(10, 40))) and not card.is_trained(64, list(range(10, 40)))
    cell = {"n": 4, "accuracy": 0.5, "mean_length": 15.6, "abs_error": 0.125, "signed_error": -0.125}
    text = card.table(
        {"trained_budgets": [16], "datasets": {"d": {"budgets": {"16": cell, "9": cell, "none": {"n": 1}}}}}
    )
    lines = text.splitlines()
    assert lines[2] == "| d | 16 | 4 | 50.0% | 16 | 12.5% | -12.5% |  |  |  |"
    assert lines[3].startswith("| d | 9 (untrained) | 4 |") and lines[4].startswith(
        "| d | no length | 1 |  |"
    )


# Progress ---------------------------------------------------------------------------------------------------


def test_a_line_every_n_seconds(tmp_path, monkeypatch):
    now, lines = [100.0], []
    monkeypatch.setattr(logbook.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logbook.show_step, "quiet_until", 0.0)
    m = {"reward": 0.5, "accuracy": 0.5, "length": 9.0, "truncated": 0.0, "entropy": 0.1, "grad_norm": 1.0,
         "logp_gap_max": 0.0, "seconds_sample": 1.0, "overhead": 0.0}  # fmt: skip
    for step in range(10):  # 4 seconds a step
        logbook.show_step(m | {"step": step}, Namespace(log_seconds=10.0, steps=10), None, lines.append)
        now[0] += 4.0
    # The first one, one whenever ten seconds have passed, and the last.
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 4, 7, 10]


def test_a_bar_on_a_terminal(tmp_path):
    """What tqdm writes on a real terminal: reward, length error, time left."""
    code = """
import sys
from argparse import Namespace
from pathlib import Path
import logbook
bar, log = logbook.make_log(Namespace(steps=4), Namespace(is_main_process=True))
bar.initial = bar.n = bar.last_print_n = 2
bar.unpause()
m = {"step": 2, "reward": 0.5, "accuracy": 0.25, "length": 9.0, "abs_error": 0.125}
logbook.show_step(m, Namespace(steps=4), bar, log)
bar.refresh()
"""
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 160))
    ends = {"stdin": inside, "stdout": inside, "stderr": inside}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **ends):
        os.close(inside)
        shown = b""
        with contextlib.suppress(OSError):  # its end, on Linux
            while part := os.read(terminal, 4096):
                shown += part
    os.close(terminal)
    text = shown.decode()
    assert (
        "3/4" in text
        and "reward +0.500" in text
        and "12.5%" in text
        and re.search(r"\d\d:\d\d<\d\d:\d\d", text)
    )


# Everyday ---------------------------------------------------------------------------------------------------

SCRIPTS = ["train_grpo.py", "evaluate.py", "data.py", "baselines.py", "card.py"]


def code_lines() -> dict[str, int]:
    """{"file.function": lines of code} of bodies, without comments, docstrings and blank lines."""
    counts = {}
    for path in sorted(Path(ROOT).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first, skip = node.body[0], set()
                if ast.get_docstring(node) is not None:
                    skip = set(range(first.lineno, first.end_lineno + 1))
                at = [i for i in range(first.lineno, node.end_lineno + 1) if i not in skip]
                code = [i for i in at if lines[i - 1].strip() and not lines[i - 1].strip().startswith("#")]
                counts[f"{path.stem}.{node.name}"] = len(code)
    return counts


def test_counts_of_what_is_written_by_hand():
    counts, rows = code_lines(), 0
    with open(os.path.join(ROOT, "docs", "dependencies.md"), encoding="utf-8") as f:
        for line in f:
            names, told = re.findall(r"`(\w+\.\w+)`", line), re.search(r"\| (\d+) \|", line)
            if line.startswith("| ") and told:
                scripts = {name.removesuffix(".py") for name in os.listdir(ROOT) if name.endswith(".py")}
                names = [
                    n for n in names if n.split(".")[0] in scripts and not n.endswith((".py", ".ADVANTAGES"))
                ]
                counted = sum(counts[name] for name in names)  # a KeyError names a function that is gone
                assert abs(counted - int(told[1])) <= max(2, 0.2 * counted), (names, counted)
                rows += 1
    assert rows > 20


def test_every_piece_of_test_data_is_in_the_notice():
    with open(os.path.join(ROOT, "NOTICE"), encoding="utf-8") as f:
        notice = f.read()
    files = {name for name in os.listdir(os.path.join(ROOT, "tests", "data")) if name != "README.md"}
    assert not [name for name in files if name not in notice]


def test_one_version_of_ruff():
    texts = {}
    for name in ("requirements-test.txt", ".pre-commit-config.yaml"):
        with open(os.path.join(ROOT, name), encoding="utf-8") as f:
            texts[name] = set(re.findall(r"ruff==([\d.]+)", f.read()))
    assert len(set.union(*texts.values())) == 1, texts


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_groups_and_what_the_script_is_for(name, script):
    text = script(name, "--help").stdout
    assert text.startswith(f"usage: {name}") and len(text) > 500
    if name in ("train_grpo.py", "evaluate.py", "data.py"):
        groups = re.findall(r"^(\S.+):$", text, re.M)
        assert len(groups) >= 4, groups


# What needs no hint: these names mean one thing everywhere, most of them an object of a library that is
# loaded late; `s` is the trainer's state, `log` a function that prints a line.
DUCKS = "args s state sampler tokenizer model optimizer log ax axis device rng bar ctx file tracker".split()


def functions(body: list, prefix: str = ""):
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, f"{node.name}.")


def test_public_functions_have_type_hints_and_docstrings():
    missing = []
    for path in sorted(Path(ROOT).glob("*.py")):
        for name, node in functions(ast.parse(path.read_text(encoding="utf-8")).body):
            known = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            bare = [a.arg for a in known if a.annotation is None and a.arg not in ("self", "cls", *DUCKS)]
            if bare or node.returns is None or not ast.get_docstring(node):
                missing.append((path.name, name, bare))
    assert not missing
