"""Reminders: while a response is written, the context is told how much of its budget is used. 2508.17196.

BudgetThinker's marks are fractions, 1/8 to 7/8, the same for every budget: none names a number that was not
trained. Seed-OSS counts: form="used {used} left {left}". A mark counts in the length and has no loss.
Generation is cut at the marks and goes on behind them, which any engine can do; its prefix cache has read the
rest. Marks that would come less than `least` tokens after another one are left out. evaluate.py and a run's
own evaluations ask without marks; integrations/remind.py asks with them.
"""

from data import BadInput
from methods import Method, end_of, extend, go_on, prompt_ids, request

FORM = "<{i}/8>"


class Reminders(Method):
    def __init__(self, args, tokenizer, form="", least=4):
        super().__init__(args, tokenizer)
        self.form, self.least = form or FORM, least
        self.end = tokenizer.encode(args.think_end, add_special_tokens=False)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in self.mark(1, 8):
            raise BadInput(f"--method-args form={self.form}: the tokenizer does not know all of it")

    def mark(self, i, budget):
        """Token ids that say: i eighths of the budget are used."""
        used = budget * i // 8
        text = self.form.format(i=i, used=used, left=budget - used)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def marks(self, budget):
        """{place: token ids}: after `place` tokens of the response comes a mark."""
        found, last = {}, 0
        for i in range(1, 8) if budget else ():
            place, ids = budget * i // 8, self.mark(i, budget)
            if place >= last + self.least:
                found[place], last = ids, place + len(ids)
        return found

    def requests(self, row):
        tags, ids = {"limit": self.args.max_tokens, "asked": row["budget"]}, prompt_ids(self.tokenizer, row)
        first = min([tags["limit"], *self.marks(row["budget"])])
        return [request(ids, self.args.group_size, first, **tags)]

    def complete(self, groups, sampler, seed):
        """Responses {prompt_ids, asked, limit, ids, logps, truncated}, cut at a mark, go on to their end."""
        while live := [r for r in sum(groups, []) if r["truncated"] and len(r["ids"]) < r["limit"]]:
            for r in live:
                marks, place = self.marks(r["asked"]), len(r["ids"])
                # An answer that has begun is not interrupted.
                if place in marks and end_of(r["ids"].tolist(), self.end) is None:
                    extend(r, marks[place][: r["limit"] - place])
                place = len(r["ids"])
                r["room"] = min([r["limit"], *(p for p in marks if p > place)]) - place
            live = [r for r in live if r["room"]]
            seed += 1
            for r, [rest] in zip(live, go_on(live, sampler, self.args, seed) if live else [], strict=True):
                extend(r, rest["ids"], rest["logps"])
                r["truncated"] = rest["truncated"]
