"""What papers do besides their reward: a file each, `--method NAME`. Each overrides what it needs of Method.

The hooks stand in the order in which a step of train_grpo.py calls them. hapo.py (a memory) is a good first
one to read, then dot.py (edits responses), adaptthink.py (forces tokens), drpo.py (another objective). Two
papers at once are a subclass: see docs/guide.md.
"""

import difflib
import importlib
import inspect
import json
import os

import numpy as np

from data import BadInput, encode_prompt
from rewards import DERIVED


def prompt_ids(tokenizer, row, added=""):
    """Token ids of a row's prompt, with what a method adds to it."""
    return encode_prompt(tokenizer, row["prompt"] + added, row.get("turns"))


def request(ids, n, cap, forced=(), **tags):
    """n responses to a prompt, of `cap` tokens at most; `forced` begin each, with a loss; `tags`: notes."""
    return {"prompt_ids": ids, "n": n, "cap": cap, "forced": list(forced), "tags": tags}


def end_of(ids, words):
    """Number of tokens in a list up to the end of the first `words` in it; None where there are none."""
    n = len(words)
    return next((t for t in range(n, len(ids) + 1) if ids[t - n : t] == words), None)


def extend(r, ids, logps=None):
    """Response r goes on with these tokens. Without log-probs they are forced, and have no loss."""
    if logps is None or "mask" in r:
        mask = r.get("mask", np.ones(len(r["ids"]), np.float32))
        r["mask"] = np.append(mask, np.full(len(ids), logps is not None, np.float32))
    logps = np.full(len(ids), np.nan, np.float32) if logps is None else logps
    r |= {"ids": np.append(r["ids"], np.array(ids, np.int32)), "logps": np.append(r["logps"], logps)}


def go_on(responses, sampler, args, seed, n=1):
    """n continuations of each response, of r["room"] tokens at most."""
    prompts = [r["prompt_ids"] + r["ids"].tolist() for r in responses]
    return sampler.generate(prompts, n, [r["room"] for r in responses], args.temperature, seed + 1)


class Method:
    """Plain GRPO: every hook does nothing."""

    provides = ()  # fields of the rollouts that rewards may read: noted on the responses, or reward_inputs()
    moves = {}  # {reward: the constant of it that stands still without this method}
    asks_starting_model = False  # a copy of it is kept, for begin_step's ask(..., starting=True)

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer = args, tokenizer
        self.state = {}  # plain numbers, saved with checkpoints

    def row(self, row, step):
        """The row as it is asked at this step (curricula change its budget). Called before the run, too."""
        return row

    def begin_step(self, step, turn, rows, all_rows, ask):
        """Before sampling; `turn` counts its refills. ask(rows, n, key, starting) samples and checks."""

    def requests(self, row):
        """The requests that make up a row's group, each for equally many responses."""
        return [request(prompt_ids(self.tokenizer, row), self.args.group_size, self.args.max_tokens)]

    def complete(self, groups, sampler, seed):
        """After sampling, before the check: responses that go on."""

    def revise(self, groups, rows):
        """After the check: responses that are cut, checked again or scored by a model."""

    def reward_inputs(self, groups, rows, step):
        """Fields for the reward besides lengths and verdicts, [P] or [P, G]; "constants" override its own."""
        return {name: np.array([[r[name] for r in group] for group in groups]) for name in self.provides}

    def learn(self, groups, rows):
        """After the rewards: what the next step remembers of all that was sampled."""

    def before_update(self, model, minibatch, add_logps):
        """Before an optimizer step: other advantages, weights or old log-probs for the responses.

        add_logps(model, minibatch, name) gives r[name] [L] to those of them that are this process's share.
        """

    def metrics(self, groups, rollouts, reward):
        """Numbers of its own for metrics.jsonl."""
        return {name: rollouts[name].mean() for name in self.provides}


def names():
    files = (f[:-3] for f in os.listdir(os.path.dirname(__file__)) if f.endswith(".py"))
    return sorted(f for f in files if not f.startswith("_"))


def find(name):
    """The class of --method NAME: the last Method that methods/NAME.py defines, or one that it imports."""
    if name == "plain":
        return Method
    path = f"methods.{name}"
    found = vars(importlib.import_module(path)).values()
    found = [c for c in found if isinstance(c, type) and issubclass(c, Method) and c is not Method]
    if not found:
        raise BadInput(f"methods/{name}.py defines no Method: see methods/hapo.py")
    return sorted(found, key=lambda c: c.__module__ == path)[-1]


KNOWN = {"budget", "mode", "step", "range", *DERIVED}  # what a reward can read without a method


def make(args, tokenizer, *readers):
    """The method that --method names. `readers`, reward and advantage, declare the fields that they read."""
    method = find(args.method)
    for field in sorted({field for f in readers for field in f.needs} - KNOWN):
        if field not in method.provides:
            having = [name for name in names() if field in find(name).provides]
            raise BadInput(f"--reward and --advantage read {field!r}: give --method {' or '.join(having)}")
    for name in names():
        constant = find(name).moves.get(args.reward)
        if constant and args.reward not in method.moves and constant not in args.reward_args:
            raise BadInput(f"--reward {args.reward} stands still without --method {name}, which moves its "
                           f"{constant}: give it, or mean it by --reward-args {constant}=...")  # fmt: skip
    return method(args, tokenizer, **args.method_args)


def constants(name, function, words):
    """["alpha=0.1", "metric=shortest"] -> {"alpha": 0.1, "metric": "shortest"}, parameters of `function`."""
    known, found, empty = inspect.signature(function).parameters, {}, inspect.Parameter.empty
    having = [k for k in known if known[k].default is not empty and k != "parts"]
    if isinstance(words, dict):  # of a resumed run
        words = [f"{k}={json.dumps(value)}" for k, value in words.items()]
    for word in words:
        k, _, value = word.partition("=")
        if not value or k not in having:
            near = ", ".join(difflib.get_close_matches(k, having, 1) or having) or "it has none"
            flag = f"--{name.replace('_', '-')} ({word})"
            raise BadInput(f"{flag} must be K=V with K a constant of {function.__name__}: {near}")
        try:
            found[k] = json.loads(value)
        except ValueError:
            found[k] = value  # a text needs no quotation marks
    return found
