import json
import os
import signal
import subprocess
import sys

import pytest

# One thread a process: the tests start several processes, and the models are too small to gain from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Metrics that differ between two runs of the same thing.
TIMES = ("seconds",)

# A run of seconds: a small model that was taught the toy's task, and twelve of its problems.
FREEZE = os.path.join(ROOT, "tests", "data", "freeze")
TOY = f"""--model {FREEZE}/model --data {FREEZE}/rows.jsonl --sampler hf --budgets bucket:16,32 --wording tulu
    --require-think --reward peaked_exact --advantage gdpo --max-tokens 48 --prompts-per-step 4 --group-size 4
    --micro-tokens 2048 --lr 1e-3""".split()


def lines(out) -> list[dict]:
    """The steps of metrics.jsonl."""
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def timeless(out) -> list[dict]:
    """The same without what differs between two runs of the same thing."""
    return [{k: v for k, v in m.items() if not k.startswith(TIMES)} for m in lines(out)]


@pytest.fixture(autouse=True)
def signal_handlers():
    """The trainer's stay until its process ends; pytest goes on after it."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow (minutes each)")
    parser.addoption(
        "--runhosts", action="store_true", help="also run the tests that need requirements-hosts.txt"
    )


def pytest_collection_modifyitems(config, items):
    reasons = {"slow": "slow: run with --runslow"}
    reasons["hosts"] = (
        "verl has an environment of its own (requirements-hosts.txt): run there with --runhosts"
    )
    for name, reason in reasons.items():
        for item in items:
            if item.get_closest_marker(name) and not config.getoption(f"--run{name}"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a small random Qwen2 with a BPE tokenizer trained on real problems."""
    from tiny import make_tiny

    return make_tiny(str(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def tiny_pad_is_eos(tmp_path_factory):
    """The same with pad == eos: the case in which masks made from token values lose the end token."""
    from tiny import make_tiny

    return make_tiny(str(tmp_path_factory.mktemp("models") / "tiny_pad"), pad_is_eos=True)


@pytest.fixture(scope="session")
def script():
    """script("train_grpo.py", ...) runs the real command line and returns the finished process."""

    def run(*words, check=True, timeout=300, **options):
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": timeout} | options
        done = subprocess.run([sys.executable, *map(str, words)], **options)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def same(got, expected, tol=1e-6) -> None:
    """Equal in structure and, number by number, within tol * max(1, |expected|)."""
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for key in expected:
            same(got[key], expected[key], tol)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            same(g, e, tol)
    elif isinstance(expected, float):
        assert got is not None and abs(got - expected) <= tol * max(1, abs(expected)), (got, expected)
    else:
        assert got == expected
