"""TLDR, 2505.07961 (a reconstruction): prompts ask for short, medium or long reasoning. Reward tldr."""

import numpy as np

from data import BadInput
from methods import Method, prompt_ids, request

LEVELS = ("short", "medium", "long")
TEXTS = ("Keep the reasoning short.", "Reason at medium length.", "Reason at length.")


class Tldr(Method):
    provides, levels = ("level",), LEVELS

    def __init__(self, args, tokenizer, texts=TEXTS):
        super().__init__(args, tokenizer)
        self.texts = texts
        if isinstance(texts, str) or len(texts) != 3:
            raise BadInput('--method tldr: texts must be a list of three: \'texts=["...","...","..."]\'')

    def requests(self, row):
        k = row["position"] % len(self.levels)
        ids = prompt_ids(self.tokenizer, row, "\n" + self.texts[k])
        return [request(ids, self.args.group_size, self.args.max_tokens, level=self.levels[k])]

    def reward_inputs(self, groups, rows, step):
        return {"level": [group[0]["level"] for group in groups]}

    def metrics(self, groups, rollouts, reward):
        level = np.array(rollouts["level"])
        lengths = {name: rollouts["length"][level == name].mean() for name in sorted({*rollouts["level"]})}
        return {"length_by_level": lengths}
