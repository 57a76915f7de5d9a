"""Adaptive Deep Reasoning, 2505.20101 (a reconstruction): half of a group is told to think short, half long.

Reward adaptive_deep.
"""

from data import BadInput
from methods import Method, prompt_ids, request

TEXTS = ("[Please answer with Short CoT]", "[Please answer with Long CoT]")


class AdaptiveDeep(Method):
    provides = ("long_mode",)

    def __init__(self, args, tokenizer, texts=TEXTS):
        super().__init__(args, tokenizer)
        self.texts = texts
        if isinstance(texts, str) or len(texts) != 2:
            raise BadInput('--method adaptive_deep: texts must be a list of two: \'texts=["...","..."]\'')
        if args.group_size % 2:
            raise BadInput(f"--group-size ({args.group_size}): --method adaptive_deep needs an even one")

    def requests(self, row):
        prompts = [prompt_ids(self.tokenizer, row, "\n" + text) for text in self.texts]
        n, cap = self.args.group_size // 2, self.args.max_tokens
        return [request(ids, n, cap, long_mode=k) for k, ids in enumerate(prompts)]

    def metrics(self, groups, rollouts, reward):
        m = {}
        for k, name in enumerate(("short", "long")):
            part = rollouts["long_mode"] == k
            m |= {f"{name}_length": rollouts["length"][part].mean()}
            m |= {f"{name}_accuracy": rollouts["correct"][part].mean()}
        return m
