"""At home among its users' tools: trackers, the hub, learning curves, progress, everyday files."""

import ast
import atexit
import base64
import contextlib
import http.server
import importlib.util
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from conftest import FREEZE, ROOT, TOY, lines

import evaluate
import train_grpo
from integrations import card

SAMPLES = os.path.join(ROOT, "tests", "data", "samples_small.jsonl")


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None and importlib.util.find_spec(name).origin is not None


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> str:
    """Folder of a finished evaluation of a few saved samples."""
    out = str(tmp_path_factory.mktemp("evaluation") / "out")
    assert evaluate.main(["--samples", SAMPLES, "--out", out]) == 0
    return out


def log_run(name: str, out, start: int = 0) -> None:
    """One step into a tracker, from `start` on, in a process of its own: it is closed when that ends."""
    code = f"""
import math
from argparse import Namespace
from accelerate import PartialState
from integrations import trackers
PartialState(cpu=True)  # as the trainer does; the trackers' log needs it
args = Namespace(log_with={name!r}, out={str(out)!r}, reward="lcpo_exact", reward_args={{}}, seed=0)
send = trackers.start(args, {start})
m = {{"step": {start}, "reward": 0.5, "kl": None, "error_by_budget": {{"16": {{"abs": 0.25}}}}}}
send(m)
"""
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(out)}
    os.makedirs(out, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not installed("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard(tmp_path):
    """A real run, gone on with after its first two steps: what came after them is written anew."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    flags = [*TOY, "--log-with", "tensorboard", "--steps", "3", "--save-every", "2", "--out", str(out)]
    train_grpo.main(flags)
    atexit._run_exitfuncs()
    shutil.rmtree(out / "checkpoint-3")
    train_grpo.main(["--resume", "--out", str(out)])
    atexit._run_exitfuncs()
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    told = [(e.step, e.value) for e in events.Scalars("train/reward")]
    assert told == [(m["step"] + 1, pytest.approx(m["reward"])) for m in lines(out)] and len(told) == 3
    names = events.Tags()["scalars"]
    assert "train/error_by_budget/16/abs" in names and "train/step" not in names


@pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed")
def test_wandb_offline(tmp_path):
    log_run("wandb", tmp_path / "run")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    found = record.read_bytes()
    assert b"train/error_by_budget/16/abs" in found and b"lcpo_exact" in found and b"train/kl" not in found
    assert "run-0" in record.name  # the id of the run: a resumed one goes on in it


@pytest.mark.skipif(not installed("trackio"), reason="trackio is not installed")
def test_trackio_on_this_machine(tmp_path):
    log_run("trackio", tmp_path / "run")
    written = (path.read_bytes() for path in (tmp_path / "run").glob("nanoL1.db*"))
    assert any(b"train/error_by_budget/16/abs" in part for part in written)


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


def test_a_checkpoint_on_the_hub(script, tmp_path):
    """Trained, evaluated, described and uploaded, with the real huggingface_hub."""
    flags = [*TOY, "--steps", "1", "--eval-data", f"{FREEZE}/rows.jsonl", "--eval-every", "1"]
    train_grpo.main([*flags, "--reward-args", "tau=0.3", "--out", str(tmp_path / "run")])
    folder = tmp_path / "run" / "checkpoint-1"
    words = [
        "-m",
        "integrations.card",
        folder,
        "--eval",
        tmp_path / "run" / "eval",
        "--push-to-hub",
        "me/short",
    ]
    with hub() as (url, files, seen):
        env = os.environ | {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = script(*words, env=env)
    assert f"uploaded: {url}/me/short/commit/1" in done.stdout
    assert {token for path, token in seen if "commit" in path} == {"Bearer hf_secret"}
    assert set(files) == {p.name for p in folder.iterdir()} - {"trainer_state.pt"}
    assert {"README.md", "violins.png", "model.safetensors", "tokenizer.json"} <= set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    text = files["README.md"].decode()
    assert "PROBLEM\nThink for N tokens." in text and "Budgets trained: 16, 32 tokens." in text
    assert '"max_tokens": 48' in text and '"tau": 0.3' in text and "hf_secret" not in text
    cell = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    cell = cell["datasets"]["rows"]["budgets"]["16"]
    row = next(line for line in text.splitlines() if line.startswith("| rows | 16 |"))
    shown = [f" {cell['n']} ", f" {cell['accuracy']:.1%} ", f" {cell['mean_length']:.0f} "]
    assert row.split("|")[3:6] == shown


def test_card_of_another_evaluation(tmp_path, evaluation, capsys):
    """The card can be written again; mistakes are told in one line."""
    train_grpo.main([*TOY, "--steps", "1", "--out", str(tmp_path / "run")])
    folder = tmp_path / "run" / "checkpoint-1"
    assert card.main([str(folder)]) == 0 and "Not measured yet." in (folder / "README.md").read_text()
    for _ in range(2):  # a second one replaces the first
        assert card.main([str(folder), "--eval", evaluation]) == 0
    text = (folder / "README.md").read_text()
    assert "Not measured" not in text and text.count("| data | asked for |") == 1
    pictures = re.findall(r"!\[[^]]*\]\((.+?)\)", text)
    assert pictures and all((folder / name).exists() for name in pictures)
    capsys.readouterr()
    for words, told in (([tmp_path], "args.json"), ([folder, "--eval", tmp_path], "results.json"),
                        ([folder, "--push-to-hub", "a b/c"], "hf auth login")):  # fmt: skip
        assert card.main(list(map(str, words))) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


# Everyday ---------------------------------------------------------------------------------------------------


def test_a_bar_on_a_terminal(tmp_path):
    """On a real terminal: what tqdm draws, and above it a line for each step."""
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 200))
    ends = {"stdin": inside, "stdout": inside, "stderr": inside}
    words = ["train_grpo.py", *TOY, "--steps", "2", "--out", str(tmp_path / "run")]
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, **ends):
        os.close(inside)
        shown = b""
        with contextlib.suppress(OSError):  # its end, on Linux
            while part := os.read(terminal, 4096):
                shown += part
    os.close(terminal)
    text = shown.decode()
    assert "step    2/2  reward" in text and re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d", text), text


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


HELP = "train_grpo.py|evaluate.py|data.py|-m evaluation.baselines|-m integrations.card".split("|")


@pytest.mark.parametrize("words", HELP)
def test_help(words, script):
    text = script(*words.split(), "--help").stdout
    assert text.startswith("usage: ") and words.split(".")[-1].removesuffix("py") in text and len(text) > 500


ALSO = "tests/tiny.py tests/two_processes.py tests/link_lines.py tests/test_freeze.py studies/study_report.py"


@pytest.mark.parametrize("path", [*ALSO.split(), "studies/zoo.py", "studies/study.py"])
def test_help_of_a_helper(path, script, tmp_path):
    """It says what the script does, and does nothing."""
    before = os.path.getmtime(os.path.join(ROOT, "docs", "study.md"))
    module = path.removesuffix(".py").replace("/", ".")
    text = ast.get_docstring(ast.parse(Path(ROOT, path).read_text(encoding="utf-8")))
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((ROOT, os.path.join(ROOT, "tests"))),
        "OUT": str(tmp_path),
    }
    done = script("-m", module, "--help", cwd=tmp_path, env=env, check=False)
    assert text.splitlines()[0] in done.stdout + done.stderr
    assert os.listdir(tmp_path) == [] and os.path.getmtime(os.path.join(ROOT, "docs", "study.md")) == before


def test_public_functions_have_docstrings():
    """Short ones say it themselves."""
    missing = []
    for path in [*Path(ROOT).glob("*.py"), *Path(ROOT).glob("methods/__init__.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and len(node.body) > 12:
                free = ast.get_docstring(node) or node.name in ("build_parser", "parse_args", "main")
                missing += [] if free else [(path.name, node.name)]
    assert missing == []
