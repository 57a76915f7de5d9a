"""A user's mistakes: one line with the value, the rule and the way out, exit code 2, nothing touched."""

import json
import os
import shutil

import pytest
from conftest import ROOT

import data
import evaluate
import train_grpo
from evaluation import baselines

DATA = os.path.join(ROOT, "tests", "data")
MATH = os.path.join(DATA, "math_train_small.jsonl.gz")
HF = ["--sampler", "hf"]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Paths that the cases name: good and broken files, models and runs."""
    root = tmp_path_factory.mktemp("world")
    (root / "empty.jsonl").write_text("")
    (root / "columns.jsonl").write_text(json.dumps({"foo": 1, "bar": 2}) + "\n")
    (root / "answers.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": None}) + "\n")
    (root / "broken.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": \n')
    (root / "rows.txt").write_text("1 + 1 = 2")
    (root / "file").write_text("not a folder")
    (root / "plain").mkdir()
    (root / "no_tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(os.path.join(tiny, name), root / "no_tokenizer" / name)
    flags = [
        "--data",
        MATH,
        "--budgets",
        "fixed:8",
        "--max-tokens",
        "8",
        "--steps",
        "1",
        "--prompts-per-step",
        "2",
    ]
    run = ["--model", tiny, *flags, "--group-size", "2", *HF]
    assert train_grpo.main([*run, "--out", str(root / "run")]) == 0
    shutil.copytree(root / "run", root / "torn")
    with open(root / "torn" / "checkpoint-1" / "trainer_state.pt", "r+b") as f:
        f.truncate(1000)
    shutil.copytree(root / "run", root / "bare")  # its checkpoint has gone, and it was not the last step
    shutil.rmtree(root / "bare" / "checkpoint-1")
    with open(root / "bare" / "metrics.jsonl", "a") as f:
        f.writelines(json.dumps({"step": step}) + "\n" for step in range(1, 60))
    shutil.copytree(tiny, root / "split")  # a tokenizer in which </think> is several tokens
    tokenizer = json.loads((root / "split" / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if "think" not in t["content"]]
    (root / "split" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return {"tiny": tiny, "root": str(root), "math": MATH, "split": str(root / "split")}


# (flags after --model tiny --data math --budgets fixed:8, what the message must name)
TRAIN = [
    ("--data {root}/missing.jsonl", ["missing.jsonl"]),
    ("--data {root}/columns.jsonl", ["columns.jsonl", "foo", "problem"]),
    ("--data {root}/empty.jsonl", ["empty.jsonl"]),
    ("--data {root}/answers.jsonl", ["answers.jsonl", "answer"]),
    ("--data {root}/broken.jsonl", ["broken.jsonl", "line 2"]),
    ("--data {root}/rows.txt", ["rows.txt", ".jsonl"]),
    ("--reward lcpo_exakt", ["lcpo_exakt", "lcpo_exact"]),
    ("--reward-args gamma=1", ["gamma", "alpha"]),
    ("--reward-args alpha=much", ["alpha=much"]),
    ("--reward hbpo", ["hbpo", "subgroup_budget", "--subgroups hbpo"]),
    ("--reward adaptthink --subgroups adaptthink", ["ref_accuracy", "--reference-samples"]),
    ("--reward o1_pruner", ["o1_pruner", "--reference-samples"]),
    ("--param-dtype bfloat16", ["--param-dtype bfloat16", "add --dtype bfloat16"]),
    ("--vllm-sleep --sampler hf", ["--vllm-sleep", "CUDA", "here it is hf on cpu", "leave it out"]),
    ("--offload-reference", ["--offload-reference", "--kl-coef", "leave it out"]),
    ("--offload-reference --kl-coef 0.1 --lora 4", ["--offload-reference", "--lora needs none"]),
    ("--reward crf", ["crf", "--conciseness-model"]),
    ("--reward crf --conciseness-model {root}/plain", ["{root}/plain", "tokenizer"]),
    ("--reward crf --conciseness-model {tiny}", ["{tiny}", "label"]),
    ("--reward tldr --subgroups modes", ["tldr", "--subgroups levels"]),
    ("--reward curriculum_band", ["curriculum_band", "--budget-schedule"]),
    ("--reward curriculum_band --budget-schedule step --reward-args b0=9", ["b0", "--schedule-args"]),
    ("--reward laser_d --reward-args targets={{}}", ["targets", "--method-args"]),
    ("--reward laser --method-args every=2", ["every=2", "laser"]),
    ("--reward hapo_cosine --method-args history=max", ["history=max", "mean"]),
    ("--reward longwriter_range --budgets none", ["longwriter_range", "--budgets"]),
    ("--subgroups hbpo --group-size 6", ["--group-size", "6", "4"]),
    ("--subgroups hbpo --subgroup-args budgets=5", ["budgets=5", "tuple"]),
    ("--subgroups hbpo --subgroup-args budgets=[0]", ["budgets", "more than 0"]),
    ("--subgroups modes --subgroup-args texts=[1]", ["texts", "2"]),
    ("--subgroups adaptthink --subgroup-args think_word=Alrighty", ["Alrighty", "one token"]),
    ("--subgroups elastic --max-tokens 2000", ["2000", "2048"]),
    ("--budget-schedule linear --schedule-args start=5000", ["5000", "4096"]),
    ("--dot 3 --group-size 8", ["--dot 3", "--group-size 11"]),
    ("--dual-clip 0.5", ["--dual-clip", "0.5"]),
    ("--objective drpo --prompts-per-step 3 --minibatches 2", ["drpo", "multiple"]),
    ("--objective drpo --kl-coef 0.1", ["drpo", "--kl-coef"]),
    ("--objective drpo --objective-args beta=1", ["beta=1", "tau"]),
    ("--dynamic-sampling correct --refills -1", ["--refills", "-1"]),
    ("--reward dot_threshold", ["dot_threshold", "lcpo_exact"]),
    ("--advantage hbpo", ["hbpo", "subgroup_budget"]),
    ("--reward peaked_exact --advantage gdpo --advantage-args weights=[1,2,3]", ["gdpo"]),
    ("--advantage grop", ["grop", "rloo"]),
    ("--budgets uniform:100", ["uniform:100"]),
    ("--budgets uniform:400:100", ["400", "100"]),
    ("--budgets bucket:8,x", ["bucket:8,x"]),
    ("--budgets fixed:4097", ["4097", "--max-tokens", "4096"]),
    ("--group-size 1", ["--group-size", "1", "2"]),
    ("--prompts-per-step 0", ["--prompts-per-step", "0"]),
    ("--minibatches 200", ["--minibatches", "200"]),
    ("--lr -1", ["--lr", "-1"]),
    ("--temperature 0", ["--temperature", "0"]),
    ("--weight-decay -1", ["--weight-decay", "-1"]),
    ("--betas 1 2", ["--betas", "[0, 1)"]),
    ("--seed 100000000000000000000", ["--seed"]),
    ("--clip-low nan", ["--clip-low", "nan"]),
    ("--verify-timeout inf", ["--verify-timeout", "inf"]),
    ("--eval-budgets 512,0", ["--eval-budgets", "512,0"]),
    ("--eval-data {math} --eval-every 1 --eval-budgets 9000", ["9000", "8192"]),
    ("--budgets none", ["--budgets none", "lcpo_exact"]),
    ("--max-tokens 9000", ["9000", "8192", "--max-prompt-tokens"]),
    ("--eval-every 5", ["--eval-every", "--eval-data"]),
    ("--eval-data {root}/missing.jsonl --eval-every 1", ["missing.jsonl"]),
    ("--model {root}/no_tokenizer", ["no_tokenizer", "tokenizer"]),
    ("--model {root}/plain", ["plain", "config.json"]),
    ("--model {root}/nowhere", ["nowhere"]),
    ("--optim adamw8bit", ["adamw8bit", "CUDA"]),
    ("--out {root}/run", ["{root}/run", "--resume", "--overwrite"]),
    ("--out {root}/file", ["{root}/file", "folder"]),
    ("--resume --out {root}/plain", ["{root}/plain", "--resume"]),
    ("--resume --out {root}/bare --budgets fixed:8", ["{root}/bare", "checkpoint"]),
    ("--resume --out {root}/torn --budgets fixed:8 --steps 2", ["checkpoint-1", "damaged"]),
]


@pytest.mark.parametrize("flags, words", TRAIN, ids=[flags for flags, _ in TRAIN])
def test_train(world, flags, words, capsys, tmp_path):
    base = [
        "--model",
        world["tiny"],
        "--data",
        MATH,
        "--budgets",
        "fixed:8",
        "--out",
        str(tmp_path / "out"),
        *HF,
    ]
    assert train_grpo.main(base + flags.format(**world).split()) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("train_grpo.py: error: ")
    assert all(word.format(**world) in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_rows_without_budgets(world, capsys, tmp_path):
    for flags, words in [([], ["--budgets"]), (["--reward", "lcpo_max"], ["--budgets"])]:
        assert (
            train_grpo.main(["--model", world["tiny"], "--data", MATH, "--out", str(tmp_path / "o"), *flags])
            == 2
        )
        assert all(word in capsys.readouterr().err for word in words)


def test_data_without_a_model(capsys, tmp_path):
    assert train_grpo.main(["--data", MATH, "--out", str(tmp_path / "o")]) == 2
    assert "--model" in capsys.readouterr().err


def test_batch_not_divisible_by_processes(world, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = [
        "--model",
        world["tiny"],
        "--data",
        MATH,
        "--prompts-per-step",
        "12",
        "--out",
        str(tmp_path / "o"),
    ]
    assert train_grpo.main(flags) == 2
    message = capsys.readouterr().err
    assert "--prompts-per-step (12)" in message and "use 8 or 16" in message


@pytest.mark.parametrize("name", ["train_grpo.py", "evaluate.py", "data.py"])
def test_unknown_flag_is_refused_and_help_is_fast(script, name):
    needed = {"data.py": ["in.jsonl", "--out", "out.jsonl"], "evaluate.py": ["--out", "out"]}.get(name, [])
    unknown = script(name, *needed, "--stepz", "5", check=False, timeout=20)
    assert unknown.returncode == 2 and "--stepz" in unknown.stderr and len(unknown.stderr.splitlines()) == 1
    shown = script("-X", "importtime", name, "--help", timeout=20)
    assert "usage" in shown.stdout
    heavy = ("torch", "transformers", "datasets", "vllm", "matplotlib", "sympy", "math_verify", "accelerate")
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines() if "|" in line}
    assert not imported & set(heavy)


def test_real_command_lines_exit_with_2_and_one_line(script, world):
    for words in (
        ["train_grpo.py", "--model", world["tiny"], "--data", "nowhere.jsonl"],
        ["evaluate.py", "--samples", "nowhere.jsonl", "--out", "/tmp/none"],
        ["data.py", "nowhere.jsonl", "--budgets", "fixed:8", "--mode", "exact", "--out", "/tmp/none.jsonl"],
    ):
        done = script(*words, check=False, timeout=60)
        assert done.returncode == 2 and "nowhere.jsonl" in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not os.path.exists("/tmp/none")


def test_every_script_has_the_same_kind_of_error():
    assert train_grpo.BadInput is data.BadInput is evaluate.BadInput


def test_a_recipe_with_an_open_quotation(world, capsys, tmp_path):
    (tmp_path / "bad.args").write_text('--reward-args "alpha=1\n')
    assert train_grpo.main(["@" + str(tmp_path / "bad.args")]) == 2
    assert "quotation" in capsys.readouterr().err


def test_overwrite_never_deletes_what_the_run_needs(world, capsys):
    checkpoint = os.path.join(world["root"], "run", "checkpoint-1")
    flags = ["--data", MATH, "--budgets", "fixed:8", "--out", os.path.join(world["root"], "run"), *HF]
    assert train_grpo.main(["--model", checkpoint, *flags, "--overwrite"]) == 2
    assert "would delete" in capsys.readouterr().err
    assert train_grpo.main(["--model", world["tiny"], *flags, "--overwrite", "--resume"]) == 2
    assert "choose one" in capsys.readouterr().err and os.path.exists(checkpoint)


def test_torn_weights_on_resume(world, capsys, tmp_path):
    shutil.copytree(os.path.join(world["root"], "run"), tmp_path / "run")
    with open(tmp_path / "run" / "checkpoint-1" / "model.safetensors", "r+b") as f:
        f.truncate(2000)
    assert train_grpo.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"]) == 2
    assert "checkpoint-1" in capsys.readouterr().err


NOT_NUMBERS = ["nan", "inf", "-inf", "-1", "1e400", "x", "", "1,5"]
NUMERIC = [a.option_strings[0] for a in train_grpo.build_parser()._actions if a.type in (int, float)]


@pytest.mark.parametrize("flag", NUMERIC)
def test_numbers_that_are_none(flag, world, capsys, tmp_path):
    """Every flag of the trainer that takes a number, with eight values that no flag takes."""
    base = [
        "--model",
        world["tiny"],
        "--data",
        MATH,
        "--budgets",
        "fixed:8",
        "--out",
        str(tmp_path / "o"),
        *HF,
    ]
    for value in NOT_NUMBERS:
        pair = [flag, "0.9", value.replace("-", "2")]  # two numbers; a word with a dash would be a flag
        values = pair if flag == "--betas" else [f"{flag}={value}"]
        assert train_grpo.main([*base, *values]) == 2, value
        message = capsys.readouterr().err
        assert flag in message and message.count("\n") == 1, message
    assert not (tmp_path / "o").exists()


OTHERS = {  # script: (flags of a command that would run, its flags with a number, more values they refuse)
    data: ("{math} --tokenizer {tiny} --out {out}.jsonl", "--copies --seed --limit --max-prompt-tokens", []),
    evaluate: (
        "--model {tiny} --data {math} --budgets 8 --out {out} --sampler hf",
        "--n --temperature --top-p --max-tokens --seed --limit --concurrency",
        ["-0.5"],
    ),
    baselines: (
        "sweep --model {tiny} --data {math} --budgets 8 --out {out}",
        "--n --temperature --top-p --max-tokens --answer-tokens --seed --limit",
        ["-0.5"],
    ),
}


@pytest.mark.parametrize("script", OTHERS, ids=lambda script: script.__name__)
def test_numbers_that_are_none_elsewhere(script, world, capsys, tmp_path):
    line, flags, more = OTHERS[script]
    base = line.format(**world, out=tmp_path / "o").split()
    for flag in flags.split():
        for value in NOT_NUMBERS + more:
            assert script.main([*base, f"{flag}={value}"]) == 2, (flag, value)
            message = capsys.readouterr().err
            assert flag in message and message.count("\n") == 1, message
    assert os.listdir(tmp_path) == []


LINES = [  # by the real command line, and before anything heavy is imported
    "train_grpo.py --steps x",
    "train_grpo.py --group-size 1",
    "train_grpo.py @nowhere.args",
    "train_grpo.py --out {root}/file",
    "train_grpo.py --out {root}/file/below",
    "train_grpo.py --out {root}/run",
    "train_grpo.py --resume --out {root}/plain",
    "train_grpo.py --model {root}/plain --data {math}",
    "train_grpo.py --reward nothing",
    "data.py {root}/broken.jsonl --out {root}/o.jsonl",
    "data.py {math} --budgets fixed:0 --out {root}/o.jsonl",
    "data.py {math} --out {math}/o.jsonl",
    "evaluate.py --model {tiny} --data {root}/empty.jsonl --budgets 8 --out {root}/o",
    "evaluate.py --samples {root}/broken.jsonl --out {root}/o",
    "-m evaluation.compare {root}/run {root}/plain --out {root}/o",
    "-m evaluation.baselines tops --samples {root}/broken.jsonl --out {root}/o.jsonl",
    "-m evaluation.baselines merge --base {root}/plain --tuned {tiny} --out {root}/o",
]


def test_real_command_lines(script, world):
    before = sorted(os.listdir(world["root"]))
    for line in LINES:
        done = script(*line.format(**world).split(), check=False, timeout=120)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, line + done.stderr
        assert ": error: " in done.stderr and done.stdout == "", line
    assert sorted(os.listdir(world["root"])) == before
