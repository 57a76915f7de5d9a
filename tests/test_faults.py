"""Things broken on purpose: kills, signals, full disks, dead processes, damaged files, numbers that fool."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_often
import psutil
import pytest
import torch
from conftest import ROOT, TOY, lines, timeless

import train_grpo
from data import BadInput
from methods import Method
from toy.hf_sampler import HFSampler


def equal(a, b):
    """Whether two trainer states are the same, tensor by tensor, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load_state(out, step):
    path = os.path.join(out, f"checkpoint-{step}", "trainer_state.pt")
    return torch.load(path, map_location="cpu", weights_only=True)


def same_run(a, b, step):
    """Weights, optimizer, memory and metrics of two runs after `step` steps are bit for bit the same."""
    one, two = (Path(out) / f"checkpoint-{step}" / "model.safetensors" for out in (a, b))
    assert one.read_bytes() == two.read_bytes()
    assert equal(load_state(a, step), load_state(b, step))
    assert [m["step"] for m in lines(b)] == list(range(step)) and timeless(a) == timeless(b)


# Resuming ---------------------------------------------------------------------------------------------------

MODES = {
    "hapo": "--method hapo --reward hapo_linear",
    "palu, dynamic sampling": "--method palu --reward palu --reward-args l_max=48 --dynamic-sampling reward",
    "curriculum": "--method curriculum --method-args start=40 period=2 --reward curriculum_band",
    "laser_d": "--method laser_d --method-args every=3 size=8 samples=2 low=8 step=8 --reward laser_d",
    "starting_model": "--method starting_model --method-args samples=2 --reward o1_pruner",
    "minibatches, cosine": "--minibatches 2 --lr-schedule cosine --kl-coef 0.01 --reward lcpo_exact",
}


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact(tmp_path, mode):
    """5 steps are 3, the end of everything in memory, and 2 more; memory, draws and optimizer included."""
    budgets = [] if mode.startswith(("hapo", "mini")) else ["--budgets", "none"]
    flags = [*TOY, "--advantage", "grpo", *MODES[mode].split(), *budgets, "--steps", "5", "--save-every", "3"]
    train_grpo.main([*flags, "--out", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-5")
    train_grpo.main(["--resume", "--out", str(tmp_path / "broken")])
    same_run(tmp_path / "whole", tmp_path / "broken", 5)
    remembered = load_state(tmp_path / "whole", 5)["method"]
    assert all(remembered.values()) and bool(remembered) == mode.startswith(
        ("hapo", "palu", "laser", "start")
    )


# Kills and signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_random_signals(tmp_path, name):
    """In CI 8 of kill -9 and 3 of the others, to forked processes that run main(); slow: fifty."""
    times = 8 if name == "SIGKILL" else 3
    kill_often.torment(str(tmp_path), getattr(signal, name), times, kill_often.Forked, steps=40, seed=1)
    kill_often.compare(str(tmp_path), kill_often.Forked, steps=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_fifty_random_signals(tmp_path, name):
    launch = kill_often.command if name == "SIGKILL" else kill_often.Forked
    records = kill_often.torment(str(tmp_path), getattr(signal, name), 50, launch, steps=320)
    kill_often.compare(str(tmp_path), launch, steps=320)
    print(kill_often.summary(records))


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_in_the_middle_of_a_step(tmp_path, capsys, monkeypatch, times):
    """The step is finished and saved, and the words say how to go on. Launchers may send a signal twice."""
    real, calls = HFSampler._generate, []

    def generate(self, *words):
        calls.append(1)
        for _ in range(times if len(calls) == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *words)

    monkeypatch.setattr(HFSampler, "_generate", generate)
    train_grpo.main([*TOY, "--steps", "5", "--save-every", "0", "--out", str(tmp_path / "run")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"stopped after step 2, which is saved; to go on: --resume --out {tmp_path}/run"
    assert train_grpo.checkpoints(tmp_path / "run") == [2] and len(lines(tmp_path / "run")) == 2
    train_grpo.main(["--resume", "--out", str(tmp_path / "run")])
    assert train_grpo.checkpoints(tmp_path / "run") == [2, 5] and len(lines(tmp_path / "run")) == 5


# Checkpoints and disks --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of 4 steps with checkpoints after 2 and 4."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train_grpo.main([*TOY, "--steps", "4", "--save-every", "2", "--out", str(out)])
    return out


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, ("touch /tmp/ran_by_a_checkpoint",)


DAMAGE = {
    "half of the weights": lambda folder: os.truncate(folder / "model.safetensors", 100_000),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half a trainer state": lambda folder: os.truncate(folder / "trainer_state.pt", 1000),
    "an empty trainer state": lambda folder: os.truncate(folder / "trainer_state.pt", 0),
    "code in place of it": lambda folder: (folder / "trainer_state.pt").write_bytes(pickle.dumps(Evil())),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped(finished, tmp_path, damage, capsys):
    out = tmp_path / "memory"  # a name that must not be taken for an error's
    shutil.copytree(finished, out)
    DAMAGE[damage](out / "checkpoint-4")
    args = train_grpo.parse_args(["--resume", "--out", str(out)])
    args.dtype = "float32"
    state, model = train_grpo.newest_checkpoint(args)
    assert state["step"] == 2 and model is not None
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "checkpoint-4 is damaged (" in told and told.endswith(": skipped\n")
    assert not os.path.exists("/tmp/ran_by_a_checkpoint")


def test_going_on_from_the_checkpoint_before(finished, tmp_path, capsys):
    """Its steps are taken again, and nothing differs in the end."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    DAMAGE["half of the weights"](out / "checkpoint-4")
    train_grpo.main(["--resume", "--out", str(out)])
    assert "checkpoint-4 is damaged" in capsys.readouterr().out
    same_run(finished, out, 4)


def test_no_whole_checkpoint_at_all(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for step in (2, 4):
        DAMAGE["no weights"](out / f"checkpoint-{step}")
    with pytest.raises(BadInput, match="checkpoint-2 is damaged.*start again with --overwrite") as error:
        train_grpo.main(["--resume", "--out", str(out)])
    assert "\n" not in str(error.value)
    assert len(lines(out)) == 4, "a run that cannot be resumed is left as it is"


def test_out_of_memory_is_no_damage(finished, tmp_path, monkeypatch):
    """What torch says when memory ends is its own, and the checkpoint is not skipped for an older one."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for place in ("torch.load", "scaling.model.load_model"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *words, **options: torch.empty(1 << 60))
            with pytest.raises(RuntimeError, match="allocate"):
                train_grpo.main(["--resume", "--out", str(out)])


def test_a_run_that_died_before_its_first_checkpoint_starts_again(finished, tmp_path):
    """In the middle of a line of its metrics, and while it saved."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for step in (2, 4):
        shutil.rmtree(out / f"checkpoint-{step}")
    told = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*told[:1], told[1][:50]]))
    (out / "checkpoint-2.tmp").mkdir()
    (out / "checkpoint-2.tmp" / "model.safetensors").write_text("half")
    train_grpo.main(["--resume", "--out", str(out)])
    same_run(finished, out, 4)
    assert not (out / "checkpoint-2.tmp").exists()


def test_metrics_after_the_checkpoint_are_dropped(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoint-4")
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "rew')
    args = train_grpo.parse_args(["--resume", "--out", str(out)])
    train_grpo.open_run(args, 2)
    assert [m["step"] for m in lines(out)] == [0, 1]


def test_the_two_newest_are_kept(tmp_path):
    train_grpo.main([*TOY, "--steps", "4", "--save-every", "1", "--out", str(tmp_path / "run")])
    assert train_grpo.checkpoints(tmp_path / "run") == [3, 4]
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".tmp")]


LITTLE_DISK = """
import resource, sys, train_grpo
real = train_grpo.save_checkpoint
def save(out, step, *words):
    if step == 4:  # enough for half of the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    real(out, step, *words)
train_grpo.save_checkpoint = save
train_grpo.main(sys.argv[1:])
"""


def test_a_disk_that_is_full_while_saving(finished, script, tmp_path):
    """The run ends with the library's own error; what was saved before is whole, and it goes on there."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    flags = [*TOY, "--steps", "4", "--save-every", "2", "--out", tmp_path / "run"]
    done = script("-c", LITTLE_DISK, *flags, check=False)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert train_grpo.checkpoints(tmp_path / "run") == [2] and len(lines(tmp_path / "run")) == 4
    train_grpo.main(["--resume", "--out", str(tmp_path / "run")])
    same_run(finished, tmp_path / "run", 4)


# Numbers ----------------------------------------------------------------------------------------------------


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path):
    flags = [*TOY, "--reward", "lcpo_exact", "--advantage", "grpo", "--reward-args", "alpha=1e308"]
    with pytest.raises(SystemExit, match=r"step 1, not finite: -inf, .*lower --lr"):
        train_grpo.main([*flags, "--steps", "2", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "metrics.jsonl").read_text() and not train_grpo.checkpoints(
        tmp_path / "run"
    )


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, what):
    """nan comes into the loss of step 2, or into its gradient alone; the checkpoint of step 2 stays good."""

    def poison(self, model, minibatch, add_logps):
        poison.calls += 1
        if poison.calls == 3 and what == "loss":
            minibatch[0]["advantage"] = float("nan")
        elif poison.calls == 3:
            model.get_input_embeddings().weight.register_hook(lambda g: g * float("inf"))

    poison.calls = 0
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Method, "before_update", poison)
        with pytest.raises(SystemExit, match=rf"step 3, not finite: .*'{what}': (nan|inf)"):
            train_grpo.main([*TOY, "--steps", "4", "--save-every", "1", "--out", out])
    assert train_grpo.checkpoints(out) == [1, 2] and [m["step"] for m in lines(out)] == [0, 1]
    train_grpo.main(["--resume", "--out", out])
    assert all(m["loss"] is not None and m["grad_norm"] >= 0 for m in lines(out)) and len(lines(out)) == 4


# Two processes ----------------------------------------------------------------------------------------------


def two(*words):
    """The command line that starts two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_grpo.py"]
    return [sys.executable, *launch, *map(str, words)]


def start_two(out, steps, *words):
    """The launcher of two processes, in the middle of a run: a checkpoint is there, and steps after it."""
    with open(f"{out}.log", "a") as log:
        launcher = subprocess.Popen(two(*words, "--out", out), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while kill_often.saved(out) < steps or kill_often.steps_taken(out) <= steps:
        assert launcher.poll() is None, Path(f"{out}.log").read_text()
        time.sleep(0.01)
    return launcher


def test_a_signal_and_a_death_among_two_processes(tmp_path):
    """SIGTERM: both stop after the same step, which is saved. kill -9 of one: the other ends within a minute.

    Gone on with by two processes each time, the run is the undisturbed one.
    """
    flags = [*TOY, "--method", "hapo", "--reward", "hapo_linear", "--advantage", "grpo"]
    flags += ["--dynamic-sampling", "reward", "--steps", "12", "--save-every", "2", "--micro-tokens", "128"]
    whole, out = str(tmp_path / "whole"), str(tmp_path / "run")
    subprocess.run(two(*flags, "--out", whole), cwd=ROOT, check=True, capture_output=True)
    launcher = start_two(out, 2, *flags)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=60)  # torchrun's own exit code is not 0 after a signal
    stopped = kill_often.steps_taken(out)
    assert f"stopped after step {stopped}, which is saved" in Path(f"{out}.log").read_text()
    assert kill_often.saved(out) == stopped < 12
    launcher = start_two(out, stopped, "--resume")
    workers = {child.environ().get("RANK"): child for child in psutil.Process(launcher.pid).children()}
    workers["1"].kill()
    began = time.monotonic()
    assert launcher.wait(timeout=60) != 0 and time.monotonic() - began < 60
    assert not any(worker.is_running() for worker in workers.values())
    assert kill_often.steps_taken(out) - kill_often.saved(out) <= 2
    subprocess.run(two("--resume", "--out", out), cwd=ROOT, check=True, capture_output=True)
    same_run(whole, out, 12)


ONE_SIDED = """
import os, sys, torch
sys.path.insert(0, os.getcwd())
import train_grpo
real, found = torch.load, train_grpo.newest_checkpoint
def load(path, **options):
    if "checkpoint-4" in str(path) and os.environ["RANK"] == "1":
        raise OSError("a disk that only this process has")
    return real(path, **options)
def newest(args):
    state, model = found(args)
    os.write(1, f"rank {train_grpo.RANK}: step {state['step']}, {model.device.type}\\n".encode())
    return state, model
torch.load, train_grpo.newest_checkpoint = load, newest
train_grpo.main(sys.argv[1:])
"""


@pytest.mark.parametrize("shards", [False, True])
def test_what_is_damaged_for_one_process_is_so_for_all(finished, tmp_path, shards):
    """Or they would train from different steps. Of shards the first process alone reads the weights."""
    out, script = tmp_path / "run", tmp_path / "one_sided.py"
    if shards:
        flags = [*TOY, "--fsdp", "--steps", "4", "--save-every", "2", "--out", out]
        subprocess.run(two(*flags), cwd=ROOT, check=True, capture_output=True)
    else:
        shutil.copytree(finished, out)
    script.write_text(ONE_SIDED)
    words = [str(script) if word == "train_grpo.py" else word for word in two("--resume", "--out", out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checkpoint-4 is damaged (OSError('a disk that only this process has'))") == 1
    assert "rank 0: step 2, cpu" in done.stdout
    assert f"rank 1: step 2, {'meta' if shards else 'cpu'}" in done.stdout
    assert [m["step"] for m in lines(out)] == [0, 1, 2, 3]


def test_args_json_is_there_as_a_whole_or_not_at_all(finished, tmp_path, monkeypatch):
    """A kill between the first and the last byte of it must not make the run one that cannot be resumed."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = (out / "args.json").read_text()

    def die(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        train_grpo.main(["--resume", "--steps", "6", "--out", str(out)])
    assert (out / "args.json").read_text() == before and json.loads(before)["steps"] == 4


def test_overwrite_behind_a_link(tmp_path):
    """A run's folder may be a link to a larger disk: what it points to is deleted and made anew."""
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    words = [*TOY, "--steps", "1", "--out", str(tmp_path / "link")]
    train_grpo.main(words)
    (tmp_path / "disk" / "old").write_text("")
    train_grpo.main([*words, "--overwrite"])
    assert "old" not in os.listdir(tmp_path / "disk") and len(lines(tmp_path / "link")) == 1
