"""DOT, 2601.03969: in groups that are all right, very long answers are cut and checked once more.

What is left is what is trained. An answer that the cut loses is wrong; one that is still there stays right.
"""

import math

import numpy as np

from data import BadInput
from methods import Method
from rewards import dot_threshold
from verifier import check_answers


class Dot(Method):
    def __init__(self, args, tokenizer, a=3.0, margin=32):
        super().__init__(args, tokenizer)
        self.a, self.margin, n = a, margin, args.group_size
        # A single outlier of n values lies at most (n - 1) / sqrt(n) sample deviations above their mean.
        if not 0 < a < (n - 1) / math.sqrt(n):
            least = next((g for g in range(2, 10**4) if (g - 1) / math.sqrt(g) > a), "none")
            raise BadInput(f"--method dot, a={a:g}, cuts nothing in {n}: --group-size {least} or more")

    def revise(self, groups, rows):
        if not groups:
            return
        batch = {k: np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length", "truncated")}
        cut = []
        for group, row, limit in zip(groups, rows, dot_threshold(batch, self.a), strict=True):
            for r in group:
                r["dot_threshold"] = float(limit)  # nan: not all of the group are right
                if r["length"] - limit >= self.margin:
                    n = int(limit)
                    r |= {"ids": r["ids"][:n], "logps": r["logps"][:n], "length": n, "dot_cut": 1}
                    r["text"] = self.tokenizer.decode(r["ids"], skip_special_tokens=False)
                    cut.append((r, row))
        golds, kinds, choices = ([row.get(k) for _, row in cut] for k in ("answer", "kind", "choices"))
        think = {"require_think": self.args.require_think, "think_end": self.args.think_end}
        verdicts, _ = check_answers([r["text"] for r, _ in cut], golds, kinds, choices, **think)
        for (r, _), right in zip(cut, verdicts, strict=True):
            r["correct"] = int(right)

    def metrics(self, groups, rollouts, reward):
        limits = np.array([g[0]["dot_threshold"] for g in groups])
        cut = [r for r in sum(groups, []) if "dot_cut" in r]
        mean = np.nanmean(limits) if np.isfinite(limits).any() else np.nan
        return {"dot_threshold": mean, "dot_cut": len(cut), "dot_lost": sum(not r["correct"] for r in cut)}
