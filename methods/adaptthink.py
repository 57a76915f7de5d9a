"""AdaptThink, 2505.13417: half of a group begins with a forced </think>, the other half with a thinking word.

That first token is trained. Its behaviour probability is 1/2, whatever the policy's is: it replaces the old
log-prob. With think_word=null the other half is sampled freely, and it is 1/2 forced + 1/2 policy.
"""

import math

import numpy as np

from data import BadInput
from methods import prompt_ids, request
from methods.starting_model import StartingModel

HALF = math.log(0.5)


class AdaptThink(StartingModel):
    provides = (*StartingModel.provides, "no_think")

    def __init__(self, args, tokenizer, think_word="Alright", no_think_tokens=None, samples=16):
        super().__init__(args, tokenizer, samples)
        if args.group_size % 2:
            raise BadInput(f"--group-size ({args.group_size}): --method adaptthink needs an even one")
        self.end, self.word = self.one_token(args.think_end), self.one_token(think_word) if think_word else []
        self.short = min(no_think_tokens or args.max_tokens, args.max_tokens)

    def one_token(self, word):
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise BadInput(f"--method adaptthink: {word!r} must be one token, here it is {len(ids)}")
        return ids

    def begin_step(self, step, turn, rows, all_rows, ask):
        self.first_update = True
        super().begin_step(step, turn, rows, all_rows, ask)

    def requests(self, row):
        ids, n = prompt_ids(self.tokenizer, row), self.args.group_size // 2
        quick = request(ids, n, self.short, self.end, no_think=1)
        return [quick, request(ids, n, self.args.max_tokens, self.word, no_think=0)]

    def behaviour(self, r, logp):
        """Log-prob with which this sampler begins response r, where its policy would with logp."""
        if self.word:
            return HALF
        return np.logaddexp(HALF, HALF + logp) if r["ids"][0] == self.end[0] else HALF + logp

    def complete(self, groups, sampler, seed):
        for r in sum(groups, []):
            if not np.isnan(r["logps"][0]):  # the token was not forced
                r["logps"][0] = self.behaviour(r, r["logps"][0])

    def reward_inputs(self, groups, rows, step):
        no_think = np.array([[r["no_think"] for r in g] for g in groups])
        return super().reward_inputs(groups, rows, step) | {"no_think": no_think}

    def before_update(self, model, minibatch, add_logps):
        if self.first_update:  # later ones have old log-probs already
            add_logps(model, minibatch, "old_logps")
        self.first_update = False
        for r in minibatch:
            if "old_logps" in r:  # this process's share
                r["old_logps"][0] = self.behaviour(r, r["old_logps"][0])

    def metrics(self, groups, rollouts, reward):
        m, no_think = {"ref_accuracy": rollouts["ref_accuracy"].mean()}, rollouts["no_think"]
        for name, part in (("think", no_think == 0), ("no_think", no_think == 1)):
            m[f"{name}_length"] = rollouts["length"][part].mean()
            m[f"{name}_accuracy"] = rollouts["correct"][part].mean()
        return m
