"""A supervised warm start: a model is taught its own responses, each asked for by exactly its length.

    python -m studies.warm_start MODEL OUT --data ROWS

MODEL answers problems as it likes; what ends by itself within --cap tokens is taught to it again, behind a
prompt with that length as its budget; long ones, which are rare, are drawn more often. No reward, no sampling
while it learns. RL can start from there where a model is deaf to budgets: as long as a budget changes
nothing, no reward can tell it what a budget is for.
OUT/responses.jsonl keeps what was sampled; run again, it is read instead.
--idea: one of studies/ideas.py; with `remind` and its kin a response holds the reminders of its length.
"""

import argparse
import json
import math
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

import data
import methods
import train_grpo
import verifier
from methods.reminders import Reminders
from scaling import model as net
from studies import ideas
from toy.hf_sampler import HFSampler


def own_responses(model, tokenizer, problems: list[dict], args) -> list[dict]:
    """The problems, each with the "ids" of a response to it as it stands, no length asked for, that ended.

    --right: only those with the right answer.
    """
    stops = data.stop_ids(model.generation_config, tokenizer)
    sampler, found = HFSampler(model, tokenizer, stops, 0, bf16=train_grpo.DEVICE.type == "cuda"), []
    for start in tqdm(range(0, len(problems), 64), desc="sampling", disable=None):
        part = problems[start : start + 64]
        asked = [data.budget_prompt(p["problem"], None, None, p["kind"], args.wording) for p in part]
        prompts = [data.encode_prompt(tokenizer, prompt) for prompt in asked]
        groups = sampler.generate(prompts, args.samples, [args.cap] * len(part), 1.0, args.seed + start)
        for problem, responses in zip(part, groups, strict=True):
            whole = [problem | {"ids": r["ids"].tolist()} for r in responses if not r["truncated"]]
            texts = [tokenizer.decode(p["ids"][:-1]) for p in whole]
            golds, kinds = [problem["answer"]] * len(texts), [problem["kind"]] * len(texts)
            right = verifier.check_answers(texts, golds, kinds)[0] if args.right else [True] * len(texts)
            found += [p for p, ok in zip(whole, right, strict=True) if ok]
    return found


def with_marks(ids: list[int], method) -> tuple[list[int], list[float]]:
    """A response as it would be with the reminders of its whole length in it; 0: those are not taught."""
    for budget in range(len(ids), 2 * len(ids)):
        out, mask, rest = [], [], list(ids)
        for place, mark in method.marks(budget).items():
            own, rest = rest[: place - len(out)], rest[place - len(out) :]
            out, mask = out + own, mask + [1.0] * len(own)
            if methods.end_of(out, method.end) or not rest:
                break  # an answer is not interrupted
            out, mask = out + mark, mask + [0.0] * len(mark)
        out, mask = out + rest, mask + [1.0] * len(rest)
        if len(out) <= budget:
            return out, mask
    raise ValueError("a response of nothing but reminders")


def lesson(row: dict, tokenizer, wording: str, method=None) -> dict:
    """A response as train_grpo.update takes it; an advantage of 1: its gradient is the log-likelihood's."""
    ids, mask = with_marks(row["ids"], method) if method else (row["ids"], [1.0] * len(row["ids"]))
    asked = data.budget_prompt(row["problem"], len(ids), "exact", row["kind"], wording)
    r = {"prompt_ids": data.encode_prompt(tokenizer, asked), "ids": np.array(ids, np.int32), "advantage": 1.0}
    r |= {"mask": np.array(mask, np.float32)} if method else {}
    return r | {"logps": np.zeros(len(ids), np.float32)}  # so that "logp_gap" is the mean of -log p


def draw_order(lengths: np.ndarray, n: int, generator: torch.Generator) -> list[int]:
    """n places among the responses, drawn so that long ones, which are rare, are learned as well.

    Every 16 tokens of length are drawn as often as every other, if at least 100 responses are that long.
    """
    weights = 1 / np.maximum(np.bincount(lengths // 16), 100)[lengths // 16]
    if weights.min() == weights.max():  # few responses: each comes once before one comes again
        passes = [torch.randperm(len(lengths), generator=generator) for _ in range(-(-n // len(lengths)))]
        return torch.cat(passes)[:n].tolist()
    return torch.multinomial(torch.tensor(weights), n, replacement=True, generator=generator).tolist()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__}
    parser = data.one_line_errors(argparse.ArgumentParser("studies.warm_start", **form))
    parser.add_argument("model", help="the model's folder or hub id")
    parser.add_argument("out", help="folder for the trained model")
    parser.add_argument("--data", required=True, help="problems: a file, preset or hub id")
    parser.add_argument("--problems", type=int, default=512, help="how many of them (default %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="responses to each (default %(default)s)")
    parser.add_argument("--cap", type=int, default=160, help="longest response (default %(default)s)")
    parser.add_argument("--right", action="store_true", help="teach right answers only")
    parser.add_argument("--wording", default="l1", help="of budgets, as RL will ask (default %(default)s)")
    parser.add_argument("--idea", choices=ideas.IDEAS, help="one of studies/ideas.py")
    parser.add_argument(
        "--epochs", type=int, default=2, help="draws of a response, on average (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32, help="responses a step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (default %(default)s)")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="see train_grpo.py")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the order")
    return parser.parse_args(argv)


@data.exit_code("studies.warm_start")
def main(argv: list[str] | None = None) -> None:
    """Sample, annotate, train, save a model folder."""
    args, device = parse_args(argv), train_grpo.DEVICE
    words = f"--tis-cap 0 --max-tokens {args.cap} --micro-tokens {args.micro_tokens} --dtype "
    words += "bfloat16" if device.type == "cuda" else "float32"
    flags, path = train_grpo.build_parser().parse_args(words.split()), f"{args.out}/responses.jsonl"
    model, tokenizer = net.load_model(args.model, flags).to(device), data.load_tokenizer(args.model)
    if not os.path.exists(path):
        problems = data.load_problems(args.data)[: args.problems]
        if not (found := own_responses(model, tokenizer, problems, args)):
            told = f"no {'right ' if args.right else ''}response to {len(problems)} problems ended within"
            raise data.BadInput(f"{told} --cap ({args.cap}): raise it, or --problems or --samples")
        data.write_rows(found, path)
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    if args.idea:
        ideas.IDEAS[args.idea]()
    method = Reminders(flags, tokenizer) if (args.idea or "").startswith("remind") else None
    lessons = [lesson(row, tokenizer, args.wording, method) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps, generator = max(1, args.epochs * len(rows) // args.batch), torch.Generator().manual_seed(args.seed)
    lengths = np.array([len(row["ids"]) for row in rows])
    order = draw_order(lengths, steps * args.batch, generator)
    lengths = np.percentile(lengths, [0, 10, 50, 90, 100]).astype(int).tolist()
    print(
        f"{len(rows)} responses, {steps} steps; lengths: least, 10%, half, 90%, most: {lengths}", flush=True
    )
    for step in range(steps):
        # Batches of one length would be faster, and no longer drawn at random.
        batch = [lessons[i] for i in order[step * args.batch : (step + 1) * args.batch]]
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 20) * cosine
        m = train_grpo.update(model, None, optimizer, batch, methods.Method(flags, tokenizer), flags)
        if step % 20 == 0:
            print(f"step {step}/{steps}  loss {m['logp_gap']:.3f} nats a token", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    told = {k: getattr(args, k) for k in ("idea", "right", "seed", "cap")} | {"responses": len(rows)}
    with open(f"{args.out}/warm_start.json", "w") as f:
        json.dump(told | {"steps": steps, "lengths": lengths}, f)


if __name__ == "__main__":
    sys.exit(main())
