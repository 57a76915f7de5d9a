"""Supervised training on traces that are annotated with their own lengths: what L1 says does not work.

    python -m studies.supervised MODEL OUT [--mlt]

MODEL (a toy base model) answers training problems as it likes; its right answers are then taught to it again,
each behind a prompt that asks for exactly the length it has. No reward, no sampling while it learns.
--mlt: asked for by Ruler's special tokens (2409.18943) in place of a sentence; see ideas.py.
"""

import argparse
import json
import math
import os

import torch

import data
import verifier
from scaling import model as net
from studies import ideas
from toy import task
from toy.hf_sampler import HFSampler

# 2,000 problems, 8 samples of each, three times over, with RL's learning rate: about as many responses are
# learned from as in 200 steps of RL.
PROBLEMS, SAMPLES, EPOCHS, BATCH, LR, CAP = 2000, 8, 3, 64, 3e-4, 96


def own_traces(model, tokenizer, problems: list[dict], seed: int) -> list[tuple[dict, list[int]]]:
    """(problem, response ids) of the model's right answers to prompts that ask for no length."""
    sampler = HFSampler(model, tokenizer, data.stop_ids(model.generation_config, tokenizer), task.CONTEXT)
    prompts = [data.encode_prompt(tokenizer, p["problem"]) for p in problems]
    groups, found = sampler.generate(prompts, SAMPLES, [CAP] * len(prompts), 1.0, seed), []
    for problem, responses in zip(problems, groups, strict=True):
        whole = [r["ids"].tolist() for r in responses if not r["truncated"]]
        texts = [tokenizer.decode(ids[:-1]) for ids in whole]
        right = verifier.check_answers(texts, [problem["answer"]] * len(texts), ["math"] * len(texts))[0]
        found += [(problem, ids) for ids, ok in zip(whole, right, strict=True) if ok]
    return found


def to_batch(pairs: list[tuple], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), each [B, T], of (problem, response ids); only the responses are taught."""
    rows = []
    for problem, response in pairs:
        asked = data.budget_prompt(problem["problem"], len(response), "exact", wording="tulu")
        rows.append((data.encode_prompt(tokenizer, asked), response))
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return ids, labels


def main(argv: list[str] | None = None) -> None:
    """Sample, annotate, train, save a model folder."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="studies.supervised", description=__doc__, formatter_class=form)
    parser.add_argument("model", help="the base model's folder")
    parser.add_argument("out", help="folder for the trained model")
    parser.add_argument("--mlt", action="store_true", help="special length tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the order")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="sampled (default %(default)s)")
    args = parser.parse_args(argv)
    model = net.load_model(args.model, argparse.Namespace(dtype="float32", lora=0))
    tokenizer = data.load_tokenizer(args.model)
    pairs = own_traces(model, tokenizer, task.problems("toy", "train", args.problems), args.seed)
    if args.mlt:
        ideas.IDEAS["mlt"]()
        tokenizer.add_special_tokens({"additional_special_tokens": [ideas.mlt(n) for n in ideas.MLT]})
        torch.manual_seed(args.seed)
        model.resize_token_embeddings(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    steps = EPOCHS * len(pairs) // BATCH
    generator = torch.Generator().manual_seed(args.seed)
    order = [i for _ in range(EPOCHS) for i in torch.randperm(len(pairs), generator=generator).tolist()]
    print(f"{len(pairs)} right answers of {args.problems * SAMPLES}, {steps} steps of {BATCH}")
    for step in range(steps):
        # Batches of one length would be faster, and no longer drawn at random.
        chosen = [pairs[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        ids, labels = to_batch(chosen, tokenizer)
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 20) * cosine
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    with open(os.path.join(args.out, "supervised.json"), "w") as f:
        json.dump({"mlt": args.mlt, "seed": args.seed, "answers": len(pairs), "steps": steps}, f)


if __name__ == "__main__":
    main()
