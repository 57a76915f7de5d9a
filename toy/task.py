"""A world small enough for a laptop: a reasoning task, a tokenizer and a base model of 0.5M parameters.

It plays the part of nanoGPT's shakespeare_char. The base model can reason (a running sum modulo ten), can
check itself (`wait` and a few steps once more), and thinks for a random number of tokens whatever one asks:

    prompt    add 7 3 9 Think for 24 tokens.
    response  7 +3 =0 +9 =9 wait =0 +9 =9 wait wait =9 </think> 9 <eos>

That is the state of a real reasoning model before L1: able, and deaf to budgets. A second task, the running
maximum (`max 7 3 9`: `7 ^3 =7 ^9 =9`), is taught in the warm-up, never trained by RL: the out-of-domain test.
All is drawn from seeds; the finished base model is an ordinary Hugging Face folder that vLLM loads too.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np

from data import BadInput

if TYPE_CHECKING:  # libraries that are loaded late
    from transformers import PreTrainedTokenizerBase

DIGITS = 3, 6  # a problem has between 3 and 6 digits (both included)
CONTEXT = 512  # positions of the base model: room for budgets far beyond the trained ones
TASKS = {"toy": "add", "toy_ood": "max"}  # the name that --data takes -> the word that starts a problem


# ------------------------------------------------------------------------------------------------------------
# The task


def solve(word: str, digits: list[int]) -> list[int]:
    """Running results of a problem, one per digit; the last one is the answer."""
    step = (lambda a, b: (a + b) % 10) if word == "add" else max
    results = [digits[0]]
    for digit in digits[1:]:
        results.append(step(results[-1], digit))
    return results


def draw(word: str, rng: np.random.Generator) -> str:
    """A random problem of the task that begins with `word`."""
    digits = rng.integers(0, 10, size=rng.integers(DIGITS[0], DIGITS[1] + 1)).tolist()
    return " ".join([word, *map(str, digits)])


def held_out(problem: str) -> bool:
    """Whether a problem is kept for testing; a checksum of its text says so, whatever was drawn before."""
    return zlib.crc32(problem.encode()) % 10 == 0


def problems(task: str, split: str, n: int, seed: int = 0) -> list[dict]:
    """n problems of `task` ("toy", "toy_ood"); those of `split` "test" are new to the base and to RL."""
    if n > 50_000:
        raise BadInput(f"{n} toy problems were asked for; there are not many more: ask for up to 50000")
    rng, rows, seen = np.random.default_rng([seed, split == "test", task == "toy_ood"]), [], set()
    while len(rows) < n:
        problem = draw(TASKS[task], rng)
        if held_out(problem) != (split == "test") or problem in seen:
            continue
        seen.add(problem)
        answer = str(solve(TASKS[task], [int(d) for d in problem.split()[1:]])[-1])
        rows.append({"id": f"{task}-{split}-{len(rows)}", "problem": problem, "answer": answer})
        rows[-1] |= {"kind": "math", "source": task}
    return rows


def trace(problem: str, extra: int, rng: np.random.Generator) -> str:
    """A right chain of thought for `problem`, prolonged by re-checks of at least `extra` tokens."""
    word, *digits = problem.split()
    digits = [int(d) for d in digits]
    sign, results = ("+" if word == "add" else "^"), solve(word, digits)
    steps = [f"{sign}{d} ={r}" for d, r in zip(digits[1:], results[1:], strict=True)]
    words = [str(digits[0]), *" ".join(steps).split()]
    target = len(words) + extra
    while len(words) < target:
        words.append("wait")
        # Now and then it only hesitates: without these single tokens every trace would have an even length.
        if rng.random() < 0.75:
            first = int(rng.integers(max(0, len(digits) - 3), len(digits)))
            words += [f"={results[first]}", *" ".join(steps[first:]).split()]
    return " ".join([*words, "</think>", str(results[-1])])


# ------------------------------------------------------------------------------------------------------------
# The tokenizer and the model


def make_tokenizer() -> "PreTrainedTokenizerBase":
    """Tokenizer of 66 tokens; numbers are spelled digit by digit, so any budget can be written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<user>", "<think>", "</think>", "<unk>", "wait", "add", "max"]
    words += ["Think", "for", "up", "to", "maximum", "tokens", "##."]
    # ##4 is a digit within a number: 24 is `2 ##4`. Were it the 4 of the problem, the base model would have
    # learned to look past it, and RL would need far longer to find out that it matters.
    words += [sign + str(d) for sign in ("", "+", "^", "=", "##") for d in range(10)]
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
