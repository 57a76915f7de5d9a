import os
import subprocess
import sys

import pytest

# One thread a process: the tests start several processes, and the models are too small to gain from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Metrics that differ between two runs of the same thing.
TIMES = ("seconds", "tokens_per", "peak", "overhead", "train_")


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
