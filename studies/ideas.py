"""Ideas against the open question of docs/study.md: can control reach beyond the largest trained budget?

    python -m studies.ideas NAME train_grpo FLAGS...     training with that idea put in
    python -m studies.ideas NAME evaluate FLAGS...

Also an example of a fork that leaves the other files alone: a sentence in the place of data.budget_prompt,
two rewards, a method, a sampler. Budgets up to 48 tokens are the trained ones; up to 96 is what is hoped for.

    relative       the budget is asked for in percent of 48 tokens: 72 are "Think for 150 maximum tokens."
    tally          the budget is asked for by marks, one for 4 tokens
    tally_8        the same, one for 8 tokens
    mlt            a special token names the nearest length that has one, as Ruler does (2409.18943)
    remind         after every 8 tokens the context is told how many are left
    remind_capped  the same, but prompt and reminders never name more than 48: a larger budget counts down
                   only from there (nothing to train: for a model of remind)
    remind_16, remind_16_capped  the same after every 16 tokens, when the shortest chain of thought is over
    free_beyond    budgets up to 96 are trained, those above 48 by length alone: they need no answers
    unfinished     the same, but responses are cut at 56 tokens: one asked for more must not have ended
"""

import importlib
import re
import sys
from collections.abc import Callable

import numpy as np

import data
import methods
import rewards
from toy import hf_sampler

LARGEST, CUT = 48, 56  # tokens: the largest budget whose answers count; where "unfinished" cuts
MLT = range(8, 97, 8)  # the lengths that have a token of their own

# ------------------------------------------------------------------------------------------------------------
# Other sentences


def ask_by(sentence: Callable[[int], str]) -> None:
    """Ask for budgets by `sentence` in place of "Think for N tokens.", in training and evaluation."""

    def budget_prompt(problem, budget, *rest, **options):
        return problem if budget is None else f"{problem}\n{sentence(int(budget))}"

    data.budget_prompt = budget_prompt


def relative(budget: int) -> str:
    """Percent of the largest trained budget."""
    return f"Think for {round(100 * budget / LARGEST)} maximum tokens."


def tally(budget: int, worth: int = 4) -> str:
    """A mark for every `worth` tokens; the toy's tokenizer lends a word."""
    return "Think for " + "up " * max(1, round(budget / worth)) + "tokens."


def mlt(budget: int) -> str:
    """A token of its own for the nearest length that has one."""
    return f"<MLT:{min(MLT, key=lambda n: abs(n - budget))}>"


# ------------------------------------------------------------------------------------------------------------
# Two rewards and a method


def length_beyond(rollouts: dict, parts: bool = False):
    """peaked_exact whose correctness counts up to LARGEST only: longer budgets need no answers."""
    terms = rewards.peaked_exact(rollouts, parts=True)
    terms["correct"] = terms["correct"] * (np.asarray(rollouts["budget"])[:, None] <= LARGEST)
    return terms if parts else sum(terms.values())


def censored(rollouts: dict, parts: bool = False):
    """length_beyond; a response that was cut before its budget has been as long as it was asked to be."""
    terms = length_beyond(rollouts, parts=True)
    cut = np.asarray(rollouts["truncated"]) * (np.asarray(rollouts["budget"])[:, None] > CUT)
    terms["length"] = np.where(cut > 0, 1.0, terms["length"])
    return terms if parts else sum(terms.values())


class Unfinished(methods.Method):
    """No response gets longer than CUT in training, whatever is asked."""

    def requests(self, row):
        return [asked | {"cap": min(CUT, asked["cap"])} for asked in super().requests(row)]


# ------------------------------------------------------------------------------------------------------------
# A sampler


class Reminded(hf_sampler.HFSampler):
    """Writes the tokens that are left behind every `every` tokens of the thinking.

    A reminder counts in the length and in what is left, and no loss falls on it. Neither the reminders nor
    the prompt name more than `most` tokens.
    """

    every, most = 8, None

    def generate(self, prompts, n, caps, temperature, seed, **options):
        """See HFSampler.generate; responses have a "mask" [L] besides, 0 on the reminders."""
        end = self.tokenizer.encode("</think>", add_special_tokens=False)[0]
        rows = [self.begin(p, cap) for p, cap in zip(prompts, caps, strict=True) for _ in range(n)]
        while live := [r for r in rows if r["truncated"] is None]:
            contexts = [r["prompt"] + r["ids"] for r in live]
            room = [min(self.every, r["cap"] - len(r["ids"])) for r in live]
            found = super().generate(contexts, 1, room, temperature, seed, **options)
            seed += 1
            for r, [more] in zip(live, found, strict=True):
                add(r, more["ids"].tolist(), more["logps"].tolist(), 1.0)
                if not more["truncated"] or len(r["ids"]) >= r["cap"]:
                    r["truncated"] = more["truncated"]
                elif end not in r["ids"]:
                    self.remind(r)
        types = {"ids": np.int32, "logps": np.float32, "mask": np.float32, "truncated": int}
        done = [{k: np.array(r[k], dtype)[()] for k, dtype in types.items()} for r in rows]
        return [done[i : i + n] for i in range(0, len(done), n)]

    def begin(self, prompt: list[int], cap: int) -> dict:
        """A response without tokens; its prompt asks for `most` tokens at most."""
        found = re.search(r"Think for (\d+) tokens", self.tokenizer.decode(prompt))
        budget = int(found[1]) if found else 0
        if self.most and budget > self.most:
            old, new = (self.spell(f"for {number} tokens") for number in (budget, self.most))
            at = next(i for i in range(len(prompt)) if prompt[i : i + len(old)] == old)
            prompt = prompt[:at] + new + prompt[at + len(old) :]
        made = {"prompt": prompt, "cap": cap, "budget": budget, "truncated": None}
        return made | {"ids": [], "logps": [], "mask": []}

    def remind(self, r: dict) -> None:
        """Append the number of tokens left behind the number, where any are left and there is room for it."""
        left = r["budget"] - len(r["ids"]) - 2
        left = min(left - (left > 99), self.most or left)  # three digits from 100 on
        ids = self.spell(" ".join(f"##{digit}" for digit in f"{left:02d}"))
        if left > 0 and len(r["ids"]) + len(ids) < r["cap"]:
            add(r, ids, [np.nan] * len(ids), 0.0)  # not sampled, so without a log-prob

    def spell(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def add(r: dict, ids: list[int], logps: list[float], mask: float) -> None:
    r["ids"], r["logps"], r["mask"] = r["ids"] + ids, r["logps"] + logps, r["mask"] + [mask] * len(ids)


def use_reminders(every: int = 8, most: int | None = None) -> None:
    """Both scripts import HFSampler when they need it, so they get this one."""
    Reminded.every, Reminded.most, hf_sampler.HFSampler = every, most, Reminded


def add_reward(reward: Callable, method: type = methods.Method) -> None:
    """Make `--reward NAME` known, and `method` what training does without --method."""
    rewards.register(rewards.REWARDS, "budget")(reward)
    methods.Method = method


IDEAS = {
    "relative": lambda: ask_by(relative),
    "tally": lambda: ask_by(tally),
    "tally_8": lambda: ask_by(lambda budget: tally(budget, 8)),
    "mlt": lambda: ask_by(mlt),
    "remind": lambda: use_reminders(),
    "remind_capped": lambda: use_reminders(most=LARGEST),
    "remind_16": lambda: use_reminders(16),
    "remind_16_capped": lambda: use_reminders(16, LARGEST),
    "free_beyond": lambda: add_reward(length_beyond),
    "unfinished": lambda: add_reward(censored, Unfinished),
}

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:2]):
        sys.exit(print(__doc__))
    if len(sys.argv) < 3 or sys.argv[1] not in IDEAS or sys.argv[2] not in ("train_grpo", "evaluate"):
        sys.exit(__doc__)
    IDEAS[sys.argv[1]]()
    try:
        sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
    except data.BadInput as error:
        print(f"{sys.argv[2]}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
