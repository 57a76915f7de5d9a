# PYTHON_ARGCOMPLETE_OK
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
import contextlib
import inspect
import json
import os
import pickle
import re
import shlex
import sys
import time
from collections import Counter

import numpy as np

import evaluate
import faults
import methods
from checkpoints import best, holds_run, is_due, newest_state, open_run, save_checkpoint
from data import (
    BadInput,
    budget_prompt,
    encode_prompt,
    first_line,
    load_config,
    load_tokenizer,
    one_line_errors,
    parse_budgets,
)
from integrations import card, trackers
from logbook import let_go_of_the_screen, make_log, show_samples, step_metrics, tell
from rewards import ADVANTAGES, REWARDS
from rollouts import (
    check_prompts,
    check_reward,
    lap,
    load_rows,
    rewards_and_advantages,
    sample_batch,
    to_rollouts,
)
from toy import task as toy

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
    parser.convert_arg_line_to_args = split_line

    def number(name, default, help):
        add(name, type=type(default), default=default, help=f"{help} (default {default:g})", metavar="N")

    def choice(name, words, help):  # the first word is the default
        add(name, choices=words.split(), default=words.split()[0], help=help)

    def constants(name, help):
        add(name, nargs="+", default=[], metavar="K=V", help=help)

    add = parser.add_argument_group("model, data, output").add_argument
    add("--model", help="folder or hub id of the model to train; none: the toy (see toy.py)")
    add("--data", help="rows of data.py, raw problems (with --budgets), preset, hub id, toy or toy_ood")
    number("--limit", 0, "take the first N problems of --data only; 0: all")
    add("--budgets", help="uniform:LO:HI, log:LO:HI, bucket:A,B,..., fixed:N tokens, drawn here; none")
    choice("--mode", "exact max both", "what drawn budgets mean")
    choice("--wording", "l1 tulu", "the budget sentence of drawn budgets")
    add("--resample-budgets", action="store_true", help="draw new budgets every epoch (with --budgets)")
    add("--out", default="out/run", help="folder for metrics, checkpoints and evaluations")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, with its flags")
    add("--overwrite", action="store_true", help="delete the run that is in --out")
    number("--seed", 0, "seed of prompts, budgets and samples; of the toy's base model, too")

    add = parser.add_argument_group("reward").add_argument
    add("--reward", default="lcpo_exact", help=f"one of {', '.join(REWARDS)}")
    constants("--reward-args", "its hyper-parameters, as alpha=0.0003")
    constants("--method-args", "constants of what hapo, palu, laser_d and longwriter_range keep beside it")
    add("--advantage", default="grpo", help=f"one of {', '.join(ADVANTAGES)}")
    constants("--advantage-args", "its hyper-parameters, as eps=1e-4")
    add("--require-think", action="store_true", help="an answer without </think> is wrong")
    number("--verify-timeout", 5.0, "limit for checking one answer, seconds")
    number("--reference-samples", 0, "samples of the starting model for each prompt that is new")
    add("--conciseness-model", help="classifier that scores responses for crf: folder, hub id or toy")
    number("--dot", 0.0, "DOT: cut responses this many deviations above their all-right group's mean; 0: off")
    number("--dot-margin", 32, "DOT: excess over that length from which a response is cut, tokens")

    add = parser.add_argument_group("sampling").add_argument
    choice("--sampler", "auto vllm hf", "auto: vllm on CUDA where it is installed, else hf")
    number("--steps", 500, "training steps, each on one batch of rollouts")
    number("--prompts-per-step", 128, "prompts in a step, over all processes")
    number("--group-size", 16, "responses to each prompt")
    number("--max-tokens", 4096, "cap of a response, tokens")
    number("--temperature", 1.0, "of sampling, and of the log-probs in the loss")
    number("--vllm-memory", 0.35, "vLLM's share of the GPU memory")
    add("--vllm-sleep", action="store_true", help="give that share to the trainer during the update")
    choice("--dynamic-sampling", "none correct reward", "replace groups without a difference in it")
    number("--refills", 4, "rounds of sampling to replace them, at most")
    choice("--subgroups", " ".join(methods.SUBGROUPS), "parts of a group asked, or begun, differently")
    constants("--subgroup-args", "its constants")
    choice("--budget-schedule", " ".join(methods.SCHEDULES), "one budget for all prompts, by the step")
    constants("--schedule-args", "start=256 tokens, and gamma, period (step) or end, steps")
    add("--cut-at-budget", action="store_true", help="end a response at its prompt's budget")
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
    add("--fsdp", action="store_true", help="shard weights, gradients, optimizer over the processes (FSDP2)")
    number("--lora", 0, "train adapters of this rank (peft) and leave the weights; 0: train the weights")
    choice("--dtype", "float32 bfloat16", "type to compute in; the optimizer's state stays float32")
    choice(
        "--param-dtype",
        "float32 bfloat16",
        "of weights and of gradients, summed over passes: 4 or 2 bytes each",
    )
    add("--gradient-checkpointing", action="store_true", help="recompute activations: slower, leaner")
    worst = "the longest prompt and response through one update before training (default: on CUDA)"
    add("--check-memory", action=argparse.BooleanOptionalAction, help=worst)
    choice("--objective", "policy drpo", "drpo: right answers against wrong ones, without advantages")
    constants("--objective-args", "its constants: lam, tau, l_max, kl_coef, kl_delta")
    choice("--ratio", "token sequence cispo", "importance ratio: GRPO, GSPO or CISPO")
    number("--clip-low", 0.2, "lower clip of the ratio")
    number("--clip-high", 0.2, "upper clip of the ratio; DAPO: 0.28")
    number("--dual-clip", 0.0, "bounds the loss of bad responses at this multiple of -advantage; 0: off")
    add("--overlong-filter", action="store_true", help="truncated responses leave the loss")
    choice("--loss-reduction", "token_mean sequence_mean constant", "what a token weighs in the whole batch")
    number("--kl-coef", 0.0, "weight of the KL to the starting model; 0: that model is not loaded")
    choice("--kl-estimator", "k3 k1 k2", "estimator of that KL")
    add("--offload-reference", action="store_true", help="that model in CPU memory, on the GPU when used")
    number("--tis-cap", 2.0, "cap of the sampler/trainer importance weight; 0: off")

    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval-data", help="held-out problems: files, presets, toy, toy_ood; comma-separated")
    number("--eval-every", 0, "evaluate every N steps, after a checkpoint; 0: never")
    add("--eval-budgets", help="budgets to ask for, comma-separated (default: trained ones)")
    number("--eval-limit", 200, "problems of each held-out set")
    number("--eval-n", 1, "samples per problem and budget")
    number("--save-every", 50, "checkpoint every N steps; 0: only at the end")
    number("--keep", 2, "newest checkpoints to keep, beside the one with the best mean reward")
    choice("--log-with", " ".join(trackers.TRACKERS), "send metrics and pictures to a tracker, too")
    number("--log-seconds", 0.0, "without a terminal: a line every N seconds at most; 0: every step")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the last checkpoint, with a model card")
    return one_line_errors(parser)


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
            raise BadInput(f"--resume: --out ({args.out}) holds no args.json, no run: start without --resume")
        try:
            with open(saved) as f:
                parser.set_defaults(**json.load(f))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"--resume: {saved} is damaged ({error}): start again with --overwrite") from None
        args = parser.parse_args(argv)
    for flag, (named_by, table) in KEYWORDS.items():
        words = getattr(args, flag + "_args")
        setattr(args, flag + "_args", keyword_args("--" + flag, getattr(args, named_by), table, words))
    args.command = getattr(args, "command", argv)  # for the model card; a resumed run keeps its own
    check_args(args)
    return args


# --X-args: the flag that names a function, and the functions. Its parameters with defaults can be set.
KEYWORDS = {
    "reward": ("reward", REWARDS), "method": ("reward", methods.METHODS),
    "advantage": ("advantage", ADVANTAGES), "subgroup": ("subgroups", methods.SUBGROUPS),
    "schedule": ("budget_schedule", methods.SCHEDULES),
    # Defaults of these: losses.drpo_objective; that file imports torch, and arguments come before torch.
    "objective": ("objective", {"drpo": lambda lam=0, tau=0, l_max=0, kl_coef=0, kl_delta=0: None}),
}  # fmt: skip


def keyword_args(flag: str, name: str, table: dict, words: list[str] | dict) -> dict:
    """`["alpha=0.1"]` -> {"alpha": 0.1}, checked against the parameters of the function `name` in `table`."""
    if flag in ("--reward", "--advantage") and (name not in table or name == "dot_threshold"):
        raise BadInput(f"{flag} ({name}) must be one of: {', '.join(table)}")  # that one is a cut length
    if isinstance(words, dict):  # from a resumed run's args.json
        return words
    known = inspect.signature(table.get(name, lambda: None)).parameters.items()
    known = {k: v.default for k, v in known if v.default is not v.empty and k not in ("rollouts", "parts")}
    found = {}
    for word in words:
        k, _, value = word.partition("=")
        if k not in known or not value:
            names = ", ".join(sorted(known)) or "it has none"
            raise BadInput(f"{flag}-args ({word}) must be K=V with K a constant of {name}: {names}")
        try:
            found[k] = json.loads(value)
        except json.JSONDecodeError:
            found[k] = value  # a text needs no quotation marks
        kind = type(known[k])
        fits = {int: (int, float), float: (int, float), tuple: list, str: (str, type(None))}.get(kind, kind)
        if known[k] is not None and not isinstance(found[k], fits):
            raise BadInput(f"{flag}-args ({word}): {value} is no {kind.__name__}, as {known[k]!r} is")
    return found


POSITIVE = "steps prompts_per_step max_tokens minibatches micro_tokens temperature lr keep grad_clip".split()
POSITIVE += "verify_timeout eval_n eval_limit dot_margin".split()
ZERO_IS_FINE = "warmup_steps save_every eval_every check_sync kl_coef tis_cap seed weight_decay".split()
ZERO_IS_FINE += "lora limit clip_low clip_high refills reference_samples dot dual_clip log_seconds".split()


def check_args(args: argparse.Namespace) -> None:
    """Every rule that needs neither the data nor the model."""
    # Set by torchrun and by accelerate: known here before either of the two is imported.
    processes = int(os.environ.get("WORLD_SIZE", 1))
    for name in (*POSITIVE, *ZERO_IS_FINE):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if name in POSITIVE and not 0 < value < 1e9:
            raise BadInput(f"{flag} ({value}) must be more than 0, and finite")
        if not 0 <= value < 2**31:
            raise BadInput(f"{flag} ({value}) must be 0 or more, and finite")
    per_process, out = args.prompts_per_step // processes, os.path.abspath(args.out or ".")
    near = per_process * processes or processes
    highest = parse_budgets(args.budgets)["high"] if args.budgets else None
    local, files = args.model and os.path.isdir(args.model), (args.model, args.data, args.eval_data)
    parent = out
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    inside = [n for n in files if n and os.path.abspath(n).startswith(out + os.sep)]
    for wrong, message in (
        (args.model and not args.data,
         "--data is missing: name the rows to train on (data.py makes them), or leave out --model"),
        (args.model is None and args.data not in toy.TASKS,
         f"--data ({args.data}) needs --model: without a model only toy and toy_ood can be trained"),
        (args.group_size < 2,
         f"--group-size ({args.group_size}) must be at least 2: advantages compare responses"),
        (args.prompts_per_step % processes,
         f"--prompts-per-step ({args.prompts_per_step}) must be a multiple of the number of processes "
         f"({processes}): use {near} or {near + processes}"),
        (not all(0 <= beta < 1 for beta in args.betas),
         f"--betas ({args.betas[0]:g} {args.betas[1]:g}) must lie in [0, 1): as in 0.9 0.999"),
        (args.minibatches > per_process,
         f"--minibatches ({args.minibatches}) must not exceed a process's prompts: at most {per_process}"),
        (args.objective == "drpo" and args.prompts_per_step % args.minibatches,
         "--objective drpo compares the answers to a prompt: --prompts-per-step must be a multiple of "
         f"--minibatches ({args.minibatches})"),
        (args.objective == "drpo" and args.kl_coef,
         "--objective drpo has a KL of its own (--objective-args kl_coef=...): --kl-coef must be 0"),
        (args.fsdp and processes == 1,
         "--fsdp shards the model over processes, but there is one: accelerate launch --num_processes N, or "
         "leave it out"),
        (args.fsdp and args.optim == "adamw8bit",
         "--fsdp shards plain tensors, and bitsandbytes' 8-bit states are not: use --optim adamw"),
        (args.param_dtype == "bfloat16" and args.dtype != "bfloat16",
         "--param-dtype bfloat16 has no float32 weights to compute with: add --dtype bfloat16"),
        (args.param_dtype == "bfloat16" and args.fsdp,
         "--param-dtype bfloat16 rounds whole weights, and --fsdp holds parts of them: use one of the two"),
        (args.offload_reference and (args.fsdp or args.lora or not (args.kl_coef or args.reference_samples)),
         "--offload-reference is for a second, whole model: --fsdp shards it, --lora needs none, and without "
         "--kl-coef or --reference-samples there is none; leave it out"),
        (0 < args.dual_clip <= 1,
         f"--dual-clip ({args.dual_clip:g}) must be more than 1 (3 is usual), or 0: off"),
        (not 0 < args.vllm_memory < 1,
         f"--vllm-memory ({args.vllm_memory}) must lie between 0 and 1: a share of the GPU memory"),
        (args.resample_budgets and args.budgets in (None, "none"),
         "--resample-budgets needs --budgets: rows from a file keep the budgets they came with"),
        (args.eval_every and not args.eval_data,
         f"--eval-every ({args.eval_every}) needs --eval-data: name a held-out file"),
        (not re.fullmatch("[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", args.eval_budgets or "1"),
         f"--eval-budgets ({args.eval_budgets}) must be positive whole numbers: 512,1024"),
        (highest and highest > args.max_tokens,
         f"--budgets asks for up to {highest} tokens, more than the response cap --max-tokens "
         f"({args.max_tokens}): raise that, or draw smaller budgets"),
        (local and not os.path.exists(os.path.join(args.model, "config.json")),
         f"--model ({args.model}) has no config.json: name a Hugging Face model folder"),
        # A mistyped path would be looked up on the hub otherwise, with retries and an unhelpful answer.
        (args.model and not local and (args.model[0] in "./~" or args.model.count("/") > 1),
         f"--model ({args.model}) is no folder, and no hub id (OWNER/NAME): check the path"),
        (not args.out or (os.path.exists(args.out) and not os.path.isdir(args.out)),
         f"--out ({args.out!r}) is no folder: name one"),
        (not os.path.isdir(parent) or not os.access(parent, os.W_OK),
         f"--out ({args.out}) cannot be made: {parent} is no folder that can be written to"),
        (args.resume and args.overwrite,
         "--resume goes on with a run and --overwrite deletes it: choose one of the two"),
        (args.overwrite and inside,
         f"--overwrite would delete {inside}, which lies in --out ({args.out}): name another --out"),
        (not (args.resume or args.overwrite) and holds_run(out),
         f"--out ({args.out}) holds a run: --resume goes on, --overwrite deletes it; or name another"),
    ):  # fmt: skip
        if wrong:
            raise BadInput(message)
    methods.check_flags(args)
    trackers.check(args.log_with)
    card.check_login(args.push_to_hub)


def check_device(args: argparse.Namespace, sampler: str, device: str) -> None:
    """The rules that need to know where the run takes place: "vllm" or "hf" on "cuda" or "cpu"."""
    if args.optim == "adamw8bit" and device != "cuda":
        raise BadInput("--optim adamw8bit needs a CUDA device, where its kernels run: use --optim adamw")
    if args.vllm_sleep and (sampler, device) != ("vllm", "cuda"):
        raise BadInput(
            f"--vllm-sleep needs vLLM on a CUDA device, whose memory it frees; here it is {sampler} on "
            f"{device}: leave it out"
        )


# ------------------------------------------------------------------------------------------------------------
# The sampler's check


def gap_limit(args, device) -> float:
    """Largest mean log-prob gap between sampler and trainer that passes for rounding, nats."""
    # float32 engines agree to 2e-5 (measured); bf16 ones may be hundredths off.
    return 1e-3 if args.dtype == "float32" and device.type == "cpu" else 0.1


def check_sync(sampler, model, prompt_ids: list[int], args, device) -> float:
    """Mean log-prob gap between sampler and trainer on a probe, in nats; a stale engine stops the run."""
    from update import add_logps, trained_positions

    probe = sampler.generate([prompt_ids], 4, min(32, args.max_tokens), args.temperature, seed=args.seed)[0]
    batch = [r | {"prompt_ids": prompt_ids, "advantage": 0.0, "weight": 0.0} for r in probe]
    add_logps(model, batch, args, device)
    sampled = [r["logps"][t] for r in batch for t in trained_positions(r)]
    gap = float(np.mean(np.abs(np.subtract(sampled, [logp for r in batch for logp in r["old_logps"]]))))
    limit = gap_limit(args, device)
    # A small step hides in the noise of bf16: so the weights themselves are compared as well.
    stale = sampler.stale_weights(model) if sampler.name == "vllm" else []
    if stale or not gap < limit:
        raise SystemExit(
            f"train_grpo.py: error: the sampler does not hold the trainer's weights: log-probs of a probe "
            f"differ by {gap:.2g} on average (limit {limit:g}), {len(stale)} weights do: {stale[:3]}. "
            f"An update was lost; a run that went on would learn from another policy's responses."
        )
    return gap


# ------------------------------------------------------------------------------------------------------------
# Training


def set_up(args: argparse.Namespace, state, log) -> argparse.Namespace:
    """Load and check all that the loop needs; --out is touched last, when nothing can be wrong any more."""
    import torch

    from sampler import load_model, make_sampler, pick_sampler

    s = argparse.Namespace(memory={}, reference=None, start=0, rows=load_rows(args), held_out=[], epochs={})
    s.seconds, s.clock, s.conciseness, s.unwritten = Counter(), time.monotonic(), None, []
    s.tracker = None
    check_reward(s.rows, args)
    s.folder, saved = newest_state(args, log)
    s.path = args.model
    if args.eval_data:
        s.held_out = evaluate.load_data(args.eval_data, args.eval_limit, 0)
    kind = pick_sampler(args.sampler, log)
    check_device(args, kind, state.device.type)
    cache = os.path.dirname(os.path.abspath(args.out))
    if s.path is None:
        with state.main_process_first():  # one process makes the toy's models, the others find them there
            s.path = toy.make_base(cache, args.seed, log=log)
    if scorer := args.conciseness_model:
        with state.main_process_first():
            scorer = toy.make_conciseness(cache, log=log) if scorer == "toy" else scorer
        s.conciseness = methods.load_conciseness(scorer, state.device)
    s.tokenizer = load_tokenizer(s.path)
    context = load_config(s.path, s.tokenizer).max_position_embeddings
    longest = s.longest = check_prompts(s.rows, s.tokenizer, args, context)
    # Not kept for their own sake: a resumed run is the same run only where these are the same.
    s.run = {"processes": state.num_processes, "data": evaluate.hash_data(s.rows)}
    build_model(s, args, state)
    if saved:
        restore(s, saved, args, log)
    # The toy's last evaluation asks for more than was trained: its engine takes the whole context.
    room = max(longest + args.max_tokens, plan_held_out(s, args, context))
    room = context if args.model is None else room
    own = args.prompts_per_step * args.group_size // state.num_processes
    seed = args.seed + state.process_index
    # transformers cannot generate with shards: that sampler gets a model of its own.
    sampled = load_model(s.path, state.device) if args.fsdp and kind == "hf" else s.model
    s.sampler = make_sampler(
        kind, sampled, s.path, s.tokenizer, room, args.dtype, seed, args.vllm_memory, own, args.vllm_sleep
    )
    if saved:
        torch.set_rng_state(saved["torch_rng"])
    if state.is_main_process:
        open_run(args, s.start)
        s.tracker = trackers.start(args, s.start)
    s.saved = s.done = s.start
    state.wait_for_everyone()
    log(
        f"{s.model.num_parameters() / 1e6:.2f}M parameters on {state.device}, {state.num_processes} "
        f"process(es), {len(s.rows)} rows, reward {args.reward}, advantage {args.advantage}, sampler {kind}, "
        f"steps {s.start}..{args.steps}"
    )
    return s


def restore(s, saved: dict, args, log) -> None:
    """Optimizer, memory and step of a checkpoint; words where the resumed run cannot be the same run."""
    from weights import load_trained_state

    load_trained_state(s.model, s.optimizer, saved)
    for group in s.optimizer.param_groups:  # flags that were changed for the resumed run count
        group.update(betas=tuple(args.betas), weight_decay=args.weight_decay)
    s.memory, s.start = saved["memory"], saved["step"]
    for name in s.run:
        if saved["run"].get(name) != s.run[name]:
            log(f"warning: --resume: {name} changed since step {s.start}: it is no longer the same run")


def build_model(s, args, state) -> None:
    """s.model, s.reference (the starting model, where something asks for it) and s.optimizer."""
    import torch

    import weights
    from sampler import load_model
    from update import make_optimizer, run

    # Adapters start from the starting model. Shards come from the CPU: no GPU has to hold the whole model.
    start, device = s.path if args.lora else s.folder or s.path, "cpu" if args.fsdp else state.device
    s.model = load_model(start, device, args.param_dtype).train()
    if args.lora:
        torch.manual_seed(args.seed)  # the same adapters on every process
        weights.add_lora(s.model, args.lora)
    if args.gradient_checkpointing:
        s.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.kl_coef or args.reference_samples:
        # Without its adapters the model is the starting model: no second one is held.
        s.reference, home = s.model, "cpu" if args.offload_reference else device
        if not args.lora:
            s.reference = load_model(s.path, home, args.param_dtype).eval().requires_grad_(False)
    for p in s.reference.parameters() if args.offload_reference and state.device.type == "cuda" else []:
        p.data = p.data.pin_memory()  # copied at the full speed of the bus, while the CPU goes on
    for model in dict.fromkeys([s.model, s.reference]) if args.fsdp else []:
        if model is not None:
            weights.shard(model, run, args, state.device, state.num_processes)
    # The learning rate is a function of the step: no scheduler state.
    s.optimizer = make_optimizer(s.model, args)


def train(args: argparse.Namespace) -> None:
    """The whole run; see the docstring of this file. A signal ends it early, after a checkpoint."""
    import torch
    from accelerate import PartialState

    from update import check_memory

    # Without `cpu` plain torchrun on a machine without GPU would run N single trainers side by side.
    state = PartialState(cpu=not torch.cuda.is_available())
    bar, log = make_log(args, state)
    began = time.monotonic()
    s = set_up(args, state, log)
    # The engine was built from the starting model: it gets the trainer's weights before anything is sampled.
    s.probe = encode_prompt(s.tokenizer, s.rows[0]["prompt"])
    s.sampler.sync(s.model)
    check_sync(s.sampler, s.model, s.probe, args, state.device)
    if args.check_memory or (args.check_memory is None and state.device.type == "cuda"):
        if args.vllm_sleep:
            s.sampler.rest()
        check_memory(s.model, s.reference, s.optimizer, s.longest, args, state.device)
        if args.vllm_sleep:
            s.sampler.sync(s.model)
    if bar:  # the time left is that of steps: neither the set-up nor the steps before a --resume count
        bar.initial = bar.n = bar.last_print_n = s.start
        bar.unpause()
    done, before = s.start, pickle.dumps(s.memory)
    with faults.signals():
        try:
            if args.model is None and done == 0:
                evaluate_toy(s, args, "eval_base", state, log)
            while done < args.steps:
                before = pickle.dumps(s.memory)
                evaluate_if_due(s, args, done, state, log)
                lap(s)  # evaluations and checkpoints are no part of a step
                m = take_step(s, args, state, done, log)
                if state.is_main_process:
                    tell(m, args, s.unwritten, bar, log)
                    trackers.log_step(s.tracker, m)
                lap(s, "rest")  # of the next step: this one's line is written
                done = s.done = done + 1
                if done == args.steps or is_due(done, args):
                    save(s, args, state, done, log)
            log(f"trained in {(time.monotonic() - began) / 60:.1f} min; model: {s.folder}; {best(args.out)}")
            must_be_saved(s, args, state, done)
            wrap_up(s, args, state, log)
        except faults.Stopped:
            if done < args.steps:  # the memory has seen prompts of the step that is dropped
                s.memory = pickle.loads(before)
                save(s, args, state, done, log)
                must_be_saved(s, args, state, done)
            log(f"stopped by a signal after step {done}; to go on: {faults.resume_command(args, state)}")
    trackers.finish(s.tracker)
    if bar:
        bar.close()
    if s.sampler.name == "hf":  # vLLM takes its groups down itself
        state.destroy_process_group()  # its threads, left to the interpreter's end, can abort a finished run


def wrap_up(s, args, state, log) -> None:
    """The evaluation after the last step, the toy's summary, the model card (and the upload)."""
    evaluate_if_due(s, args, s.done, state, log)
    if args.model is None:
        evaluate_toy(s, args, "eval", state, log)
    if not state.is_main_process:
        return
    if args.model is None and (args.budgets != "none" or args.budget_schedule != "none"):
        log(toy.summary(args.out))
    last = os.path.join(args.out, "eval" if args.model is None else f"eval-{s.done}")
    card.finish(s.folder, vars(args), s.rows, last, args.push_to_hub, log)


def take_step(s, args, state, step: int, log) -> dict:
    """One step, from prompts to new weights in the sampler; its metrics.

    faults.Stopped comes before the weights are changed or not at all.
    """
    from update import learning_rate, training_speed, update

    rank, processes, device = state.process_index, state.num_processes, state.device
    # ---- Sample and verify: a group of responses to each prompt, the whole batch on every process ----------
    rows, groups, counts, m = sample_batch(s, args, state, step)

    # ---- Reward --------------------------------------------------------------------------------------------
    rollouts = to_rollouts(groups, rows, args, step, s.memory)
    total, parts, advantages = rewards_and_advantages(rollouts, args, s.memory)
    # Every token of a response shares its advantage: GRPO knows no credit within a response.
    for i, (group, line) in enumerate(zip(groups, advantages, strict=True)):
        for r, advantage in zip(group, line, strict=True):
            r |= {"advantage": float(advantage), "group": i}
    batch = [r for group in groups for r in group if not (args.overlong_filter and r["truncated"])]
    reference, write = s.reference if args.kl_coef else None, args.out if state.is_main_process else None
    faults.check_finite(step, {"reward": total, "advantage": advantages}, batch, write)
    if step == 0:
        show_samples(groups, rows, total, log)
    methods.learn(*s.seen, args, s.memory)  # after the rewards, which belong to the old memory
    lap(s, "verify")

    # ---- Update --------------------------------------------------------------------------------------------
    lr = learning_rate(step, args)
    for param_group in s.optimizer.param_groups:
        param_group["lr"] = lr
    if args.vllm_sleep:
        s.sampler.rest()
        lap(s, "sync")
    m |= update(s.model, reference, s.optimizer, batch, args, rank, processes, device)
    faults.check_finite(step, {"loss": m["loss"], "grad_norm": m["grad_norm"]}, batch, write)
    lap(s, "train")
    m |= training_speed(s.model, reference, batch, args, s.seconds["train"], processes, device)

    # ---- Push the new weights into the sampler -------------------------------------------------------------
    # A stale engine is the commonest silent failure of this kind of trainer; hence the check.
    s.sampler.sync(s.model)
    if args.check_sync and (step == 0 or (step + 1) % args.check_sync == 0):
        check_sync(s.sampler, s.model, s.probe, args, device)
    lap(s, "sync")

    m |= {"lr": lr} | counts | methods.metrics(groups, rollouts, total, args, s.memory)
    lap(s, "rest")
    m = step_metrics(step, rollouts, total, parts, m, s.seconds)
    s.seconds.clear()
    for text in faults.watch(m, counts, groups, s.tokenizer, args, s.memory, gap_limit(args, device)):
        log(text)
    return m


def save(s, args, state, done: int, log) -> None:
    """OUT/checkpoint-DONE. A disk that does not take it is told and not fatal: the next time it may."""
    from safetensors import SafetensorError

    from weights import trained_state, whole_weights

    # Gathered by all processes, written by one. A plain model is written as it is.
    trained, whole = trained_state(s.model, s.optimizer), None
    if args.lora or args.fsdp:
        whole = {name: weight.cpu() for name, weight in whole_weights(s.model)}
    if state.is_main_process and done > s.saved:
        folder = os.path.join(args.out, f"checkpoint-{done}")
        everything = trained | {"step": done, "memory": s.memory, "run": s.run}
        reward = s.memory["watch"]["reward"]
        try:
            save_checkpoint(folder, everything, s.model, s.tokenizer, args.keep, reward, whole)
            s.folder, s.saved = folder, done
        except (OSError, RuntimeError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            log(f"warning: step {done} could not be saved in {args.out} ({why}): training goes on, the next "
                f"try is at the next checkpoint; on disk is step {s.saved}")  # fmt: skip
    state.wait_for_everyone()


def must_be_saved(s, args, state, done: int) -> None:
    """Ends the run with words where its last step is not on disk."""
    if state.is_main_process and s.saved < done:
        raise SystemExit(
            f"train_grpo.py: error: step {done} could not be saved (see above): make room in {args.out}; "
            f"--resume goes on from step {s.saved}"
        )


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


def evaluate_if_due(s, args, done: int, state, log) -> None:
    """A budget sweep over --eval-data every --eval-every steps; the results go to OUT/eval-DONE."""
    if done == 0 or not args.eval_every or done % args.eval_every:
        return
    # After a resume it is the evaluation that the end of the run may have cut short.
    if done == s.start and os.path.exists(os.path.join(args.out, f"eval-{done}", "results.json")):
        return
    budgets, mode, wording = s.held_out_plan
    run_evaluation(s, args, s.held_out, budgets, mode, wording, args.eval_n, f"eval-{done}", state, log)


def evaluate_toy(s, args, name: str, state, log) -> None:
    """The toy's table: trained and untrained budgets, the trained task and the one that RL never sees."""
    trained = sorted({row["budget"] for row in s.rows if row.get("budget")})
    problems, n = toy.problems("toy", "test", toy.TESTED), 2
    budgets = trained if 0 < len(trained) <= 8 else toy.ASKED_BEFORE
    if name == "eval":
        problems, n = problems + toy.problems("toy_ood", "test", toy.TESTED), 4
        budgets = sorted({*budgets, *toy.ASKED})
    if not trained and args.budget_schedule == "none":
        budgets = [None]  # a method that asks for no length is asked for none
    mode, cap = "exact" if args.mode == "both" else args.mode, 2 * max(toy.ASKED)
    # One cap for all, so that a budget which is not obeyed shows the length it gets and not the cap.
    run_evaluation(s, args, problems, budgets, mode, args.wording, n, name, state, log, max_tokens=cap)


def run_evaluation(
    s,
    args,
    problems: list[dict],
    budgets: list,
    mode: str,
    wording: str,
    n: int,
    name: str,
    state,
    log,
    max_tokens: int | None = None,
) -> None:
    """evaluate.py on the live sampler, shared by all processes; sampled as in training."""
    trained = sorted({row["budget"] for row in s.rows if row.get("budget")})
    alone = state.num_processes == 1
    try:
        # Of several processes none may leave alone: there a signal waits for the end of the evaluation.
        with faults.interruptible() if alone else contextlib.nullcontext():
            results = evaluate.evaluate(
                s.sampler, problems, budgets, mode, n, os.path.join(args.out, name), wording=wording,
                temperature=args.temperature, top_p=1.0, max_tokens=max_tokens, seed=args.seed,
                require_think=args.require_think, trained_budgets=trained,
                model=s.folder or s.path, log=log, state=state,
            )  # fmt: skip
            trackers.log_evaluation(s.tracker, results, os.path.join(args.out, name), s.done)
    except OSError as error:
        if not alone:
            raise
        log(f"warning: the evaluation {name} could not be written ({error.strerror}): training goes on")


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, 1 after a failure, each told in one line."""
    args = None
    try:
        args = parse_args(argv)
        train(args)
    except BadInput as error:
        print(f"train_grpo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_grpo.py: interrupted; what was saved stays saved", file=sys.stderr)
        return 130
    except Exception as error:
        told = faults.explain(error, args) if args else None
        if told is None:
            raise  # not known: the traceback says more than words could
        print(f"train_grpo.py: error: {told}", file=sys.stderr)
        return 1
    finally:
        let_go_of_the_screen()
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
