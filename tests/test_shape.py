"""The shape of the house: what lies where, how large it may be, what imports what.

Raising a number of this file is a decision of its own, never a part of a feature.
"""

import ast
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

import train_grpo
from methods import Method

TOP = """train_grpo.py rewards.py verifier.py data.py evaluate.py README.md CHANGELOG.md CITATION.cff
    requirements.txt requirements-cpu.txt requirements-hosts.txt requirements-test.txt CONTRIBUTING.md LICENSE
    NOTICE pyproject.toml methods recipes toy scaling evaluation integrations studies docs tests
    .ci .github .gitignore .pre-commit-config.yaml""".split()
LINES = {"train_grpo.py": 800, "rewards.py": 650, "verifier.py": 600, "data.py": 800, "evaluate.py": 550}
LINES["README.md"] = 200
PACKAGES = "methods toy scaling evaluation integrations studies".split()
# What a folder needs of another one, besides the top level that all of them import.
NEEDED = {
    ("train_grpo", "methods"), ("train_grpo", "scaling"), ("train_grpo", "toy"), ("train_grpo", "evaluation"),
    ("train_grpo", "integrations"), ("evaluate", "evaluation"), ("evaluate", "toy"),
    ("data", "integrations"),  # --export
    ("evaluation", "toy"),  # the transformers sampler
    ("toy", "scaling"),  # which gathers the weights of a sharded model
    ("evaluation", "studies"),  # the edits of finished checkpoints, behind one command
    ("scaling", "studies"),  # what the benchmarks compare with
    ("integrations", "evaluation"), ("integrations", "methods"),  # reminders at serving time
    ("methods", "toy"), ("scaling", "methods"),  # CRF's classifier; what is measured
}  # fmt: skip


def tracked() -> list[str]:
    """The files of the repository, as git knows them: those that are new and not ignored, too."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if os.path.exists(os.path.join(ROOT, name))]


FILES = tracked()
PYTHON = [name for name in FILES if name.endswith(".py")]
CODE = [name for name in PYTHON if not name.startswith(("tests/", "studies/"))]
ROOMS = [name for name in CODE if not name.startswith("docs/")]


def read(name):
    return Path(ROOT, name).read_text(encoding="utf-8")


def test_top_level():
    assert {name.split("/")[0] for name in FILES} == set(TOP)


@pytest.mark.parametrize("name", LINES)
def test_lines(name):
    assert len(read(name).splitlines()) <= LINES[name]


def test_lines_of_methods():
    sizes = {name: len(read(name).splitlines()) for name in PYTHON if name.startswith("methods/")}
    assert len(sizes) > 10
    assert {name: n for name, n in sizes.items() if n > 80 and name != "methods/__init__.py"} == {}


def test_lines_in_all():
    assert sum(len(read(name).splitlines()) for name in CODE) <= 8000


def test_flags_of_the_trainer():
    flags = [a.option_strings[0] for a in train_grpo.build_parser()._actions if a.option_strings]
    assert 40 < len(flags) - 1 <= 55, "without --help"


def test_hooks_of_a_method():
    hooks = [name for name, value in vars(Method).items() if callable(value) and not name.startswith("_")]
    assert len(hooks) <= 9
    assert all(f".{name}(" in read("train_grpo.py") for name in hooks), "a step calls each of them"


def functions(name):
    """(name, number of lines) of every function of a file, those of classes and of functions included."""
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_long_functions():
    free = ("build_parser", "parse_args", "main")
    found = {f"{name}: {f}": n for name in CODE for f, n in functions(name) if n > 70 and f not in free}
    assert found == {}


def test_no_wide_lines():
    wide = [
        f"{name}:{i}"
        for name in PYTHON
        for i, line in enumerate(read(name).splitlines(), 1)
        if len(line) > 110
    ]
    assert wide == []


def test_recipes_hold_nothing_else():
    names = [name for name in FILES if name.startswith("recipes/")]
    assert len(names) == 52 and all(name.count("/") == 1 and name.endswith(".args") for name in names)


def imports(name):
    """The modules of this project that a file imports, anywhere in it, by the first part of their names."""
    mine = {n.removesuffix(".py") for n in PYTHON if "/" not in n} | set(PACKAGES)
    for node in ast.walk(ast.parse(read(name))):
        found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        found = [node.module or ""] if isinstance(node, ast.ImportFrom) else found
        yield from {module.split(".")[0] for module in found} & mine


@pytest.mark.parametrize("name", ["rewards.py", "verifier.py"])
def test_files_that_are_copied_alone(name):
    assert set(imports(name)) == set()


def test_data_needs_nothing_until_a_flag_asks_for_it():
    body = ast.parse(read("data.py")).body
    top = [a.name for node in body if isinstance(node, ast.Import) for a in node.names]
    top += [node.module for node in body if isinstance(node, ast.ImportFrom)]
    mine = {n.removesuffix(".py") for n in PYTHON if "/" not in n} | set(PACKAGES)
    assert not {module.split(".")[0] for module in top} & mine


def test_imports_go_one_way():
    """The folders import the top level, not each other; what is needed beyond that is in NEEDED, no more."""
    crossing = set()
    for name in ROOMS:
        room = name.split("/")[0].removesuffix(".py")
        crossing |= {(room, other) for other in imports(name) if other in PACKAGES and other != room}
    assert crossing - NEEDED == set(), "a new need"
    assert NEEDED - crossing == set(), "a need that is gone"
    assert not [name for name in CODE if name.startswith("methods/") and "train_grpo" in set(imports(name))]
