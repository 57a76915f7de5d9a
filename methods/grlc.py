"""GRLC, Nemotron 3 Nano, 2512.20848: short thinking pays, and short answers, each by itself. Reward grlc."""

import numpy as np

from methods import Method, end_of


class Grlc(Method):
    """Thinking ends with its first --think-end; without one all of a response is thinking."""

    provides = ("think_length",)

    def __init__(self, args, tokenizer):
        super().__init__(args, tokenizer)
        self.end = tokenizer.encode(args.think_end, add_special_tokens=False)

    def reward_inputs(self, groups, rows, step):
        lengths = [[end_of(r["ids"].tolist(), self.end) or len(r["ids"]) for r in g] for g in groups]
        return {"think_length": np.array(lengths)}

    def metrics(self, groups, rollouts, reward):
        think = rollouts["think_length"]
        return {"think_length": think.mean(), "answer_length": (rollouts["length"] - think).mean()}
