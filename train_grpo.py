"""Train a language model to think for as many tokens as the prompt asks: GRPO, sampler in the same process.

    python train_grpo.py                                            the toy: warm-up, training, evaluation
    python train_grpo.py @recipes/l1_exact.args                     L1-Exact on one GPU
    accelerate launch --num_processes 8 train_grpo.py @recipes/l1_exact.args

One step: draw prompts with budgets, sample a group of responses to each, check the answers, turn (correct,
length, budget) into rewards and advantages, take a few clipped policy-gradient steps, push the weights to the
sampler. Left out on purpose: critics, reward models, replay, tool use, more than one machine.
Every random draw is a function of (seed, step, process): a resumed run draws what an undisturbed one would.
"""

import argparse
import inspect
import json
import math
import os
import re
import shlex
import shutil
import sys
import time

import numpy as np

import evaluate
import toy
from data import (
    BadInput,
    annotate,
    budget_prompt,
    encode_prompt,
    load_problems,
    load_tokenizer,
    one_line_errors,
    parse_budgets,
)  # fmt: skip
from rewards import ADVANTAGES, REWARDS, check_answers, response_length

# What `python train_grpo.py` without a model does: these replace the defaults below, flags still win.
TOY = {
    "data": "toy", "budgets": toy.BUDGETS, "wording": "tulu", "reward": "peaked_exact", "advantage": "gdpo",
    "steps": 250, "prompts_per_step": 32, "group_size": 8, "max_tokens": 96, "require_think": True,
    "minibatches": 2, "micro_tokens": 2048, "lr": 3e-4, "lr_schedule": "cosine", "warmup_steps": 10,
    "save_every": 100, "out": "out/toy",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Arguments. They are read and checked before torch is imported: a typing error costs a second, not a minute.


def split_line(line: str) -> list[str]:
    """The flags of one line of a recipe."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise BadInput(f"recipe line {line!r}: {error}; close the quotation") from None


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped; `@FILE` reads flags from a recipe (several a line, # starts a comment)."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "fromfile_prefix_chars": "@"}
    parser = argparse.ArgumentParser("train_grpo.py", description=__doc__, allow_abbrev=False, **options)
    one_line_errors(parser).convert_arg_line_to_args = split_line

    def number(name, default, help):
        add(name, type=type(default), default=default, help=f"{help} (default {default:g})", metavar="N")

    def choice(name, words, help):  # the first word is the default
        add(name, choices=words.split(), default=words.split()[0], help=help)

    add = parser.add_argument_group("model, data, output").add_argument
    add("--model", help="folder or hub id of the model to train; none: the toy (see toy.py)")
    add("--data", help="rows of data.py, raw problems (with --budgets), preset, hub id, toy or toy_ood")
    add("--budgets", help="draw budgets here: uniform:LO:HI, log:LO:HI, bucket:A,B,..., fixed:N (tokens)")
    choice("--mode", "exact max both", "what drawn budgets mean")
    choice("--wording", "l1 tulu", "the budget sentence of drawn budgets")
    add("--resample-budgets", action="store_true", help="draw new budgets every epoch (with --budgets)")
    add("--out", default="out/run", help="folder for metrics, checkpoints and evaluations")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, with its flags")
    add("--overwrite", action="store_true", help="delete the run that is in --out")
    number("--seed", 0, "seed of prompts, budgets and samples; of the toy's base model, too")

    add = parser.add_argument_group("reward").add_argument
    add("--reward", default="lcpo_exact", help=f"one of {', '.join(REWARDS)}")
    add("--reward-args", nargs="+", default=[], metavar="K=V", help="its hyper-parameters, as alpha=0.0003")
    add("--advantage", default="grpo", help=f"one of {', '.join(ADVANTAGES)}")
    add("--advantage-args", nargs="+", default=[], metavar="K=V", help="its hyper-parameters, as eps=1e-4")
    choice("--count", "response thinking", "the tokens that a budget counts")
    add("--require-think", action="store_true", help="an answer without </think> is wrong")
    number("--verify-timeout", 5.0, "limit for checking one answer, seconds")

    add = parser.add_argument_group("sampling").add_argument
    choice("--sampler", "auto vllm hf", "auto: vllm on CUDA where it is installed, else hf")
    number("--steps", 500, "training steps, each on one batch of rollouts")
    number("--prompts-per-step", 128, "prompts in a step, over all processes")
    number("--group-size", 16, "responses to each prompt")
    number("--max-tokens", 4096, "cap of a response, tokens")
    number("--temperature", 1.0, "of sampling, and of the log-probs in the loss")
    number("--vllm-memory", 0.35, "vLLM's share of the GPU memory")
    number("--check-sync", 50, "compare sampler and trainer every N steps; 0: only at the start")

    add = parser.add_argument_group("update").add_argument
    number("--lr", 1e-6, "peak learning rate of AdamW")
    choice("--lr-schedule", "constant cosine linear", "learning rate after the warm-up")
    number("--warmup-steps", 0, "steps of linear learning-rate warm-up")
    number("--weight-decay", 0.0, "of AdamW")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], metavar="N", help="of AdamW")
    choice("--optim", "adamw adamw8bit", "adamw8bit: bitsandbytes, CUDA only")
    number("--grad-clip", 1.0, "largest gradient norm")
    number("--minibatches", 1, "optimizer steps on each batch of rollouts; 1: on policy")
    number("--micro-tokens", 16384, "tokens in one forward pass, padding included")
    choice("--dtype", "float32 bfloat16", "type to compute in; weights and optimizer stay float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: slower, leaner")
    choice("--ratio", "token sequence cispo", "importance ratio: GRPO, GSPO or CISPO")
    number("--clip-low", 0.2, "lower clip of the ratio")
    number("--clip-high", 0.2, "upper clip of the ratio; DAPO: 0.28")
    choice("--loss-reduction", "token_mean sequence_mean constant", "what a token weighs in the whole batch")
    number("--kl-coef", 0.0, "weight of the KL to the starting model; 0: that model is not loaded")
    choice("--kl-estimator", "k3 k1 k2", "estimator of that KL")
    number("--tis-cap", 2.0, "cap of the sampler/trainer importance weight; 0: off")

    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval-data", help="held-out problems: files, presets, toy, toy_ood; comma-separated")
    number("--eval-every", 0, "evaluate every N steps; 0: never")
    add("--eval-budgets", help="budgets to ask for, comma-separated (default: trained ones)")
    number("--eval-limit", 200, "problems of each held-out set")
    number("--eval-n", 1, "samples per problem and budget")
    number("--save-every", 50, "checkpoint every N steps; 0: only at the end")
    number("--keep", 2, "checkpoints to keep")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, checked; the toy's defaults where no model is named, the run's own where it is resumed."""
    argv, parser = list(sys.argv[1:] if argv is None else argv), build_parser()
    args = parser.parse_args(argv)
    if args.model is None:
        parser.set_defaults(**TOY)
        args = parser.parse_args(argv)
    if args.resume:
        saved = os.path.join(args.out, "args.json")
        if not os.path.exists(saved):
            raise BadInput(
                f"--resume: --out ({args.out}) holds no run (no args.json); start without --resume"
            )
        try:
            with open(saved) as f:
                parser.set_defaults(**json.load(f))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"--resume: {saved} is damaged ({error}): start again with --overwrite") from None
        args = parser.parse_args(argv)
    args.reward_args = keyword_args("--reward", args.reward, REWARDS, args.reward_args)
    args.advantage_args = keyword_args("--advantage", args.advantage, ADVANTAGES, args.advantage_args)
    check_args(args)
    return args


def keyword_args(flag: str, name: str, table: dict, words: list[str] | dict) -> dict:
    """`["alpha=0.1"]` -> {"alpha": 0.1}, checked against the parameters of the function `name` in `table`."""
    if name not in table or name == "dot_threshold":  # that one is a cut length, not a reward
        raise BadInput(f"{flag} ({name}) must be one of: {', '.join(table)}")
    if isinstance(words, dict):  # from a resumed run's args.json
        return words
    known, found = set(inspect.signature(table[name]).parameters) - {"rollouts", "rewards", "parts"}, {}
    for word in " ".join(words).split():
        key, _, value = word.partition("=")
        if key not in known or not value:
            raise BadInput(
                f"{flag}-args ({word}) must be K=V with K of {name}: {', '.join(sorted(known)) or 'none'}"
            )
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            raise BadInput(
                f"{flag}-args ({word}): {value} is not a number, list, true, false or null"
            ) from None
    return found


def check_args(args: argparse.Namespace) -> None:
    """Every rule that needs neither the data nor the model."""
    # Set by torchrun and by accelerate: known here before either of the two is imported.
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.model and not args.data:
        raise BadInput(
            "--data is missing: name the rows to train on (data.py makes them), or leave out --model"
        )
    if args.model is None and args.data not in toy.TASKS:
        raise BadInput(
            f"--data ({args.data}) needs --model: without a model only toy and toy_ood can be trained"
        )
    if args.group_size < 2:
        raise BadInput(f"--group-size ({args.group_size}) must be at least 2: advantages compare responses")
    if args.prompts_per_step % processes:
        near = args.prompts_per_step // processes * processes or processes
        raise BadInput(
            f"--prompts-per-step ({args.prompts_per_step}) must be a multiple of the number of processes "
            f"({processes}): use {near} or {near + processes}"
        )
    positive = "steps prompts_per_step max_tokens minibatches micro_tokens temperature lr keep grad_clip"
    for name in (positive + " verify_timeout eval_n eval_limit").split():
        if not 0 < getattr(args, name) < 1e9:
            raise BadInput(
                f"--{name.replace('_', '-')} ({getattr(args, name)}) must be more than 0, and finite"
            )
    zero_is_fine = "warmup_steps save_every eval_every check_sync kl_coef tis_cap seed weight_decay clip_low"
    for name in (zero_is_fine + " clip_high").split():
        if not 0 <= getattr(args, name) < 2**31:
            raise BadInput(
                f"--{name.replace('_', '-')} ({getattr(args, name)}) must be 0 or more, and finite"
            )
    if not all(0 <= beta < 1 for beta in args.betas):
        raise BadInput(f"--betas ({args.betas[0]:g} {args.betas[1]:g}) must lie in [0, 1): as in 0.9 0.999")
    most = args.prompts_per_step // processes
    if args.minibatches > most:
        raise BadInput(
            f"--minibatches ({args.minibatches}) must not exceed the prompts of a process: at most {most}"
        )
    if not 0 < args.vllm_memory < 1:
        raise BadInput(
            f"--vllm-memory ({args.vllm_memory}) must lie between 0 and 1: a share of the GPU memory"
        )
    if args.resample_budgets and not args.budgets:
        raise BadInput("--resample-budgets needs --budgets: rows from a file keep the budgets they came with")
    if args.eval_every and not args.eval_data:
        raise BadInput(f"--eval-every ({args.eval_every}) needs --eval-data: name a held-out file")
    if args.eval_budgets and not re.fullmatch("[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", args.eval_budgets):
        raise BadInput(f"--eval-budgets ({args.eval_budgets}) must be positive whole numbers: 512,1024")
    highest = parse_budgets(args.budgets)["high"] if args.budgets else None
    if args.budgets and highest is None:
        raise BadInput("--budgets none: leave --budgets out, and the rows keep the prompts they have")
    if highest and highest > args.max_tokens:
        raise BadInput(
            f"--budgets asks for up to {highest} tokens, more than the response cap --max-tokens "
            f"({args.max_tokens}): raise that, or draw smaller budgets"
        )
    if (
        args.model
        and os.path.isdir(args.model)
        and not os.path.exists(os.path.join(args.model, "config.json"))
    ):
        raise BadInput(f"--model ({args.model}) has no config.json: name a Hugging Face model folder")
    # A mistyped path would be looked up on the hub otherwise, with retries and an unhelpful answer.
    if args.model and not os.path.isdir(args.model) and (args.model[0] in "./~" or args.model.count("/") > 1):
        raise BadInput(f"--model ({args.model}) is no folder, and no hub id (OWNER/NAME): check the path")
    if not args.out or (os.path.exists(args.out) and not os.path.isdir(args.out)):
        raise BadInput(f"--out ({args.out!r}) is no folder: name one")
    if args.resume and args.overwrite:
        raise BadInput("--resume goes on with a run and --overwrite deletes it: choose one of the two")
    for name in (args.model, args.data, args.eval_data) if args.overwrite else ():
        if name and os.path.abspath(name).startswith(os.path.abspath(args.out) + os.sep):
            raise BadInput(
                f"--overwrite would delete {name}, which lies in --out ({args.out}): name another --out"
            )
    if not (args.resume or args.overwrite) and os.path.exists(os.path.join(args.out, "args.json")):
        raise BadInput(
            f"--out ({args.out}) holds a run: --resume goes on, --overwrite deletes it; or name another"
        )


# ------------------------------------------------------------------------------------------------------------
# Data: rows with budgets; which of them a step uses depends on (seed, step) alone.


def load_rows(args: argparse.Namespace) -> list[dict]:
    """Training rows of the Row contract; a budget distribution given here replaces the rows' own budgets."""
    rows = toy.problems(args.data, "train", 8000) if args.data in toy.TASKS else load_problems(args.data)
    if args.budgets:
        rows = annotate(rows, parse_budgets(args.budgets), args.mode, args.wording, 1, args.seed)
    if not all(row.get("prompt") for row in rows):
        raise BadInput(
            f"--data ({args.data}) has rows without a prompt: annotate them with data.py, or give --budgets"
        )
    budgets = [row["budget"] for row in rows if row.get("budget")]
    # Without a budget these rewards are plain correctness: the run would look fine and learn no length at
    # all.
    if not budgets and args.reward.startswith(("lcpo", "tulu", "peaked")):
        raise BadInput(
            f"--reward ({args.reward}) needs budgets, but --data ({args.data}) has none: give --budgets"
        )
    if budgets and max(budgets) > args.max_tokens:
        raise BadInput(
            f"a budget of {max(budgets)} tokens exceeds --max-tokens ({args.max_tokens}), the response cap: "
            f"raise --max-tokens or draw smaller budgets"
        )
    return rows


def rows_of_step(rows: list[dict], args: argparse.Namespace, step: int, epochs: dict) -> list[dict]:
    """The P rows of a step: the data in a new random order every epoch, one epoch running into the next.

    `epochs` remembers the order and the budgets of an epoch; it may be empty at any time.
    """
    # No iterator and no generator is kept between steps: the position is the step, so resuming needs nothing
    # else.
    chosen = []
    for position in range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step):
        epoch, i = divmod(position, len(rows))
        if epoch not in epochs:
            epochs.pop(epoch - 2, None)
            order = np.random.default_rng([args.seed, epoch]).permutation(len(rows))
            epochs[epoch] = order, resampled(rows, args, epoch) if args.resample_budgets else rows
        order, drawn = epochs[epoch]
        chosen.append(drawn[order[i]])
    return chosen


def resampled(rows: list[dict], args: argparse.Namespace, epoch: int) -> list[dict]:
    """The rows with the budgets of this epoch; the first epoch keeps those that were checked at the start."""
    if epoch == 0:
        return rows
    return annotate(
        rows, parse_budgets(args.budgets), args.mode, args.wording, 1, args.seed + 1_000_003 * epoch
    )


def check_prompts(rows: list[dict], tokenizer, args: argparse.Namespace, context: int) -> int:
    """Length of the longest prompt in tokens, after checking that it leaves room for a response."""
    longest = max(len(encode_prompt(tokenizer, row["prompt"])) for row in rows)
    if longest + args.max_tokens > context:
        raise BadInput(
            f"the longest prompt ({longest} tokens) and --max-tokens ({args.max_tokens}) exceed the model's "
            f"context ({context}): lower --max-tokens, or drop long prompts with data.py --max-prompt-tokens"
        )
    return longest


# ------------------------------------------------------------------------------------------------------------
# From responses to advantages


def score(groups: list[list[dict]], rows: list[dict], prompts: list[list[int]], tokenizer, args) -> dict:
    """Adds prompt_ids, text, length, truncated, correct to each response; counters of the answer check."""
    think_end = tokenizer.encode("</think>", add_special_tokens=False)
    flat = [(r, row) for row, group in zip(rows, groups, strict=True) for r in group]
    for (r, _), ids in zip(flat, [ids for ids in prompts for _ in groups[0]], strict=True):
        r["prompt_ids"] = ids
        stopped = r["finish_reason"] == "stop"
        # Only the end token is cut off: </think> is a special token in many models, and must stay readable.
        r["text"] = tokenizer.decode(r["ids"][:-1] if stopped else r["ids"], skip_special_tokens=False)
        r["length"] = response_length(r["ids"], args.count, think_end)
        r["truncated"] = int(not stopped)
    # A response that was cut off earns nothing for its answer in any method: it is not worth checking.
    whole = [(r, row) for r, row in flat if not r["truncated"]]
    correct, counts = check_answers(
        [r["text"] for r, _ in whole], [row["answer"] for _, row in whole], [row["kind"] for _, row in whole],
        [row.get("choices") for _, row in whole], args.require_think, args.verify_timeout,
    )  # fmt: skip
    for r, _ in flat:
        r["correct"] = 0
    for (r, _), ok in zip(whole, correct, strict=True):
        r["correct"] = int(ok)
    return counts


def to_rollouts(groups: list[list[dict]], rows: list[dict], args, step: int) -> dict:
    """One batch as the reward functions read it: arrays [P, G] of responses and [P] of prompts."""
    # A missing budget is nan, not -1: a sentinel would be taken for a number by some reward sooner or later.
    table = {k: np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length", "truncated")}
    table["budget"] = np.array([row.get("budget") or np.nan for row in rows], dtype=np.float64)
    table["mode"] = [row.get("mode") for row in rows]
    return table | {"max_length": args.max_tokens, "step": step}


def rewards_and_advantages(rollouts: dict, args) -> tuple[np.ndarray, dict, np.ndarray]:
    """(total reward [P, G], its parts {name: [P, G]}, advantages [P, G])."""
    function, parts = REWARDS[args.reward], {}
    # Reward functions are copied into other projects, so they know nothing of args: names match by signature.
    total = function(rollouts, **args.reward_args)
    if "parts" in inspect.signature(function).parameters:
        parts = function(rollouts, **args.reward_args, parts=True)
    rewards = total
    if args.advantage == "gdpo":  # decoupled: each part is normalised by itself before they are added
        rewards = np.stack(list(parts.values())) if parts else total[None]
    return total, parts, ADVANTAGES[args.advantage](rewards, rollouts, **args.advantage_args)


def check_reward(rows: list[dict], args) -> None:
    """Try reward and advantage on an invented batch: what does not fit shows now, not after sampling."""
    lengths, rows = range(1, args.group_size + 1), rows[:2]
    invented = [{"correct": n % 2, "length": min(n, args.max_tokens), "truncated": 0} for n in lengths]
    try:
        rewards_and_advantages(to_rollouts([invented] * len(rows), rows, args, 0), args)
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(
            f"--reward {args.reward} with --advantage {args.advantage} does not work here: {error.args[0]}"
        ) from None


# ------------------------------------------------------------------------------------------------------------
# The update. A batch is a flat list of responses {"prompt_ids", "ids", "logps", "advantage", "weight"}.


def micro_batches(batch: list[dict], limit: int) -> list[list[dict]]:
    """Longest first, as many as fit into `limit` tokens when padded to the longest: little is padding."""
    # With budgets from 100 to 4000, batches in random order would be half padding. Longest first also means
    # that the micro-batch which needs most memory is the first one: what fits once, fits to the end of the
    # step.
    parts = []
    for r in sorted(batch, key=total_length, reverse=True):
        if not parts or (len(parts[-1]) + 1) * total_length(parts[-1][0]) > limit:
            parts.append([])
        parts[-1].append(r)
    return parts


def total_length(r: dict) -> int:
    """Tokens of prompt and response."""
    return len(r["prompt_ids"]) + len(r["ids"])


def share_of(batch: list[dict], rank: int, processes: int) -> list[dict]:
    """This process's part of the batch: dealt out by length, back and forth, so that all get equally much."""
    turns = [*range(processes), *reversed(range(processes))]
    order = sorted(batch, key=total_length, reverse=True)
    return [r for i, r in enumerate(order) if turns[i % len(turns)] == rank]


def to_tensors(micro: list[dict], device) -> dict:
    """Padded input ids [N, width], and flat [T] tensors of the response tokens: place, target, cargo."""
    import torch

    # Which tokens count follows from lengths alone: the end token is trained even if it is also the padding.
    ids = np.zeros((len(micro), max(map(total_length, micro))), dtype=np.int64)
    names = ("row", "column", "target", "sampler_logp", "old_logp", "advantage", "weight")
    flat = {name: [] for name in names}
    for i, r in enumerate(micro):
        p, n = len(r["prompt_ids"]), len(r["ids"])
        ids[i, : p + n] = r["prompt_ids"] + r["ids"]
        flat["row"] += [i] * n
        flat["column"] += range(p - 1, p + n - 1)  # a token is predicted from the position before it
        flat["target"] += r["ids"]
        flat["sampler_logp"] += r["logps"]
        flat["old_logp"] += r.get("old_logps", [])
        flat["advantage"] += [r["advantage"]] * n
        flat["weight"] += [r["weight"]] * n
    tensors = {k: torch.tensor(v, device=device) for k, v in flat.items()}
    return tensors | {"ids": torch.from_numpy(ids).to(device)}


def model_logps(model, t: dict, args):
    """Log-probs and entropies [T] of the response tokens of to_tensors' `t` under `model`."""
    import torch

    from losses import token_logps

    with torch.autocast(t["ids"].device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        # No attention mask: padding is on the right, where no real token of a causal model can see it.
        hidden = model.get_decoder()(input_ids=t["ids"], use_cache=False).last_hidden_state
        hidden = hidden[t["row"], t["column"]]
        head = model.get_output_embeddings().weight.to(hidden.dtype)
        return token_logps(hidden, head, t["target"], args.temperature)


def update(model, reference, optimizer, batch: list[dict], args, rank=0, processes=1, device="cpu") -> dict:
    """Optimizer steps over the batch (the same list on every process); means of the diagnostics."""
    import torch
    import torch.distributed as dist

    from losses import policy_loss, response_weights

    # Each response belongs to one minibatch (an optimizer step), there to one process, there to one micro-
    # batch.
    n, sums, gap_max, norms = args.minibatches, {}, torch.zeros(1, device=device), []
    parts = [batch[len(batch) * k // n : len(batch) * (k + 1) // n] for k in range(n)]
    for part in parts:
        # The denominator of the loss is that of all processes and micro-batches, fixed before any is run.
        lengths = torch.tensor([len(r["ids"]) for r in part])
        weights = response_weights(lengths, args.loss_reduction, args.max_tokens)
        for r, weight in zip(part, weights.tolist(), strict=True):
            r["weight"] = weight
    shares = [share_of(part, rank, processes) for part in parts]
    if n > 1:  # with one optimizer step a batch, the policy that is updated is the one that sampled
        add_old_logps(model, sum(shares, []), args, device)
    for mine in shares:
        optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches(mine, args.micro_tokens):
            t = to_tensors(micro, device)
            logp, entropy = model_logps(model, t, args)
            old, ref = t["old_logp"] if n > 1 else logp.detach(), None
            if reference is not None:
                with torch.no_grad():
                    ref, _ = model_logps(reference, t, args)
            loss, stats = policy_loss(
                logp, old, t["advantage"], t["weight"], t["row"], ratio=args.ratio, clip_low=args.clip_low,
                clip_high=args.clip_high, sampler_logp=t["sampler_logp"], tis_cap=args.tis_cap or None,
                ref_logp=ref, kl_coef=args.kl_coef, kl_estimator=args.kl_estimator,
            )  # fmt: skip
            # Gradients of micro-batches add up in p.grad; their weights make the sum the mean over the
            # minibatch.
            loss.backward()
            gap = (old - t["sampler_logp"]).abs()
            gap_max = torch.maximum(gap_max, gap.max())
            stats |= {"loss": loss.detach(), "entropy": entropy.sum(), "logp_gap": gap.sum()}
            stats |= {"tokens": torch.tensor(len(logp)), "padded": torch.tensor(t["ids"].numel())}
            stats["real"] = torch.tensor(sum(map(total_length, micro)))
            sums = {k: sums.get(k, 0.0) + v.double().cpu() for k, v in stats.items()}
        if processes > 1:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)  # a sum, not a mean: the weights divide by the whole batch already
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item())
        optimizer.step()
    if processes > 1:
        total = torch.stack(list(sums.values())).to(device)
        dist.all_reduce(total)
        dist.all_reduce(gap_max, dist.ReduceOp.MAX)
        sums = dict(zip(sums, total.cpu(), strict=True))
    sums = {k: v.item() for k, v in sums.items()}
    per_token = [k for k in ("entropy", "clip_fraction", "kl", "logp_gap") if k in sums]
    means = {"loss": sums["loss"] / n, "logp_gap_max": gap_max.item(), "grad_norm": float(np.mean(norms))}
    means |= {k: sums[k] / sums["tokens"] for k in per_token}
    return means | {"padding": 1 - sums["real"] / sums["padded"]}


def add_old_logps(model, batch: list[dict], args, device) -> None:
    """`old_logps` of every response under the policy that is about to be updated."""
    import torch

    # Not the sampler's log-probs: the ratio compares two policies, and must be 1 where the policy has not
    # changed.
    with torch.no_grad():
        for micro in micro_batches(batch, args.micro_tokens):
            flat = model_logps(model, to_tensors(micro, device), args)[0].tolist()
            for r in micro:
                r["old_logps"], flat = flat[: len(r["ids"])], flat[len(r["ids"]) :]


def learning_rate(step: int, args) -> float:
    """Learning rate of a step: linear warm-up, then constant, or cosine / linear down to 0 at the end."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    factors = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return args.lr * factors[args.lr_schedule]


def make_optimizer(model, args):
    """AdamW over all parameters; with --optim adamw8bit its moments take 2 bytes a parameter instead of 8."""
    import torch

    options = {"lr": args.lr, "betas": tuple(args.betas), "weight_decay": args.weight_decay}
    if args.optim == "adamw":
        return torch.optim.AdamW(model.parameters(), **options)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(model.parameters(), **options)


def check_sync(sampler, model, prompt_ids: list[int], args, device) -> float:
    """Mean log-prob gap between sampler and trainer on a probe, in nats; a stale engine stops the run."""
    probe = sampler.generate([prompt_ids], 4, min(32, args.max_tokens), args.temperature, seed=args.seed)[0]
    batch = [r | {"prompt_ids": prompt_ids, "advantage": 0.0, "weight": 0.0} for r in probe]
    add_old_logps(model, batch, args, device)
    pairs = [p for r in batch for p in zip(r["logps"], r["old_logps"], strict=True)]
    gap = float(np.mean([abs(a - b) for a, b in pairs]))
    # float32 engines agree to 2e-5 (measured); bf16 ones may be hundredths off, and a small step hides
    # in that: so the weights themselves are compared as well.
    limit = 1e-3 if args.dtype == "float32" and device.type == "cpu" else 0.1
    stale = sampler.stale_weights(model) if sampler.name == "vllm" else []
    if stale or not gap < limit:
        raise SystemExit(
            f"train_grpo.py: error: the sampler does not hold the trainer's weights: log-probs of a probe "
            f"differ by {gap:.2g} on average (limit {limit:g}), {len(stale)} weights do: {stale[:3]}. "
            f"An update was lost; a run that went on would learn from another policy's responses."
        )
    return gap


# ------------------------------------------------------------------------------------------------------------
# Metrics


def length_metrics(rollouts: dict) -> dict:
    """Length and its errors over the batch, and per requested budget (or per quarter of their range)."""
    length, budget = rollouts["length"].astype(float), rollouts["budget"]
    out = {
        "length": length.mean(),
        "length_p95": np.quantile(length, 0.95),
        "truncated": rollouts["truncated"].mean(),
    }
    # Signed errors of over- and undershoot cancel in their mean, so the absolute ones are logged beside them.
    have = ~np.isnan(budget)
    if not have.any():
        return out
    asked, got = budget[have][:, None], length[have]
    error = (got - asked) / asked
    out |= {"signed_error": error.mean(), "abs_error": np.abs(error).mean()}
    out |= {
        "within_10": (np.abs(error) <= 0.1).mean(),
        "over_budget": (error > 0).mean(),
        "error_by_budget": {},
    }
    values = np.unique(asked)
    buckets = {f"{v:g}": asked[:, 0] == v for v in values}
    if len(values) > 8:  # four buckets of equal width between the least and the greatest budget of this batch
        edges = np.linspace(values[0], values[-1] + 1, 5).astype(int)
        pairs = list(zip(edges, edges[1:], strict=False))
        buckets = {f"{a}-{b - 1}": (asked[:, 0] >= a) & (asked[:, 0] < b) for a, b in pairs}
    for name, rows in buckets.items():
        if rows.any():
            e = error[rows]
            cell = {"signed": e.mean(), "abs": np.abs(e).mean(), "length": got[rows].mean()}
            out["error_by_budget"][name] = cell
    return out


def show_samples(groups, rows, total, log) -> None:
    """Three decoded responses of the first step and what they earned: most mistakes can be seen here."""
    for row, group, line in list(zip(rows, groups, total, strict=True))[:3]:
        r, text = group[0], group[0]["text"]
        text = text if len(text) < 500 else text[:300] + " [...] " + text[-150:]
        verdict = ("right" if r["correct"] else "wrong") + (" (cut off)" if r["truncated"] else "")
        log(f"  prompt    {row['prompt']!r}\n  response  {text!r}")
        log(
            f"  answer    {row['answer']!r}: {verdict}; {r['length']} tokens, budget {row.get('budget')}, "
            f"reward {line[0]:.3f}\n"
        )


def make_log(args, state):
    """(tqdm bar or None, function that prints a line): bar on a terminal, lines elsewhere, one rank only."""
    from tqdm import tqdm

    if not state.is_main_process:
        return None, lambda text: None
    bar = tqdm(total=args.steps, dynamic_ncols=True) if sys.stderr.isatty() else None
    return bar, bar.write if bar else lambda text: print(text, flush=True)


def log_step(
    step: int, rollouts: dict, total, parts: dict, trained: dict, clock: list, args, bar, log
) -> None:
    """One line of metrics.jsonl, and one line on the screen (or the bar of a terminal)."""
    m = {"step": step, "reward": total.mean(), "reward_std": total.std(-1).mean()}
    m |= {f"reward_{name}": part.mean() for name, part in parts.items()}
    m |= {"accuracy": rollouts["correct"].mean(), **length_metrics(rollouts)}
    m |= {"zero_variance": (np.ptp(total, -1) < 1e-9).mean(), **trained}
    seconds = dict(zip(("sample", "verify", "train", "sync"), np.diff(clock), strict=True))
    m |= {f"seconds_{name}": value for name, value in seconds.items()}
    m |= {"tokens_per_second": rollouts["length"].sum() / (clock[-1] - clock[0]), "peak_gib": peak_memory()}
    with open(os.path.join(args.out, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(evaluate.jsonable(m), allow_nan=False) + "\n")
    error = f"  error {m['abs_error']:6.1%}" if "abs_error" in m else ""
    text = f"reward {m['reward']:+.3f}  accuracy {m['accuracy']:.2f}  length {m['length']:.1f}{error}"
    if bar is not None:
        bar.set_postfix_str(text)
        bar.update(step + 1 - bar.n)
        return
    log(
        f"step {step + 1:4d}/{args.steps}  {text}  cut {m['truncated']:.2f}  entropy {m['entropy']:.2f}  "
        f"grad {m['grad_norm']:.2f}  gap {m['logp_gap_max']:.0e}  {clock[-1] - clock[0]:.1f} s"
    )


def peak_memory() -> float:
    """Most memory this process ever held, GiB: of the GPU where there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face folder plus trainer_state.pt; there completely or not at all.


def save_checkpoint(folder: str, step: int, model, tokenizer, optimizer, memory: dict, keep: int) -> None:
    """Write OUT/checkpoint-STEP under a temporary name, flush it to disk, rename it; delete older ones."""
    import torch

    out, temporary = os.path.dirname(folder), folder.replace("checkpoint-", ".writing-")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    # Samples and prompts are drawn from (seed, step) alone; the generator is kept for models with dropout.
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "memory": memory,
        "torch_rng": torch.get_rng_state(),
    }
    torch.save(state, os.path.join(temporary, "trainer_state.pt"))
    # A rename that survives a power cut while the data does not would leave a whole-looking, empty
    # checkpoint.
    for name in [*os.listdir(temporary), ""]:  # every file, then the folder itself
        handle = os.open(os.path.join(temporary, name), os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(os.path.join(out, f"checkpoint-{old}"))


def checkpoints(out: str) -> list[int]:
    """Steps of the complete checkpoints in `out`, ascending."""
    names = [n.removeprefix("checkpoint-") for n in os.listdir(out) if n.startswith("checkpoint-")]
    return sorted(int(n) for n in names if n.isdigit())


def load_state(folder: str) -> dict:
    """trainer_state.pt of a checkpoint; no code in it is ever run. BadInput when it is missing or damaged."""
    import pickle

    import torch

    try:
        state = torch.load(os.path.join(folder, "trainer_state.pt"), weights_only=True)
        return {key: state[key] for key in ("step", "optimizer", "memory", "torch_rng")}
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise BadInput(
            f"--resume: {folder} is damaged ({type(error).__name__}: {str(error).splitlines()[0][:80]}); "
            f"delete it to go on from the one before, or start again with --overwrite"
        ) from None


def newest_checkpoint(args) -> str | None:
    """The folder that --resume goes on from; None for a fresh run."""
    if not args.resume:
        return None
    steps = checkpoints(args.out)
    if not steps:
        raise BadInput(
            f"--resume: --out ({args.out}) holds no complete checkpoint: start again with --overwrite"
        )
    return os.path.join(args.out, f"checkpoint-{steps[-1]}")


def open_run(args, start: int) -> None:
    """Prepare --out: --overwrite deletes an old run, --resume drops its metrics from step `start` on."""
    if args.overwrite and os.path.exists(os.path.join(args.out, "args.json")):
        shutil.rmtree(args.out)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "args.json"), "w") as f:
        json.dump(vars(args) | {"resume": False, "overwrite": False}, f, indent=1)
    # Steps after the checkpoint will be taken again: without this they would stand in the file twice.
    path = os.path.join(args.out, "metrics.jsonl")
    if os.path.exists(path):
        with open(path) as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] < start]
        with open(path, "w") as f:
            f.writelines(lines)


# ------------------------------------------------------------------------------------------------------------
# Training


def set_up(args: argparse.Namespace, state, log) -> argparse.Namespace:
    """Load and check all that the loop needs; --out is touched last, when nothing can be wrong any more."""
    import torch
    from transformers import AutoConfig

    from sampler import load_model, make_sampler, pick_sampler

    s = argparse.Namespace(memory={}, reference=None, start=0, rows=load_rows(args), held_out=[], epochs={})
    check_reward(s.rows, args)
    s.folder, s.path = newest_checkpoint(args), args.model
    if args.eval_data:
        s.held_out = evaluate.load_data(args.eval_data, args.eval_limit, 0)
    if args.optim == "adamw8bit" and state.device.type != "cuda":
        raise BadInput("--optim adamw8bit needs a CUDA device, where its kernels run: use --optim adamw")
    if s.path is None:
        cache = os.path.dirname(os.path.abspath(args.out))
        if state.is_main_process:  # one process makes the toy's base model, the others find it in the cache
            toy.make_base(cache, args.seed, log=log)
        state.wait_for_everyone()
        s.path = toy.make_base(cache, args.seed, log=lambda _: None)
    s.tokenizer = load_tokenizer(s.path)
    if args.count == "thinking" and len(s.tokenizer.encode("</think>", add_special_tokens=False)) != 1:
        raise BadInput(
            "--count thinking needs a tokenizer in which </think> is one token; this one splits it"
        )
    context = AutoConfig.from_pretrained(s.path).max_position_embeddings
    longest = check_prompts(s.rows, s.tokenizer, args, context)
    saved = load_state(s.folder) if s.folder else None
    kind = pick_sampler(args.sampler, log)
    s.model = load_model(s.folder or s.path, state.device).train()
    if args.gradient_checkpointing:
        s.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.kl_coef:
        s.reference = load_model(s.path, state.device).eval().requires_grad_(False)
    # The learning rate is a function of the step: no scheduler state.
    s.optimizer = make_optimizer(s.model, args)
    if saved:
        s.optimizer.load_state_dict(saved["optimizer"])
        for group in s.optimizer.param_groups:  # flags that were changed for the resumed run count
            group.update(betas=tuple(args.betas), weight_decay=args.weight_decay)
        s.memory, s.start = saved["memory"], saved["step"]
    # The toy's last evaluation asks for more than was trained: its engine takes the whole context.
    room = max(longest + args.max_tokens, plan_held_out(s, args, context))
    room = context if args.model is None else room
    own = args.prompts_per_step * args.group_size // state.num_processes
    seed = args.seed + state.process_index
    s.sampler = make_sampler(
        kind, s.model, s.path, s.tokenizer, room, args.dtype, seed, args.vllm_memory, own
    )
    if saved:
        torch.set_rng_state(saved["torch_rng"])
    if state.is_main_process:
        open_run(args, s.start)
    state.wait_for_everyone()
    log(
        f"{s.model.num_parameters() / 1e6:.2f}M parameters on {state.device}, {state.num_processes} "
        f"process(es), {len(s.rows)} rows, reward {args.reward}, advantage {args.advantage}, sampler {kind}, "
        f"steps {s.start}..{args.steps}"
    )
    return s


def train(args: argparse.Namespace) -> None:
    """The whole run; see the docstring of this file."""
    import torch
    from accelerate import PartialState

    # ---- Setup ---------------------------------------------------------------------------------------------
    # Without `cpu` plain torchrun on a machine without GPU would run N single trainers side by side.
    state = PartialState(cpu=not torch.cuda.is_available())
    rank, processes, device = state.process_index, state.num_processes, state.device
    bar, log = make_log(args, state)
    began = time.monotonic()
    s = set_up(args, state, log)
    # The engine was built from the starting model: it gets the trainer's weights before anything is sampled.
    probe = encode_prompt(s.tokenizer, s.rows[0]["prompt"])
    s.sampler.sync(s.model)
    check_sync(s.sampler, s.model, probe, args, device)
    if args.model is None and s.start == 0:
        evaluate_toy(s, args, "eval_base", state, log)

    for step in range(s.start, args.steps):
        # ---- Sample: this process's prompts, a group of responses to each ----------------------------------
        clock = [time.monotonic()]
        rows = rows_of_step(s.rows, args, step, s.epochs)
        own = rows[len(rows) * rank // processes : len(rows) * (rank + 1) // processes]
        prompts = [encode_prompt(s.tokenizer, row["prompt"]) for row in own]
        # One number per (seed, step, process): a resumed run needs no generator's history.
        seed = int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0])
        groups = s.sampler.generate(prompts, args.group_size, args.max_tokens, args.temperature, seed=seed)
        clock.append(time.monotonic())

        # ---- Verify and reward: every process gets the whole batch, so advantages cannot differ ------------
        counts = score(groups, own, prompts, s.tokenizer, args)
        if processes > 1:
            groups, counts = evaluate.gather(groups), evaluate.sum_counts(evaluate.gather([counts]))
        rollouts = to_rollouts(groups, rows, args, step)
        total, parts, advantages = rewards_and_advantages(rollouts, args)
        for group, line in zip(groups, advantages, strict=True):
            for r, advantage in zip(group, line, strict=True):
                r["advantage"] = float(advantage)
        if step == 0:
            show_samples(groups, rows, total, log)
        clock.append(time.monotonic())

        # ---- Update ----------------------------------------------------------------------------------------
        # Every token of a response shares its advantage: GRPO knows no credit within a response.
        lr = learning_rate(step, args)
        for param_group in s.optimizer.param_groups:
            param_group["lr"] = lr
        trained = update(s.model, s.reference, s.optimizer, sum(groups, []), args, rank, processes, device)
        # Stop, do not skip: after the first nan in the weights every later step is lost anyway.
        if not (math.isfinite(trained["loss"]) and math.isfinite(trained["grad_norm"])):
            raise SystemExit(f"train_grpo.py: error: step {step}: loss or gradient is not finite: {trained}")
        clock.append(time.monotonic())

        # ---- Push the new weights into the sampler ---------------------------------------------------------
        # A stale engine is the commonest silent failure of this kind of trainer; hence the check.
        s.sampler.sync(s.model)
        if args.check_sync and (step == 0 or (step + 1) % args.check_sync == 0):
            check_sync(s.sampler, s.model, probe, args, device)
        clock.append(time.monotonic())

        # ---- Log, save, evaluate ---------------------------------------------------------------------------
        if state.is_main_process:
            log_step(step, rollouts, total, parts, trained | {"lr": lr} | counts, clock, args, bar, log)
        done = step + 1
        if done == args.steps or (args.save_every and done % args.save_every == 0):
            s.folder = os.path.join(args.out, f"checkpoint-{done}")
            if state.is_main_process:
                save_checkpoint(s.folder, done, s.model, s.tokenizer, s.optimizer, s.memory, args.keep)
            state.wait_for_everyone()
        if args.eval_every and done % args.eval_every == 0:
            evaluate_held_out(s, args, f"eval-{done}", state, log)

    # ---- Done ----------------------------------------------------------------------------------------------
    log(f"trained in {(time.monotonic() - began) / 60:.1f} min; model: {s.folder}")
    if args.model is None:
        evaluate_toy(s, args, "eval", state, log)
        if state.is_main_process:
            log(toy.summary(args.out))
    if bar:
        bar.close()


def plan_held_out(s, args, context: int) -> int:
    """Sets budgets, mode and wording of the evaluations on --eval-data; the most tokens that one needs."""
    budgets = sorted({row["budget"] for row in s.rows if row.get("budget")})
    if len(budgets) > 8:  # drawn from a range: four that stand for it
        budgets = [int(b) for b in np.quantile(budgets, [0.125, 0.375, 0.625, 0.875])]
    if args.eval_budgets:
        budgets = [int(b) for b in args.eval_budgets.split(",")]
    row = next((row for row in s.rows if row.get("budget")), None)
    modes = {row.get("mode") for row in s.rows if row.get("budget")}
    mode = "max" if modes == {"max"} else "exact"
    # The rows may come from data.py, so what their prompts say counts, not the flags.
    wording = args.wording
    for w in ("l1", "tulu") if row else ():
        asked = budget_prompt(row["problem"], row["budget"], row["mode"], row["kind"], w)
        wording = w if row["prompt"] == asked else wording
    s.held_out_plan = budgets or [None], mode, wording
    requests = evaluate.plan(s.held_out, *s.held_out_plan, s.tokenizer, context, None)
    return max((len(request["ids"]) + request["max_tokens"] for request in requests), default=0)


def evaluate_held_out(s, args, name: str, state, log) -> None:
    """A budget sweep over --eval-data; the results go to OUT/NAME."""
    budgets, mode, wording = s.held_out_plan
    run_evaluation(s, args, s.held_out, budgets, mode, wording, args.eval_n, name, state, log)


def evaluate_toy(s, args, name: str, state, log) -> None:
    """The toy's table: trained and untrained budgets, the trained task and the one that RL never sees."""
    trained = sorted({row["budget"] for row in s.rows})
    problems, n = toy.problems("toy", "test", toy.TESTED), 2
    budgets = trained if len(trained) <= 8 else toy.ASKED_BEFORE
    if name == "eval":
        problems, n = problems + toy.problems("toy_ood", "test", toy.TESTED), 4
        budgets = sorted({*budgets, *toy.ASKED})
    mode, cap = "exact" if args.mode == "both" else args.mode, 2 * max(toy.ASKED)
    # One cap for all, so that a budget which is not obeyed shows the length it gets and not the cap.
    run_evaluation(s, args, problems, budgets, mode, args.wording, n, name, state, log, max_tokens=cap)


def run_evaluation(s, args, problems, budgets, mode, wording, n, name, state, log, max_tokens=None) -> None:
    """evaluate.py on the live sampler, shared by all processes; sampled as in training."""
    trained = sorted({row["budget"] for row in s.rows if row.get("budget")})
    evaluate.evaluate(
        s.sampler, problems, budgets, mode, n, os.path.join(args.out, name), wording=wording,
        temperature=args.temperature, top_p=1.0, max_tokens=max_tokens, seed=args.seed, count=args.count,
        require_think=args.require_think, trained_budgets=trained, model=s.folder or s.path,
        log=log, state=state,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    try:
        train(parse_args(argv))
    except BadInput as error:
        print(f"train_grpo.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def start_cpu_processes() -> None:
    """Make `accelerate launch --cpu --num_processes N` start N processes: by itself it starts one, silently.

    accelerate leaves several CPU processes to mpirun. What it leaves is a MASTER_ADDR without a WORLD_SIZE;
    the number stands in the launcher's command line only. torchrun then starts what was asked for.
    """
    env = os.environ
    if env.get("ACCELERATE_USE_CPU") != "True" or "MASTER_ADDR" not in env or "WORLD_SIZE" in env:
        return
    import psutil

    words = " ".join(psutil.Process().parent().cmdline()).replace("=", " ").replace("-", "_").split()
    processes = words[words.index("__num_processes") + 1] if "__num_processes" in words[:-1] else ""
    if not processes.isdigit():
        sys.exit("train_grpo.py: error: accelerate started one CPU process of several: use torchrun instead")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    os.execv(sys.executable, torchrun + sys.argv)


if __name__ == "__main__":
    start_cpu_processes()
    sys.exit(main())
