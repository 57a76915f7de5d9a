"""PALU, 2510.10168 (second-hand): every prompt has a budget of its own, cut there. Reward palu.

The budget shrinks while the prompt is solved, and is --max-tokens again as soon as it is not.
"""

import numpy as np

from methods import Method, prompt_ids, request
from methods.hapo import prompt_key


def next_budget(budget, correct, length, l_max, c=0.8, tau=0.5):
    """Pass rate of the group [G] >= c: less by Q_1 - Q_(1 - tau) of its right lengths; else l_max."""
    right = np.array(length)[np.array(correct) > 0]
    if not len(right) or len(right) < c * len(length):
        return l_max
    return max(1, int(budget - (right.max() - np.quantile(right, 1 - tau))))


class Palu(Method):
    provides = ("target",)

    def __init__(self, args, tokenizer, c=0.8, tau=0.5):
        super().__init__(args, tokenizer)
        self.c, self.tau, self.state["budget"] = c, tau, {}

    def budget(self, row):
        return min(self.args.max_tokens, self.state["budget"].get(prompt_key(row), self.args.max_tokens))

    def requests(self, row):
        ids = prompt_ids(self.tokenizer, row)
        return [request(ids, self.args.group_size, self.budget(row))]

    def reward_inputs(self, groups, rows, step):
        return {"target": np.array([self.budget(row) for row in rows], dtype=float)}

    def learn(self, groups, rows):
        for row, group in zip(rows, groups, strict=True):
            correct, length = ([r[k] for r in group] for k in ("correct", "length"))
            budget = next_budget(self.budget(row), correct, length, self.args.max_tokens, self.c, self.tau)
            self.state["budget"][prompt_key(row)] = budget

    def metrics(self, groups, rollouts, reward):
        return {"palu_budget": rollouts["target"].mean()}
