"""HBPO, 2507.15844: a group has a part for each of several budgets. Reward and advantage hbpo.

The budget is named by the first sentence of the thinking, which is neither trained nor counted (the authors'
code counts it); in_prompt: it ends the question instead.
"""

from data import BadInput
from methods import Method, prompt_ids, request

PREFIX = "I will answer the question within {} tokens."


class Hbpo(Method):
    provides = ("subgroup_budget",)

    def __init__(self, args, tokenizer, budgets=(512, 1024, 2048, 2560), prefix=PREFIX, in_prompt=False):
        super().__init__(args, tokenizer)
        self.budgets, self.prefix, self.in_prompt = budgets, prefix, in_prompt
        if not budgets or args.group_size % len(budgets):
            raise BadInput(f"--group-size ({args.group_size}): hbpo needs a multiple of {len(budgets)}")

    def requests(self, row):
        made, n = [], self.args.group_size // len(self.budgets)
        for budget in self.budgets:
            sentence = self.prefix.format(budget)
            ids = prompt_ids(self.tokenizer, row, "\n" + sentence if self.in_prompt else "")
            ids += [] if self.in_prompt else self.tokenizer.encode(sentence, add_special_tokens=False)
            made.append(request(ids, n, self.args.max_tokens, subgroup_budget=budget))
        return made

    def metrics(self, groups, rollouts, reward):
        parts = {f"{b:g}": rollouts["subgroup_budget"] == b for b in self.budgets}
        values = {"length_by_subgroup": rollouts["length"], "reward_by_subgroup": reward}
        return {name: {b: value[part].mean() for b, part in parts.items()} for name, value in values.items()}
