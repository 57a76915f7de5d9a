"""BRPO (AnytimeReasoner), 2505.13438: thinking is cut at several budgets, and answers are forced at each.

A token of thinking is paid by the answers at its own and later budgets, an answer against others to the same
thinking. Here each answer is a response (theirs share a tree); one trains the thinking. Reward correct.
"""

import numpy as np

from data import BadInput
from methods import Method, end_of, extend, go_on, prompt_ids, request


def segment_advantage(v, p):
    """A [G, S] of the thinking before each budget, from scores v [G, S] there and the budgets' weights p [S].

    A_s = R_s - (s V1 + (S - s) V2) / S, s = 0 ... S - 1; R_s: sum of p_j v_j over j >= s; V2: its mean in the
    group; V1: sum of p_j over j >= s, times the mean of v_j over j < s weighed by 2^j.
    """
    s, double = np.arange(len(p)), 2.0 ** np.arange(len(p))
    ahead, returns = (x[..., ::-1].cumsum(-1)[..., ::-1] for x in (p, p * v))
    v1 = ahead * np.pad(np.cumsum(double * v, 1) / np.cumsum(double), ((0, 0), (1, 0)))[:, :-1]
    return returns - (s * v1 + (len(p) - s) * returns.mean(0)) / len(p)


class Brpo(Method):
    def __init__(self, args, tokenizer, budgets=(2000, 4000, 6000, 8000), weights=(1, 2, 3, 4), answers=4,
                 length=118, cut="...\n\n...\n\n", ask="\n\n**Final Answer**\n"):  # fmt: skip
        super().__init__(args, tokenizer)
        if args.reward != "correct" or args.overlong_filter:  # the filter drops answers that were cut
            raise BadInput(f"brpo: --reward ({args.reward}) must be correct, and --overlong-filter not given")
        rising = type(budgets) in (list, tuple) and sorted({b for b in budgets if type(b) is int and b > 0})
        if not rising or rising != [*budgets]:
            raise BadInput(f"brpo: --method-args budgets={budgets} must be a list of whole numbers that rise")
        texts = args.think_end, ask, cut + args.think_end + ask
        self.end, self.ask, self.forced = (tokenizer.encode(x, add_special_tokens=False) for x in texts)
        self.budgets, self.answers, self.shape = budgets, answers, (-1, len(budgets), answers)
        each, room = len(budgets) * answers, budgets[-1] + len(self.forced) + length
        if len(weights) != len(budgets) or args.group_size % each or args.max_tokens < room:
            raise BadInput(f"brpo: --group-size {each} x N, --max-tokens >= {room}, {len(budgets)} weights")
        self.p, self.length, self.thoughts = np.divide(weights, sum(weights)), length, args.group_size // each

    def requests(self, row):
        return [request(prompt_ids(self.tokenizer, row), self.thoughts, self.budgets[-1])]

    def complete(self, groups, sampler, seed):
        asked = []
        for group in groups:
            thoughts, group[:] = list(group), []
            for r in thoughts:
                closed, size = end_of(r["ids"].tolist(), self.end), len(r["ids"])
                stops = [min(budget, closed or size) for budget in self.budgets]
                for start, stop in zip([0, *stops[:-1]], stops, strict=True):
                    # Thinking that ended without its end is wrong, whatever it would answer.
                    lost = int(stop == size and not (closed or r["truncated"]))
                    cut = {"start": start, "stop": stop, "lost": lost, "room": self.length}
                    asked.append((group, r | cut | {k: r[k][:stop] for k in ("ids", "logps")}))
                    extend(asked[-1][1], self.ask if stop == closed else self.forced)
        found = go_on([r for _, r in asked], sampler, self.args, seed, self.answers)
        for (group, r), answers in zip(asked, found, strict=True):
            for k, answer in enumerate(answers):  # the first of them trains the thinking
                group.append(r | {"truncated": max(answer["truncated"], r["lost"])})
                extend(group[-1], answer["ids"], answer["logps"])
                group[-1]["mask"][: r["stop"] if k else r["start"]] = 0

    def revise(self, groups, rows):
        for group in groups:
            right, stops = (np.reshape([r[k] for r in group], self.shape) for k in ("correct", "stop"))
            paid = segment_advantage(right.mean(2), self.p)
            for r, (g, s, _) in zip(group, np.ndindex(right.shape), strict=True):
                others = right[g][stops[g] == r["stop"]] if self.answers > 1 else right[:, s]
                r["paid"] = np.full(len(r["ids"]), r["correct"] - others.mean(), np.float32)
                r["paid"][: r["stop"]] = paid[g, s]

    def before_update(self, model, minibatch, add_logps):
        for r in minibatch:
            r["advantage"] = r["paid"]

    def metrics(self, groups, rollouts, reward):
        scores = rollouts["correct"].reshape(self.shape).mean((0, 2)).tolist()
        return {"accuracy_by_budget": dict(zip(map(str, self.budgets), scores, strict=True))}
