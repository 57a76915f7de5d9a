"""Elastic Reasoning, 2505.05315: at most `think` tokens, a forced </think>, at most `solution` tokens.

The forced </think> has no loss: the policy did not choose it. (In the authors' code it has.)
"""

import numpy as np

from data import BadInput
from methods import Method, prompt_ids, request


class Elastic(Method):
    def __init__(self, args, tokenizer, think=1024, solution=1024):
        super().__init__(args, tokenizer)
        self.think, self.solution = think, solution
        self.end = tokenizer.encode(args.think_end, add_special_tokens=False)
        room = think + len(self.end) + solution
        if args.max_tokens < room:
            raise BadInput(
                f"--max-tokens ({args.max_tokens}) is too small for --method elastic: {room} are needed"
            )

    def requests(self, row):
        return [request(prompt_ids(self.tokenizer, row), self.args.group_size, self.think)]

    def complete(self, groups, sampler, seed):
        unfinished, n = [], len(self.end)
        for r in sum(groups, []):
            ids = r["ids"].tolist()
            closed = next((t for t in range(n, len(ids) + 1) if ids[t - n : t] == self.end), None)
            if closed is None and not r["truncated"]:
                continue  # it ended while thinking
            if closed is None:
                closed = len(ids) + n
                r |= {"forced_end": 1, "mask": np.array([1] * len(ids) + [0] * n, np.float32)}
                self.append(r, np.array(self.end, np.int32), np.full(n, np.nan, np.float32))
            left = closed + self.solution - len(r["ids"])
            if left < 0 or (left == 0 and r["truncated"]):
                cut = slice(0, closed + self.solution)
                r |= {"ids": r["ids"][cut], "logps": r["logps"][cut], "truncated": 1}
            elif r["truncated"]:
                unfinished.append((r, left))
        if not unfinished:
            return
        prompts = [r["prompt_ids"] + r["ids"].tolist() for r, _ in unfinished]
        caps = [left for _, left in unfinished]
        more = sampler.generate(prompts, 1, caps, self.args.temperature, seed + 1)
        for (r, _), [rest] in zip(unfinished, more, strict=True):
            self.append(r, rest["ids"], rest["logps"])
            r["truncated"] = rest["truncated"]
            if "forced_end" in r:
                r["mask"] = np.concatenate([r["mask"], np.ones(len(rest["ids"]), np.float32)])

    @staticmethod
    def append(r, ids, logps):
        r |= {"ids": np.concatenate([r["ids"], ids]), "logps": np.concatenate([r["logps"], logps])}

    def metrics(self, groups, rollouts, reward):
        return {"forced_share": np.mean(["forced_end" in r for r in sum(groups, [])])}


METHOD = Elastic
