"""ThinkPrune (UCSB-NLP-Chang/ThinkPrune): a response is cut at its prompt's budget. Reward correct."""

from data import BadInput, encode_prompt
from methods import Method, request


class ThinkPrune(Method):
    def row(self, row, step):
        if not row.get("budget"):
            raise BadInput(
                "--method thinkprune cuts responses at their budget, but rows have none: give --budgets"
            )
        return row

    def requests(self, row):
        cap = min(self.args.max_tokens, row["budget"])
        return [request(encode_prompt(self.tokenizer, row["prompt"]), self.args.group_size, cap)]


METHOD = ThinkPrune
