"""GRPO with a colocated vLLM engine, in one file: a language model learns to think as long as it is asked to.

Every process owns one GPU, and on it both the model that is trained and the vLLM engine that samples. A step:

    rows -> responses (vLLM) -> right or wrong, length -> reward -> advantage -> loss -> new weights -> vLLM

$ python train_grpo.py                                                   a laptop: the toy of toy/, no GPU
$ python train_grpo.py @recipes/l1_exact.args                            one GPU
$ torchrun --nproc_per_node 8 train_grpo.py @recipes/l1_exact.args       a box of eight

A response is a dict: prompt_ids, ids [L], logps [L] (the sampler's), text, length, correct, truncated, ...
What a paper needs besides its reward is in methods/, one file each. Every random draw is a function of
(seed, step, rank), so a resumed run is the same run.
"""

import argparse
import datetime
import importlib.util
import inspect
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

import data
import methods
from data import BadInput, add_up
from rewards import ADVANTAGES, REWARDS
from scaling import model as net
from scaling import shared_prompt
from verifier import check_answers

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")

# ---- Flags. `@FILE` reads them from a recipe; a later flag overrides an earlier one.


def build_parser():
    parser = argparse.ArgumentParser("train_grpo.py", fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)

    def add(name, default=None, help="", **options):
        if default is not None:
            kind = {"action": "store_true"} if default is False else {"type": type(default)}
            options, help = kind | options, f"{help} (default: %(default)s)" if default else help
        parser.add_argument(*name.split(), default=default, help=help, **options)

    pairs = {"nargs": "+", "metavar": "K=V", "type": str}
    # model, data, output
    add("--model", help="folder or hub id; without --model and --data: the toy, as in recipes/toy.args")
    add("--data", help="rows of data.py (.jsonl), a preset or a hub id")
    add("--limit", 0, "take the first N problems only; 0: all")
    add("--budgets", help="draw budgets here: uniform:LO:HI, log:LO:HI, bucket:A,B, fixed:N or none")
    add("--mode", "exact", "what drawn budgets mean", choices=["exact", "max", "both"])
    add("--wording --sentence", "l1", "asks for a drawn budget: l1, tulu, or your own with {N} in it")
    add("--out", "out/run", "folder for metrics, checkpoints and evaluations")
    add("--resume", False, "go on from the newest checkpoint in --out, with its flags")
    add("--overwrite", False, "delete the run in --out first")
    add("--seed", 0, "of prompts, budgets and samples")
    # reward and method
    known, named = [r for r in REWARDS if r != "dot_threshold"], ["plain", *methods.names()]
    add("--reward", "lcpo_exact", "see rewards.py", choices=known, metavar="NAME")
    add("--reward-args", [], "its constants, as alpha=0.0003", **pairs)
    add("--advantage", "grpo", "see rewards.py", choices=ADVANTAGES, metavar="NAME")
    add("--advantage-args", [], "its constants", **pairs)
    add("--method", "plain", "what its paper does besides", choices=named, metavar="NAME")
    add("--method-args", [], "its constants", **pairs)
    add("--require-think", False, "an answer without the end of thinking is wrong")
    add("--think-end", "</think>", "the text that ends thinking")
    # sampling
    add("--sampler", "auto", "auto: vllm if there is CUDA and vllm", choices=["auto", "vllm", "hf"])
    add("--steps", 500, "training steps, each on one batch of responses")
    add("--prompts-per-step", 128, "over all processes")
    add("--group-size", 16, "responses to each prompt")
    add("--max-tokens", 4096, "longest response")
    add("--temperature", 1.0, "of sampling, and of the log-probs in the loss")
    add("--vllm-memory", 0.35, "vLLM's share of the GPU memory")
    add("--vllm-sleep", False, "lend that share to the trainer during the update")
    add("--dynamic-sampling", "none", "replace groups alike in it", choices=["none", "correct", "reward"])
    # update
    add("--lr", 1e-6, "peak learning rate of AdamW")
    add("--lr-schedule", "constant", "after the warm-up", choices=["constant", "cosine", "linear"])
    add("--warmup-steps", 0, "of linear warm-up")
    add("--weight-decay", 0.0, "of AdamW")
    add("--optim", "adamw", "adamw8bit: bitsandbytes", choices=["adamw", "adamw8bit"])
    add("--minibatches", 1, "optimizer steps on each batch; 1: on policy")
    add("--micro-tokens", 16384, "tokens in one forward pass, padding included")
    add("--dtype", "auto", "to compute in; auto: bfloat16 on CUDA", choices=["auto", "float32", "bfloat16"])
    add("--gradient-checkpointing", False, "recompute activations: slower, leaner")
    add("--check-memory", False, "try the largest update before training")
    add("--fsdp", False, "shard the model over the processes (7B and up)")
    add("--lora", 0, "rank of adapters (peft); 0 trains all weights")
    # loss
    add("--ratio", "token", "GRPO, GSPO, CISPO", choices=["token", "sequence", "cispo"])
    add("--clip-low", 0.2, "lower clip of the ratio")
    add("--clip-high", 0.2, "upper clip of the ratio; DAPO: 0.28")
    add("--dual-clip", 0.0, "bound the loss of bad responses at this times -advantage; 0: off")
    add("--overlong-filter", False, "truncated responses leave the loss")
    reductions = ["token_mean", "sequence_mean", "constant"]  # 1 / (all tokens, N x own tokens, N x cap)
    add("--loss-reduction", "token_mean", "what a token weighs", choices=reductions)
    add("--kl-coef", 0.0, "weight of the KL to the starting model; 0 loads no such model")
    add("--kl-estimator", "k3", "of that KL; k1 has no gradient in a loss", choices=["k2", "k3"])
    add("--tis-cap", 2.0, "cap of the trainer/sampler importance weight; 0: off")
    add("--tis-mode", "token", "cut or masked", choices=["token", "sequence", "token_mask", "sequence_mask"])
    # evaluation and checkpoints
    add("--eval-data", help="held-out problems for evaluate.py: files or presets, comma-separated")
    add("--eval-every", 0, "evaluate before training, every N steps and at the end; 0: never")
    add("--eval-budgets", help="512,1024,... (default: four from those of the rows)")
    add("--save-every", 50, "checkpoint every N steps; 0: only at the end")
    add("--log-with", "none", "send metrics there, too", choices=["none", "wandb", "tensorboard", "trackio"])
    return data.one_line_errors(parser)


def parse_args(argv=None):
    """Flags given, the toy's or a resumed run's; BadInput, before anything is loaded, for usual mistakes."""
    argv, parser = list(sys.argv[1:] if argv is None else argv), build_parser()
    try:
        args = parser.parse_args(argv)
    except ValueError as error:  # BadInput, or a recipe's open quotation mark
        raise BadInput(str(error)) from None
    if not (args.model or args.data or args.resume):  # the laptop's default
        argv = ["@" + os.path.join(os.path.dirname(os.path.abspath(__file__)), "recipes/toy.args"), *argv]
        args = parser.parse_args(argv)
    if args.resume:  # the run's own flags; those given now still win
        try:
            with open(os.path.join(args.out, "args.json")) as f:
                parser.set_defaults(**json.load(f))
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"--resume: no run to go on with in --out ({args.out}): {error}") from None
        args = parser.parse_args(argv)
    positive = "lr steps prompts_per_step max_tokens minibatches micro_tokens temperature".split()
    for name, value in vars(args).items():
        least, rule = (1e-30, "more than 0") if name in positive else (0, "0 or more")
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} ({value}) must be {rule}")
    p, dual, tracker = args.prompts_per_step, args.dual_clip, args.log_with
    out = os.path.realpath(args.out) + os.sep
    there = next(p for p in (Path(out), *Path(out).parents) if p.exists())
    held = os.path.exists(out + "args.json") and not args.resume and not args.overwrite
    read = [n for n in (args.model, args.data, *(args.eval_data or "").split(","), ".") if n]
    inside = [n for n in read if os.path.exists(n) and f"{os.path.realpath(n)}{os.sep}".startswith(out)]
    needs = ("peft", args.lora), ("bitsandbytes", args.optim == "adamw8bit"), (tracker, tracker != "none")
    lacking = [name for name, asked in needs if asked and not importlib.util.find_spec(name)]
    for wrong, message in (
        (args.model and not args.data, "--data is missing: name the rows to train on (data.py makes them)"),
        (args.data and not args.model, "--model is missing: name the model to train"),
        (args.group_size < 2, f"--group-size ({args.group_size}) must be 2 or more: advantages compare"),
        (p % WORLD, f"--prompts-per-step ({p}) must be a multiple of the {WORLD} processes"),
        (args.minibatches > p, f"--minibatches ({args.minibatches}) exceeds --prompts-per-step ({p})"),
        (not 0 < args.vllm_memory < 1, f"--vllm-memory ({args.vllm_memory}) must lie between 0 and 1"),
        (dual and (args.ratio == "cispo" or dual <= 1), f"--dual-clip ({dual}) must exceed 1; not for cispo"),
        (args.fsdp and WORLD == 1, "--fsdp needs several processes: torchrun --nproc_per_node N"),
        (args.fsdp and args.optim == "adamw8bit", "--fsdp cannot shard 8-bit states: use --optim adamw"),
        (args.eval_every and args.model and not args.eval_data, "--eval-every needs --eval-data"),
        (args.resume and args.overwrite, "--resume goes on with a run, --overwrite deletes it: choose one"),
        (held, f"--out ({args.out}) holds a run: --resume goes on, --overwrite deletes it; or name another"),
        (args.overwrite and inside, f"--overwrite would delete {inside}: it lies in --out; name another"),
        (RANK == 0 and not os.access(f"{there}/.", os.W_OK), f"--out ({args.out}) cannot be written"),
        (0 < args.tis_cap <= 1 and "mask" in args.tis_mode, f"--tis-cap ({args.tis_cap}) must exceed 1"),
        (lacking, f"a flag needs a package that is not installed: pip install {' '.join(lacking)}"),
    ):  # fmt: skip
        if wrong:
            raise BadInput(message)
    functions = REWARDS[args.reward], ADVANTAGES[args.advantage], methods.find(args.method)
    for name, function in zip(("reward_args", "advantage_args", "method_args"), functions, strict=True):
        setattr(args, name, methods.constants(name, function, getattr(args, name)))
    return args


def print0(*words, **options):
    if RANK == 0:
        print(*words, flush=True, **options)


# ---- The sampler: a vLLM engine in this process, on this GPU.


class VLLM:
    def __init__(self, path, tokenizer, stops, max_model_len, dtype, seed, memory, seqs, sleep=False, **more):
        # In this process and not in one of its own: so weights can be handed over as plain tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        import vllm
        from vllm.model_executor.layers import utils as ops
        from vllm.platforms import current_platform

        self.vllm, self.name, self.tokenizer, self.stop_ids = vllm, "vllm", tokenizer, stops
        self.max_model_len, self.asleep = max_model_len, False
        options = {"gpu_memory_utilization": memory, "enable_sleep_mode": sleep}
        if current_platform.is_cpu():
            # That build repacks weights, and packed ones cannot be updated: plain products instead.
            f = torch.nn.functional.linear
            ops.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: vars(layer).update(cpu_linear=f)
            options = {"enforce_eager": True}
        options |= {"distributed_executor_backend": "external_launcher"} if WORLD > 1 else {}
        self.llm = vllm.LLM(
            model=path, dtype=dtype, seed=seed, max_model_len=max_model_len, max_num_seqs=min(seqs, 512),
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled, temperature included
            enable_prefix_caching=True, disable_log_stats=True, use_tqdm_on_load=False, **options, **more,
        )  # fmt: skip
        set_threads(threads)  # the CPU worker changes it for the whole process and disables the setter

    def generate(self, prompts, n, caps, temperature, seed, top_p=1.0, stop_ids=None, **more):
        """n responses {"ids" [L], "logps" [L], "truncated"} to each prompt (token ids), of caps[i] tokens.

        ids hold the end token, too. Same call, same seed: same responses. logps: nats. more: SamplingParams.
        """
        torch.manual_seed(seed)  # the engine draws from the generators of this process
        np.random.seed(seed % 2**32)
        common = more | {"n": n, "temperature": temperature, "top_p": top_p}
        common |= {"stop_token_ids": stop_ids or self.stop_ids, "detokenize": False}
        common |= {"logprobs": 0, "flat_logprobs": True}  # plain lists, one number a token: the sampled one's
        params = [self.vllm.SamplingParams(max_tokens=cap, **common) for cap in caps]
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        found = [[] for _ in prompts]
        for group, answer in zip(found, self.llm.generate(requests, params, use_tqdm=False), strict=True):
            for o in answer.outputs:
                r = {"ids": np.array(o.token_ids, np.int32), "truncated": int(o.finish_reason != "stop")}
                group.append(r | {"logps": np.array(o.logprobs.logprobs, np.float32)})
        return found

    def sleep(self):
        """Lend the GPU memory of weights and cache to the trainer, until load()."""
        self.llm.sleep(level=2)  # neither is kept anywhere: the next weights are the trainer's
        self.asleep = True

    def load(self, model):
        """Take over the weights of `model`. All that was cached under the old ones is dropped."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        # The one place that reaches into vLLM (0.32.0): its loader maps the names and fuses q, k and v.
        worker = self.llm.llm_engine.model_executor.driver_worker
        worker.model_runner.model.load_weights(net.whole_weights(model))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after an update: are requests still running?")


def pick_sampler(name):
    """vllm or hf: what this machine can do."""
    installed = importlib.util.find_spec("vllm")
    if name == "vllm" and not installed:
        raise BadInput("--sampler vllm: vllm is not installed: see requirements.txt, or use --sampler hf")
    driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    if driver and torch.version.cuda and DEVICE.type == "cpu" and name != "hf":
        raise BadInput(f"torch sees no GPU, but an NVIDIA driver is here: CUDA {torch.version.cuda} needs a "
                       f"newer one (CUDA 13: 580), or train on the CPU with --sampler hf")  # fmt: skip
    return name if name != "auto" else "vllm" if installed and DEVICE.type == "cuda" else "hf"


# ---- Rollouts


def draw_rows(rows, position, n, seed):
    """n rows from `position` on, without end. A position says it all: a resumed run needs no iterator."""
    places = [divmod(p, len(rows)) for p in range(position, position + n)]
    order = {e: np.random.default_rng([seed, e]).permutation(len(rows)) for e in {e for e, _ in places}}
    return [rows[order[e][i]] | {"position": position + k} for k, (e, i) in enumerate(places)]


def roll_out(sampler, rows, requests, method, tokenizer, args, key):
    """(a checked group of responses to each row, counters of the check). Each process samples its share, all
    get the whole batch: advantages cannot differ. key: [step, ...], new at each call, seeds the sampling."""
    own = slice(len(rows) * RANK // WORLD, len(rows) * (RANK + 1) // WORLD)
    rows, requests = rows[own], requests[own]
    seed = int(np.random.SeedSequence([args.seed, key[0], RANK, *key[1:]]).generate_state(1)[0])
    flat = [request for group in requests for request in group]  # a method may ask a group in parts
    prompts = [q["prompt_ids"] + q["forced"] for q in flat]
    caps = [q["cap"] - len(q["forced"]) for q in flat]
    answers = iter(sampler.generate(prompts, flat[0]["n"], caps, args.temperature, seed) if flat else [])
    groups = [[] for _ in requests]
    for group, requested in zip(groups, requests, strict=True):
        for q in requested:
            forced = np.array(q["forced"], np.int32)
            unknown = np.full(len(forced), np.nan, np.float32)  # not sampled, but with a loss
            for r in next(answers):
                r["ids"], r["logps"] = np.append(forced, r["ids"]), np.append(unknown, r["logps"])
                group.append(r | {"prompt_ids": q["prompt_ids"], **q["tags"]})
    method.complete(groups, sampler, seed)
    counts = check(groups, rows, tokenizer, args)
    method.revise(groups, rows)
    return gather_object(groups), add_up(gather_object([counts]))


def check(groups, rows, tokenizer, args):
    """Adds text, length and correct to every response; the counters of the answer check."""
    for r in sum(groups, []):
        # Only the end token is cut off: </think> is a special token in many models, and must stay readable.
        ids = r["ids"] if r["truncated"] else r["ids"][:-1]
        r |= {"text": tokenizer.decode(ids, skip_special_tokens=False), "length": len(r["ids"]), "correct": 0}
    # A response that was cut off at the cap is wrong, whatever stands in its middle.
    whole = [(r, row) for group, row in zip(groups, rows, strict=True) for r in group if not r["truncated"]]
    golds, kinds, choices = ([row.get(k) for _, row in whole] for k in ("answer", "kind", "choices"))
    think = {"require_think": args.require_think, "think_end": args.think_end}
    verdicts, counts = check_answers([r["text"] for r, _ in whole], golds, kinds, choices, **think)
    for (r, _), right in zip(whole, verdicts, strict=True):
        r["correct"] = int(right)
    return counts


def reward_and_advantage(groups, rows, method, args, step):
    """(rollouts as the reward reads them, reward [P, G], its parts {name: [P, G]}, advantage [P, G])."""
    rollouts = {k: np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length", "truncated")}
    rollouts["text"] = [[r["text"] for r in g] for g in groups]
    # A missing budget is nan, not -1: a sentinel would be taken for a number by some reward sooner or later.
    rollouts["budget"] = np.array([row.get("budget") or np.nan for row in rows], dtype=float)
    rollouts |= {"mode": [row.get("mode") for row in rows], "step": step, "require_think": args.require_think}
    rollouts |= method.reward_inputs(groups, rows, step)
    reward, constants = REWARDS[args.reward], args.reward_args | rollouts.pop("constants", {})
    total, is_sum = reward(rollouts, **constants), "parts" in inspect.signature(reward).parameters
    parts = reward(rollouts, **constants, parts=True) if is_sum else {}  # its terms by name
    # GDPO normalises each part by itself before they are added; all others see their sum.
    scored = np.stack(list(parts.values()) or [total]) if args.advantage == "gdpo" else total
    return rollouts, total, parts, ADVANTAGES[args.advantage](scored, rollouts, **args.advantage_args)


def sample_batch(sampler, rows, method, tokenizer, args, step, position, ask):
    """(groups, their rows, next position, all that was sampled, counters) of a step. With --dynamic-sampling
    groups that teach nothing, as all their responses are alike, are replaced: four more rounds at most."""
    groups, kept, seen, seen_rows, counts = [], [], [], [], {}
    for turn in range(5):
        missing = math.ceil((args.prompts_per_step - len(groups)) / WORLD) * WORLD  # equally many each
        new_rows = [method.row(row, step) for row in draw_rows(rows, position, missing, args.seed)]
        position += missing
        method.begin_step(step, turn, new_rows, rows, ask)
        requests, key = [method.requests(row) for row in new_rows], [step, turn] if turn else [step]
        new, checked = roll_out(sampler, new_rows, requests, method, tokenizer, args, key)
        seen, seen_rows, counts = seen + new, seen_rows + new_rows, add_up([counts, checked])
        if args.dynamic_sampling == "none":
            return new, new_rows, position, (new, new_rows), counts
        rollouts, reward, _, _ = reward_and_advantage(new, new_rows, method, args, step)
        compared = rollouts["correct"] if args.dynamic_sampling == "correct" else reward
        for group, row, differs in zip(new, new_rows, np.ptp(compared, axis=1) > 1e-9, strict=True):
            groups, kept = (groups + [group], kept + [row]) if differs else (groups, kept)
        if len(groups) >= args.prompts_per_step:
            break
    n, right = args.prompts_per_step, np.mean([r["correct"] for group in seen for r in group])
    counts |= {"sampled_groups": len(seen), "kept_groups": min(len(groups), n), "sampled_accuracy": right}
    groups, kept = (groups, kept) if groups else (seen, seen_rows)  # all alike: a step that teaches nothing
    return groups[:n], kept[:n], position, (seen, seen_rows), counts


# ---- Loss and update. Response tokens of a micro-batch are one flat row [T]; t["row"] says whose.


def token_weights(lengths, reduction, cap):
    """What a token of each response weighs. Fixed over all responses of an OPTIMIZER STEP, before their split
    over micro-batches and processes: the loss is a weighted sum, so it cannot depend on the split."""
    lengths = np.array(lengths, dtype=float)
    if reduction == "token_mean":  # DAPO, 2503.14476
        return np.ones_like(lengths) / max(lengths.sum(), 1)
    if reduction == "sequence_mean":  # GRPO, 2402.03300
        return 1 / (len(lengths) * np.maximum(lengths, 1))
    return np.full_like(lengths, 1 / (len(lengths) * cap))  # constant: Dr. GRPO, 2503.20783


def response_sums(x, t, n):
    """At each token [T]: the sum of x [T] over those tokens of its response that have a loss; n responses."""
    return x.new_zeros(n).index_add(0, t["row"], x * t["mask"])[t["row"]]


def sequence_ratio(logp, t, n):
    """GSPO, 2507.18071: exp of the mean of logp - old_logp over a response, at each of its tokens [T]."""
    mean = response_sums(logp - t["old_logp"], t, n) / response_sums(torch.ones_like(logp), t, n).clamp(min=1)
    return mean.clamp(-20, 20).exp()


def policy_loss(logp, t, args):
    """The clipped objective of the tokens [T], and sums of its diagnostics over those that have a loss.

    t: old_logp, sampler_logp, ref_logp, advantage, weight, mask [T]; sequence_ratio, sequence_gap.
    """
    old = logp.detach() if t["old_logp"] is None else t["old_logp"]  # at first it is the policy that sampled
    # Ratios beyond e^20 only come from a broken run; the clamp keeps them finite, so that it can be seen.
    ratio = (logp - old).clamp(-20, 20).exp()
    if args.ratio == "sequence" and t["sequence_ratio"] is not None:
        # All tokens of a response share its ratio, and each brings its own gradient.
        ratio = t["sequence_ratio"] * (logp - logp.detach()).exp()
    advantage, clipped = t["advantage"], ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    if args.ratio == "cispo":  # 2506.13585: the clipped ratio is a weight, without gradient
        loss, outside = -clipped.detach() * advantage * logp, ratio != clipped
    else:
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        outside = clipped * advantage < ratio * advantage
        if args.dual_clip:  # 1912.09729
            loss = torch.where(advantage < 0, torch.minimum(loss, -args.dual_clip * advantage), loss)
    gap = (old - t["sampler_logp"]).nan_to_num(0.0)  # nan: the token was forced, not sampled
    if args.tis_cap:  # vLLM's numbers are not the trainer's: an importance weight between the two
        weight = (t["sequence_gap"] if "sequence" in args.tis_mode else gap).clamp(max=60).exp()
        near = (weight * args.tis_cap >= 1) & (weight <= args.tis_cap)
        loss = loss * (weight * near if "mask" in args.tis_mode else weight.clamp(max=args.tis_cap))
    stats = {"clip_fraction": (outside * t["mask"]).sum(), "logp_gap": (gap.abs() * t["mask"]).sum()}
    if t["ref_logp"] is not None:
        d = (logp - t["ref_logp"]).clamp(-20, 20)
        # k3 explodes where the reference is sure of another token: bounded, as in verl's low_var_kl.
        kl = {"k1": d, "k2": d.square() / 2, "k3": (torch.expm1(-d) + d).clamp(-10, 10)}[args.kl_estimator]
        loss, stats["kl"] = loss + args.kl_coef * kl, (kl * t["mask"]).sum()
    loss = (loss * t["weight"]).sum()
    return loss, stats | {"loss": loss}


def size(r):
    return len(r["prompt_ids"]) + len(r["ids"])


def micro_batches(batch, limit):
    """This process's share in micro-batches of `limit` padded tokens, longest first: little padding, the most
    memory at the start. Every process gets equally many."""
    batch = sorted(batch, key=size, reverse=True)
    turns, shares = [*range(WORLD), *reversed(range(WORLD))], [[] for _ in range(WORLD)]
    for i, unit in enumerate(shared_prompt.units(batch, limit, WORLD)):
        micros = shares[turns[i % len(turns)]]
        if not micros or (len(micros[-1]) + len(unit)) * size(micros[-1][0]) > limit:
            micros.append([])
        micros[-1] += unit
    # Shards are gathered by all processes together: one with fewer micro-batches runs weightless fillers.
    filler = {"advantage": 0.0, "weight": 0.0, "mask": np.zeros(len(batch[-1]["ids"]), np.float32)}
    return shares[RANK] + [[batch[-1] | filler]] * (max(map(len, shares)) - len(shares[RANK]))


def to_tensors(micro):
    """Padded ids [N, width], and flat tensors [T] of the response tokens: place, target, weight, ..."""
    prompts, lengths = (np.array([len(r[k]) for r in micro]) for k in ("prompt_ids", "ids"))
    ids = np.zeros((len(micro), (prompts + lengths).max()), dtype=np.int64)
    for i, r in enumerate(micro):
        ids[i, : prompts[i]], ids[i, prompts[i] : size(r)] = r["prompt_ids"], r["ids"]
    row, starts = np.repeat(np.arange(len(micro)), lengths), np.cumsum(lengths) - lengths
    # A token is predicted one place before it stands.
    flat = {"ids": ids, "row": row, "column": np.arange(len(row)) - starts[row] + prompts[row] - 1}
    flat |= {"prompt": prompts if shared_prompt.pays(micro) else None, "sequence_ratio": None}
    flat["target"] = np.concatenate([r["ids"] for r in micro]).astype(np.int64)
    flat["sampler_logp"] = np.concatenate([r["logps"] for r in micro])
    flat["mask"] = np.concatenate([r["mask"] for r in micro])
    flat["weight"] = np.array([r["weight"] for r in micro], np.float32)[row] * flat["mask"]
    # One number for all tokens of a response or, where a method says so, an array of one for each.
    flat["advantage"] = np.concatenate([np.full(len(r["ids"]), r["advantage"], np.float32) for r in micro])
    for name in ("old_logp", "ref_logp"):
        flat[name] = np.concatenate([r[name + "s"] for r in micro]) if name + "s" in micro[0] else None
    return {k: None if v is None else torch.from_numpy(v).to(DEVICE) for k, v in flat.items()}


@torch.no_grad()
def add_logps(model, batch, name, args):
    """r[name] [L]: log-probs of the response's tokens under `model` as it is now, in this process's share."""
    for micro in micro_batches(batch, args.micro_tokens):
        t = to_tensors(micro)
        flat = net.output_head(model, t, args).all_logps(t["target"]).cpu().numpy()
        ends = np.cumsum([len(r["ids"]) for r in micro])
        for r, logps in zip(micro, np.split(flat, ends[:-1]), strict=True):
            r[name] = logps


def backward(model, micro, args):
    """Adds the gradient of a micro-batch's loss to p.grad; sums of its diagnostics."""
    t, sums = to_tensors(micro), Counter(real=sum(map(size, micro)))
    head = net.output_head(model, t, args)
    of_responses = args.tis_cap and "sequence" in args.tis_mode
    if of_responses or (args.ratio == "sequence" and t["old_logp"] is not None):  # the head runs once more
        logp, n = head.all_logps(t["target"]), len(micro)
        t["old_logp"] = logp if t["old_logp"] is None else t["old_logp"]
        t["sequence_ratio"] = sequence_ratio(logp, t, n)
        t["sequence_gap"] = response_sums((t["old_logp"] - t["sampler_logp"]).nan_to_num(0.0), t, n)
    for part in head.parts():  # a chunk of tokens at a time: their logits never exist all at once
        of_part = {k: v if v is None or k in ("ids", "prompt") else v[part] for k, v in t.items()}
        logp, entropy = head.logps(part, of_part["target"])
        loss, stats = policy_loss(logp.requires_grad_(), of_part, args)
        loss.backward()
        head.backward(part, of_part["target"], logp.grad)
        stats |= {"entropy": (entropy * of_part["mask"]).sum(), "tokens": of_part["mask"].sum()}
        sums.update({k: v.detach().double() for k, v in stats.items()})
    head.finish()  # from the hidden states on through the model; micro-batches add up in p.grad
    return sums | {"padded": t["ids"].numel()}


def update(model, reference, optimizer, batch, method, args):
    """--minibatches optimizer steps over the batch, the same on every process; means of the diagnostics."""
    n, sums, norms = args.minibatches, Counter(), []
    minibatches = [b for k in range(n) if (b := batch[len(batch) * k // n : len(batch) * (k + 1) // n])]
    for minibatch in minibatches:
        for r in minibatch:  # by place, never by value: an end token that is also the padding has a loss
            r.setdefault("mask", np.ones(len(r["ids"]), np.float32))
        weights = token_weights([r["mask"].sum() for r in minibatch], args.loss_reduction, args.max_tokens)
        for r, weight in zip(minibatch, weights, strict=True):
            r["weight"] = weight
    for minibatch in minibatches[1:]:  # later steps compare with the policy that sampled
        add_logps(model, minibatch, "old_logps", args)
    for minibatch in minibatches if args.kl_coef else []:
        with net.without_adapters(reference):
            add_logps(reference, minibatch, "ref_logps", args)
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    for minibatch in minibatches:
        method.before_update(model, minibatch, lambda m, rs, name: add_logps(m, rs, name, args))
        for micro in micro_batches(minibatch, args.micro_tokens):
            sums.update(backward(model, micro, args))
        for p in learned if WORLD > 1 else []:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            # A sum: the weights divide by the whole minibatch already. FSDP has taken the mean.
            p.grad.mul_(WORLD) if args.fsdp else dist.all_reduce(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(learned, 1.0)
        norms.append((norm.full_tensor() if args.fsdp else norm).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    sums = add_up(gather_object([{k: float(v) for k, v in sums.items()}]))
    per_token = ["entropy", "clip_fraction", "logp_gap", *(["kl"] if args.kl_coef else [])]
    means = {k: sums.get(k, 0.0) / max(sums.get("tokens", 0), 1) for k in per_token}
    loss = sums.get("loss", 0.0) / max(len(minibatches), 1)
    means |= {"loss": loss, "grad_norm": float(np.mean(norms or [0.0]))}
    return means | {"padding": 1 - sums.get("real", 0) / max(sums.get("padded", 0), 1)}


def learning_rate(step, args):
    """Of this step: linear warm-up, then --lr-schedule to the end of training."""
    warm, after = min(1, (step + 1) / max(1, args.warmup_steps)), max(0, step - args.warmup_steps)
    done = after / max(1, args.steps - args.warmup_steps)
    decay = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return args.lr * warm * decay[args.lr_schedule]


# ---- Checkpoints: a Hugging Face folder that vLLM and evaluate.py load, plus trainer_state.pt for --resume.


def save_checkpoint(out, step, model, tokenizer, optimizer, state, args):
    """OUT/checkpoint-STEP, whole or not at all; the newest two are kept. Every process calls it."""
    folder, beside = f"{out}/checkpoint-{step}", f"{out}/checkpoint-{step}.tmp"
    # Adapters and shards are made whole by all processes; one keeps and writes them.
    state |= net.trained_state(model, optimizer)
    whole = None if net.is_plain(model) else {k: w.cpu() for k, w in net.whole_weights(model) if RANK == 0}
    if RANK == 0:
        model.save_pretrained(beside, state_dict=whole)
        tokenizer.save_pretrained(beside)
        torch.save(state, f"{beside}/trainer_state.pt")
        # A rename may survive a power cut that the data does not: it would look whole and be empty.
        for name in [*os.listdir(beside), "."]:
            handle = os.open(f"{beside}/{name}", os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)  # there completely or not at all
        for old in checkpoints(out)[:-2]:
            shutil.rmtree(f"{out}/checkpoint-{old}")
    PartialState().wait_for_everyone()


def checkpoints(out):
    return sorted(int(p.name[11:]) for p in Path(out).glob("checkpoint-*") if p.name[11:].isdigit())


def newest_checkpoint(args):
    """(state, model) to go on from, ({}, None) where there is nothing. A damaged checkpoint is skipped."""
    damaged, safe = "", {"map_location": "cpu", "mmap": True, "weights_only": True}  # runs no code in it
    for step in reversed(gather_object([checkpoints(args.out)])[0]) if args.resume else ():  # of rank 0
        folder, wrong, empty = f"{args.out}/checkpoint-{step}", "", args.fsdp and RANK > 0
        try:
            state = torch.load(f"{folder}/trainer_state.pt", **safe)
            model = net.load_model(args.model if args.lora else folder, args, empty=empty)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, BadInput) as error:
            if "allocate" in str(error):  # out of memory is no damage
                raise
            wrong = repr(error)[:120]
        if not (wrong := max(gather_object([wrong]))):  # damaged for one process, damaged for all
            return state, model
        damaged = f"--resume: {folder} is damaged ({wrong})"
        print0(f"{damaged}: skipped")
    if damaged:
        raise BadInput(f"{damaged}, and nothing before it is whole: start again with --overwrite")
    return {}, None


def open_run(args, step):
    """--out is made, and what lies after `step` is dropped from its metrics: these steps are taken again."""
    if args.overwrite and os.path.exists(f"{args.out}/args.json"):  # only what is a run is ever deleted
        shutil.rmtree(os.path.realpath(args.out))
    os.makedirs(os.path.realpath(args.out), exist_ok=True)  # a link may point to what was deleted
    path, kept = f"{args.out}/metrics.jsonl", []
    if os.path.exists(path):
        with open(path) as f:  # a crash may have torn the last line
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] < step]
    flags = json.dumps(vars(args) | {"resume": False, "overwrite": False}, indent=1)
    for name, text in {"metrics.jsonl": "".join(kept), "args.json": flags}.items():
        with open(f"{args.out}/{name}.tmp", "w") as f:
            f.write(text)
        os.replace(f.name, f"{args.out}/{name}")  # killed in between, a run keeps the old one
    if args.log_with != "none":
        from integrations import trackers

        return trackers.start(args, step)


# ---- The run


def main(argv=None):
    """A whole run, from flags to the last evaluation. Every process calls it."""
    args = parse_args(argv)
    if args.model is None:
        from toy.prepare import prepare

        vars(args).update(prepare(args.seed, print0))
    # One process may save for a long time while the others wait.
    state = PartialState(cpu=DEVICE.type == "cpu", timeout=datetime.timedelta(hours=6))
    args.dtype = {"auto": "bfloat16" if DEVICE.type == "cuda" else "float32"}.get(args.dtype, args.dtype)

    # ---- rows, and what a method makes of them
    kind, tokenizer, rows = pick_sampler(args.sampler), data.load_tokenizer(args.model), load_rows(args)
    method = methods.make(args, tokenizer, REWARDS[args.reward], ADVANTAGES[args.advantage])
    drawn = sorted({row["budget"] for row in rows if row.get("budget")})
    first = [method.row(r | {"position": i}, s) for i, r in enumerate(rows) for s in (0, args.steps)]
    longest = max(len(q["prompt_ids"]) for row in first for q in method.requests(row)) + args.max_tokens
    if "budget" in REWARDS[args.reward].needs and not any(row.get("budget") for row in first):
        raise BadInput(f"--reward {args.reward} needs budgets, and the rows have none: give --budgets")
    context = data.load_config(args.model, tokenizer).max_position_embeddings
    if longest > context:
        raise BadInput(f"--max-tokens ({args.max_tokens}) and longest prompt: {longest}, the model takes "
                       f"{context}: lower it, or drop prompts (data.py --max-prompt-tokens)")  # fmt: skip
    room = longest
    if args.eval_every:
        from evaluation.in_training import evaluate_now, plan_evaluation

        asked = plan_evaluation(rows, tokenizer, context, args)
        room = max(room, asked["room"])

    # ---- model, starting model, optimizer
    saved, model = newest_checkpoint(args)
    model, reference, optimizer = net.build(args, model, args.kl_coef or method.asks_starting_model, DEVICE)
    step, position = saved.get("step", 0), saved.get("position", 0)
    method.state |= saved.get("method", {})
    net.load_trained_state(model, optimizer, saved)

    # ---- the engine on the same GPU, with room for the longest prompt and response
    stops = data.stop_ids(model.generation_config, tokenizer)
    if kind == "vllm":
        n = args.prompts_per_step * args.group_size // WORLD
        memory = args.vllm_memory, n, args.vllm_sleep
        sampler = VLLM(args.model, tokenizer, stops, room, args.dtype, args.seed + RANK, *memory)
    else:
        from toy.hf_sampler import HFSampler

        whole = net.load_model(args.model, args).to(DEVICE) if args.fsdp else model
        sampler = HFSampler(whole, tokenizer, stops, room, args.fsdp, args.dtype == "bfloat16")
    if args.check_memory:
        from scaling.memory import check_memory

        check_memory(model, reference, optimizer, longest, args, sampler)
    sampler.load(model)  # the engine was built from the starting model

    def ask(rows, n, key, starting=False):
        """For methods: n checked responses to each row as it stands, the policy's or the starting model's."""
        plain = methods.Method(args, tokenizer)
        requests = [[q | {"n": n} for q in plain.requests(row)] for row in rows]
        with net.without_adapters(model) if starting else nullcontext():
            sampler.load(reference if starting else model)
            groups, _ = roll_out(sampler, rows, requests, plain, tokenizer, args, key)
        sampler.load(model)
        return groups

    # ---- --out is touched last, when nothing can be wrong any more
    tracker, signals = open_run(args, step) if RANK == 0 else None, []
    for number in (signal.SIGTERM, signal.SIGINT):  # looked at after each step; launchers may send it twice
        signal.signal(number, lambda n, _: (signals.append(n), signals[2:] and sys.exit(1)))
    print0(f"{model.num_parameters() / 1e6:.2f}M parameters, {WORLD} x {DEVICE.type}, {len(rows)} rows, "
           f"sampler {kind}: {args.reward}, {args.advantage}, {args.method}")  # fmt: skip
    bar = tqdm(total=args.steps, initial=step, disable=True if RANK else None, unit="step")
    while step < args.steps:
        if args.eval_every and step % args.eval_every == 0:  # what was evaluated where a run goes on stays
            evaluate_now(sampler, asked, args, state, f"eval-{step}", step == saved.get("step"))

        # ---- sample a group of responses to each prompt, check the answers
        t0 = time.time()
        sampled = sample_batch(sampler, rows, method, tokenizer, args, step, position, ask)
        groups, batch_rows, position, seen, counts = sampled

        # ---- reward and advantage, one number for all tokens of a response unless a method changes it later
        rollouts, reward, parts, advantage = reward_and_advantage(groups, batch_rows, method, args, step)
        for i, group in enumerate(groups):
            for r, a in zip(group, advantage[i], strict=True):
                r |= {"advantage": a, "group": i}
        method.learn(*seen)
        for row, group, line in list(zip(batch_rows, groups, reward, strict=True))[: 3 if step == 0 else 0]:
            r = group[0]  # most mistakes can be seen in three responses
            print0(f"{row['prompt']!r}\n {r['text'][:600]!r}\n {r['length']} tokens of {row.get('budget')}, "
                   f"gold {row['answer']!r}, correct {r['correct']}: reward {line[0]:.3f}")  # fmt: skip
        batch = [r for group in groups for r in group if not (args.overlong_filter and r["truncated"])]
        t1 = time.time()

        # ---- policy gradient
        for param_group in optimizer.param_groups:
            param_group |= {"lr": learning_rate(step, args), "weight_decay": args.weight_decay}
        if args.vllm_sleep:
            sampler.sleep()
        m = update(model, reference, optimizer, batch, method, args)
        if not np.isfinite([m["loss"], m["grad_norm"], reward.sum()]).all():
            sys.exit(f"train_grpo.py: error: step {step + 1}, not finite: {reward.sum()}, {m}; lower --lr")
        # float32 engines agree to 2e-5 (measured), bf16 ones to hundredths: more is a lost sync.
        if m["logp_gap"] > (1e-3 if args.dtype == "float32" and DEVICE.type == "cpu" else 0.1):
            sys.exit(f"train_grpo.py: error: step {step + 1}: the sampler lacks the trainer's weights: "
                     f"log-probs are {m['logp_gap']:.2g} apart on average")  # fmt: skip
        t2 = time.time()

        # ---- the new weights into the engine: the next response comes from them
        sampler.load(model)
        t3 = time.time()

        # ---- log, save, evaluate
        m |= {"step": step, "lr": learning_rate(step, args), "reward": reward.mean()}
        m |= {f"reward_{name}": part.mean() for name, part in parts.items()} | length_metrics(rollouts, drawn)
        m |= {"accuracy": rollouts["correct"].mean(), "zero_variance": (np.ptp(reward, -1) < 1e-9).mean()}
        m |= {"seconds_sample": t1 - t0, "seconds_train": t2 - t1, "seconds_sync": t3 - t2}
        log(m | counts | method.metrics(groups, rollouts, reward), args, bar, tracker)
        step += 1
        stop = any(gather_object([bool(signals)]))  # all processes stop, or none
        if step == args.steps or stop or (args.save_every and step % args.save_every == 0):
            trainer = {"step": step, "position": position, "method": method.state}
            save_checkpoint(args.out, step, model, tokenizer, optimizer, trainer, args)
        if stop:
            break
    bar.close()
    if step < args.steps:
        more = "\n(torchrun's own error below can be ignored)" * (WORLD > 1)
        print0(f"stopped after step {step}, which is saved; to go on: --resume --out {args.out}{more}")
    elif args.eval_every:
        evaluate_now(sampler, asked, args, state, "eval")
    if WORLD > 1 and dist.is_initialized() and kind == "hf":  # vLLM takes its groups down itself
        dist.destroy_process_group()


def load_rows(args):
    """Rows of --data, with budgets drawn if --budgets says so; BadInput where they cannot be trained on."""
    rows = data.load_problems(args.data)[: args.limit or None]
    if args.budgets:
        mode = "none" if args.budgets == "none" else args.mode
        if any(row.get("budget") for row in rows):
            print0("--budgets draws anew: budgets and sentences of --data are not used")
        rows = data.annotate(rows, args.budgets, mode, args.wording, 1, args.seed)
    if not all(row.get("prompt") for row in rows):
        raise BadInput(f"--data ({args.data}) has rows without a prompt: use data.py, or give --budgets")
    if (highest := max((row.get("budget") or 0 for row in rows), default=0)) > args.max_tokens:
        raise BadInput(f"--max-tokens ({args.max_tokens}) is below a budget in --data ({highest}): raise it")
    return rows


def length_metrics(rollouts, drawn):
    """Length and its errors, also in up to five buckets of the run's budgets `drawn` (named by the least)."""
    length, budget = rollouts["length"].astype(float), rollouts["budget"]
    m = {"length": length.mean(), "truncated": rollouts["truncated"].mean()}
    error, lowest = length / budget[:, None] - 1, drawn[:: -(-len(drawn) // 5)] if drawn else []
    if np.isfinite(error).any():  # signed errors cancel in their mean: the absolute ones stand beside them
        e = error[np.isfinite(budget)]
        m |= {"signed_error": e.mean(), "abs_error": np.abs(e).mean(), "over_budget": (e > 0).mean()}
        m |= {"within_10": (np.abs(e) <= 0.1).mean(), "error_by_budget": {}}
    for low, high in zip(lowest, [*lowest[1:], math.inf], strict=False):
        if (inside := (budget >= low) & (budget < high)).any():
            e, mean = error[inside], length[inside].mean()
            m["error_by_budget"][str(low)] = {"signed": e.mean(), "abs": np.abs(e).mean(), "length": mean}
    return m


def log(m, args, bar, tracker):
    """A step into metrics.jsonl (nan: null, JSON knows none), to the tracker and onto the screen."""
    m = {k: None if v != v else v.item() if hasattr(v, "item") else v for k, v in m.items()}
    if RANK == 0:
        with open(f"{args.out}/metrics.jsonl", "a") as f:
            f.write(json.dumps(m) + "\n")
        error = f"  error {m['abs_error']:.1%}" if "abs_error" in m else ""
        bar.write(f"step {m['step'] + 1:4d}/{args.steps}  reward {m['reward']:+.3f}  accuracy "
                  f"{m['accuracy']:.2f}  length {m['length']:.1f}{error}  cut {m['truncated']:.2f}  entropy "
                  f"{m['entropy']:.2f}  grad {m['grad_norm']:.2f}  {m['seconds_sample']:.1f} + "
                  f"{m['seconds_train']:.1f} s")  # fmt: skip
        bar.update()
        if tracker:
            tracker(m)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print0(f"train_grpo.py: error: {error}", file=sys.stderr)
        sys.exit(2)
