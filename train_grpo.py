"""
GRPO with a colocated vLLM engine, in one file: teach a language model to think for as many tokens as it is asked to.

Every process owns one GPU, and on it both the model that is trained and the vLLM engine that samples. One step is

    rows -> responses (vLLM) -> right or wrong, length -> reward -> advantage -> loss -> new weights -> vLLM

$ python train_grpo.py                                                   a laptop: the toy of toy/, no GPU
$ python train_grpo.py @recipes/l1_exact.args                            one GPU
$ torchrun --nproc_per_node 8 train_grpo.py @recipes/l1_exact.args       a box of eight

A response is a dict: prompt_ids, ids [L], logps [L] (of the sampler), text, length, correct, truncated, advantage, ...
What a paper needs besides its reward is in methods/, one file each. Every random draw is a function of
(seed, step, rank), so a resumed run is the same run.
"""

import argparse
import contextlib
import datetime
import difflib
import importlib.metadata
import inspect
import json
import math
import os
import pickle
import resource
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

import methods
from data import (
    BadInput,
    annotate,
    budget_prompt,
    encode_prompt,
    load_config,
    load_problems,
    load_tokenizer,
    one_line_errors,
    parse_budgets,
    stop_ids,
)
from rewards import ADVANTAGES, REWARDS
from scaling.logps import ChunkedHead
from verifier import check_answers

# -----------------------------------------------------------------------------
# Flags. `@FILE` reads them from a recipe; a later flag overrides an earlier one.


def build_parser():
    parser = argparse.ArgumentParser(
        "train_grpo.py", description=__doc__, fromfile_prefix_chars="@", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)

    def add(name, default=None, help="", **options):
        if default is not None and default is not False:
            options["type"], help = options.get("type", type(default)), f"{help} (default: %(default)s)"
        parser.add_argument(name, default=default, help=help, **options)

    flag, pairs = {"action": "store_true"}, {"nargs": "+", "metavar": "K=V"}
    # model, data, output
    add("--model", help="folder or hub id; none: the toy, as in recipes/toy.args")
    add("--data", help="rows of data.py (.jsonl), a preset or a hub id")
    add("--limit", 0, "take the first N problems only; 0: all")
    add("--budgets", help="draw budgets here: uniform:LO:HI, log:LO:HI, bucket:A,B, fixed:N or none")
    add("--mode", "exact", "what drawn budgets mean", choices=["exact", "max", "both"])
    add("--wording", "l1", "sentence that asks for a drawn budget: l1, tulu, or your own with {N} in it")
    add("--out", "out/run", "folder for metrics, checkpoints and evaluations")
    add("--resume", False, "go on from the newest checkpoint in --out, with its flags", **flag)
    add("--overwrite", False, "delete the run in --out first", **flag)
    add("--seed", 0, "of prompts, budgets and samples")
    # reward and method
    add("--reward", "lcpo_exact", f"one of {', '.join(REWARDS)}", metavar="NAME")
    add("--reward-args", [], "its constants, as alpha=0.0003", type=str, **pairs)
    add("--advantage", "grpo", f"one of {', '.join(ADVANTAGES)}", metavar="NAME")
    add("--advantage-args", [], "its constants", type=str, **pairs)
    add(
        "--method",
        "plain",
        f"what a paper does besides its reward: {', '.join(methods.names())}",
        metavar="NAME",
    )
    add("--method-args", [], "its constants", type=str, **pairs)
    add("--require-think", False, "an answer without the end of thinking is wrong", **flag)
    add("--think-end", "</think>", "the text that ends thinking")
    # sampling
    add(
        "--sampler",
        "auto",
        "auto: vllm on CUDA where it is installed, else hf",
        choices=["auto", "vllm", "hf"],
    )
    add("--steps", 500, "training steps, each on one batch of responses")
    add("--prompts-per-step", 128, "over all processes")
    add("--group-size", 16, "responses to each prompt")
    add("--max-tokens", 4096, "longest response")
    add("--temperature", 1.0, "of sampling, and of the log-probs in the loss")
    add("--vllm-memory", 0.35, "vLLM's share of the GPU memory")
    add("--vllm-sleep", False, "lend that share to the trainer during the update", **flag)
    alike = "replace groups in which this does not differ, four rounds at most"
    add("--dynamic-sampling", "none", alike, choices=["none", "correct", "reward"])
    # update
    add("--lr", 1e-6, "peak learning rate of AdamW")
    add("--lr-schedule", "constant", "after the warm-up", choices=["constant", "cosine", "linear"])
    add("--warmup-steps", 0, "of linear warm-up")
    add("--weight-decay", 0.0, "of AdamW")
    add("--optim", "adamw", "adamw8bit: bitsandbytes", choices=["adamw", "adamw8bit"])
    add("--minibatches", 1, "optimizer steps on each batch; 1: on policy")
    add("--micro-tokens", 16384, "tokens in one forward pass, padding included")
    add("--dtype", "auto", "to compute in; auto: bfloat16 on CUDA", choices=["auto", "float32", "bfloat16"])
    add("--gradient-checkpointing", False, "recompute activations: slower, leaner", **flag)
    add("--fsdp", False, "shard the model over the processes (7B and up)", **flag)
    add("--lora", 0, "rank of adapters (peft); 0 trains all weights")
    # loss
    add("--ratio", "token", "GRPO, GSPO, CISPO", choices=["token", "sequence", "cispo"])
    add("--clip-low", 0.2, "lower clip of the ratio")
    add("--clip-high", 0.2, "upper clip of the ratio; DAPO: 0.28")
    add("--dual-clip", 0.0, "bound the loss of bad responses at this times -advantage; 0: off")
    add("--overlong-filter", False, "truncated responses leave the loss", **flag)
    reductions = ["token_mean", "sequence_mean", "constant"]
    add("--loss-reduction", "token_mean", "what a token weighs in the whole batch", choices=reductions)
    add("--kl-coef", 0.0, "weight of the KL to the starting model; 0 loads no such model")
    add("--kl-estimator", "k3", "of that KL", choices=["k2", "k3"])
    add("--tis-cap", 2.0, "cap of the trainer/sampler importance weight; 0: off")
    # evaluation and checkpoints
    add("--eval-data", help="held-out problems for evaluate.py: files or presets, comma-separated")
    add("--eval-every", 0, "evaluate before training, every N steps and at the end; 0: never")
    add("--eval-budgets", help="512,1024,... (default: four from those of the rows)")
    add("--save-every", 50, "checkpoint every N steps; 0: only at the end")
    add("--log-with", "none", "send metrics there, too", choices=["none", "wandb", "tensorboard", "trackio"])
    return one_line_errors(parser)


def parse_args(argv=None):
    argv, parser = list(sys.argv[1:] if argv is None else argv), build_parser()
    args = parser.parse_args(argv)
    if args.model is None and args.data is None:  # the laptop's default
        argv = [f"@{os.path.join(os.path.dirname(os.path.abspath(__file__)), 'recipes', 'toy.args')}", *argv]
        args = parser.parse_args(argv)
    if args.resume:  # the run's own flags; those given now still win
        path = os.path.join(args.out, "args.json")
        if not os.path.exists(path):
            raise BadInput(f"--resume: --out ({args.out}) holds no run: start without --resume")
        try:
            with open(path) as f:
                parser.set_defaults(**json.load(f))
        except (ValueError, TypeError) as error:
            raise BadInput(f"--resume: {path} is damaged ({error}): start again with --overwrite") from None
        args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    """The mistakes that people make, each told in a line before anything is loaded."""
    for name in "steps prompts_per_step max_tokens minibatches micro_tokens temperature lr".split():
        if not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} ({getattr(args, name)}) must be more than 0")
    for name in "limit seed warmup_steps weight_decay lora clip_low dual_clip kl_coef tis_cap eval_every save_every".split():
        if not 0 <= getattr(args, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} ({getattr(args, name)}) must be 0 or more")
    highest = (parse_budgets(args.budgets)["high"] or 0) if args.budgets else 0
    held = args.out and os.path.exists(os.path.join(args.out, "args.json"))
    for wrong, message in (
        (args.model and not args.data, "--data is missing: name the rows to train on (data.py makes them)"),
        (args.reward not in REWARDS, f"--reward ({args.reward}) is unknown{near(args.reward, REWARDS)}"),
        (args.advantage not in ADVANTAGES, f"--advantage ({args.advantage}) is unknown{near(args.advantage, ADVANTAGES)}"),
        (not methods.find(args.method), f"--method ({args.method}) is unknown{near(args.method, methods.names())}"),
        (args.group_size < 2, f"--group-size ({args.group_size}) must be 2 or more: an advantage compares responses"),
        (args.prompts_per_step % WORLD, f"--prompts-per-step ({args.prompts_per_step}) must be a multiple of {WORLD} processes"),
        (args.minibatches > args.prompts_per_step, f"--minibatches ({args.minibatches}) must not exceed --prompts-per-step"),
        (not 0 < args.vllm_memory < 1, f"--vllm-memory ({args.vllm_memory}) is a share of the GPU: between 0 and 1"),
        (highest > args.max_tokens, f"--budgets asks for {highest} tokens, more than --max-tokens ({args.max_tokens})"),
        (0 < args.dual_clip <= 1, f"--dual-clip ({args.dual_clip}) must be more than 1 (3 is usual), or 0: off"),
        (args.dual_clip and args.ratio == "cispo", "--dual-clip bounds a clipped ratio's loss, and cispo has none: leave it out"),
        (args.fsdp and WORLD == 1, "--fsdp shards over processes, but there is one: torchrun --nproc_per_node N, or leave it out"),
        (args.fsdp and args.optim == "adamw8bit", "--fsdp cannot shard bitsandbytes' 8-bit states: use --optim adamw"),
        (args.eval_every and not args.eval_data, f"--eval-every ({args.eval_every}) needs --eval-data"),
        (args.resume and args.overwrite, "--resume goes on with a run and --overwrite deletes it: choose one"),
        (held and not (args.resume or args.overwrite), f"--out ({args.out}) holds a run: --resume goes on, --overwrite deletes it"),
        (os.path.isfile(args.out), f"--out ({args.out}) is a file: name a folder"),
    ):  # fmt: skip
        if wrong:
            raise BadInput(message)
    constants("--reward-args", REWARDS[args.reward], args.reward_args)
    constants("--advantage-args", ADVANTAGES[args.advantage], args.advantage_args)
    constants("--method-args", methods.find(args.method), args.method_args)


def near(word, known):
    close = difflib.get_close_matches(str(word), list(known), 1)
    return f": did you mean {close[0]}?" if close else f": one of {', '.join(known)}"


def constants(flag, function, words):
    """["alpha=0.1", "metric=shortest"] -> {"alpha": 0.1, "metric": "shortest"}, parameters of `function`."""
    known = [
        k
        for k, p in inspect.signature(function).parameters.items()
        if p.default is not p.empty and k != "parts"
    ]
    found = {}
    for word in words:
        k, _, value = word.partition("=")
        if k not in known or not value:
            raise BadInput(
                f"{flag} ({word}) must be K=V with K a constant of {function.__name__}{near(k, known)}"
            )
        try:
            found[k] = json.loads(value)
        except ValueError:
            found[k] = value  # a text needs no quotation marks
    return found


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.cuda.is_available()
    else torch.device("cpu")
)


def print0(*words):
    if RANK == 0:
        print(*words, flush=True)


def gather(items):
    """The items of all processes, in the order of the processes: afterwards every process holds the same list."""
    if WORLD == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def add_up(counters):
    return {k: sum(c.get(k, 0) for c in counters) for k in sorted({k for c in counters for k in c})}


# -----------------------------------------------------------------------------
# The sampler: a vLLM engine in this process, on this GPU.


class VLLM:
    name = "vllm"

    def __init__(self, path, tokenizer, stops, max_model_len, dtype, seed, memory, sequences, sleep=False):
        # In this process and not in one of its own: so weights can be handed over as plain tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        import vllm
        from vllm.model_executor.layers import utils as layers
        from vllm.platforms import current_platform

        self.vllm, self.tokenizer, self.stop_ids = vllm, tokenizer, stops
        self.max_model_len, self.asleep = max_model_len, False
        if current_platform.is_cpu():
            # That build repacks weights for its kernels, and packed ones cannot be updated: plain products instead.
            layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
                layer, "cpu_linear", torch.nn.functional.linear
            )
            options = {"enforce_eager": True}
        else:
            options = {
                "gpu_memory_utilization": memory,
                "enable_prefix_caching": True,
                "enable_sleep_mode": sleep,
            }
        self.llm = vllm.LLM(
            model=path, dtype=dtype, seed=seed, max_model_len=max_model_len, max_num_seqs=min(sequences, 512),
            logprobs_mode="processed_logprobs",  # with the temperature in: of the distribution that was sampled
            distributed_executor_backend="external_launcher" if WORLD > 1 else None,
            disable_log_stats=True, use_tqdm_on_load=False, **options,
        )  # fmt: skip
        set_threads(threads)  # the CPU worker changes it for the whole process and disables the setter

    def generate(self, prompts, n, caps, temperature, seed, top_p=1.0, stop_ids=None, logit_bias=None):
        """n responses to each prompt (token ids): {"ids" [L], "logps" [L], "truncated"}; caps[i] tokens at most.

        The end token is the last of ids. `seed` makes the call reproducible; logps are nats, without top_p.
        """
        torch.manual_seed(seed)  # the engine draws from the generators of this process
        np.random.seed(seed % 2**32)
        common = {
            "n": n,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": stop_ids or self.stop_ids,
        }
        common |= {
            "logprobs": 0,
            "flat_logprobs": True,
            "detokenize": False,
            "logit_bias": logit_bias or None,
        }
        params = [self.vllm.SamplingParams(max_tokens=cap, **common) for cap in caps]
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return [
            [
                {
                    "ids": np.array(o.token_ids, dtype=np.int32),
                    "logps": np.array(
                        o.logprobs.logprobs, dtype=np.float32
                    ),  # one a position: the sampled token's
                    "truncated": int(o.finish_reason != "stop"),
                }
                for o in answer.outputs
            ]
            for answer in self.llm.generate(requests, params, use_tqdm=False)
        ]

    def sleep(self):
        """Lend the GPU memory of weights and cache to the trainer, until load()."""
        self.llm.sleep(level=2)  # neither is kept anywhere: the next weights are the trainer's
        self.asleep = True

    def load(self, model):
        """Take over the weights of `model`. All that was cached under the old ones is dropped."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        # The one place that reaches into vLLM (0.32.0): its loader maps the names and fuses q, k and v.
        self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(whole_weights(model))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache after an update: are requests still running?")


def whole_weights(model):
    """(name, tensor) of every parameter; of a model with adapters or shards as the plain architecture has them."""
    if WORLD == 1 and not hasattr(model, "peft_config"):
        return model.named_parameters()
    from scaling.sharded import whole_weights

    return whole_weights(model)


def pick_sampler(name):
    """vllm or hf, what this machine can do."""
    if torch.version.cuda and not torch.cuda.is_available() and name != "hf":
        if os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi"):
            raise BadInput(
                f"torch {torch.__version__} finds no GPU although an NVIDIA driver is installed: CUDA "
                f"{torch.version.cuda} needs a newer one (nvidia-smi shows it; CUDA 13: 580 or newer), or --sampler hf"
            )
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()} & {"vllm", "vllm-cpu"}
    if name == "vllm" and not installed:
        raise BadInput(
            "--sampler vllm: the package vllm is not installed: see requirements.txt, or use --sampler hf"
        )
    if name == "auto":
        return "vllm" if DEVICE.type == "cuda" and "vllm" in installed else "hf"
    return name


# -----------------------------------------------------------------------------
# Rollouts


@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def draw_rows(rows, position, n, seed):
    """n rows from `position` on, without end. A position says it all: a resumed run needs no iterator."""
    drawn = []
    for p in range(position, position + n):
        epoch, i = divmod(p, len(rows))
        drawn.append(rows[shuffled(len(rows), seed, epoch)[i]] | {"position": p})
    return drawn


def roll_out(sampler, rows, requests, method, tokenizer, args, key):
    """(a checked group of responses to each row, counters of the check). Each process samples its share; every one
    gets the whole batch, so advantages and memories cannot differ between them."""
    own = slice(len(rows) * RANK // WORLD, len(rows) * (RANK + 1) // WORLD)
    rows, requests = rows[own], requests[own]
    seed = int(np.random.SeedSequence([args.seed, key[0], RANK, *key[1:]]).generate_state(1)[0])
    flat = [request for group in requests for request in group]  # a method may ask a group in parts
    prompts = [q["prompt_ids"] + q["forced"] for q in flat]
    caps = [q["cap"] - len(q["forced"]) for q in flat]
    answers = iter(sampler.generate(prompts, flat[0]["n"], caps, args.temperature, seed) if flat else [])
    groups = []
    for group in requests:
        groups.append([])
        for q in group:
            forced = np.array(q["forced"], dtype=np.int32)
            for r in next(answers):
                r |= {"prompt_ids": q["prompt_ids"], "ids": np.concatenate([forced, r["ids"]]), **q["tags"]}
                # nan: the sampler did not choose it. Where it has a loss, the policy's own log-prob stands in.
                r["logps"] = np.concatenate([np.full(len(forced), np.nan, np.float32), r["logps"]])
                groups[-1].append(r)
    method.complete(groups, sampler, seed)
    counts = check(groups, rows, tokenizer, args)
    method.revise(groups, rows)
    return gather(groups), add_up(gather([counts]))


def check(groups, rows, tokenizer, args):
    """Adds text, length and correct to every response; the counters of the answer check."""
    for r in sum(groups, []):
        # Only the end token is cut off: </think> is a special token in many models, and must stay readable.
        r["text"] = tokenizer.decode(r["ids"] if r["truncated"] else r["ids"][:-1], skip_special_tokens=False)
        r |= {"length": len(r["ids"]), "correct": 0}
    # A response that was cut off at the cap is wrong, whatever stands in its middle.
    whole = [(r, row) for group, row in zip(groups, rows, strict=True) for r in group if not r["truncated"]]
    verdicts, counts = check_answers(
        [r["text"] for r, _ in whole], [row["answer"] for _, row in whole], [row["kind"] for _, row in whole],
        [row.get("choices") for _, row in whole], args.require_think, think_end=args.think_end,
    )  # fmt: skip
    for (r, _), right in zip(whole, verdicts, strict=True):
        r["correct"] = int(right)
    return counts


def reward_and_advantage(groups, rows, method, args, step):
    """(rollouts as the reward reads them, reward [P, G], its parts {name: [P, G]}, advantage [P, G])."""
    rollouts = {k: np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length", "truncated")}
    rollouts["text"] = [[r["text"] for r in g] for g in groups]
    # A missing budget is nan, not -1: a sentinel would be taken for a number by some reward sooner or later.
    rollouts["budget"] = np.array([row.get("budget") or np.nan for row in rows], dtype=float)
    rollouts |= {"mode": [row.get("mode") for row in rows], "max_length": args.max_tokens, "step": step}
    rollouts |= method.reward_inputs(groups, rows, step)
    reward, advantage = REWARDS[args.reward], ADVANTAGES[args.advantage]
    options = constants("--reward-args", reward, args.reward_args) | rollouts.pop("constants", {})
    total = reward(rollouts, **options)
    parts = reward(rollouts, **options, parts=True) if "parts" in inspect.signature(reward).parameters else {}
    # GDPO normalises each part by itself before they are added; all others see their sum.
    scored = np.stack(list(parts.values()) or [total]) if args.advantage == "gdpo" else total
    options = constants("--advantage-args", advantage, args.advantage_args)
    return rollouts, total, parts, advantage(scored, rollouts, **options)


def sample_batch(sampler, rows, method, tokenizer, args, step, position, ask):
    """(groups, their rows, next position, all that was sampled, counters) of a step. With --dynamic-sampling groups
    that teach nothing, because all their responses are alike, are replaced, in four more rounds at most."""
    groups, kept, seen, seen_rows, counts = [], [], [], [], {}
    for turn in range(5):
        missing = -(-(args.prompts_per_step - len(groups)) // WORLD) * WORLD
        new_rows = [method.row(row, step) for row in draw_rows(rows, position, missing, args.seed)]
        position += missing
        method.begin_step(step, turn, new_rows, rows, ask)
        requests = [method.requests(row) for row in new_rows]
        new, n = roll_out(
            sampler, new_rows, requests, method, tokenizer, args, [step, turn] if turn else [step]
        )
        seen, seen_rows, counts = seen + new, seen_rows + new_rows, add_up([counts, n])
        if args.dynamic_sampling == "none":
            return new, new_rows, position, (new, new_rows), counts
        rollouts, total, _, _ = reward_and_advantage(new, new_rows, method, args, step)
        differs = np.ptp(rollouts["correct"] if args.dynamic_sampling == "correct" else total, axis=1) > 1e-9
        groups += [g for g, d in zip(new, differs, strict=True) if d]
        kept += [row for row, d in zip(new_rows, differs, strict=True) if d]
        if len(groups) >= args.prompts_per_step:
            break
    counts |= {"kept_groups": min(len(groups), args.prompts_per_step), "sampled_groups": len(seen)}
    groups, kept = (groups, kept) if groups else (seen, seen_rows)
    return groups[: args.prompts_per_step], kept[: args.prompts_per_step], position, (seen, seen_rows), counts


# -----------------------------------------------------------------------------
# Loss. Response tokens of a micro-batch lie in one flat row [T]; t["row"] says to which response each belongs.


def token_weights(lengths, reduction, cap):
    """What a token of each response weighs. Fixed over the WHOLE batch, before it is split over micro-batches
    and processes: the loss is a weighted sum, so it cannot depend on the split."""
    lengths = np.array(lengths, dtype=float)
    if reduction == "token_mean":  # DAPO, 2503.14476
        return np.ones_like(lengths) / max(lengths.sum(), 1)
    if reduction == "sequence_mean":  # GRPO, 2402.03300
        return 1 / (len(lengths) * np.maximum(lengths, 1))
    return np.full_like(lengths, 1 / (len(lengths) * cap))  # constant: Dr. GRPO, 2503.20783


def policy_loss(logp, t, args):
    """The clipped objective of the tokens [T], and sums of its diagnostics over those that have a loss.

    t: old_logp, sampler_logp, ref_logp, advantage, weight, mask [T], and for GSPO sequence_ratio [T].
    """
    old = (
        logp.detach() if t["old_logp"] is None else t["old_logp"]
    )  # at first the policy is the one that sampled
    # Ratios beyond e^20 only come from a broken run; the clamp keeps them finite, so that it can be seen.
    ratio = (logp - old).clamp(-20, 20).exp()
    if args.ratio == "sequence" and t["sequence_ratio"] is not None:
        # GSPO, 2507.18071: all tokens of a response share its ratio, and each brings its gradient.
        ratio = t["sequence_ratio"] * (logp - logp.detach()).exp()
    advantage, clipped = t["advantage"], ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    if args.ratio == "cispo":  # 2506.13585: the clipped ratio is a weight, without gradient
        loss = -clipped.detach() * advantage * logp
        outside = ratio != clipped
    else:
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        outside = clipped * advantage < ratio * advantage
        if args.dual_clip:  # 1912.09729
            loss = torch.where(advantage < 0, torch.minimum(loss, -args.dual_clip * advantage), loss)
    sampled = torch.where(t["sampler_logp"].isnan(), old, t["sampler_logp"])
    gap = old - sampled
    if args.tis_cap:  # vLLM's numbers are not the trainer's: truncated importance weight between the two
        loss = loss * gap.clamp(max=60).exp().clamp(max=args.tis_cap)
    stats = {"clip_fraction": (outside * t["mask"]).sum(), "logp_gap": (gap.abs() * t["mask"]).sum()}
    if t["ref_logp"] is not None:
        d = (logp - t["ref_logp"]).clamp(-20, 20)
        # k3 explodes where the reference is sure of another token: bounded as verl's low_var_kl.
        kl = d.square() / 2 if args.kl_estimator == "k2" else (torch.expm1(-d) + d).clamp(-10, 10)
        loss = loss + args.kl_coef * kl
        stats["kl"] = (kl * t["mask"]).sum()
    loss = (loss * t["weight"]).sum()
    return loss, stats | {"loss": loss}


def sequence_ratio(logp, t):
    """exp of the mean of logp - old_logp over each response, spread over its tokens [T]."""
    rows = torch.zeros(len(t["ids"]), device=logp.device)
    total = rows.index_add(0, t["row"], (logp - t["old_logp"]) * t["mask"])
    return (total / rows.index_add(0, t["row"], t["mask"]).clamp(min=1)).clamp(-20, 20).exp()[t["row"]]


# -----------------------------------------------------------------------------
# Update


def size(r):
    return len(r["prompt_ids"]) + len(r["ids"])


def mask_of(r):
    """[L] 1.0 where a token has a loss: all but those that a method forced. By place, never by token value, so that
    the end token is trained even where it is also the padding token."""
    return r.get("mask", np.ones(len(r["ids"]), np.float32))


def micro_batches(batch, limit):
    """This process's share of the batch, in micro-batches of `limit` tokens when padded; equally many on every process.

    Longest first: little padding, and what needs most memory comes first. Dealt out to the processes back and forth.
    """
    batch = sorted(batch, key=size, reverse=True)
    turns, shares = [*range(WORLD), *reversed(range(WORLD))], [[] for _ in range(WORLD)]
    for i, r in enumerate(batch):
        micros = shares[turns[i % len(turns)]]
        if not micros or (len(micros[-1]) + 1) * size(micros[-1][0]) > limit:
            micros.append([])
        micros[-1].append(r)
    # Sharded weights are gathered by all processes together: one with fewer passes runs a filler without any weight.
    filler = (
        batch[-1] | {"weight": 0.0, "mask": np.zeros(len(batch[-1]["ids"]), np.float32)} if batch else None
    )
    return shares[RANK] + [[filler]] * (max(map(len, shares)) - len(shares[RANK]))


def to_tensors(micro):
    """Padded ids [N, width], and flat tensors [T] of all response tokens: place, target, old log-probs, weight."""
    prompts, lengths = (np.array([len(r[k]) for r in micro]) for k in ("prompt_ids", "ids"))
    ids = np.zeros((len(micro), (prompts + lengths).max()), dtype=np.int64)
    for i, r in enumerate(micro):
        ids[i, : prompts[i]], ids[i, prompts[i] : size(r)] = r["prompt_ids"], r["ids"]
    ends, row = np.cumsum(lengths), np.repeat(np.arange(len(micro)), lengths)
    place = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    mask = np.concatenate([mask_of(r) for r in micro])
    flat = {"row": row, "column": place + prompts[row] - 1, "mask": mask}  # predicted one place before it
    flat["target"] = np.concatenate([r["ids"] for r in micro]).astype(np.int64)
    flat["sampler_logp"] = np.concatenate([r["logps"] for r in micro])
    flat["weight"] = np.array([r["weight"] for r in micro], dtype=np.float32)[row] * mask
    # One number for all tokens of a response, or, where a method says so, an array of one for each.
    spread = [
        np.broadcast_to(np.asarray(r["advantage"], np.float32), n)
        for r, n in zip(micro, lengths, strict=True)
    ]
    flat["advantage"] = np.concatenate(spread)
    for name in ("old_logp", "ref_logp"):
        known = name + "s" in micro[0]
        flat[name] = np.concatenate([r[name + "s"] for r in micro]) if known else None
    t = {k: v if v is None else torch.from_numpy(v).to(DEVICE) for k, v in flat.items()}
    return t | {"ids": torch.from_numpy(ids).to(DEVICE), "sequence_ratio": None}


def hidden_states(model, ids, bf16):
    """Last hidden states [N, width, d]. No attention mask: padding is on the right, where a causal model cannot see it."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.bfloat16() if bf16 else hidden


def output_head(model, t, args):
    """(hidden states [T, d] from which the response tokens are predicted, weight of the output layer, its ChunkedHead)"""
    bf16 = args.dtype == "bfloat16"
    hidden = model(t["ids"]) if args.fsdp else hidden_states(model, t["ids"], bf16)
    hidden, weight = hidden[t["row"], t["column"]], model.get_output_embeddings().weight
    return hidden, weight, ChunkedHead(hidden, weight, args.temperature)


@torch.no_grad()
def add_logps(model, batch, name, args):
    """r[name] [L]: log-probs of the response's tokens under `model` as it is now, for this process's share."""
    for micro in micro_batches(batch, args.micro_tokens):
        t = to_tensors(micro)
        _, _, head = output_head(model, t, args)
        flat = torch.cat([head.logps(part, t["target"][part])[0] for part in head.parts()]).cpu().numpy()
        for r, logps in zip(
            micro, np.split(flat, np.cumsum([len(r["ids"]) for r in micro])[:-1]), strict=True
        ):
            r[name] = logps


def backward(model, micro, args):
    """Adds the gradient of a micro-batch's loss to p.grad; sums of its diagnostics."""
    t = to_tensors(micro)
    hidden, weight, head = output_head(model, t, args)
    if (
        args.ratio == "sequence" and t["old_logp"] is not None
    ):  # needs whole responses: the head runs once more
        t["sequence_ratio"] = sequence_ratio(
            torch.cat([head.logps(p, t["target"][p])[0] for p in head.parts()]), t
        )
    sums = Counter()
    for part in head.parts():  # a chunk of tokens at a time: their logits never exist all at once
        of_part = {k: v if v is None or k == "ids" else v[part] for k, v in t.items()}
        logp, entropy = head.logps(part, of_part["target"])
        logp.requires_grad_()
        loss, stats = policy_loss(logp, of_part, args)
        loss.backward()
        head.backward(part, of_part["target"], logp.grad, weight.requires_grad)
        stats |= {"entropy": (entropy * of_part["mask"]).sum(), "tokens": of_part["mask"].sum()}
        sums.update({k: v.detach().double() for k, v in stats.items()})
    slopes = [(hidden, head.d_hidden)] + (
        [(weight, head.d_weight.to(weight.dtype))] if weight.requires_grad else []
    )
    torch.autograd.backward(*zip(*slopes, strict=True))  # from the hidden states on through the model
    return sums | {"padded": t["ids"].numel(), "real": sum(map(size, micro))}


def update(model, reference, optimizer, batch, method, args):
    """--minibatches optimizer steps over the batch (the same list on every process); means of the diagnostics."""
    n, sums, norms = args.minibatches, Counter(), []
    parts = [part for k in range(n) if (part := batch[len(batch) * k // n : len(batch) * (k + 1) // n])]
    for part in parts:
        weights = token_weights([mask_of(r).sum() for r in part], args.loss_reduction, args.max_tokens)
        for r, weight in zip(part, weights, strict=True):
            r["weight"] = weight
    for part in parts[1:]:  # later steps compare with the policy that sampled
        add_logps(model, part, "old_logps", args)
    if args.kl_coef:
        with as_starting_model(reference, args):
            for part in parts:
                add_logps(reference, part, "ref_logps", args)
    learned = [p for p in model.parameters() if p.requires_grad]
    for part in parts:
        method.before_update(model, part, lambda model, part, name: add_logps(model, part, name, args))
        for micro in micro_batches(part, args.micro_tokens):
            sums.update(backward(model, micro, args))  # p.grad adds up; the weights make the sum a mean
        for p in learned if WORLD > 1 else []:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            # A sum: the weights divide by the whole batch already. FSDP has taken the mean.
            p.grad.mul_(WORLD) if args.fsdp else dist.all_reduce(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(learned, 1.0)
        norms.append((norm.full_tensor() if args.fsdp else norm).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    sums = add_up(gather([{k: float(v) for k, v in sums.items()}]))
    means = {
        k: sums[k] / max(sums["tokens"], 1)
        for k in ("entropy", "clip_fraction", "logp_gap", "kl")
        if k in sums
    }
    means |= {"loss": sums.get("loss", 0.0) / max(len(parts), 1), "grad_norm": float(np.mean(norms or [0.0]))}
    return means | {"padding": 1 - sums.get("real", 0) / max(sums.get("padded", 0), 1)}


def as_starting_model(reference, args):
    """With adapters the reference is the trained model without them."""
    if not args.lora:
        return contextlib.nullcontext()
    from scaling.sharded import without_adapters

    return without_adapters(reference)


def learning_rate(step, args):
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    decay = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return args.lr * decay[args.lr_schedule]


def check_memory(model, reference, optimizer, longest, method, args):
    """One update as large as any will be, with moments and gradients in memory: what does not fit fails now."""
    fresh = not optimizer.state
    n = args.max_tokens
    r = {"prompt_ids": [0] * (longest - n), "ids": np.zeros(n, np.int32), "logps": np.zeros(n, np.float32)}
    batch = [
        r | {"advantage": 0.0, "weight": 0.0} for _ in range(WORLD * max(1, args.micro_tokens // longest))
    ]
    try:
        if fresh:  # gradients of 0 at a learning rate of 0: the moments are made, the weights stay
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            for param_group in optimizer.param_groups:
                param_group["lr"] = 0.0
            optimizer.step()
        if args.kl_coef:
            with as_starting_model(reference, args):
                add_logps(reference, batch, "ref_logps", args)
        for micro in micro_batches(batch, args.micro_tokens):
            backward(model, micro, args)
    except torch.OutOfMemoryError as error:
        raise BadInput(
            f"--micro-tokens ({args.micro_tokens}) does not fit into memory, with responses of {n} tokens "
            f"({str(error).splitlines()[0]}): lower it, --max-tokens or --vllm-memory, or add "
            f"--gradient-checkpointing, --vllm-sleep, --optim adamw8bit or --lora 32"
        ) from None
    if fresh:
        optimizer.state.clear()
    optimizer.zero_grad(set_to_none=True)


# -----------------------------------------------------------------------------
# Checkpoints: a Hugging Face folder that vLLM and evaluate.py load, plus trainer_state.pt for --resume.


def save_checkpoint(out, step, model, tokenizer, optimizer, state, args):
    folder = os.path.join(out, f"checkpoint-{step}")
    whole = None
    if args.fsdp or args.lora:  # gathered by all processes, kept and written by one
        from scaling.sharded import trained_state

        state |= trained_state(model, optimizer)
        whole = {name: weight.cpu() for name, weight in whole_weights(model) if RANK == 0}
    else:
        state["optimizer"] = optimizer.state_dict()
    if RANK == 0:
        shutil.rmtree(folder + ".tmp", ignore_errors=True)
        model.save_pretrained(folder + ".tmp", state_dict=whole)
        tokenizer.save_pretrained(folder + ".tmp")
        torch.save(state, os.path.join(folder + ".tmp", "trainer_state.pt"))
        # A rename may survive a power cut that the data does not: it would look whole and be empty.
        for name in [*os.listdir(folder + ".tmp"), ""]:
            sync_to_disk(os.path.join(folder + ".tmp", name))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(folder + ".tmp", folder)  # there completely or not at all
        sync_to_disk(out)
        for old in checkpoints(out)[:-2]:
            shutil.rmtree(os.path.join(out, f"checkpoint-{old}"))
    if WORLD > 1:
        dist.barrier()


def sync_to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checkpoints(out):
    names = os.listdir(out) if os.path.isdir(out) else []
    return sorted(int(name[11:]) for name in names if name.startswith("checkpoint-") and name[11:].isdigit())


def newest_checkpoint(args):
    """(folder, state, model) to go on from; (None, None, None) where there is none. One that is damaged is skipped."""
    from safetensors import SafetensorError

    told = None
    for step in reversed(checkpoints(args.out)) if args.resume else ():
        folder = os.path.join(args.out, f"checkpoint-{step}")
        try:
            # To the CPU: every process would put it on the first GPU otherwise. No code in it is ever run.
            state = torch.load(
                os.path.join(folder, "trainer_state.pt"), map_location="cpu", weights_only=True
            )
            return (
                folder,
                {k: state[k] for k in ("step", "position", "method", "optimizer")} | state,
                load_model(args.model if args.lora else folder, args),
            )
        except (
            OSError,
            EOFError,
            KeyError,
            RuntimeError,
            pickle.UnpicklingError,
            SafetensorError,
            BadInput,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            told = f"{folder} is damaged ({str(error).splitlines()[0][:120]})"
            print0(f"--resume: {told}: skipped")
    if told:
        raise BadInput(f"--resume: {told}, and nothing before it is whole: start again with --overwrite")
    return None, None, None


def keep_metrics_until(out, step):
    """Steps after the checkpoint will be taken again; a crash may have torn the last line."""
    path = os.path.join(out, "metrics.jsonl")
    if not os.path.exists(path):
        return
    kept = []
    with open(path) as f:
        for line in f:
            with contextlib.suppress(ValueError):
                kept += [line] if json.loads(line)["step"] < step else []
    with open(path + ".tmp", "w") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)


# -----------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    if args.model is None:
        from toy.prepare import prepare

        vars(args).update(prepare(args.seed, print0))
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:
        from accelerate import PartialState

        # One process may save or evaluate for a long time while the others wait.
        PartialState(cpu=DEVICE.type == "cpu", timeout=datetime.timedelta(hours=6))
    if args.dtype == "auto":
        args.dtype = "bfloat16" if DEVICE.type == "cuda" else "float32"
    kind = pick_sampler(args.sampler)

    # ---- data, model, optimizer
    tokenizer = load_tokenizer(args.model)
    rows = load_rows(args)
    method = methods.find(args.method)
    method = method(args, tokenizer, **constants("--method-args", method, args.method_args))
    check_reads(args, method)
    longest, room = room_needed(rows, tokenizer, method, args)
    folder, saved, model = newest_checkpoint(args)
    model = model or load_model(args.model, args)
    if args.lora:
        from scaling.sharded import add_lora

        torch.manual_seed(args.seed)  # the same adapters on every process
        add_lora(model, args.lora)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reference = None
    if args.kl_coef or method.asks_starting_model:
        reference = model if args.lora else load_model(args.model, args, frozen=True)
    if args.fsdp:
        from scaling.sharded import shard

        for m in (model, reference) if reference not in (None, model) else (model,):
            shard(
                m,
                lambda m, ids: hidden_states(m, ids, args.dtype == "bfloat16"),
                args.dtype == "bfloat16",
                DEVICE,
            )
    else:
        model.to(DEVICE)
        reference = reference.to(DEVICE) if reference else None
    optimizer = make_optimizer(model, args)
    step, position = 0, 0
    if saved:
        step, position, method.state = saved["step"], saved["position"], saved["method"]
        if args.fsdp or args.lora:
            from scaling.sharded import load_trained_state

            load_trained_state(model, optimizer, saved)
        else:
            optimizer.load_state_dict(saved["optimizer"])
        for param_group in optimizer.param_groups:
            param_group["weight_decay"] = (
                args.weight_decay
            )  # a flag that was changed for the resumed run counts

    # ---- the engine on the same GPU, with room for the longest prompt and response
    stops = stop_ids(model.generation_config, tokenizer)
    if kind == "vllm":
        sequences = args.prompts_per_step * args.group_size // WORLD
        seed = args.seed + RANK
        sampler = VLLM(
            args.model, tokenizer, stops, room, args.dtype, seed, args.vllm_memory, sequences, args.vllm_sleep
        )
    else:
        from toy.hf_sampler import HFSampler

        sampler = HFSampler(
            load_model(args.model, args).to(DEVICE) if args.fsdp else model, tokenizer, stops, room, args.fsdp
        )
    if DEVICE.type == "cuda":
        if args.vllm_sleep:
            sampler.sleep()
        check_memory(model, reference, optimizer, longest, method, args)
    sampler.load(model)  # the engine was built from the starting model

    # ---- --out is touched last, when nothing can be wrong any more
    if RANK == 0:
        if args.overwrite:
            shutil.rmtree(args.out, ignore_errors=True)
        os.makedirs(args.out, exist_ok=True)
        keep_metrics_until(args.out, step)
        with open(os.path.join(args.out, "args.json"), "w") as f:
            json.dump(vars(args) | {"resume": False, "overwrite": False}, f, indent=1)
    tracker = make_tracker(args) if RANK == 0 and args.log_with != "none" else None
    print0(
        f"{model.num_parameters() / 1e6:.2f}M parameters, {WORLD} process(es) on {DEVICE.type}, {len(rows)} rows, reward "
        f"{args.reward}, advantage {args.advantage}, method {args.method}, sampler {kind}, steps {step}..{args.steps}"
    )
    edges = budget_edges(rows)
    asked = catch_signals()

    def ask(rows, n, key, starting=False):
        """n checked responses to each row as it stands, for a method: of the policy, or of the starting model."""
        requests = [
            [methods.request(encode_prompt(tokenizer, row["prompt"]), n, args.max_tokens)] for row in rows
        ]
        with as_starting_model(reference, args) if starting else contextlib.nullcontext():
            sampler.load(reference if starting else model)
            groups, _ = roll_out(
                sampler, rows, requests, methods.Method(args, tokenizer), tokenizer, args, key
            )
        sampler.load(model)
        return groups

    from tqdm import tqdm

    bar = tqdm(total=args.steps, initial=step, disable=True if RANK else None, unit="step")
    if args.eval_every and step == 0:
        evaluate_now(sampler, rows, args, "eval-0")
    while step < args.steps:
        # ---- sample a group of responses to each prompt, check the answers
        t0 = time.time()
        groups, batch_rows, position, seen, counts = sample_batch(
            sampler, rows, method, tokenizer, args, step, position, ask
        )

        # ---- reward and advantage: every token of a response shares its advantage
        rollouts, reward, parts, advantage = reward_and_advantage(groups, batch_rows, method, args, step)
        for i, group in enumerate(groups):
            for r, a in zip(group, advantage[i], strict=True):
                r |= {"advantage": a, "group": i}
        if not np.isfinite(reward).all() or not np.isfinite(advantage).all():
            raise SystemExit(
                f"train_grpo.py: error: step {step}: reward or advantage is not finite: {reward.tolist()}"
            )
        method.learn(*seen)
        if step == 0:
            show_samples(groups, batch_rows, reward)
        batch = [r for group in groups for r in group if not (args.overlong_filter and r["truncated"])]
        t1 = time.time()

        # ---- policy gradient
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate(step, args)
        if args.vllm_sleep:
            sampler.sleep()
        m = update(model, reference, optimizer, batch, method, args)
        must_be_sound(m, step, args)
        t2 = time.time()

        # ---- the new weights into the engine: the next response comes from them
        sampler.load(model)
        t3 = time.time()

        # ---- log, save, evaluate
        m |= {
            "step": step,
            "reward": reward.mean(),
            "reward_std": reward.std(-1).mean(),
            "lr": learning_rate(step, args),
        }
        m |= {f"reward_{name}": part.mean() for name, part in parts.items()} | length_metrics(rollouts, edges)
        m |= {"accuracy": rollouts["correct"].mean(), "zero_variance": (np.ptp(reward, -1) < 1e-9).mean()}
        m |= counts | method.metrics(groups, rollouts, reward)
        m |= {"seconds_sample": t1 - t0, "seconds_train": t2 - t1, "seconds_sync": t3 - t2}
        m |= speed(model, batch, m["seconds_train"], args)
        log(m, args, bar, tracker)
        step += 1
        stop = any(gather([asked["signal"]]))  # all processes stop, or none
        if step == args.steps or stop or (args.save_every and step % args.save_every == 0):
            state = {"step": step, "position": position, "method": method.state}
            save_checkpoint(args.out, step, model, tokenizer, optimizer, state, args)
        if stop and step < args.steps:
            print0(
                f"stopped by a signal after step {step}, which is saved; to go on: --resume --out {args.out}"
            )
            break
        if args.eval_every and step % args.eval_every == 0 and step < args.steps:
            evaluate_now(sampler, rows, args, f"eval-{step}")
    bar.close()
    if step == args.steps and args.eval_every:
        evaluate_now(sampler, rows, args, "eval")
        if RANK == 0:
            from evaluation.before_after import before_after

            print0(before_after(os.path.join(args.out, "eval-0"), os.path.join(args.out, "eval")))
    if tracker:
        tracker.finish()
    if WORLD > 1 and dist.is_initialized() and kind == "hf":  # vLLM takes its groups down itself
        dist.destroy_process_group()
    return 0


# -----------------------------------------------------------------------------
# Small things


def load_rows(args):
    rows = load_problems(args.data)[: args.limit or None]
    if args.budgets:
        mode = "none" if args.budgets == "none" else args.mode
        rows = annotate(rows, args.budgets, mode, args.wording, 1, args.seed)
    if not all(row.get("prompt") for row in rows):
        raise BadInput(f"--data ({args.data}) has rows without a prompt: use data.py, or give --budgets")
    highest = max((row["budget"] for row in rows if row.get("budget")), default=0)
    if highest > args.max_tokens:
        raise BadInput(
            f"a budget of {highest} tokens exceeds --max-tokens ({args.max_tokens}), the response cap"
        )
    row = next((row for row in rows if row.get("budget")), None)
    if (
        row and args.eval_every
    ):  # an evaluation that asks otherwise than training would measure something else
        asked = budget_prompt(row["problem"], row["budget"], row["mode"], row["kind"], args.wording)
        if asked != row["prompt"]:
            raise BadInput(
                f"--wording ({args.wording}) is not how the rows ask for a budget: {row['prompt'][-80:]!r}"
            )
    return rows


def check_reads(args, method):
    """A reward whose fields nobody provides would fail after an hour of sampling, or learn nothing."""
    needs = {*getattr(REWARDS[args.reward], "needs", ()), *getattr(ADVANTAGES[args.advantage], "needs", ())}
    for name in sorted(needs - {"budget"} - {*method.provides}):
        having = [n for n in methods.names() if name in methods.find(n).provides]
        raise BadInput(
            f"--reward {args.reward} with --advantage {args.advantage} reads {name!r}: give --method {' or '.join(having)}"
        )


def room_needed(rows, tokenizer, method, args):
    """(tokens of the longest prompt and response in training, the same including evaluations)"""
    steps = (0, args.steps // 2, args.steps)
    asked = [method.row(rows[i % len(rows)] | {"position": i}, s) for i in range(6) for s in steps]
    added = [
        len(q["prompt_ids"]) - len(encode_prompt(tokenizer, row["prompt"]))
        for row in asked
        for q in method.requests(row)
    ]
    longest = max(len(encode_prompt(tokenizer, row["prompt"])) for row in rows) + max(added) + args.max_tokens
    context = load_config(args.model, tokenizer).max_position_embeddings
    if longest > context:
        raise BadInput(
            f"the longest prompt and --max-tokens ({args.max_tokens}) need {longest} positions, the model has {context}: "
            f"lower --max-tokens, or drop long prompts with data.py --max-prompt-tokens"
        )
    return longest, min(
        context, max(longest, longest - args.max_tokens + 2 * max(eval_budgets(rows, args), default=0))
    )


def load_model(path, args, frozen=False):
    """A causal language model in the CPU's memory. Weights that learn are float32; others have the compute type."""
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if args.dtype == "bfloat16" and (frozen or args.lora) else torch.float32
    try:
        # A pickle could run code, and so could a folder that brings its own classes.
        options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInput(
            f"the model in {path} does not load ({str(error).splitlines()[0]}): check that folder"
        ) from None
    return model.eval().requires_grad_(False) if frozen else model.train()


def make_optimizer(model, args):
    learned = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optim == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(learned, **options)
    return torch.optim.AdamW(learned, fused=True, **options)


def catch_signals():
    """{"signal": whether SIGTERM or SIGINT came}: looked at after each step. A second one ends the process at once."""
    asked = {"signal": False}

    def note(number, frame):
        asked["signal"] = True
        signal.signal(number, signal.SIG_DFL)
        print0("signal: the run will stop after this step")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return asked


def must_be_sound(m, step, args):
    """Stops a run that can only get worse."""
    if not math.isfinite(m["loss"]) or not math.isfinite(m["grad_norm"]):
        raise SystemExit(f"train_grpo.py: error: step {step}: {m}: --resume with a lower --lr")
    # float32 engines agree to 2e-5 (measured); bf16 ones may be hundredths off.
    limit = 1e-3 if args.dtype == "float32" and DEVICE.type == "cpu" else 0.1
    if m["logp_gap"] > limit:
        raise SystemExit(
            f"train_grpo.py: error: step {step}: the sampler does not hold the trainer's weights: log-probs differ by "
            f"{m['logp_gap']:.2g} nats on average (limit {limit:g}); the run would learn from another policy's responses"
        )


def budget_edges(rows):
    """Borders of at most five buckets over the budgets of the run, fixed once: [5, 12, 19, ...]; [] without budgets."""
    budgets = sorted({row["budget"] for row in rows if row.get("budget")})
    if len(budgets) <= 5:
        return [*budgets, budgets[-1] + 1] if budgets else []
    return np.linspace(budgets[0], budgets[-1] + 1, 6).astype(int).tolist()


def length_metrics(rollouts, edges):
    """Length and its errors. Signed errors cancel in their mean, so the absolute ones stand beside them."""
    length, budget = rollouts["length"].astype(float), rollouts["budget"]
    m = {
        "length": length.mean(),
        "length_p95": np.quantile(length, 0.95),
        "truncated": rollouts["truncated"].mean(),
    }
    have = ~np.isnan(budget)
    if not have.any():
        return m
    asked, got = budget[have], length[have]
    error = got / asked[:, None] - 1
    m |= {"signed_error": error.mean(), "abs_error": np.abs(error).mean(), "over_budget": (error > 0).mean()}
    m |= {"within_10": (np.abs(error) <= 0.1).mean(), "error_by_budget": {}}
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (asked >= low) & (asked < high)
        if inside.any():
            name = f"{low}" if len(edges) < 6 else f"{low}-{high - 1}"
            e = error[inside]
            m["error_by_budget"][name] = {
                "signed": e.mean(),
                "abs": np.abs(e).mean(),
                "length": got[inside].mean(),
            }
    return m


PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989}  # bf16, dense, of the cards' data sheets


def speed(model, batch, seconds, args):
    """TFLOP/s of a process in the update, by 6 FLOPs a parameter and token (4 where it is frozen), as in 2001.08361."""
    flops = (4 if args.lora else 6) * model.num_parameters() * sum(map(size, batch))
    m = {"train_tflops": flops / max(seconds, 1e-9) / WORLD / 1e12}
    card = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else ""
    m |= {"train_mfu": m["train_tflops"] / peak for name, peak in PEAK_TFLOPS.items() if name in card}
    held = (
        torch.cuda.max_memory_allocated()
        if card
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return m | {"peak_gib": held / 2**30}


def make_tracker(args):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    try:
        options = {"logging_dir": args.out} if args.log_with == "tensorboard" else {}
        tracker = LOGGER_TYPE_TO_CLASS[args.log_with](f"nanoL1-{os.path.basename(args.out)}", **options)
    except (ImportError, ModuleNotFoundError):
        raise BadInput(f"--log-with {args.log_with}: pip install {args.log_with}, or leave it out") from None
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration(
        {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
    )
    return tracker


def log(m, args, bar, tracker):
    """A step into metrics.jsonl, to the tracker and onto the screen."""
    if RANK:
        return
    m = {k: v.item() if hasattr(v, "item") else v for k, v in m.items()}
    m = {k: v if v == v else None for k, v in m.items()}  # JSON knows no nan
    with open(os.path.join(args.out, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(m) + "\n")
    if tracker:
        tracker.log(
            {f"train/{k}": v for k, v in m.items() if isinstance(v, (int, float))}, step=m["step"] + 1
        )
    error = f"  error {m['abs_error']:.1%}" if "abs_error" in m else ""
    bar.write(
        f"step {m['step'] + 1:4d}/{args.steps}  reward {m['reward']:+.3f}  accuracy {m['accuracy']:.2f}  "
        f"length {m['length']:.1f}{error}  cut {m['truncated']:.2f}  entropy {m['entropy']:.2f}  "
        f"grad {m['grad_norm']:.2f}  gap {m['logp_gap']:.0e}  {m['seconds_sample']:.1f} + {m['seconds_train']:.1f} s"
    )
    bar.update()


def show_samples(groups, rows, reward):
    """Three responses of the first step and what they earned: most mistakes can be seen here."""
    for row, group, line in list(zip(rows, groups, reward, strict=True))[:3]:
        r, text = group[0], group[0]["text"]
        text = text if len(text) < 500 else text[:300] + " [...] " + text[-150:]
        verdict = ("right" if r["correct"] else "wrong") + (" (cut off)" if r["truncated"] else "")
        print0(
            f"  prompt    {row['prompt']!r}\n  response  {text!r}\n  answer    {row['answer']!r}: {verdict}; "
            f"{r['length']} tokens, budget {row.get('budget')}, reward {line[0]:.3f}\n"
        )


def eval_budgets(rows, args):
    """The budgets that evaluations ask for; [] where the rows have none."""
    if args.eval_budgets:
        return [int(b) for b in args.eval_budgets.split(",")]
    budgets = sorted({row["budget"] for row in rows if row.get("budget")})
    return (
        budgets if len(budgets) <= 5 else [int(b) for b in np.quantile(budgets, [0.125, 0.375, 0.625, 0.875])]
    )


def evaluate_now(sampler, rows, args, name):
    """A budget sweep over --eval-data with the trainer's own engine."""
    from evaluate import evaluate, load_data

    budgets, mode = eval_budgets(rows, args), "max" if args.mode == "max" else "exact"
    # One cap for all budgets, so that one which is not obeyed shows the length it gets and not the cap.
    problems, cap = load_data(args.eval_data, 200, 0), 2 * max(budgets, default=0) or args.max_tokens
    evaluate(
        sampler, problems, budgets or [None], mode, 2, os.path.join(args.out, name), wording=args.wording,
        temperature=args.temperature, top_p=1.0, max_tokens=cap, seed=args.seed, require_think=args.require_think,
        model=args.model, log=print0, ranks=(RANK, WORLD),
    )  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BadInput as error:
        print0(f"train_grpo.py: error: {error}")
        sys.exit(2)
