"""Train Long, Think Short, 2508.08940: one budget for all prompts, which changes with the step.

Rewards curriculum_triangular and curriculum_band; any other that reads a budget works, too.
"""

from data import BadInput, budget_prompt
from methods import Method
from rewards import curriculum_budget

SCHEDULES = {  # the paper's own, equal ratios, equal differences (the last two stay at `end` after `steps`)
    "step": lambda t, m: curriculum_budget(t, m.start, m.gamma, m.period),
    "linear": lambda t, m: m.start + (m.end - m.start) * min(1, t / m.steps),
    "exponential": lambda t, m: m.start * (m.end / m.start) ** min(1, t / m.steps),
}


class Curriculum(Method):
    def __init__(self, args, tokenizer, schedule="step", start=256, gamma=0.7, period=150, end=87, steps=600):
        super().__init__(args, tokenizer)
        if schedule not in SCHEDULES:
            raise BadInput(f"--method-args schedule={schedule} must be one of {', '.join(SCHEDULES)}")
        if min(start, gamma, period, end, steps) <= 0:
            raise BadInput("--method curriculum: start, gamma, period, end and steps must be more than 0")
        self.schedule, self.start, self.gamma, self.period = SCHEDULES[schedule], start, gamma, period
        self.end, self.steps = end, steps
        highest = max(self.budget(0), self.budget(args.steps))
        if highest > args.max_tokens:
            raise BadInput(f"--max-tokens ({args.max_tokens}): --method curriculum asks for {highest} tokens")

    def budget(self, step):
        """In whole tokens: one number for the prompt, the reward and the metrics."""
        return max(1, int(self.schedule(step, self)))

    def row(self, row, step):
        mode, budget = self.args.mode, self.budget(step)
        mode = row.get("mode") or "exact" if mode == "both" else mode
        prompt = budget_prompt(row["problem"], budget, mode, row["kind"], self.args.wording)
        return row | {"budget": budget, "mode": mode, "prompt": prompt}

    def reward_inputs(self, groups, rows, step):
        # These know one schedule only: here its value is given.
        own = self.args.reward in ("curriculum_triangular", "curriculum_band")
        return {"constants": {"b0": self.budget(step), "gamma": 1.0}} if own else {}

    def metrics(self, groups, rollouts, reward):
        return {"scheduled_budget": self.budget(rollouts["step"])}
