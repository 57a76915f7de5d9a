"""What README and docs say is what the code does and the committed files say."""

import ast
import doctest
import glob
import importlib.util
import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT

import data
import evaluate
import rewards
import train_grpo
from scaling import bench


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as f:
        return f.read()


README, RUNS = read("README.md"), json.loads(read("docs", "toy_runs.json"))["runs"]
DOCS = {os.path.basename(path): read(path) for path in glob.glob(os.path.join(ROOT, "docs", "*.md"))}
GUIDE, TROUBLES = DOCS["guide.md"], DOCS["troubleshooting.md"]
spec = importlib.util.spec_from_file_location("links", os.path.join(ROOT, "docs", "link_methods.py"))
links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(links)


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


# Links, flags, commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_where_they_say(name):
    assert links.linked(DOCS[name]) == DOCS[name], "run python docs/link_methods.py"
    found = links.LINK.findall(DOCS[name])
    assert len(found) == DOCS[name].count(".py#L"), (
        "a link to a line names what is there: [`name`](../file.py#L1)"
    )
    for named, file, line in found:
        last = re.escape(named.rpartition(".")[2])
        assert re.match(rf" *(def|class) {last}\b|{last} = ", read(file).splitlines()[int(line) - 1])
    prose = re.sub("^```.*?^```", "", DOCS[name], flags=re.M | re.S)
    for path in re.findall(r"\]\((?!http)([^)#]+)", prose):
        assert os.path.exists(os.path.join(ROOT, "docs", path)), path
    for page, place in re.findall(r"\]\((\w+\.md)#([^)]+)\)", prose):
        heads = [
            re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
            for h in re.findall("^#+ (.+)", DOCS[page], re.M)
        ]
        assert place in heads, (place, heads)


FLAG = re.compile(r'\b(?:add|add_argument|number|choice|constants)\(\s*"(--[a-z0-9-]+)"')
OF_OTHERS = (
    "--num_processes --standalone --nproc_per_node --no-deps --cpu --runslow --no-check-memory".split()
)


@pytest.mark.parametrize("text", [GUIDE, TROUBLES], ids=["guide", "troubleshooting"])
def test_flags_exist_and_commands_are_read(text):
    flags = {flag for path in glob.glob(os.path.join(ROOT, "*.py")) for flag in FLAG.findall(read(path))}
    assert len(flags) > 100
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= flags | {*OF_OTHERS, "--help"}
    parsers = {"train_grpo": train_grpo.build_parser().parse_args, "evaluate": evaluate.parse_args}
    parsers |= {"data": data.parse_args, "bench": bench.parse_args}
    commands = [c for c in re.findall(r"`(?:\w+=\w+ )?python (\w+)\.py([^`]*)`", text) if "..." not in c[1]]
    assert len(commands) > 1
    for script, words in commands:
        parsers[script](shlex.split(words))


# docs/guide.md ----------------------------------------------------------------------------------------------


def test_the_guide_is_a_session_that_gives_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(os.path.join(ROOT, "docs", "guide.md"), module_relative=False)
    assert (failed, tried > 45) == (0, True)


def test_no_number_of_the_guide_stands_outside_of_what_is_run():
    blocks = "".join(re.findall(r"^```python\n(.*?)^```", GUIDE, re.M | re.S))
    run = set(re.findall(r"\d+\.\d+", blocks)) | set(re.findall(r"^#+ (\d\.\d+) ", GUIDE, re.M))
    known = "\n".join(re.findall(r"^\|.*", GUIDE, re.M)) + read(
        "recipes", "l1_exact.args"
    )  # the table has a test
    run |= set(re.findall(r"\d+\.\d+", known))
    prose = re.sub(r"^```.*?^```|^\|.*?$|\b\d{4}\.\d{5}\b", "", GUIDE, flags=re.M | re.S)
    assert {n for n in re.findall(r"\d+\.\d+", prose)} <= run


ROW = re.compile(r"^\| \[`(\w+)`\]\(\S+\)(.*?) \| (grpo|gdpo) \| (.*) \|$", re.M)


def advantages(name, words, advantage, correct, length):
    batch = {
        "correct": [correct],
        "truncated": [[0] * 4],
        "length": [length],
        "budget": [1000],
        "history": [700],
    }
    options = train_grpo.keyword_args("--reward", name, rewards.REWARDS, words)
    if advantage == "gdpo":
        parts = rewards.REWARDS[name](batch, **options, parts=True)
        return rewards.ADVANTAGES["gdpo"](np.stack(list(parts.values())), batch)[0]
    return rewards.ADVANTAGES[advantage](rewards.REWARDS[name](batch, **options), batch)[0]


def test_table_of_advantages():
    found = ROW.findall(GUIDE)
    assert len(found) > 10
    for name, words, advantage, cells in found:
        mixed = advantages(name, words.split(), advantage, [1, 1, 0, 0], [700, 1600, 700, 1600])
        wrong = advantages(name, words.split(), advantage, [0] * 4, [700, 700, 700, 1600])
        want = [f"{x:+.2f}" if abs(x) > 0.005 else "0" for x in (*mixed, wrong[3])]
        assert cells.split(" | ") == want, name


def test_the_reward_of_the_exercise():
    block = re.search(r"<!-- a reward -->\n```python\n(.*?)```", GUIDE, re.S)[1]
    space = dict(vars(rewards))
    exec(block, space)
    batch = {"correct": [[1, 0, 1]], "truncated": [[0, 0, 0]], "length": [[16, 22, 4]], "budget": [16]}
    assert space["cauchy_exact"](batch)[0].tolist() == pytest.approx([2, 0.5, 1.2])
    assert space["cauchy_exact"](batch | {"budget": [None]})[0].tolist() == [1, 0, 1]
    assert set(space["cauchy_exact"](batch, parts=True)) == {"correct", "length"}


BREAKS = re.findall(r"^\| [^|]+ \| (\w+\.py) \| `([^|]+)` \| `([^|]+)` \| `([^|]+)` \|$", GUIDE, re.M)


def test_what_the_guide_breaks_is_there():
    assert len(BREAKS) >= 8
    for file, old, _, test in BREAKS:
        path, _, function = test.partition("::")
        assert read(file).count(old) == 1 and f"def {function}(" in read(path), (old, test)


@pytest.mark.slow
@pytest.mark.parametrize("file, old, new, test", BREAKS, ids=[b[3].partition("::")[2] for b in BREAKS])
def test_broken(file, old, new, test, tmp_path, script):
    """A copy with the bug fails the test that the guide names."""
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / file).write_text(read(file).replace(old, new), encoding="utf-8")
    done = script("-m", "pytest", "-x", "-p", "no:cacheprovider", test, cwd=copy, check=False)
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout


# docs/troubleshooting.md ------------------------------------------------------------------------------------


def texts(source):
    """All texts of a program; what an f-string fills in is left out."""
    nodes = list(ast.walk(ast.parse(source)))
    inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def quotes():
    """A pattern for every message in the first column of the tables: all that is code and has a space."""
    cells = re.findall(r"^\| (.*?) \|", TROUBLES, re.M)
    for quote in (q for cell in cells for q in re.findall("`([^`]+)`", cell) if " " in q):
        parts = [part.strip() for part in quote.split("...")]
        assert sum(map(len, parts)) > 14, quote
        yield quote, re.compile(".*".join(map(re.escape, parts)), re.S)


def test_quoted_messages_are_what_the_code_says():
    said = [text for path in glob.glob(os.path.join(ROOT, "*.py")) for text in texts(read(path))]
    found = list(quotes())
    assert len(found) > 50
    for quote, pattern in found:
        assert any(pattern.search(text) for text in said), quote


@pytest.mark.parametrize("name", ["explain", "check_finite", "watch", "unread"])
def test_every_failure_and_warning_has_a_line(name):
    body = next(n for n in ast.parse(read("faults.py")).body if getattr(n, "name", "") == name).body[1:]
    said = [text for node in body for text in texts(ast.unparse(node)) if len(text) > 45 and "|" not in text]
    assert said
    for text in said:
        assert any(pattern.search(text) for _, pattern in quotes()), text
