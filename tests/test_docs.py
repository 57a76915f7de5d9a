"""What the README says is what the committed files say."""

import json
import os
import re

from conftest import ROOT

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()
with open(os.path.join(ROOT, "docs", "toy_runs.json")) as f:
    RUNS = json.load(f)["runs"]


def cell(name, seed):
    found = [r["after"] for r in RUNS if (r["name"], r["seed"]) == (name, seed)]
    return f"{found[0]['abs_error']:.1%}, {found[0]['accuracy_64']:.1%}" if found else "not run"


def test_the_table_of_seeds_is_that_of_the_runs():
    for seed in sorted({r["seed"] for r in RUNS}):
        before = next(r["before"]["abs_error"] for r in RUNS if r["seed"] == seed)
        cells = [cell(name, seed) for name in ("peaked", "vllm", "lcpo")]
        row = f"| {seed} | {before:.0%} | {' | '.join(cells)} |"
        assert row in README, row


def test_the_claim_holds_in_the_runs():
    """The worst seed of the default stays inside what the first paragraph promises."""
    after = [r["after"] for r in RUNS if r["name"] == "peaked"]
    assert len(after) == 5
    promised = re.search(r"within ([0-9.]+)% of the budget", README)
    accuracy = re.search(r"at least ([0-9]+)% of its answers right", README)
    assert max(r["abs_error"] for r in after) <= float(promised[1]) / 100
    assert min(r["accuracy_64"] for r in after) >= float(accuracy[1]) / 100


def test_commands_and_files_that_the_readme_names_exist():
    for name in set(re.findall(r"`((?:recipes|docs|tests)/[\w./]+|\w+\.(?:py|txt|args))`", README)):
        places = [os.path.join(ROOT, name), os.path.join(ROOT, "recipes", name)]
        assert any(os.path.exists(place) for place in places), name
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert os.path.getsize(os.path.join(ROOT, picture)) > 5000


def test_ci_runs_the_readme_test_command():
    command = re.search(r"<!-- the tests -->\n```sh\n(.+)\n```", README)[1]
    assert "requirements-test.txt" in command and command.endswith("python -m pytest -n 2 --dist loadfile")
    with open(os.path.join(ROOT, ".ci", "run")) as f:
        assert "<!-- the tests -->" in f.read()
