"""LASER-D and -DE, 2505.15612: a monitor set moves the targets. Rewards laser_d, laser_de."""

import numpy as np

from data import BadInput
from methods import Method


def find_targets(correct, length, l_max, low, step):
    """{"easy", "medium", "hard"} in tokens from the monitor set [M, n], as the authors' code does it.

    Class by the share of right answers, borders 1/3 and 2/3. Target: the least T = low, low + step, ... with
    floor(share of the class's responses of at most T tokens x m) >= 1, m = floor(2n/3), floor(n/3), 1;
    l_max where there is none.
    """
    n, thirds = correct.shape[1], 3 * correct.sum(1)
    medium = (thirds > n) & (thirds <= 2 * n)
    classes = {"easy": (thirds > 2 * n, 2 * n // 3), "medium": (medium, n // 3), "hard": (thirds <= n, 1)}
    targets = {}
    for name, (rows, m) in classes.items():
        found = length[rows].ravel()
        enough = (t for t in range(low, l_max + 1, step) if (found <= t).sum() * m >= len(found) > 0)
        targets[name] = next(enough, l_max)
    return targets


class LaserD(Method):
    moves = {"laser_d": "targets", "laser_de": "targets"}

    def __init__(self, args, tokenizer, every=20, size=500, samples=8, low=1024, step=1024):
        super().__init__(args, tokenizer)
        if args.reward not in self.moves:
            raise BadInput(f"--method laser_d is for --reward laser_d or laser_de, not for {args.reward}")
        if min(every, size, samples, low, step) < 1:
            raise BadInput("--method-args every, size, samples, low and step of laser_d must be 1 or more")
        self.every, self.size, self.samples, self.low, self.step = every, size, samples, low, step

    def begin_step(self, step, turn, rows, all_rows, ask):
        if turn or step % self.every:
            return
        rng, size = np.random.default_rng([self.args.seed, 77]), min(len(all_rows), self.size)
        monitor = [all_rows[i] for i in rng.choice(len(all_rows), size, replace=False)]  # the same every time
        groups = ask(monitor, self.samples, [step, 0, 2])
        correct, length = (np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length"))
        self.state["targets"] = find_targets(correct, length, self.args.max_tokens, self.low, self.step)

    def reward_inputs(self, groups, rows, step):
        return {"constants": {"targets": self.state["targets"]}}

    def metrics(self, groups, rollouts, reward):
        return {f"laser_{name}": target for name, target in self.state["targets"].items()}
