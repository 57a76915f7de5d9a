"""What can go wrong in a run of days, and what is said about it: signals, dead engines, numbers that fool.

with signals(): ...            SIGTERM and SIGINT become a clean end of the run
explain(error)                 a failure of memory, engine or network -> one line with the flag to change
check_finite(...)              nan and inf stop the run, the batch that caused them is kept
watch(...)                     warnings in words about runs that only look healthy
"""

import contextlib
import gzip
import json
import os
import re
import shlex
import signal
import time
import traceback
from collections.abc import Iterator

import numpy as np

from data import first_line

# ------------------------------------------------------------------------------------------------------------
# Signals. Schedulers send SIGTERM some 30 seconds before they kill: less than a step of a big run takes. So
# sampling, which changes nothing that is kept, is broken off and its step dropped; an update is finished.


class Stopped(BaseException):  # as KeyboardInterrupt: no library's `except Exception` may swallow it
    """A signal asked for the end of the run while a step was sampled: the step counts as not begun."""


ASKED = {"signal": 0, "when": 0.0, "at_once": False}


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """From here on SIGTERM and SIGINT only ask for an end; a second Ctrl-C, a second later, forces it."""

    def ask(number, frame):
        if number == signal.SIGINT and ASKED["signal"] and time.monotonic() - ASKED["when"] > 1:
            raise KeyboardInterrupt
        # Launchers pass on what the terminal has sent already: the same signal may come twice.
        if not ASKED["signal"]:
            ASKED.update(signal=number, when=time.monotonic())
        if ASKED["at_once"]:
            ASKED["at_once"] = False
            raise Stopped

    ASKED.update(signal=0, at_once=False)
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """What runs in here is broken off by a signal, with Stopped; one that came before is heeded first."""
    ASKED["at_once"] = True
    try:
        if ASKED["signal"]:
            raise Stopped
        yield
    finally:
        ASKED["at_once"] = False


def resume_command(args, state) -> str:
    """What to type after a clean end."""
    launcher = "the same launcher with " if state.num_processes > 1 else ""
    return f"{launcher}python train_grpo.py --resume --out {shlex.quote(args.out)}"


# ------------------------------------------------------------------------------------------------------------
# Errors that are nobody's typing mistake


def explain(error: BaseException, args) -> str | None:
    """One line: what broke and which flag to change; None for an error that is not known (a bug: show it)."""
    text = f"{type(error).__name__}: {first_line(error)[:300]}"
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    sampling = any(os.path.basename(file) == "sampler.py" for file in files)
    resume = f"then go on with --resume --out {args.out}"
    if re.search("out of memory|can't allocate memory|Cannot allocate memory", str(error), re.I):
        if sampling:
            return (
                f"out of memory while sampling ({text}): lower --max-tokens or --prompts-per-step; with vLLM "
                f"change --vllm-memory ({args.vllm_memory:g}), its share of the GPU; {resume}"
            )
        return (
            f"out of memory in the update ({text}): lower --micro-tokens ({args.micro_tokens}), e.g. to "
            f"{max(1, args.micro_tokens // 2)}, or give --gradient-checkpointing; lower --vllm-memory "
            f"({args.vllm_memory:g}) if the engine holds the rest; {resume}"
        )
    if re.search("KV cache|cache blocks|gpu_memory_utilization|Free memory on device", str(error)):
        return (
            f"vLLM finds no room for its cache ({text}): raise --vllm-memory ({args.vllm_memory:g}), or "
            f"lower it if another process holds the GPU; or lower --max-tokens ({args.max_tokens})"
        )
    if re.search("Connection (closed|reset)|nccl(Remote|System)Error|Broken pipe|timeout.*rank", str(error)):
        return f"another process of this run has ended or hangs ({text}); its own message says why; {resume}"
    if "probability tensor contains" in str(error):
        return (
            f"the model's probabilities are not finite any more: an update went too far; {resume}, with a "
            f"lower --lr ({args.lr:g}) or --grad-clip ({args.grad_clip:g})"
        )
    if isinstance(error, OSError):
        return f"a file could not be read or written ({text}): {resume}"
    if sampling and any(f"{os.sep}vllm{os.sep}" in file for file in files):
        return f"the vLLM engine failed ({text}): {resume}, with --sampler hf if it fails again"
    return None


# ------------------------------------------------------------------------------------------------------------
# Numbers


def check_finite(step: int, numbers: dict, batch: list[dict], out: str | None) -> None:
    """Ends the run if any of the named numbers is nan or infinite; the responses go to OUT/bad-batch-STEP.

    Skipping such a step would hide its cause: after the first nan in the weights all later ones are lost.
    """
    bad = [name for name, value in numbers.items() if not np.isfinite(value).all()]
    if not bad:
        return
    path = os.path.join(out or "", f"bad-batch-{step + 1}.jsonl.gz")
    try:
        if out:  # one process writes
            with gzip.open(path, "wt", encoding="utf-8") as f:
                f.writelines(json.dumps(r, default=plain) + "\n" for r in batch)
        where = f"the {len(batch)} responses of the step are in {path}"
    except OSError as error:
        where = f"the responses could not be kept: {path}: {error.strerror}"
    shown = {name: float(value) for name, value in numbers.items() if np.ndim(value) == 0}
    raise SystemExit(
        f"train_grpo.py: error: step {step + 1}: {' and '.join(bad)} not finite {shown or ''}: {where}. The "
        f"last checkpoint is untouched: --resume goes on from it; usual ways out: a lower --lr or --grad-clip"
    )


def plain(x: object) -> list | float:
    """A numpy number or array, a set or a range as JSON has it."""
    return x.tolist() if hasattr(x, "tolist") else list(x)


REPEAT = 100  # steps before the same warning is given again
SLOW = 0.9  # factor of the running means


def watch(m: dict, counts: dict, groups: list, tokenizer, args, memory: dict, gap_limit: float) -> list[str]:
    """Warnings in words about a step with the metrics `m`, each at most once in REPEAT steps.

    memory["watch"] keeps the running means: "reward" is also what says which checkpoint is the best.
    """
    w = memory.setdefault("watch", {"steps": 0, "constant": 0, "best": 0.0, "told": {}})
    accuracy, same = m.get("sampled_accuracy", m["accuracy"]), abs(w.get("last", np.inf) - m["reward"]) < 1e-9
    w |= {"steps": w["steps"] + 1, "last": float(m["reward"]), "constant": w["constant"] + 1 if same else 0}
    for name, value in (("reward", m["reward"]), ("accuracy", accuracy)):
        w[name] = float(SLOW * w.get(name, value) + (1 - SLOW) * value)
    if w["steps"] >= 20:  # before, a lucky step would be the best for ever
        w["best"] = max(w["best"], w["accuracy"])
    found = (
        ("truncated", m["truncated"] > 0.9,
         f"{m['truncated']:.0%} of the responses were cut off at --max-tokens ({args.max_tokens}) and count "
         "as wrong: raise it, or ask for smaller budgets"),
        ("variance", m["zero_variance"] == 1,
         "in no group did the rewards differ, so this step taught nothing: the problems may be too hard "
         "or too easy (--dynamic-sampling replaces such groups), or --group-size too small"),
        ("constant", w["constant"] >= 19,
         f"the mean reward has been {m['reward']:.4g} for {w['constant'] + 1} steps: nothing is learned"),
        ("unread", *unread(m, counts, groups, tokenizer, args)),
        ("collapse", w["accuracy"] < w["best"] / 2 and w["best"] > 0.1,
         f"accuracy fell to {w['accuracy']:.2f}, below half of its best ({w['best']:.2f}; running means): go "
         "back to an earlier checkpoint with a lower --lr, or look at what the reward pays for"),
        ("gap", not m["logp_gap"] <= gap_limit,
         f"log-probs of sampler and trainer differ by {m['logp_gap']:.2g} nats a token (limit {gap_limit:g}):"
         " they are not the same policy; check --dtype; --check-sync 1 compares the weights every step"),
    )  # fmt: skip
    due = {k: text for k, bad, text in found if bad and m["step"] - w["told"].get(k, -REPEAT) >= REPEAT}
    w["told"] |= dict.fromkeys(due, m["step"])
    return [f"warning: step {m['step'] + 1}: {text}" for text in due.values()]


def unread(m: dict, counts: dict, groups: list, tokenizer, args) -> tuple[bool, str]:
    """(whether no answer of the step could be read, the warning with three examples and a likely cause)."""
    texts = [r["text"] for group in groups for r in group if not r["truncated"]]
    unclosed = args.require_think and not any("</think>" in text for text in texts)
    bad = bool(texts) and (unclosed or counts["parse_failures"] == sum(counts.values()))
    if m["truncated"] > 0.5:
        cause = f"--max-tokens ({args.max_tokens}) is too small, most responses do not get to their answer"
    elif not getattr(tokenizer, "chat_template", None):
        cause = "the tokenizer has no chat template, so the model does not see a question to be answered"
    elif unclosed:
        cause = "no response holds </think>, which --require-think wants: does the model think?"
    elif not any("\\boxed" in text for text in texts):
        cause = "no response holds \\boxed{}: the prompt must ask for it (--wording), the model know it"
    else:
        cause = "see the examples"
    examples = "".join(f"\n    ... {text[-160:]!r}" for text in texts[:3])
    return bad, f"no answer could be read. Likely cause: {cause}. Ends of responses:{examples}"
