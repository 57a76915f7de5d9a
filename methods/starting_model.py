"""How right and how long the starting model is on each prompt, asked when it is new. Reward o1_pruner."""

import numpy as np

from methods import Method
from methods.hapo import prompt_key


class StartingModel(Method):
    provides = ("ref_accuracy", "ref_length")
    asks_starting_model = True

    def __init__(self, args, tokenizer, samples=12):
        super().__init__(args, tokenizer)
        self.samples, self.state["reference"] = samples, {}

    def note(self, group):
        """What is remembered of the starting model's responses to a prompt."""
        return [float(np.mean([r[k] for r in group])) for k in ("correct", "length")]

    def begin_step(self, step, turn, rows, all_rows, ask):
        known = self.state["reference"]
        new = list({prompt_key(row): row for row in rows if prompt_key(row) not in known}.values())
        groups = ask(new, self.samples, [step, turn, 1], starting=True) if new else []
        for row, group in zip(new, groups, strict=True):
            known[prompt_key(row)] = self.note(group)

    def reward_inputs(self, groups, rows, step):
        accuracy, length = np.array([self.state["reference"][prompt_key(row)] for row in rows]).T
        return {"ref_accuracy": accuracy, "ref_length": length}
