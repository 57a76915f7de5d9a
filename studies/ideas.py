"""Other ways to train and to ask than the toy's default, for the study: each is put in before a script runs.

    python -m studies.ideas NAME train_grpo FLAGS...     training with that idea put in
    python -m studies.ideas NAME evaluate FLAGS...

Also an example of a fork that leaves the other files alone: a sentence, a reward, a sampler of its own.

    remind        responses go on behind reminders, fractions of the budget (methods/reminders.py)
    remind_only   the same, and the prompt names no budget: the reminders alone tell
    remind_count  reminders that name numbers, tokens used and tokens left
    multiplied    a reward: right or wrong times how near the length is
"""

import importlib
import sys

import numpy as np

import data
import rewards
from evaluation import engines
from integrations.remind import Reminded
from methods import reminders

COUNT = "used ##{used} left ##{left}"


def remind(form: str | None = None, asked: bool = True) -> None:
    """Reminders of a form in training (--method reminders) and evaluation; `asked`: the prompt tells, too."""
    reminders.FORM, plain = form or reminders.FORM, engines.open_sampler

    def open_sampler(*words, **options):
        sampler = plain(*words, **options)
        return Reminded(sampler, sampler.tokenizer, reminders.FORM)

    engines.open_sampler = open_sampler
    if not asked:
        data.budget_prompt = lambda problem, *rest, **options: problem


def multiplied() -> None:
    """c exp(-|L - budget| / tau): wrong answers earn nothing, right ones all of it at the budget only."""

    @rewards.register(rewards.REWARDS, "budget")
    def multiplied(rollouts, tau=6.0):
        terms = rewards.peaked_exact(rollouts, tau, parts=True)
        return terms["correct"] * np.asarray(terms["length"])


IDEAS = {
    "remind": remind,
    "remind_only": lambda: remind(asked=False),
    "remind_count": lambda: remind(COUNT),
    "multiplied": multiplied,
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
