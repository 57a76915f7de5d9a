"""What README and docs say is what the code does and the committed files say."""

import doctest
import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import types
from argparse import Namespace

import numpy as np
import pytest
from conftest import ROOT

import data
import evaluate
import methods
import rewards
import train_grpo
from evaluation import baselines
from scaling import bench
from studies import study_report

spec = importlib.util.spec_from_file_location("links", os.path.join(ROOT, "tests", "link_lines.py"))
links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(links)

PAGES = {path: links.read(path) for path in [*links.pages(), "CONTRIBUTING.md"]}
README, GUIDE = PAGES["README.md"], PAGES["docs/guide.md"]
RUNS = json.loads(links.read("docs/toy_runs.json"))


def block(page, name):
    """The code that a page shows below `<!-- name -->`."""
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)\n```", PAGES[page], re.S)[1]


# README -----------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert README.count("\n") <= 200


def row_of(run: dict) -> str:
    """A line of the README's table, from what studies/toy_seeds.sh left in docs/toy_runs.json."""
    before, after = run["before_toy-test"]["cells"], run["after_toy-test"]["cells"]
    unseen = [run[f"{when}_toy_ood-test"]["cells"] for when in ("before", "after")]
    inside = [b for b in after if 16 <= int(b) <= 64]
    held = [b for b in inside if int(b) not in study_report.DRAWN]
    assert len(inside) == 12 and 4 <= len(held) < 12

    def mean(cells, i, budgets=inside):
        return sum(cells[b][i] for b in budgets) / len(budgets)

    name = run["seed"] if run["name"] == "hf" else f"{run['seed']}, vLLM"
    words = [name, f"{mean(before, 0):.0%}", f"{mean(after, 0):.1%}"]
    words += [f"{max(after[b][0] for b in inside):.1%}", f"{mean(after, 0, held):.1%}"]
    words += [f"{run['after_toy-test']['correlation_inside']:.3f}"]
    words += [f"{after['16'][1]:.0%}, {after['33'][1]:.0%}, {after['64'][1]:.0%} ({mean(before, 1):.0%})"]
    words += [f"{mean(unseen[1], 0):.1%}, {mean(unseen[1], 1):.0%} ({mean(unseen[0], 1):.0%})"]
    return f"| {' | '.join(map(str, words))} |"


def test_the_table_of_seeds_is_that_of_the_runs():
    assert {*[("hf", seed) for seed in range(5)], ("vllm", 0)} == {(r["name"], r["seed"]) for r in RUNS}
    for run in RUNS:
        assert row_of(run) in README, run["name"] + row_of(run)


def test_every_recipe_is_in_the_table():
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*", README.partition("## Recipes")[2], re.M)))
    there = {os.path.basename(p)[:-5] for p in glob.glob(os.path.join(ROOT, "recipes", "*.args"))} - {"toy"}
    assert there <= set(named)


def test_readme_and_recipe_make_the_same_rows():
    recipe = re.search(r"^#   (python data\.py .+)", links.read("recipes/l1_exact.args"), re.M)[1]
    assert recipe in README and README.count("python data.py deepscaler") == 1


def test_ci_runs_the_readmes_test_commands():
    assert block("README.md", "the tests").endswith("python -m pytest -n 2 --dist loadfile")
    assert "requirements-test.txt" in block("README.md", "the tests")
    assert block("README.md", "the hosts").endswith("tests/test_hosts.py")
    script = links.read(".ci/run")
    assert "<!-- the tests -->" in script and "<!-- the hosts -->" in script


def test_the_quickstart_needs_no_other_index():
    lines = [x for x in block("README.md", "the toy").splitlines() if not x.startswith("#")]
    assert "--index-url" not in " ".join(lines) and lines[-1] == "python train_grpo.py"


# Links, flags, commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", links.pages())
def test_pages_are_current(page):
    """Numbers of lines, and the tables of docs/methods.md."""
    assert links.current(page) == PAGES[page], "run python tests/link_lines.py"


def test_a_row_of_a_table_is_one_line():
    for name, table in links.tables().items():
        for line in table.splitlines():
            assert line.startswith("| ") and line.endswith(" |"), f"{name}: {line}"


def test_every_reward_advantage_and_method_has_a_line():
    page = PAGES["docs/methods.md"]
    names = [f.__name__ for f in (*rewards.REWARDS.values(), *rewards.ADVANTAGES.values())]
    assert not [name for name in [*names, *methods.names()] if f"| [`{name}`](" not in page]


def test_a_link_names_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "ROOT", str(tmp_path))
    lines = [
        "LIMIT = 4",
        "",
        "",
        "def f(x):",
        "    return x  # twice",
        "",
        "",
        "class A:",
        "    def f(self):",
    ]
    (tmp_path / "a.py").write_text("\n".join([*lines, "        return 'twice'"]))
    found = [links.line_of(name, "a.py") for name in ("LIMIT", "A", "A.f", "return x")]
    assert found == [1, 8, 9, 5]
    assert (
        links.linked("[`A.f`](../a.py#L1), [`LIMIT`](a.py#L7)") == "[`A.f`](../a.py#L9), [`LIMIT`](a.py#L1)"
    )
    for name in ("f", "g", "# twice, no", "tw ice", "twice "):
        with pytest.raises(KeyError, match="a link needs one"):
            links.line_of(name, "a.py")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub("^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    assert len(links.LINK.findall(prose)) == prose.count("#L"), (
        "a link to a line names what is there in `code`"
    )
    for path, place in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", re.sub("`[^`]*`", "", prose)):
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert os.path.exists(os.path.join(ROOT, target)), path
        if target in PAGES and place:
            heads = re.findall("^#+ (.+)", PAGES[target], re.M)
            assert place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads], place
    for name in set(re.findall(r"`((?:recipes|docs|tests|studies|toy|integrations)/[\w./]+\.\w+)`", prose)):
        assert name == "recipes/NAME.args" or os.path.exists(os.path.join(ROOT, name)), name


FLAG = re.compile(r'\b(?:add|add_argument|addoption)\(\s*"(--[a-z0-9-]+)"')
OF_OTHERS = """--no-deps --index-url --dist --nproc_per_node --nnodes --node_rank --master_addr --master_port
    --num_processes --num_machines --machine_rank --main_process_ip --main_process_port --help
    --logits-processors --reasoning-config --reasoning-parser --served-model-name --enforce-eager
    --max-model-len""".split()


@pytest.mark.parametrize("page", [page for page in PAGES if "study" not in page and "zoo" not in page])
def test_flags_exist(page):
    sources = glob.glob(os.path.join(ROOT, "**", "*.py"), recursive=True)
    flags = {flag for path in sources for flag in FLAG.findall(links.read(os.path.relpath(path, ROOT)))}
    assert len(flags) > 80
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGES[page])) <= flags | {*OF_OTHERS}


def commands(text):
    """(script, words) of every command of this project in code, whether in a block or in a line."""
    blocks = "".join(re.findall(r"^ *```sh\n(.*?)```", text, re.M | re.S)).replace("\\\n", " ")
    lines = blocks.splitlines() + [" ".join(c.split()) for c in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    for line in lines:
        found = re.search(r"(?:python|launch[^@]*|torchrun[^@]*) (?:-m )?((?:\w+\.)?\w+)(?:\.py)? (.+)", line)
        if found and found[1].removesuffix(".py") in PARSERS and "..." not in found[2]:
            yield found[1].removesuffix(".py"), shlex.split(found[2], comments=True)


PARSERS = {"train_grpo": lambda words: train_grpo.build_parser().parse_args(words), "data": data.parse_args}
PARSERS |= {"evaluate": evaluate.parse_args, "scaling.bench": bench.parse_args}
PARSERS |= {"evaluation.baselines": baselines.parse_args}


def test_commands_are_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    read = {script: 0 for script in PARSERS}
    for page in PAGES:
        for script, words in commands(PAGES[page]):
            if script == "scaling.bench" and words[0] == "COMMAND":
                continue
            # What the reader writes himself stands for something that is there.
            own = {"cauchy_exact": "peaked_exact", "warm_length": "hapo"}
            PARSERS[script]([own.get(word, word) for word in words])
            read[script] += 1
    assert min(read.values()) >= 1 and sum(read.values()) > 15, read


# The guide, and the code that README and guide show ------------------------------------------------------


def test_the_guide_is_a_session_that_gives_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(os.path.join(ROOT, "docs", "guide.md"), module_relative=False)
    assert (failed, tried > 40) == (0, True)


ROW = re.compile(r"^\| \[`(\w+)`\]\(\S+\)(.*?) \| (grpo|gdpo) \| (.*) \|$", re.M)


def advantages(name, words, advantage, correct, length):
    batch = {"correct": [correct], "truncated": [[0] * 4], "length": [length], "budget": [1000]}
    reward = rewards.REWARDS[name]
    options = methods.constants("reward_args", reward, words)
    if advantage == "gdpo":
        parts = reward(batch, **options, parts=True)
        return rewards.ADVANTAGES["gdpo"](np.stack(list(parts.values())), batch)[0]
    return rewards.ADVANTAGES[advantage](reward(batch, **options), batch)[0]


def test_table_of_advantages():
    found = ROW.findall(GUIDE)
    assert len(found) >= 7
    for name, words, advantage, cells in found:
        mixed = advantages(name, words.split(), advantage, [1, 1, 0, 0], [700, 1600, 700, 1600])
        wrong = advantages(name, words.split(), advantage, [0] * 4, [700, 700, 700, 1600])
        want = [f"{x:+.2f}" if abs(x) > 0.005 else "0" for x in (*mixed, wrong[3])]
        assert cells.split(" | ") == want, name


def test_the_key_of_the_first_exercise():
    batch = {"correct": [[1, 1, 1, 0]], "truncated": [[0] * 4], "length": [[70, 38, 12, 18]], "budget": [16]}
    for alpha, told in ((0.02, "-0.78"), (0.2, "+0.64")):
        reward = rewards.REWARDS["lcpo_exact"](batch, alpha=alpha)
        assert f"{rewards.ADVANTAGES['grpo'](reward)[0, 3]:+.2f}" == told and told in GUIDE


def test_the_reward_of_the_readme():
    space = dict(vars(rewards))
    exec(block("README.md", "a reward"), space)
    reward = rewards.REWARDS.pop("cauchy_exact")
    batch = {"correct": [[1, 0, 1]], "truncated": [[0, 0, 0]], "length": [[16, 22, 4]], "budget": [16]}
    assert reward(batch)[0].tolist() == pytest.approx([2, 0.5, 1.2])
    assert reward(batch | {"budget": [None]})[0].tolist() == [1, 0, 1]
    assert set(reward(batch, parts=True)) == {"correct", "length"}
    assert reward.needs == ("budget",) and not reward.compares_group


def shown_method(page, name, monkeypatch):
    """The class of a method that a page shows, as its file would give it."""
    module = types.ModuleType("methods.shown")
    exec(block(page, name), vars(module))
    monkeypatch.setitem(sys.modules, "methods.shown", module)
    return methods.find("shown")


def test_the_method_of_the_readme(monkeypatch):
    method = shown_method("README.md", "a method", monkeypatch)(Namespace(), None, steps=50)
    weights = [method.reward_inputs([], [], step)["constants"]["weight"] for step in (0, 25, 80)]
    assert weights == [0.0, 0.5, 1.0]
    known = methods.constants("method_args", type(method), ["steps=50"])
    assert (
        known == {"steps": 50}
        and "weight" in train_grpo.inspect.signature(rewards.REWARDS["kimi"]).parameters
    )


def test_two_methods_in_one(monkeypatch):
    """The guide's subclass cuts as DOT does, and remembers what is left as HAPO does."""
    from toy import task

    tokenizer = task.make_tokenizer()
    args = Namespace(group_size=16, require_think=True, think_end="</think>")
    method = shown_method("docs/guide.md", "two methods", monkeypatch)(args, tokenizer)
    short, long = tokenizer.encode("=2 </think> 2 <eos>"), tokenizer.encode("=2 " * 300 + "</think> 2 <eos>")
    group = [{"ids": np.array(x), "logps": np.zeros(len(x)), "length": len(x), "correct": 1, "truncated": 0,
              "text": ""} for x in [short] * 15 + [long]]  # fmt: skip
    row = {"id": "a", "answer": "2", "kind": "math"}
    method.revise([group], [row])
    assert group[15]["dot_cut"] == 1 and group[15]["length"] < 250 and not group[15]["correct"]
    assert np.isnan(method.reward_inputs([group], [row], 0)["history"][0])
    method.learn([group], [row])
    rollouts = method.reward_inputs([group], [row], 1)
    assert rollouts["history"].tolist() == [4.0]
    assert {"dot_cut", "history_known"} <= set(method.metrics([group], rollouts, None))


BREAKS = re.findall(r"^\| [^|]+ \| (\w+\.py) \| `([^|]+)` \| `([^|]+)` \| `(test_\w+)` \|$", GUIDE, re.M)


def test_what_the_guide_breaks_is_there():
    tests = "".join(links.read(os.path.relpath(p, ROOT)) for p in glob.glob(f"{ROOT}/tests/test_*.py"))
    assert len(BREAKS) >= 6
    for file, old, _, test in BREAKS:
        assert links.read(file).count(old) == 1 and f"def {test}(" in tests, (old, test)


@pytest.mark.slow
@pytest.mark.parametrize("file, old, new, test", BREAKS, ids=[b[3] for b in BREAKS])
def test_broken(file, old, new, test, tmp_path, script):
    """A copy with the bug fails the test that the guide names."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__"))
    (copy / file).write_text(links.read(file).replace(old, new), encoding="utf-8")
    words = "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", test, "tests"
    done = script(*words, cwd=copy, check=False)
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout
