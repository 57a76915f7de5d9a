"""What papers do besides their reward: one file each, `--method NAME`. A method overrides what it needs of Method.

The hooks stand in the order in which a step of train_grpo.py calls them. hapo.py (a memory) is a good first one to
read, then dot.py (edits responses), adaptthink.py (forces tokens), drpo.py (another objective). Two papers at once
are a subclass: see the end of docs/guide.md.
"""

import importlib
import os

from data import encode_prompt


def request(prompt_ids, n, cap, forced=(), **tags):
    """n responses to a prompt, of `cap` tokens at most; `forced` begin each, `tags` are noted on each."""
    return {"prompt_ids": prompt_ids, "n": n, "cap": cap, "forced": list(forced), "tags": tags}


class Method:
    """Plain GRPO: every hook does nothing."""

    provides = ()  # fields of the rollouts that reward_inputs() adds, for rewards that read them
    asks_starting_model = False  # a copy of it is kept, for begin_step's ask(..., starting=True)

    def __init__(self, args, tokenizer):
        self.args, self.tokenizer, self.state = (
            args,
            tokenizer,
            {},
        )  # state: plain numbers, saved with checkpoints

    def begin_step(self, step, turn, rows, all_rows, ask):
        """Before sampling; `turn` counts the refills of --dynamic-sampling. ask(rows, n, key) samples and checks."""

    def row(self, row, step):
        """The row as it is asked at this step (curricula change its budget)."""
        return row

    def requests(self, row):
        """The requests that make up a row's group, each for equally many responses."""
        return [
            request(encode_prompt(self.tokenizer, row["prompt"]), self.args.group_size, self.args.max_tokens)
        ]

    def complete(self, groups, sampler, seed):
        """After sampling, before the check: responses that go on."""

    def revise(self, groups, rows):
        """After the check: responses that are cut, checked again or scored by a model."""

    def reward_inputs(self, groups, rows, step):
        """Fields that the reward reads besides lengths and verdicts, [P] or [P, G]; "constants" override its own."""
        return {}

    def learn(self, groups, rows):
        """After the rewards: what the next step remembers of all that was sampled."""

    def before_update(self, model, minibatch, add_logps):
        """Before an optimizer step: other advantages, weights or old log-probs for the responses.

        add_logps(model, minibatch, name) gives r[name] [L] to those of them that are this process's share.
        """

    def metrics(self, groups, rollouts, reward):
        """Numbers of its own for metrics.jsonl."""
        return {}


def find(name):
    """The class of --method NAME, or None."""
    if name == "plain":
        return Method
    return importlib.import_module(f"methods.{name}").METHOD if name in names() else None


def names():
    files = (f[:-3] for f in os.listdir(os.path.dirname(__file__)) if f.endswith(".py"))
    return sorted(f for f in files if not f.startswith("_"))
