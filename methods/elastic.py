"""Elastic Reasoning, 2505.05315: at most `think` tokens, a forced </think>, at most `solution` tokens.

The forced </think> has no loss: the policy did not choose it. (In the authors' code it has.)
"""

import numpy as np

from data import BadInput
from methods import Method, end_of, extend, go_on, prompt_ids, request


class Elastic(Method):
    def __init__(self, args, tokenizer, think=1024, solution=1024):
        super().__init__(args, tokenizer)
        self.think, self.solution = think, solution
        self.end = tokenizer.encode(args.think_end, add_special_tokens=False)
        room = think + len(self.end) + solution
        if args.max_tokens < room:
            raise BadInput(f"--max-tokens ({args.max_tokens}): for --method elastic {room} are needed")

    def requests(self, row):
        return [request(prompt_ids(self.tokenizer, row), self.args.group_size, self.think)]

    def complete(self, groups, sampler, seed):
        unfinished = []
        for r in sum(groups, []):
            closed = end_of(r["ids"].tolist(), self.end)
            if closed is None and not r["truncated"]:
                continue  # it ended while thinking
            if closed is None:
                extend(r, self.end)
                r["forced_end"], closed = 1, len(r["ids"])
            r["room"] = closed + self.solution - len(r["ids"])
            if r["room"] < 0 or (r["room"] == 0 and r["truncated"]):
                cut = slice(0, closed + self.solution)
                r |= {"ids": r["ids"][cut], "logps": r["logps"][cut], "truncated": 1}
            elif r["truncated"]:
                unfinished.append(r)
        more = go_on(unfinished, sampler, self.args, seed) if unfinished else []
        for r, [rest] in zip(unfinished, more, strict=True):
            extend(r, rest["ids"], rest["logps"])
            r["truncated"] = rest["truncated"]

    def metrics(self, groups, rollouts, reward):
        return {"forced_share": np.mean(["forced_end" in r for r in sum(groups, [])])}
