"""Toggle, Kimi K2.5, 2602.02276: m steps with a budget for each prompt, then m steps without. Reward toggle.

Training under a budget alone unlearns to use more tokens, where they are there ("length-overfitting"). The
budget of a prompt, fixed from the start on, is the rho-th percentile of the lengths of the starting model's
right answers. The report gives neither m, rho, lambda nor the number of samples.
"""

import numpy as np

from data import BadInput
from methods.hapo import prompt_key
from methods.starting_model import StartingModel


class Toggle(StartingModel):
    provides = ("target",)

    def __init__(self, args, tokenizer, m=10, rho=50, samples=16):
        super().__init__(args, tokenizer, samples)
        self.m, self.rho = m, rho
        if m < 1 or not 0 <= rho <= 100:
            raise BadInput(f"--method-args of toggle: m ({m}) must be 1 or more, rho ({rho}) from 0 to 100")

    def note(self, group):
        """The budget of a prompt; None where nothing is right: it has none."""
        right = [r["length"] for r in group if r["correct"]]
        return float(np.percentile(right, self.rho)) if right else None

    def reward_inputs(self, groups, rows, step):
        known, limited = self.state["reference"], step // self.m % 2 == 0
        budgets = [known[prompt_key(row)] if limited else None for row in rows]
        return {"target": np.array([np.nan if b is None else b for b in budgets])}

    def metrics(self, groups, rollouts, reward):
        over = rollouts["length"] > rollouts["target"][:, None]  # what pays, if its group is right enough
        known = rollouts["target"][np.isfinite(rollouts["target"])]
        budget = known.mean() if len(known) else np.nan
        return {"toggle_limited": len(known) / len(over), "toggle_over": over.mean(), "toggle_budget": budget}
