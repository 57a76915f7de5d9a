"""ThinkPrune (UCSB-NLP-Chang/ThinkPrune): a response is cut at its prompt's budget. Reward correct."""

from data import BadInput
from methods import Method, prompt_ids, request


class ThinkPrune(Method):
    def row(self, row, step):
        if not row.get("budget"):
            raise BadInput("--method thinkprune cuts at budgets, but the rows have none: give --budgets")
        return row

    def requests(self, row):
        cap = min(self.args.max_tokens, row["budget"])
        return [request(prompt_ids(self.tokenizer, row), self.args.group_size, cap)]
