"""A world small enough for a laptop: a reasoning task, a tokenizer and a base model of 0.35M parameters.

It plays the part of nanoGPT's shakespeare_char. The base model can reason (a running sum modulo ten), takes
short cuts in its head and errs there where digits are large, mends that when it goes through all once more,
knows what a number means (`write 24 tokens.` gets a text of 24), and thinks for a random number of tokens
whatever budget one asks for:

    prompt    add a +7 b +3 c +8 Think for 40 tokens.
    response  a +7 =7 b =0 c +8 =8 wait =8 wait a =7 b +3 =0 c +8 =8 wait wait </think> 8 <eos>

That is the state of a real reasoning model before L1: able, and deaf to budgets (this response has 24). A
whole chain needs 9 to 36 tokens in full, 8 to 26 at the shortest: a small budget leaves room for short cuts
only, or for a guess. A second task, the largest digit (`max a +7 b +3`), is taught in the warm-up, never
trained by RL: the out-of-domain test. All is drawn from seeds; the finished base model is an ordinary Hugging
Face folder that vLLM loads too.
"""

import itertools
import zlib
from typing import TYPE_CHECKING

import numpy as np

from data import BadInput

if TYPE_CHECKING:  # libraries that are loaded late
    from transformers import PreTrainedTokenizerBase

SIZES = 2, 11  # a problem has between 2 and 11 digits (both included)
NAMES = "abcdefghijk"
HARD = 7  # two digits of at least this much are added wrong in the head
GIVE_UP = 0.1  # share of the chains that stop early and answer with the result so far
CONTEXT = 512  # positions of the base model: room for budgets far beyond the trained ones
TASKS = {"toy": "add", "toy_ood": "max"}  # the name that --data takes -> the word that starts a problem


# ------------------------------------------------------------------------------------------------------------
# The task


def solve(word: str, digits: list[int]) -> list[int]:
    """Running results of a problem, one per digit; the last one is the answer."""
    step = (lambda a, b: (a + b) % 10) if word == "add" else max
    return list(itertools.accumulate(digits, step))


def draw(word: str, rng: np.random.Generator) -> str:
    """A random problem of the task that begins with `word`; its digits have names."""
    digits = rng.integers(0, 10, size=rng.integers(SIZES[0], SIZES[1] + 1))
    return " ".join([word, *(f"{name} +{digit}" for name, digit in zip(NAMES, digits, strict=False))])


def digits_of(problem: str) -> list[int]:
    return [int(digit) for digit in problem.split()[2::2]]


def held_out(problem: str) -> bool:
    """Whether a problem is kept for testing; a checksum of its text says so, whatever was drawn before."""
    return zlib.crc32(problem.encode()) % 10 == 0


def problems(task: str, split: str, n: int, seed: int = 0) -> list[dict]:
    """n problems of `task` ("toy", "toy_ood"); those of `split` "test" are new to the base and to RL."""
    if n > 50_000:
        raise BadInput(f"{n} toy problems were asked for: ask for up to 50000")
    rng, rows, seen = np.random.default_rng([seed, split == "test", task == "toy_ood"]), [], set()
    while len(rows) < n:
        problem = draw(TASKS[task], rng)
        if held_out(problem) != (split == "test") or problem in seen:
            continue
        seen.add(problem)
        answer = str(solve(TASKS[task], digits_of(problem))[-1])
        rows.append({"id": f"{task}-{split}-{len(rows)}", "problem": problem, "answer": answer})
        rows[-1] |= {"kind": "math", "source": task}
    return rows


def trace(problem: str, extra: int, rng: np.random.Generator, in_head=None, give_up=GIVE_UP) -> str:
    """A chain of thought for `problem`: given up early, or prolonged by at least `extra` tokens.

    A share `in_head` of its later steps (None: drawn) is short, `b =1` for `b +3 =1`; large digits err there.
    """
    word, digits = problem.split()[0], digits_of(problem)
    words, ends = [NAMES[0], f"+{digits[0]}", f"={digits[0]}"], [3]
    said = list(digits)  # the results as last stated
    in_head = rng.random() if in_head is None else in_head

    def go_on(in_head):
        for i in range(1, len(digits)):
            said[i] = solve(word, [said[i - 1], digits[i]])[-1]
            if rng.random() < in_head:
                said[i] = (said[i] + (word == "add" and min(said[i - 1], digits[i]) >= HARD)) % 10
                words.extend([NAMES[i], f"={said[i]}"])
            else:
                words.extend([NAMES[i], f"+{digits[i]}", f"={said[i]}"])
            ends.append(len(words))

    go_on(in_head)
    if rng.random() < give_up:
        done, waits = int(rng.integers(len(digits))), ["wait"] * int(rng.integers(4))
        return " ".join([*words[: ends[done]], *waits, "</think>", str(said[done])])
    target = len(words) + extra
    while len(words) < target:
        words.append("wait")
        # It hesitates, says the result again, or goes through all once more in full, which mends what it got
        # wrong. Were every trace of 3 n tokens, RL could not hit the lengths between.
        kind = rng.random()
        if kind < 0.2:
            words += [NAMES[0], f"={said[0]}"]
            go_on(0)
        elif kind < 0.45:
            words.append(f"={said[-1]}")
    return " ".join([*words, "</think>", str(said[-1])])


# ------------------------------------------------------------------------------------------------------------
# The tokenizer and the model


def make_tokenizer() -> "PreTrainedTokenizerBase":
    """Tokenizer of 77 tokens; numbers are spelled digit by digit, so any budget can be written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<user>", "<think>", "</think>", "<unk>", "wait", "add", "max", "write"]
    words += ["Think", "for", "up", "to", "maximum", "tokens", "##.", "used", "left"]
    words += [f"<{i}/8>" for i in range(1, 8)]  # of the budget is used: methods/reminders.py
    # ##4 is a digit within a number: 24 is `2 ##4`. Were it the 4 of the problem, the base model would have
    # learned to look past it, and RL would need far longer to find out that it matters.
    words += [sign + str(d) for sign in ("", "+", "=", "##") for d in range(10)] + [*NAMES]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )
    # The thinking part is opened by the prompt, as in the templates of DeepSeek-R1 and its distillations.
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} "
        "{% else %}{{ m.content }} <eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    return tokenizer
