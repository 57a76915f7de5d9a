"""Reminders: while a response is written, the context is told how much of its budget is used. 2508.17196.

BudgetThinker's marks are fractions, 1/8 to 7/8, the same for every budget: none names a number that was not
trained. Seed-OSS counts: form="used {used} left {left}". A mark counts in the length and has no loss. Generation is
cut at the marks and goes on behind them, which any engine can do; its prefix cache has read the rest.
"""

import numpy as np

from data import BadInput
from methods import Method, prompt_ids, request


class Reminders(Method):
    def __init__(self, args, tokenizer, form="<{i}/8>", least=4):
        super().__init__(args, tokenizer)
        self.form, self.least = form, least  # least: tokens between two marks
        self.end = tokenizer.encode(args.think_end, add_special_tokens=False)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in self.mark(1, 8):
            raise BadInput(f"--method-args form={form}: the tokenizer does not know all of it")

    def mark(self, i, budget):
        """Token ids that say: i eighths of the budget are used."""
        used = budget * i // 8
        text = self.form.format(i=i, used=used, left=budget - used)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def marks(self, budget):
        """[(place, token ids)]: after `place` tokens of the response comes a mark."""
        found, last = [], 0
        for i in range(1, 8) if budget else ():
            place = budget * i // 8
            if place - last >= self.least + len(self.mark(i, budget)) - 1:
                found.append((place, self.mark(i, budget)))
                last = place
        return found

    def requests(self, row):
        budget, n, cap = row.get("budget"), self.args.group_size, self.args.max_tokens
        marks = self.marks(budget) or [(cap, [])]
        first = min(cap, marks[0][0])
        return [request(prompt_ids(self.tokenizer, row), n, first, budget=budget, cap=cap)]

    def complete(self, groups, sampler, seed):
        self.go_on(sum(groups, []), sampler, self.args.temperature, seed)

    def go_on(self, responses, sampler, temperature, seed, **options):
        """Responses {prompt_ids, budget, cap, ids, logps, truncated}, cut at their first mark, to their end."""
        for r in responses:
            r["mask"] = np.ones(len(r["ids"]), np.float32)
        while live := [r for r in responses if r["truncated"] and len(r["ids"]) < r["cap"]]:
            rooms = []
            for r in live:
                marks = self.marks(r["budget"])
                for place, mark in marks:  # an answer that has begun is not interrupted
                    if place == len(r["ids"]) < r["cap"] - len(mark) and not self.closed(r):
                        self.append(r, mark, np.full(len(mark), np.nan), 0)
                later = [place for place, _ in marks if place > len(r["ids"])]
                rooms.append(min([r["cap"], *later[:1]]) - len(r["ids"]))
            seed += 1
            contexts = [r["prompt_ids"] + r["ids"].tolist() for r in live]
            more = sampler.generate(contexts, 1, rooms, temperature, seed, **options)
            for r, [rest] in zip(live, more, strict=True):
                self.append(r, rest["ids"], rest["logps"], 1)
                r["truncated"] = rest["truncated"]

    def closed(self, r):
        """Whether thinking has ended."""
        ids, n = r["ids"].tolist(), len(self.end)
        return any(ids[t : t + n] == self.end for t in range(len(ids)))

    @staticmethod
    def append(r, ids, logps, mask):
        parts = {"ids": (ids, np.int32), "logps": (logps, np.float32), "mask": ([mask] * len(ids), np.float32)}
        r |= {k: np.append(r[k], np.array(new, dtype)).astype(dtype) for k, (new, dtype) in parts.items()}

    def metrics(self, groups, rollouts, reward):
        return {"reminders": np.mean([(r["mask"] == 0).sum() for r in sum(groups, [])])}


METHOD = Reminders
