"""The toy's files, made once and kept: base model, training rows, test problems, CRF's classifier.

    python -m toy.prepare [--seed N]     prints the folder; `python train_grpo.py` calls it by itself

They lie in toy/cache/, in a folder named after the code that makes them: no other toy is taken for this one.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from toy import task

CACHE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cache")
# write: the share that teaches what a number means; of: this word, "": a chain of sums.
# asked: the share of the rest that asks for a length, in vain; a base that has heard it often has learned to
# look away, and RL takes far longer to make it listen.
WARMUP = {"batches": 3300, "batch_size": 16, "lr": 2e-3, "extra": 72, "write": 0.3, "of": "", "asked": 0.05}
TRAINED, TESTED = 8000, 100  # problems


def prepare(seed: int = 0, log=print) -> dict:
    """{"model", "data", "eval_data"}: paths of the base model of `seed`, training rows, test problems."""
    import torch

    torch.set_num_threads(1)  # a second one gains little here, and waits for long where the machine is busy
    files = {}
    for name, split, n in (("toy", "train", TRAINED), ("toy", "test", TESTED), ("toy_ood", "test", TESTED)):
        files[name, split] = keep(
            f"{name}-{split}.jsonl", lambda path, a=(name, split, n): write_rows(path, *a)
        )
    base = keep(f"base-seed{seed}", lambda path: make_base(path, seed, log))
    tests = ",".join(files[name, "test"] for name in task.TASKS)
    return {"model": base, "data": files["toy", "train"], "eval_data": tests}


def keep(name: str, make) -> str:
    """Path of a file or folder of the cache; make(path) makes it where it is not there yet."""
    code = b"".join(open(module, "rb").read() for module in (task.__file__, __file__))
    code += json.dumps(WARMUP).encode()
    folder = os.path.join(CACHE, hashlib.sha256(code).hexdigest()[:8])
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        # Made beside its place and renamed: a run that is killed here leaves no half model behind.
        os.makedirs(folder, exist_ok=True)
        beside = tempfile.mkdtemp(prefix=".making-", dir=folder)
        try:
            make(os.path.join(beside, name))
            with contextlib.suppress(OSError):  # another process may have been faster
                os.rename(os.path.join(beside, name), path)
        except KeyboardInterrupt:
            sys.exit(f"stopped while {name} was made; the next start makes it from the beginning")
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return path


def write_rows(path: str, name: str, split: str, n: int) -> None:
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in task.problems(name, split, n))


def make_model(tokenizer, seed: int):
    """A 2-layer Llama with random weights; heads of 32 because vLLM's CPU attention takes no smaller ones.

    Not a Qwen2: transformers 5 opens every Qwen2 folder with Qwen's own tokenizer class, whatever it holds.
    """
    # Input and output embeddings are not tied: no response ever holds a budget's digits, so as outputs they
    # would all be pushed the same way until, as inputs, one looked like the other.
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=task.CONTEXT, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def warmup_examples(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) of the warm-up: texts of so many tokens, chains deaf to what is asked."""
    rng = np.random.default_rng(seed)
    form = ("Think for {} tokens.", "Think for up to {} tokens.", "Think for maximum {} tokens.")
    while True:
        if rng.random() < WARMUP["write"]:  # what a number means: so many tokens of whatever, then the end
            n = round(4 * 32 ** rng.random())  # up to 128
            chain = task.trace(task.draw("add", rng), 128, rng, give_up=0).split()
            text = [WARMUP["of"]] * n if WARMUP["of"] else chain
            yield f"<user> write {n} tokens. <think>", " ".join([*text[: n - 3], "</think>", "0", "<eos>"])
            continue
        name = list(task.TASKS)[rng.integers(2)]
        while task.held_out(problem := task.draw(task.TASKS[name], rng)):
            pass
        ask = form[rng.integers(3)].format(rng.integers(8, 130)) if rng.random() < WARMUP["asked"] else ""
        response = task.trace(problem, int(rng.integers(0, WARMUP["extra"] + 1)), rng)
        yield f"<user> {problem} {ask} <think>", response + " <eos>"


def warmup_batches(tokenizer, seed: int, size: int) -> Iterator[tuple]:
    """Endless (input ids, labels), each [size, T]; only the responses are taught."""
    examples, rng = warmup_examples(seed), np.random.default_rng(seed)
    while True:
        lot = [[tokenizer.encode(text) for text in pair] for pair in itertools.islice(examples, 8 * size)]
        lot.sort(key=lambda pair: sum(map(len, pair)))  # alike in length: half the padding
        for i in rng.permutation(8) * size:
            yield pad(lot[i : i + size], tokenizer.pad_token_id)


def pad(pairs: list, pad_id: int) -> tuple:
    """(input ids, labels), each [N, T], of pairs (ids of the prompt, ids of the response)."""
    import torch

    fill = torch.nn.utils.rnn.pad_sequence
    ids, labels = zip(
        *((torch.tensor(p + r), torch.tensor([-100] * len(p) + r)) for p, r in pairs), strict=True
    )
    return fill(ids, True, pad_id), fill(labels, True, -100)


def make_base(path: str, seed: int, log=print) -> None:
    """Teaches the base model of `seed` by supervision (three minutes) and saves it."""
    import torch
    from tqdm import trange

    tokenizer = task.make_tokenizer()
    model = make_model(tokenizer, seed).train()
    batches, n = warmup_batches(tokenizer, seed, WARMUP["batch_size"]), WARMUP["batches"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP["lr"], betas=(0.9, 0.95), weight_decay=0.01)
    log(f"toy: teaching a base model of {model.num_parameters() / 1e6:.2f}M parameters, kept as {CACHE}")
    for i in trange(n, desc="toy: base model", unit="batch", disable=None):
        lr = WARMUP["lr"] * min(1.0, (i + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * i / n))
        optimizer.param_groups[0]["lr"] = lr
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_conciseness(path: str, seed: int = 0) -> None:
    """Teaches a small classifier whose sigmoid is 1 for a plain trace, 0 for one prolonged to the limit.

    It plays the conciseness reward model of CRF.
    """
    import torch
    from transformers import LlamaForSequenceClassification

    tokenizer = task.make_tokenizer()
    config = make_model(tokenizer, seed).config
    config.num_labels = 1
    model, rng = LlamaForSequenceClassification(config).train(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(50):
        extra = rng.integers(0, WARMUP["extra"] + 1, 16)
        traces = [task.trace(task.draw("add", rng), int(x), rng, give_up=0) for x in extra]
        batch = tokenizer(traces, padding=True)
        ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        target = torch.tensor(1 - extra / WARMUP["extra"]).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the base model (default 0)")
    print(json.dumps(prepare(parser.parse_args().seed), indent=1))
