"""Effort, as models of 2026 ask for it: a word or number in the prompt prices a token. Reward effort.

Inkling (Thinking Machines) takes a number from 0 to 1 in a system message; here it ends the question. What a
token costs at each effort is not published.
"""

import numpy as np

from data import BadInput
from methods.tldr import Tldr

COSTS = {"low": 1e-4, "medium": 3e-5, "high": 1e-5}


class Effort(Tldr):
    """costs: lambda of every effort, per token; text: what asks for it, with {} in it."""

    provides = ("token_cost",)  # its levels are no lengths, as those of TLDR are

    def __init__(self, args, tokenizer, costs=COSTS, text="Thinking effort level: {}"):
        if not isinstance(costs, dict) or not costs or "{}" not in text:
            raise BadInput('--method effort needs costs={"low":0.0001,"high":0.00001} and {} in its text')
        super().__init__(args, tokenizer)
        self.costs, self.levels, self.texts = costs, list(costs), [text.format(e) for e in costs]

    def reward_inputs(self, groups, rows, step):
        fields = super().reward_inputs(groups, rows, step)
        return fields | {"token_cost": np.array([self.costs[e] for e in fields["level"]], float)}
