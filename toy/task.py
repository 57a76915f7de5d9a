"""A world small enough for a laptop: a reasoning task, a tokenizer and a base model of 0.5M parameters.

It plays the part of nanoGPT's shakespeare_char. The base model can reason (a running sum modulo ten), can
check itself (`wait` and a few steps once more), and thinks for a random number of tokens whatever one asks:

    prompt    add 7 3 9 Think for 24 tokens.
    response  7 +3 =0 +9 =9 wait =0 +9 =9 wait wait =9 </think> 9 <eos>

That is the state of a real reasoning model before L1: able, and deaf to budgets. A second task, the running
maximum (`max 7 3 9`: `7 ^3 =7 ^9 =9`), is taught in the warm-up, never trained by RL: the out-of-domain test.
All is drawn from seeds; the finished base model is an ordinary Hugging Face folder that vLLM loads too.
"""

import itertools
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from data import BadInput

if TYPE_CHECKING:  # libraries that are loaded late
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIGITS = 3, 6  # a problem has between 3 and 6 digits (both included)
CONTEXT = 512  # positions of the base model: room for budgets far beyond the trained ones
TASKS = {"toy": "add", "toy_ood": "max"}  # the name that --data takes -> the word that starts a problem
BUDGETS = "bucket:16,32,48,64"  # 16 is the least that holds the longest plain chain of thought (14 tokens)
ASKED_BEFORE = [16, 32, 48, 64]  # budgets of the evaluation before training, and of the one after it:
ASKED = [16, 24, 32, 40, 48, 56, 64, 80, 96, 128]  # trained ones, ones between them, ones beyond them
TESTED = 100  # problems of each task in them
WARMUP = {"batches": 500, "batch_size": 64, "lr": 2e-3, "extra": 72}
VERSION = 2  # part of the cache's name: a base model made by another recipe is never taken for this one


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


def make_model(tokenizer, seed: int) -> "PreTrainedModel":
    """A 2-layer Llama with random weights; heads of 32 because vLLM's CPU attention takes no smaller ones.

    Not a Qwen2: transformers 5 opens every Qwen2 folder with Qwen's own tokenizer class, whatever it holds.
    """
    # Input and output embeddings are not tied: no response ever holds a budget's digits, so as outputs they
    # would all be pushed the same way until, as inputs, one looked like the other.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def warmup_examples(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) of the warm-up: budgets are asked for, the traces ignore them."""
    rng = np.random.default_rng(seed)
    form = ("", "Think for {} tokens.", "Think for up to {} tokens.", "Think for maximum {} tokens.")
    while True:
        task = "toy" if rng.random() < 0.7 else "toy_ood"
        while held_out(problem := draw(TASKS[task], rng)):
            pass
        ask = form[rng.choice(4, p=[0.1, 0.7, 0.1, 0.1])].format(rng.integers(8, 130))
        response = trace(problem, int(rng.integers(0, WARMUP["extra"] + 1)), rng)
        yield f"<user> {problem} {ask} <think>", response + " <eos>"


def warmup_batch(tokenizer, examples: Iterator[tuple[str, str]], batch_size: int) -> tuple:
    """(input ids, labels), each [batch_size, T]; only the responses are taught."""
    import torch

    ids, labels = [], []
    for prompt, response in itertools.islice(examples, batch_size):
        prompt, response = tokenizer.encode(prompt), tokenizer.encode(response)
        ids.append(prompt + response)
        labels.append([-100] * len(prompt) + response)
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id
    return (
        torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
        torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    )


def make_base(cache: str = "out", seed: int = 0, log=print) -> str:
    """Path of the toy's base model of `seed`; made on the first call (a minute or two), kept in `cache`."""
    path = os.path.join(cache, f"toy_base_v{VERSION}_seed{seed}")
    if os.path.exists(os.path.join(path, "model.safetensors")):
        log(f"toy: base model {path} (cached)")
        return path
    import torch

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed).train()
    examples, n = warmup_examples(seed), WARMUP["batches"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    log(f"toy: teaching a base model of {model.num_parameters() / 1e6:.2f}M parameters, {n} batches")
    for i in range(n):
        lr = WARMUP["lr"] * min(1.0, (i + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * i / n))
        optimizer.param_groups[0]["lr"] = lr
        ids, labels = warmup_batch(tokenizer, examples, WARMUP["batch_size"])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (i + 1) % 50 == 0:
            log(f"toy: batch {i + 1:4d}/{n}  loss {loss.item():.3f}")
    # Made beside its place and renamed: a run that is killed here leaves no half model behind.
    os.makedirs(cache, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".toy_base_", dir=cache)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    with open(os.path.join(temporary, "warmup.json"), "w") as f:
        json.dump({"seed": seed, "version": VERSION, **WARMUP}, f)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)
    return path


def make_conciseness(cache: str = "out", seed: int = 0, log=print) -> str:
    """Path of a small classifier whose sigmoid is 1 for a plain trace, 0 for one prolonged to the limit.

    It plays the conciseness reward model of CRF; like the base model it is made once (seconds) and kept.
    """
    path = os.path.join(cache, f"toy_conciseness_v{VERSION}_seed{seed}")
    if os.path.exists(os.path.join(path, "model.safetensors")):
        return path
    import torch
    from transformers import LlamaForSequenceClassification

    tokenizer = make_tokenizer()
    config = make_model(tokenizer, seed).config
    config.num_labels = 1
    model, rng = LlamaForSequenceClassification(config).train(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    log("toy: teaching a conciseness model")
    for _ in range(50):
        extra = rng.integers(0, WARMUP["extra"] + 1, 16)
        batch = tokenizer([trace(draw("add", rng), int(x), rng) for x in extra], padding=True)
        ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        target = torch.tensor(1 - extra / WARMUP["extra"]).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    os.makedirs(cache, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".toy_conciseness_", dir=cache)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(temporary, path)
    return path


def summary(out: str) -> str:
    """Before and after in two lines, from the two evaluations of a toy run."""
    both = []
    for name in ("eval_base", "eval"):
        with open(os.path.join(out, name, "results.json")) as f:
            both.append(json.load(f)["datasets"]["toy"]["budgets"])
    budgets = list(both[0])  # those that were asked before training, all of them again after it
    errors = [f"{np.mean([cells[b]['abs_error'] for b in budgets]):.1%}" for cells in both]
    largest, asked = max(budgets, key=int), ", ".join(budgets)
    right = [f"{cells[largest]['accuracy']:.1%}" for cells in both]
    return (
        f"asked for {asked} tokens: mean error {errors[0]} before, {errors[1]} after; accuracy at {largest} "
        f"tokens: {right[0]} before, {right[1]} after\nlook at {os.path.join(out, 'eval', 'violins_toy.png')}"
    )
