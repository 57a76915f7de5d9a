"""HAPO, 2505.11225: be shorter than your own right answers so far. Rewards hapo_cosine, hapo_linear.

The memory holds, for each prompt, the number, the sum and the least of the lengths of its right answers.
"""

import re

import numpy as np

from data import BadInput
from methods import Method


def prompt_key(row):
    """What a prompt is remembered by: its id without the copy number that data.py --copies appends."""
    return re.sub(r"#\d+$", "", str(row["id"]))


class Hapo(Method):
    provides = ("history",)

    def __init__(self, args, tokenizer, history="min"):
        super().__init__(args, tokenizer)
        if history not in ("min", "mean"):
            raise BadInput(f"--method-args history={history} must be min or mean")
        self.history, self.state["history"] = history, {}

    def known_length(self, row):
        """h: the "min" or "mean" length of past right answers; nan where there are none."""
        n, total, least = self.state["history"].get(prompt_key(row), (0, 0, 0))
        return np.nan if not n else float(least) if self.history == "min" else total / n

    def reward_inputs(self, groups, rows, step):
        return {"history": np.array([self.known_length(row) for row in rows])}

    def learn(self, groups, rows):
        for row, group in zip(rows, groups, strict=True):
            right = [r["length"] for r in group if r["correct"]]
            if right:
                n, total, least = self.state["history"].get(prompt_key(row), (0, 0, right[0]))
                known = [n + len(right), total + sum(right), min(least, *right)]
                self.state["history"][prompt_key(row)] = known

    def metrics(self, groups, rollouts, reward):
        known = np.isfinite(rollouts["history"])
        mean = rollouts["history"][known].mean() if known.any() else np.nan
        return {"history_known": known.mean(), "history_length": mean}
