"""DRPO, 2510.04474 Eq. 7: right answers, short ones most, are pulled up against all wrong ones of the prompt.

Its loss is no sum over responses: the wrong ones of a prompt stand in one logarithm. But its gradient is that
of sum(w logp) with a number w for each response: the loop's own loss with advantage -w, weight 1 and ratio 1.
"""

import numpy as np
import torch
from accelerate.utils import gather_object

from data import BadInput
from methods import Method


def objective(score, length, group, correct, kl, lam=0.1, tau=10.0, l_max=8192, kl_coef=1e3, kl_delta=1e-4):
    """The loss, from score (mean log-prob), length, question and verdict of responses [N] and the batch's kl.

    -mean over questions of (sum of w s over right ones - tau log mean exp(s / tau) of wrong ones), with
    w = softmax(-length / (l_max lam)); a question without both kinds adds 0. A kl above kl_delta costs.
    """
    loss, questions = score.new_zeros(()), group.unique()
    for question in questions:
        right, wrong = ((group == question) & (correct > 0), (group == question) & (correct <= 0))
        if right.any() and wrong.any():
            pull_up = ((-length[right] / (l_max * lam)).softmax(0) * score[right]).sum()
            push_down = tau * ((score[wrong] / tau).logsumexp(0) - np.log(wrong.sum().item()))
            loss = loss - (pull_up - push_down) / len(questions)
    return loss + kl_coef / 2 * (kl - kl_delta).clamp(min=0).square()


def token_weights(score, length, group, correct, kl, **constants):
    """(loss, its derivative [N] by the log-prob of each token of a response)"""
    score, kl = score.detach().requires_grad_(), kl.detach().requires_grad_()
    loss = objective(score, length, group, correct, kl, **constants) + 0 * score.sum()
    by_score, by_kl = torch.autograd.grad(loss, (score, kl))
    return loss.item(), by_score / length.clamp(min=1) - by_kl / length.sum().clamp(min=1)


class Drpo(Method):
    def __init__(self, args, tokenizer, lam=0.1, tau=10.0, l_max=8192, kl_coef=1e3, kl_delta=1e-4):
        super().__init__(args, tokenizer)
        self.constants = {"lam": lam, "tau": tau, "l_max": l_max, "kl_coef": kl_coef, "kl_delta": kl_delta}
        if args.tis_cap or args.kl_coef:
            raise BadInput("--method drpo needs --tis-cap 0 and --kl-coef 0: it has a KL of its own")
        if args.prompts_per_step % args.minibatches:
            raise BadInput(f"--prompts-per-step must be a multiple of --minibatches ({args.minibatches})")

    def begin_step(self, step, turn, rows, all_rows, ask):
        self.told = []

    def before_update(self, model, minibatch, add_logps):
        add_logps(model, minibatch, "new_logps")
        table = np.zeros((len(minibatch), 3))  # score, tokens, sum of old - new
        for i, r in enumerate(minibatch):
            if "new_logps" in r:  # this process's share
                new = r["new_logps"].astype(float)
                moved = r.get("old_logps", new) - new
                table[i] = new.mean(), len(new), moved.sum()
                # The ratio is 1; the gap to the sampler stays that of the policy that sampled.
                r |= {"old_logps": r["new_logps"], "logps": (r["logps"] - moved).astype(np.float32)}
        table = sum(gather_object([table]))
        score, length, moved = torch.from_numpy(table).T
        kl = moved.sum() / length.sum()
        group, correct = (torch.tensor([r[k] for r in minibatch]) for k in ("group", "correct"))
        loss, weights = token_weights(score, length, group, correct, kl, **self.constants)
        self.told.append((loss, kl.item()))
        for r, w in zip(minibatch, weights.tolist(), strict=True):
            r |= {"advantage": -w, "weight": 1.0}

    def metrics(self, groups, rollouts, reward):
        loss, kl = np.mean(self.told or [(0.0, 0.0)], 0)
        return {"loss": loss, "drpo_kl": kl}
