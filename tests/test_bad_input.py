"""A user's mistakes: one line with the value, the rule and the way out, exit code 2, nothing touched."""

import json
import os
import shutil

import pytest
from conftest import FREEZE, ROOT, TOY

import data
import evaluate
import train_grpo
from data import BadInput
from evaluation import baselines

MATH = os.path.join(ROOT, "tests", "data", "math_train_small.jsonl.gz")
MODEL = os.path.join(FREEZE, "model")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Paths that the cases name: good and broken files, models and runs."""
    root = tmp_path_factory.mktemp("world")
    (root / "empty.jsonl").write_text("")
    (root / "columns.jsonl").write_text(json.dumps({"foo": 1, "bar": 2}) + "\n")
    (root / "answers.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": None}) + "\n")
    (root / "broken.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": \n')
    (root / "long.jsonl").write_text(json.dumps({"problem": "1 " * 600, "answer": "1"}) + "\n")
    (root / "rows.txt").write_text("1 + 1 = 2")
    (root / "file").write_text("not a folder")
    (root / "quote.args").write_text('--reward-args "alpha=1\n')
    (root / "plain").mkdir()
    (root / "no_tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(os.path.join(MODEL, name), root / "no_tokenizer" / name)
    train_grpo.main([*TOY, "--steps", "1", "--out", str(root / "run")])
    shutil.copytree(root / "run", root / "torn")
    os.truncate(root / "torn" / "checkpoint-1" / "trainer_state.pt", 1000)
    shutil.copytree(root / "run", root / "half_args")
    (root / "half_args" / "args.json").write_text('{"model": "x", ')
    return {"root": str(root), "math": MATH, "model": MODEL}


# (flags after those of TOY, what the message must name)
TRAIN = [
    # data and model
    ("--data {root}/missing.jsonl", ["missing.jsonl"]),
    ("--data {root}/columns.jsonl", ["columns.jsonl", "foo", "problem"]),
    ("--data {root}/empty.jsonl", ["empty.jsonl"]),
    ("--data {root}/answers.jsonl", ["answers.jsonl", "answer"]),
    ("--data {root}/broken.jsonl", ["broken.jsonl", "line 2"]),
    ("--data {root}/rows.txt", ["rows.txt", ".jsonl"]),
    ("--data {root}/long.jsonl", ["--max-tokens (48)", "longest prompt", "512", "--max-prompt-tokens"]),
    ("--model {root}/no_tokenizer", ["no_tokenizer", "tokenizer"]),
    ("--model {root}/plain", ["plain"]),
    ("--model {root}/nowhere", ["nowhere"]),
    ("--budgets uniform:100", ["uniform:100"]),
    ("--budgets uniform:400:100", ["400", "100"]),
    ("--budgets bucket:8,x", ["bucket:8,x"]),
    ("--budgets fixed:49", ["49", "--max-tokens (48)"]),
    ("--budgets none", ["--reward peaked_exact", "--budgets"]),
    ("--mode hardly", ["hardly", "exact"]),
    # reward, advantage, method
    ("--reward lcpo_exakt", ["lcpo_exakt", "did you mean lcpo_exact?"]),
    ("--reward lcpo_exact --advantage grpo --reward-args gamma=1", ["gamma=1", "alpha"]),
    ("--reward-args alpha", ["alpha", "K=V"]),
    ("--advantage grop", ["grop", "did you mean grpo?"]),
    ("--method hapoo", ["hapoo", "hapo"]),
    ("--method hapo --method-args history=max", ["history=max", "mean"]),
    ("--method hapo --method-args memory=1", ["memory=1", "history"]),
    ("--reward hapo_cosine --advantage grpo", ["history", "--method hapo"]),
    ("--reward palu --advantage grpo", ["target", "--method palu"]),
    ("--reward o1_pruner --advantage grpo", ["ref_", "starting_model"]),
    ("--reward crf --advantage grpo --method crf", ["model"]),
    ("--reward laser_d --advantage grpo", ["laser_d", "--method laser_d", "--reward-args targets="]),
    ("--reward dot_threshold --advantage grpo", ["dot_threshold", "lcpo_exact"]),
    ("--tis-mode sequences", ["sequences", "did you mean sequence?"]),
    ("--tis-mode token_mask --tis-cap 1", ["--tis-cap (1.0)", "exceed 1"]),
    ("--method laser_d", ["laser_d", "--reward"]),
    ("--method drpo", ["drpo", "--tis-cap 0"]),
    ("--method dot --method-args a=5", ["dot", "a=5", "--group-size"]),
    ("--method adaptthink --method-args think_word=Alrighty", ["Alrighty", "one token"]),
    ("--method adaptthink --group-size 5", ["--group-size (5)", "even"]),
    # sizes and rates
    ("--group-size 1", ["--group-size (1)", "2"]),
    ("--prompts-per-step 0", ["--prompts-per-step (0)"]),
    ("--minibatches 200", ["--minibatches (200)", "--prompts-per-step (4)"]),
    ("--max-tokens 600 --budgets fixed:9", ["--max-tokens (600)", "512"]),
    ("--steps 0", ["--steps (0)"]),
    ("--lr -1", ["--lr", "-1"]),
    ("--lr 0", ["--lr (0.0)", "more than 0"]),
    ("--temperature 0", ["--temperature (0.0)"]),
    ("--weight-decay -1", ["--weight-decay"]),
    ("--clip-low nan", ["--clip-low (nan)"]),
    ("--vllm-memory 1.5", ["--vllm-memory (1.5)", "between 0 and 1"]),
    ("--dual-clip 0.5", ["--dual-clip (0.5)", "exceed 1"]),
    ("--dual-clip 3 --ratio cispo", ["--dual-clip (3.0)", "cispo"]),
    ("--kl-coef 0.1 --kl-estimator k1", ["k1", "k3"]),
    ("--fsdp", ["--fsdp", "torchrun"]),
    ("--steps", ["--steps"]),
    ("--steps many", ["--steps", "many"]),
    ("--stepz 5", ["--stepz", "did you mean --steps?"]),
    ("--nothing-like-it", ["--nothing-like-it (python"]),
    ("--lr steps", ["invalid float value: 'steps' (python"]),
    # evaluation
    ("--eval-every 5", ["--eval-every", "--eval-data"]),
    ("--eval-data {root}/missing.jsonl --eval-every 1", ["missing.jsonl"]),
    ("--eval-data {math} --eval-every 1 --eval-budgets 512,0", ["--eval-budgets", "512,0"]),
    ("--eval-data {math} --eval-every 1 --eval-budgets x", ["--eval-budgets", "x"]),
    ("--eval-data {math} --eval-every 1 --eval-budgets 9000", ["9000", "512"]),
    # runs
    ("--out {root}/run", ["{root}/run", "--resume", "--overwrite"]),
    ("--out {root}/file", ["{root}/file", "cannot be written"]),
    ("--out {root}/file/below", ["{root}/file", "cannot be written"]),
    ("--resume --overwrite --out {root}/run", ["--resume", "--overwrite", "choose one"]),
    ("--resume --out {root}/plain", ["{root}/plain", "--resume"]),
    ("--resume --out {root}/half_args", ["{root}/half_args", "--resume"]),
    ("--resume --out {root}/torn", ["checkpoint-1", "damaged", "--overwrite"]),
    ("--model {root}/run/checkpoint-1 --out {root}/run --overwrite", ["would delete", "checkpoint-1"]),
    ("--model {root}/run/checkpoint-1 --out {root}/run/checkpoint-1 --overwrite", ["would delete"]),
    ("--eval-data {math},{root}/run/args.json --out {root}/run --overwrite", ["would delete", "args.json"]),
    ("--out .. --overwrite", ["would delete", "'.'"]),
    ("@{root}/nowhere.args", ["nowhere.args"]),
    ("@{root}/quote.args", ["quot"]),
]


@pytest.mark.parametrize("flags, words", TRAIN, ids=[flags for flags, _ in TRAIN])
def test_train(world, flags, words, tmp_path):
    before = sorted(os.walk(world["root"]))
    with pytest.raises(BadInput) as error:
        train_grpo.main([*TOY, "--out", str(tmp_path / "out"), *flags.format(**world).split()])
    message = str(error.value)
    assert "\n" not in message and all(word.format(**world) in message for word in words), message
    assert os.listdir(tmp_path) == [] and sorted(os.walk(world["root"])) == before


def test_there_are_sixty_of_them():
    assert len(TRAIN) >= 60


@pytest.mark.parametrize("flags, words", [(["--data", MATH], "--model"), (["--model", MODEL], "--data")])
def test_half_of_what_a_run_needs(flags, words, tmp_path):
    with pytest.raises(BadInput, match=f"{words} is missing"):
        train_grpo.main([*flags, "--out", str(tmp_path / "out")])


def test_a_batch_that_processes_cannot_share(monkeypatch, tmp_path):
    monkeypatch.setattr(train_grpo, "WORLD", 8)
    with pytest.raises(BadInput, match=r"--prompts-per-step \(12\) must be a multiple of the 8 processes"):
        train_grpo.parse_args([*TOY, "--prompts-per-step", "12", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "flags, name",
    [("--optim adamw8bit", "bitsandbytes"), ("--lora 4", "peft"), ("--log-with wandb", "wandb")],
)
def test_a_package_that_is_not_there(flags, name, monkeypatch, tmp_path):
    real = train_grpo.importlib.util.find_spec
    monkeypatch.setattr(
        train_grpo.importlib.util, "find_spec", lambda asked: None if asked == name else real(asked)
    )
    with pytest.raises(BadInput, match=f"not installed: pip install {name}"):
        train_grpo.main([*TOY, *flags.split(), "--out", str(tmp_path / "out")])
    assert os.listdir(tmp_path) == []


NOT_NUMBERS = ["nan", "inf", "-inf", "-1", "1e400", "x", "", "1,5"]
NUMERIC = [a.option_strings[0] for a in train_grpo.build_parser()._actions if a.type in (int, float)]


@pytest.mark.parametrize("flag", NUMERIC)
def test_numbers_that_are_none(flag, tmp_path):
    """Every flag of the trainer that takes a number, with eight values that no flag takes."""
    for value in NOT_NUMBERS:
        with pytest.raises(BadInput) as error:
            train_grpo.parse_args([*TOY, "--out", str(tmp_path / "out"), f"{flag}={value}"])
        assert flag in str(error.value) and "\n" not in str(error.value)


OTHERS = {  # script: (flags of a command that would run, its flags with a number, more values they refuse)
    data: ("{math} --tokenizer {model} --out {out}.jsonl", "--copies --seed --limit --max-prompt-tokens", []),
    evaluate: (
        "--model {model} --data {math} --budgets 8 --out {out} --sampler hf",
        "--n --temperature --top-p --max-tokens --seed --limit",
        ["-0.5"],
    ),
    baselines: (
        "sweep --model {model} --data {math} --budgets 8 --out {out}",
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


LINES = [  # by the real command line
    "train_grpo.py --steps x",
    "train_grpo.py --model {model} --data {root}/broken.jsonl --out {root}/o",
    "train_grpo.py --resume --out {root}/torn",
    "data.py {root}/broken.jsonl --out {root}/o.jsonl",
    "data.py {math} --budgets fixed:0 --out {root}/o.jsonl",
    "evaluate.py --model {model} --data {root}/empty.jsonl --budgets 8 --out {root}/o",
    "evaluate.py --samples {root}/broken.jsonl --out {root}/o",
    # No place for files: told before a model is loaded.
    "evaluate.py --model {model} --data toy --budgets 8 --out {root}/file/o",
    "-m evaluation.baselines sweep --model {model} --data toy --budgets 8 --out {root}/file/o",
    "-m evaluation.compare {root}/run {root}/plain --out {root}/file/o",
    "-m evaluation.compare {root}/run {root}/plain --out {root}/o",
    "-m evaluation.baselines tops --samples {root}/broken.jsonl --out {root}/o.jsonl",
    "-m evaluation.baselines merge --base {root}/plain --tuned {model} --out {root}/o",
]


@pytest.mark.parametrize("line", LINES)
def test_real_command_lines(script, world, line):
    before = sorted(os.listdir(world["root"]))
    done = script(*line.format(**world).split(), check=False, timeout=120)
    assert done.returncode == 2 and ": error: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    told = done.stdout + done.stderr  # a damaged checkpoint is told where it is skipped
    assert told.count("\n") == 1 + ("torn" in line), told
    assert sorted(os.listdir(world["root"])) == before


@pytest.mark.parametrize("name", ["evaluate.py", "data.py"])
def test_unknown_flag_is_refused_and_help_is_fast(script, name):
    needed = {"data.py": ["in.jsonl", "--out", "out.jsonl"], "evaluate.py": ["--out", "out"]}[name]
    lacking = script(name, *needed[:-2], check=False, timeout=60)
    assert lacking.returncode == 2 and "required: --out (python" in lacking.stderr
    unknown = script(name, *needed, "--stepz", "5", check=False, timeout=60)
    assert unknown.returncode == 2 and "--stepz" in unknown.stderr and len(unknown.stderr.splitlines()) == 1
    shown = script("-X", "importtime", name, "--help", timeout=60)
    assert "usage" in shown.stdout
    heavy = ("torch", "transformers", "datasets", "vllm", "matplotlib", "sympy", "math_verify", "accelerate")
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines() if "|" in line}
    assert not imported & set(heavy)
