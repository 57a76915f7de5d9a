"""Files that strangers made: data sets of any shape, models and checkpoints that are not what they seem."""

import gzip
import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import ROOT, TOY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import evaluate
import train_grpo
from evaluation import baselines

MATH = os.path.join(ROOT, "tests", "data", "math_train_small.jsonl.gz")
GOOD = json.dumps({"problem": "1 + 1?", "answer": "2"})


# Data -------------------------------------------------------------------------------------------------------


def parquet(table):
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    return file.getvalue().to_pybytes()


FILES = {  # name: content that holds no usable row
    "numbers.jsonl": b'{"problem": 5, "answer": 7}\n',
    "nulls.jsonl": b'{"problem": null, "answer": null}\n' * 3,
    "lists.jsonl": b'[1, 2]\n"text"\n7\nnull\n',
    "bool.jsonl": b'{"problem": "Q", "answer": true}\n',
    "nested.jsonl": b'{"problem": {"text": "Q"}, "answer": {"a": 1}}\n',
    "infinite.jsonl": b'{"problem": "Q", "answer": Infinity}\n',
    "deep.jsonl": b"[" * 100_000,
    "utf16.jsonl": GOOD.encode("utf-16"),
    "mixed.jsonl": GOOD.encode() + b"\n" + '{"problem": "é", "answer": "1"}'.encode("latin-1") + b"\n",
    "binary.jsonl": bytes(range(256)) * 40,
    "half.jsonl": GOOD.encode()[:-5],
    "cut.jsonl.gz": gzip.compress(GOOD.encode() * 500)[:-20],
    "bits.jsonl.gz": gzip.compress(GOOD.encode() * 500)[:-20] + b"\0" * 20,
    "text.jsonl.gz": GOOD.encode(),
    "two.json": b'{"a": 1}\n{"a": 2}\n',
    "nul.csv": b'problem,answer\n"Q\0,1\n',
    "open.csv": b'problem,answer\n"Q,1\n',
    "columns.parquet": parquet({"prompt": [["a"]], "label": [1]}),
    "types.parquet": parquet({"problem": [1, 2], "answer": [[1], None]}),
    "half.parquet": parquet({"problem": ["Q"], "answer": ["1"]})[:-30],
    "empty.parquet": b"",
    "samples.jsonl": b'{"id": [], "source": "x", "budget": "many", "length": -5, "response": 7}\n',
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jsonl").mkdir()
    return folder


def refusal(module, argv, capsys):
    """What a script says to a user's mistake: one line. The trainer raises it, the others print it."""
    if module is train_grpo:
        with pytest.raises(data.BadInput) as error:
            module.main(argv)
        assert "\n" not in str(error.value)
        return str(error.value)
    assert module.main(argv) == 2, module.__name__
    error = capsys.readouterr().err
    assert ": error: " in error and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("name", [*FILES, "folder.jsonl"])
def test_files_without_a_usable_row(files, tiny, tmp_path, capsys, name):
    """One line and exit code 2 from every script that reads it, and nothing is written."""
    path, out = str(files / name), str(tmp_path / "out")
    commands = [
        (data, [path, "--budgets", "fixed:8", "--mode", "exact", "--out", out + ".jsonl"]),
        (
            train_grpo,
            ["--model", tiny, "--data", path, "--budgets", "fixed:8", "--sampler", "hf", "--out", out],
        ),
        (evaluate, ["--model", tiny, "--data", path, "--budgets", "8", "--sampler", "hf", "--out", out]),
        (evaluate, ["--samples", path, "--out", out]),
        (baselines, ["tops", "--samples", path, "--out", out + ".jsonl"]),
    ]
    for module, argv in commands:
        error = refusal(module, argv, capsys)
        assert path in error or name in error, error
    assert os.listdir(tmp_path) == []


def test_odd_rows_among_good_ones(tmp_path, capsys):
    """10 MB of text, ids that come twice, a byte-order mark: kept, or left out and counted."""
    rows = [{"id": "same", "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    rows += [{"id": 7, "problem": "x" * 10_000_000, "answer": "1"}, {"problem": "Q", "answer": None}]
    rows += [
        {"id": None, "problem": "\u202eodd\x00", "answer": ["1", None, 2.0]},
        {"problem": ["Q"], "answer": 1},
    ]
    path, out = tmp_path / "odd.jsonl", tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert data.main([str(path), "--budgets", "fixed:8", "--mode", "exact", "--out", str(out)]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    told = capsys.readouterr().out
    assert len(written) == 5 and "dropped 1: no answer" in told and "dropped 1: no problem text" in told
    assert [row["answer"] for row in written[-1:]] == [["1", "2"]]
    assert len({row["id"] for row in written}) == 5, "equal ids are not equal problems"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = (
    "id problem question answer answers choices kind prompt budget mode level source passage response".split()
)
RECORDS = st.lists(
    st.dictionaries(st.sampled_from(NAMES + ["length", "finish_reason", "correct"]), JSON) | JSON
)
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=150, **QUIET)
@given(
    st.one_of(st.binary(max_size=200), RECORDS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
)
def test_any_file_ends_well(tmp_path, capsys, content):
    """Any bytes, any JSON: whole rows and a count of the others, or one line; never half a file."""
    path, out = tmp_path / "any.jsonl", tmp_path / "rows.jsonl"
    path.write_bytes(content)
    out.unlink(missing_ok=True)
    code = data.main([str(path), "--budgets", "fixed:8", "--mode", "exact", "--out", str(out)])
    told = capsys.readouterr()
    if code == 0:
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert f"wrote {len(rows)}\n" in told.out and all(row["budget"] == 8 for row in rows) and rows
    else:
        assert code == 2 and told.err.count("\n") == 1 and "data.py: error: " in told.err
        assert not out.exists()
    for module, argv in (
        (evaluate, ["--samples", str(path), "--out", str(tmp_path / "evaluation")]),
        (baselines, ["tops", "--samples", str(path), "--out", str(tmp_path / "tops.jsonl")]),
    ):
        code, error = module.main(argv), capsys.readouterr().err
        if code == 0:  # now and then a random record has all that tops needs
            chosen = (tmp_path / "tops.jsonl").read_text(encoding="utf-8").splitlines()
            assert module is baselines and chosen and all(json.loads(row)["messages"] for row in chosen)
            (tmp_path / "tops.jsonl").unlink()
        else:
            assert code == 2 and error.count("\n") == 1


# Models and checkpoints -------------------------------------------------------------------------------------


class Evil:
    """A pickle that runs code when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


EVIL = "import pathlib\npathlib.Path({mark!r}).touch()\n"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def more_tokens(folder, mark):
    tokenizer = data.load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(500)])
    tokenizer.save_pretrained(folder)


def a_pickle(folder, mark):
    (folder / "model.safetensors").unlink()
    torch.save(Evil(mark), folder / "pytorch_model.bin")


def own_code(folder, mark):
    """A model, its configuration and its tokenizer that bring their own classes."""
    (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    names = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.T", None],
    }
    change_json(folder / "config.json", model_type="evil", auto_map=names)
    change_json(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=names)


MODELS = {
    "a tokenizer of another model": (more_tokens, "do not belong together"),
    "weights as a pickle": (a_pickle, "does not load"),
    "code of its own": (own_code, ""),
    "weights cut off": (
        lambda folder, mark: os.truncate(folder / "model.safetensors", 5000),
        "does not load",
    ),
    "weights of text": (
        lambda folder, mark: (folder / "model.safetensors").write_text("{}"),
        "does not load",
    ),
    "a configuration of text": (lambda folder, mark: (folder / "config.json").write_text("{"), "config.json"),
    "an unknown architecture": (
        lambda folder, mark: change_json(folder / "config.json", model_type="evil", architectures=["Evil"]),
        "config.json",
    ),
    "a tokenizer of text": (lambda folder, mark: (folder / "tokenizer.json").write_text("[1]"), "tokenizer"),
    "a tokenizer cut off": (lambda folder, mark: os.truncate(folder / "tokenizer.json", 300), "tokenizer"),
}


@pytest.mark.parametrize("what", MODELS)
def test_model_folders(tiny, tmp_path, capsys, what):
    folder, mark, out = tmp_path / "model", tmp_path / "mark", str(tmp_path / "out")
    shutil.copytree(tiny, folder)
    spoil, words = MODELS[what]
    spoil(folder, mark)
    flags = ["--model", str(folder), "--data", MATH, "--sampler", "hf", "--out", out]
    for module, more in (
        (
            train_grpo,
            ["--budgets", "fixed:8", "--max-tokens", "8", "--steps", "1", "--prompts-per-step", "2"],
        ),
        (evaluate, ["--budgets", "8", "--limit", "2"]),
    ):
        assert words in refusal(module, [*flags, *more], capsys)
    assert not mark.exists(), "code of the folder was run"
    assert not os.path.exists(out)


def test_a_model_without_a_chat_template_trains(tiny_pad_is_eos, tmp_path):
    """And pad == eos beside it: prompts go in as they are, the end token is trained all the same."""
    shutil.copytree(tiny_pad_is_eos, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    flags = ["--model", str(tmp_path / "model"), "--data", MATH, "--budgets", "fixed:8", "--max-tokens", "8"]
    flags += ["--steps", "1", "--prompts-per-step", "2", "--group-size", "2", "--sampler", "hf"]
    train_grpo.main([*flags, "--out", str(tmp_path / "out")])
    assert os.path.exists(tmp_path / "out" / "checkpoint-1")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_checkpoint_that_would_run_code(tmp_path, how):
    """It is skipped with a word, and no code runs."""
    mark, out = tmp_path / "mark", tmp_path / "run"
    train_grpo.main([*TOY, "--steps", "1", "--out", str(out)])
    path = out / "checkpoint-1" / "trainer_state.pt"
    if how == "torch":
        torch.save(torch.load(path, weights_only=True) | {"method": Evil(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(data.BadInput, match="checkpoint-1 is damaged"):
        train_grpo.main(["--resume", "--steps", "2", "--out", str(out)])
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists(), "it would have run"
