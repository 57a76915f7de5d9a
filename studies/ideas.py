"""Ideas against the open question of docs/study.md: can control reach beyond the largest trained budget?

    python -m studies.ideas NAME train_grpo.py FLAGS...     the script with that idea put in
    python -m studies.ideas NAME evaluate.py FLAGS...

Also an example of how to fork: an idea is a function that replaces one function of the project, or adds a
reward. The budgets up to 48 tokens are the trained ones; those up to 96 are what is hoped for.

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

import os
import re
import sys
from collections.abc import Callable

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

LARGEST, CUT = 48, 56  # tokens: the largest budget whose answers count; where "unfinished" cuts
MLT = range(8, 97, 8)  # the lengths that have a token of their own
EVERY = 8  # tokens between two reminders


def ask_by(sentence: Callable[[int], str]) -> None:
    """Ask for budgets by `sentence` in place of "Think for N tokens.", in data, training and evaluation."""
    import data

    def budget_prompt(problem, budget, mode, kind="math", wording="tulu", apart=False):
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


def length_beyond(rollouts: dict, parts: bool = False):
    """peaked_exact whose correctness counts up to LARGEST only: longer budgets need no answers."""
    from rewards import peaked_exact

    terms = peaked_exact(rollouts, parts=True)
    terms["correct"] = terms["correct"] * (np.asarray(rollouts["budget"])[:, None] <= LARGEST)
    return terms if parts else sum(terms.values())


def censored(rollouts: dict, parts: bool = False):
    """length_beyond; a response that was cut before its budget has been as long as it was asked to be."""
    terms = length_beyond(rollouts, parts=True)
    cut = np.asarray(rollouts["truncated"]) * (np.asarray(rollouts["budget"])[:, None] > CUT)
    terms["length"] = np.where(cut > 0, 1.0, terms["length"])
    return terms if parts else sum(terms.values())


def add_reward(name: str, reward: Callable, cut: int | None = None) -> None:
    """Make `--reward NAME` known; `cut`: no response gets longer than that in training, whatever is asked."""
    import methods
    import rewards

    reward.needs, reward.compares_group = ("budget",), False
    rewards.REWARDS[name] = reward
    if cut:
        whole = methods.response_cap
        methods.response_cap = lambda *args: min(cut, whole(*args))


def with_reminders(generate: Callable, most: int | None = None, every: int = EVERY) -> Callable:
    """HFSampler.generate that writes the tokens left behind every `every` tokens of the thinking.

    A reminder's tokens count in the length and in what is left, and no loss falls on them. Neither the
    reminders nor the prompt name more than `most` tokens.
    """

    def reminded(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=None, *rest, **options):
        caps = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        end, rows = self.tokenizer.encode("</think>", add_special_tokens=False)[0], []
        for prompt, cap in zip(prompts, caps, strict=True):
            asked = re.search(r"Think for (\d+) tokens", self.tokenizer.decode(prompt))
            row = {"prompt": prompt, "cap": cap, "budget": int(asked[1]) if asked else 0, "most": most}
            if most and row["budget"] > most:
                row["prompt"] = rename(prompt, row["budget"], most, self.tokenizer)
            rows += [row | {"ids": [], "logps": [], "untrained": [], "finish_reason": None} for _ in range(n)]
        for turn in range(max(caps)):
            live = [r for r in rows if r["finish_reason"] is None]
            if not live:
                break
            contexts = [r["prompt"] + r["ids"] for r in live]
            room = [min(every, r["cap"] - len(r["ids"])) for r in live]
            found = generate(
                self, contexts, 1, room, temperature, top_p, None if seed is None else seed + turn
            )
            for r, [more] in zip(live, found, strict=True):
                r["ids"], r["logps"] = r["ids"] + list(more["ids"]), r["logps"] + list(more["logps"])
                if more["finish_reason"] == "stop" or len(r["ids"]) >= r["cap"]:
                    r["finish_reason"] = more["finish_reason"]
                elif end not in r["ids"]:
                    remind(r, self.tokenizer)
        groups = [rows[i : i + n] for i in range(0, len(rows), n)]
        keys = ("ids", "logps", "finish_reason", "untrained")
        groups = [[{k: r[k] for k in keys if k != "untrained" or r[k]} for r in group] for group in groups]
        for i, group in enumerate(groups) if options.get("finished") else ():
            options["finished"](i, group)
        return groups

    return reminded


def rename(prompt: list[int], budget: int, other: int, tokenizer) -> list[int]:
    """The prompt with another number of tokens in it."""
    old, new = (tokenizer.encode(f"for {n} tokens", add_special_tokens=False) for n in (budget, other))
    at = next(i for i in range(len(prompt)) if prompt[i : i + len(old)] == old)
    return prompt[:at] + new + prompt[at + len(old) :]


def remind(r: dict, tokenizer) -> None:
    """Append the number of tokens left behind the number, where any are left and there is room for it."""
    left = r["budget"] - len(r["ids"]) - 2
    left = min(left - (left > 99), r["most"] or left)  # three digits from 100 on
    ids = tokenizer.encode(" ".join(f"##{d}" for d in f"{left:02d}"), add_special_tokens=False)
    if left <= 0 or len(r["ids"]) + len(ids) >= r["cap"]:
        return
    r["untrained"] += range(len(r["ids"]), len(r["ids"]) + len(ids))
    r["ids"], r["logps"] = r["ids"] + ids, r["logps"] + [0.0] * len(ids)


def put_in(name: str) -> None:
    """Change the project's modules so that the scripts run with the idea."""
    from sampler import HFSampler as hf

    ideas = {
        "none": lambda: None,
        "relative": lambda: ask_by(relative),
        "tally": lambda: ask_by(tally),
        "tally_8": lambda: ask_by(lambda budget: tally(budget, 8)),
        "mlt": lambda: ask_by(mlt),
        "remind": lambda: setattr(hf, "generate", with_reminders(hf.generate)),
        "remind_capped": lambda: setattr(hf, "generate", with_reminders(hf.generate, LARGEST)),
        "remind_16": lambda: setattr(hf, "generate", with_reminders(hf.generate, every=16)),
        "remind_16_capped": lambda: setattr(hf, "generate", with_reminders(hf.generate, LARGEST, every=16)),
        "free_beyond": lambda: add_reward("length_beyond", length_beyond),
        "unfinished": lambda: add_reward("censored", censored, CUT),
    }
    if name not in ideas:
        sys.exit(f"ideas.py: error: {name!r} is no idea: use one of {', '.join(ideas)}")
    ideas[name]()


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[2] not in ("train_grpo.py", "evaluate.py"):
        sys.exit(__doc__)
    put_in(sys.argv[1])
    script = __import__(sys.argv[2].removesuffix(".py"))
    sys.exit(script.main(sys.argv[3:]))
