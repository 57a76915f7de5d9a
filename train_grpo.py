"""Train a language model to think for as many tokens as the prompt asks: GRPO with the sampler in the same process.

    python train_grpo.py                                       the toy, from warm-up to evaluation, on a laptop
    python train_grpo.py @recipes/l1_exact.args                L1-Exact on one GPU
    accelerate launch --num_processes 8 train_grpo.py @recipes/l1_exact.args

One step: draw prompts with budgets, sample a group of responses to each, check the answers, turn (correct, length,
budget) into rewards and advantages, take one or a few clipped policy-gradient steps, push the weights to the sampler.
Left out on purpose: critics, reward models, replay, tool use, more than one machine. Every random draw is a function
of (seed, step, process), so a resumed run needs no generator's history to draw what an undisturbed one would.
"""

import argparse
import inspect
import json
import math
import os
import shlex
import shutil
import sys
import time

import numpy as np

import toy
from data import BadInput, annotate, encode_prompt, load_problems, load_tokenizer, parse_budgets
from rewards import ADVANTAGES, REWARDS, check_answers, response_length

# What `python train_grpo.py` without a model does: these replace the defaults below, flags still win.
TOY = {
    "data": "toy", "budgets": toy.BUDGETS, "wording": "tulu", "reward": "peaked_exact", "advantage": "gdpo",
    "steps": 300, "prompts_per_step": 32, "group_size": 8, "max_tokens": 96, "lr": 3e-4, "warmup_steps": 10,
    "save_every": 100, "out": "out/toy",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Arguments. They are read and checked before torch is imported: a typing error costs a second, not a minute.


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped; `@FILE` reads flags from a recipe (several a line, # starts a comment)."""
    parser = argparse.ArgumentParser(
        prog="train_grpo.py", description=__doc__, fromfile_prefix_chars="@", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)

    group = parser.add_argument_group("model, data, output")
    add = group.add_argument
    add("--model", help="folder or hub id of the model to train; none: the toy (see toy.py)")
    add("--data", help="rows from data.py, raw problems (with --budgets), a preset or hub id, or toy / toy_ood")
    add("--budgets", help="draw budgets here: uniform:LO:HI, log:LO:HI, bucket:A,B,..., fixed:N (tokens)")
    add("--mode", choices=["exact", "max", "both"], default="exact", help="what drawn budgets mean")
    add("--wording", choices=["l1", "tulu"], default="l1", help="the budget sentence of drawn budgets")
    add("--resample-budgets", action="store_true", help="draw new budgets every epoch (with --budgets)")
    add("--out", default="out/run", help="folder for metrics, checkpoints and evaluations")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, with its flags")
    add("--overwrite", action="store_true", help="delete the run that is in --out")
    add("--seed", type=int, default=0, help="seed of prompts, budgets and samples")

    group = parser.add_argument_group("reward")
    add = group.add_argument
    add("--reward", default="lcpo_exact", help=f"one of {', '.join(REWARDS)}")
    add("--reward-args", nargs="+", default=[], metavar="K=V", help="its hyper-parameters, e.g. alpha=0.0003")
    add("--advantage", default="grpo", help=f"one of {', '.join(ADVANTAGES)}")
    add("--advantage-args", nargs="+", default=[], metavar="K=V", help="its hyper-parameters, e.g. eps=1e-4")
    add("--count", choices=["response", "thinking"], default="response", help="the tokens that a budget counts")
    add("--require-think", action="store_true", help="an answer without </think> is wrong")
    add("--verify-timeout", type=float, default=5.0, help="limit for checking one answer, seconds")

    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--sampler", choices=["auto", "vllm", "hf"], default="auto", help="auto: vllm on CUDA where installed")
    add("--steps", type=int, default=500, help="training steps (rollout batches)")
    add("--prompts-per-step", type=int, default=128, help="prompts in a step, over all processes")
    add("--group-size", type=int, default=16, help="responses to each prompt")
    add("--max-tokens", type=int, default=4096, help="cap of a response, tokens")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the log-probs in the loss")
    add("--vllm-memory", type=float, default=0.35, help="vLLM's share of the GPU memory")
    add("--check-sync", type=int, default=50, help="compare sampler and trainer every so many steps; 0: only once")

    group = parser.add_argument_group("update")
    add = group.add_argument
    add("--lr", type=float, default=1e-6, help="peak learning rate of AdamW")
    add("--lr-schedule", choices=["constant", "cosine", "linear"], default="constant", help="after the warm-up")
    add("--warmup-steps", type=int, default=0, help="steps of linear learning-rate warm-up")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW")
    add("--optim", choices=["adamw", "adamw8bit"], default="adamw", help="adamw8bit: bitsandbytes, CUDA only")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    add("--minibatches", type=int, default=1, help="optimizer steps on each rollout batch; 1: on policy")
    add("--micro-tokens", type=int, default=16384, help="tokens in one forward pass, padding included")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute type; weights stay float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: slower, far less memory")
    add("--ratio", choices=["token", "sequence", "cispo"], default="token", help="GRPO, GSPO or CISPO")
    add("--clip-low", type=float, default=0.2, help="lower clip of the ratio")
    add("--clip-high", type=float, default=0.2, help="upper clip of the ratio (DAPO: 0.28)")
    add("--loss-reduction", choices=["token_mean", "sequence_mean", "constant"], default="token_mean",
        help="what a token weighs, over the whole batch")  # fmt: skip
    add("--kl-coef", type=float, default=0.0, help="weight of the KL to the starting model; 0: none is loaded")
    add("--kl-estimator", choices=["k1", "k2", "k3"], default="k3", help="of that KL")
    add("--tis-cap", type=float, default=2.0, help="cap of the sampler/trainer importance weight; 0: off")

    group = parser.add_argument_group("evaluation and checkpoints")
    add = group.add_argument
    add("--eval-data", help="held-out problems (file, preset, toy, toy_ood)")
    add("--eval-every", type=int, default=0, help="evaluate every so many steps; 0: never")
    add("--eval-budgets", help="budgets to ask for, comma-separated (default: trained ones)")
    add("--eval-limit", type=int, default=200, help="problems in an evaluation")
    add("--eval-n", type=int, default=1, help="samples per problem and budget")
    add("--save-every", type=int, default=50, help="checkpoint every so many steps, and at the end; 0: at the end")
    add("--keep", type=int, default=2, help="how many checkpoints to keep")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with the toy's defaults where no model is named and the run's own where it is resumed; checked."""
    argv, parser = list(sys.argv[1:] if argv is None else argv), build_parser()
    args = parser.parse_args(argv)
    saved = os.path.join(args.out, "args.json")
    if args.resume:
        if not os.path.exists(saved):
            raise BadInput(f"--resume: --out ({args.out}) holds no run (no args.json); start one without --resume")
        with open(saved) as f:
            parser.set_defaults(**json.load(f))
    elif args.model is None:
        parser.set_defaults(**TOY)
    args = parser.parse_args(argv)
    args.reward_args = keyword_args("--reward-args", args.reward, REWARDS, args.reward_args)
    args.advantage_args = keyword_args("--advantage-args", args.advantage, ADVANTAGES, args.advantage_args)
    check_args(args)
    return args


def keyword_args(flag: str, name: str, table: dict, words: list[str] | dict) -> dict:
    """`["alpha=0.1"]` -> {"alpha": 0.1}; names are compared with the parameters of the function in `table`."""
    if name not in table:
        raise BadInput(f"{flag[:-5]} ({name}) must be one of: {', '.join(table)}")
    if isinstance(words, dict):  # from a resumed run's args.json
        return words
    known, found = list(inspect.signature(table[name]).parameters), {}
    for word in " ".join(words).split():
        key, _, value = word.partition("=")
        if key not in known or not value:
            raise BadInput(f"{flag} ({word}) must be NAME=VALUE with a parameter of {name}: {', '.join(known)}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            raise BadInput(f"{flag} ({word}): {value} is not a number, true, false or null") from None
    return found


def check_args(args: argparse.Namespace) -> None:
    """Every rule that needs no model; the processes are known from the launcher's environment."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.model and not args.data:
        raise BadInput("--data is missing: name the rows to train on (made by data.py), or leave --model out too")
    if args.group_size < 2:
        raise BadInput(f"--group-size ({args.group_size}) must be at least 2: advantages compare responses")
    if args.prompts_per_step % processes:
        near = args.prompts_per_step // processes * processes or processes
        raise BadInput(
            f"--prompts-per-step ({args.prompts_per_step}) must be a multiple of the number of processes "
            f"({processes}): use {near} or {near + processes}"
        )
    if args.prompts_per_step * args.group_size < args.minibatches:
        raise BadInput(f"--minibatches ({args.minibatches}) must not exceed the responses of a step")
    positive = ["steps", "prompts_per_step", "max_tokens", "minibatches", "micro_tokens", "temperature", "lr", "keep"]
    for name in positive + ["grad_clip", "verify_timeout", "eval_n", "eval_limit"]:
        if not getattr(args, name) > 0:
            raise BadInput(f"--{name.replace('_', '-')} ({getattr(args, name)}) must be more than 0")
    for name in ["warmup_steps", "save_every", "eval_every", "check_sync", "kl_coef", "tis_cap"]:
        if getattr(args, name) < 0:
            raise BadInput(f"--{name.replace('_', '-')} ({getattr(args, name)}) must not be negative; 0 switches it off")
    if args.resample_budgets and not args.budgets:
        raise BadInput("--resample-budgets needs --budgets: rows from a file keep the budgets they came with")
    if args.eval_every and not args.eval_data:
        raise BadInput(f"--eval-every ({args.eval_every}) needs --eval-data: name a held-out file")
    if args.budgets:
        parse_budgets(args.budgets)
    if args.model and os.path.isdir(args.model):
        # A folder without its files fails deep inside transformers otherwise, after a long start.
        found = set(os.listdir(args.model))
        if "config.json" not in found:
            raise BadInput(f"--model ({args.model}) has no config.json: name a Hugging Face model folder")
        if not found & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"}:
            raise BadInput(f"--model ({args.model}) has no tokenizer: save one into it with save_pretrained")
    elif args.model and (args.model.startswith((".", "/", "out/")) or args.model.count("/") > 1):
        raise BadInput(f"--model ({args.model}) is no folder, and no hub id (OWNER/NAME): check the path")
    if not (args.resume or args.overwrite) and os.path.exists(args.out):
        if not os.path.isdir(args.out):
            raise BadInput(f"--out ({args.out}) is a file: name a folder")
        if os.path.exists(os.path.join(args.out, "args.json")):
            raise BadInput(f"--out ({args.out}) holds a run: --resume goes on, --overwrite deletes it, or choose another")


# ---------------------------------------------------------------------------------------------------------------
# Data: rows with budgets; which of them a step uses depends on (seed, step) alone.


def load_rows(args: argparse.Namespace) -> list[dict]:
    """Training rows of the Row contract; a budget distribution given here replaces the rows' own budgets."""
    rows = toy.problems(args.data, "train", 8000) if args.data in toy.TASKS else load_problems(args.data)
    if not rows:
        raise BadInput(f"--data ({args.data}) holds no usable row: see what data.py says of it")
    if args.budgets:
        rows = annotate(rows, parse_budgets(args.budgets), args.mode, args.wording, 1, args.seed)
    elif not all(row.get("prompt") for row in rows):
        raise BadInput(
            f"--data ({args.data}) has rows without a prompt: annotate it with data.py first, or give --budgets here"
        )
    budgets = [row["budget"] for row in rows if row.get("budget")]
    if not budgets and args.reward.startswith(("lcpo", "tulu", "peaked")):
        raise BadInput(f"--reward ({args.reward}) needs budgets, but no row of --data ({args.data}) has one: --budgets")
    if budgets and max(budgets) > args.max_tokens:
        raise BadInput(
            f"a budget of {max(budgets)} tokens exceeds --max-tokens ({args.max_tokens}): no response could be that "
            f"long; raise --max-tokens or draw smaller budgets"
        )
    return rows


def rows_of_step(rows: list[dict], args: argparse.Namespace, step: int) -> list[dict]:
    """The P rows of a step: the data in a new random order every epoch, one epoch running into the next."""
    chosen, order, drawn = [], {}, {}
    for position in range(step * args.prompts_per_step, (step + 1) * args.prompts_per_step):
        epoch, i = divmod(position, len(rows))
        if epoch not in order:
            order[epoch] = np.random.default_rng([args.seed, epoch]).permutation(len(rows))
            if args.resample_budgets:
                drawn[epoch] = annotate(
                    rows, parse_budgets(args.budgets), args.mode, args.wording, 1, args.seed + 1_000_003 * epoch
                )
        chosen.append(drawn.get(epoch, rows)[order[epoch][i]])
    return chosen


def check_prompts(rows: list[dict], tokenizer, args: argparse.Namespace, context: int) -> int:
    """Fills in `prompt_ids`; the longest prompt in tokens, after checking that it leaves room for the response."""
    longest = 0
    for row in rows:
        row["prompt_ids"] = encode_prompt(tokenizer, row["prompt"])
        longest = max(longest, len(row["prompt_ids"]))
    if longest + args.max_tokens > context:
        raise BadInput(
            f"the longest prompt ({longest} tokens) plus --max-tokens ({args.max_tokens}) exceeds the model's context "
            f"({context}): lower --max-tokens, or drop long prompts with data.py --max-prompt-tokens"
        )
    return longest


# ---------------------------------------------------------------------------------------------------------------
# Samplers: generate(prompts, n, max_tokens, ...) -> [[{"ids", "logps", "finish_reason"}, ...], ...]


def stop_tokens(model_config, tokenizer) -> list[int]:
    """Ids that end a response: the tokenizer's end token and those of the model's generation settings."""
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer {tokenizer.name_or_path} has no eos_token, so no response could end: set one")
    ids = {tokenizer.eos_token_id}
    declared = getattr(model_config, "eos_token_id", None)
    ids.update(declared if isinstance(declared, list) else [declared])
    return sorted(i for i in ids if i is not None)


class HFSampler:
    """transformers' generate on the model that is being trained: always in sync, no second copy, slow for big models."""

    name = "hf"

    def __init__(self, model, tokenizer, stop_ids: list[int], max_model_len: int):
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.max_model_len = max_model_len

    def sync(self, model) -> None:
        """Nothing to push: this sampler reads the trained model itself."""

    def generate(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=None) -> list[list[dict]]:
        """See the contract above; `max_tokens` is one cap or one per prompt, `seed` makes the call reproducible."""
        import torch

        if seed is not None:
            torch.manual_seed(seed)
        caps = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        self.model.eval()
        done, per_call = [], max(1, 512 // n)
        for start in range(0, len(prompts), per_call):
            part = slice(start, start + per_call)
            done += self._generate(prompts[part], n, caps[part], temperature, top_p)
        self.model.train()
        return done

    def _generate(self, prompts, n, caps, temperature, top_p):
        import torch

        width, device = max(map(len, prompts)), self.model.device
        # Prompts are padded on the left, so that all responses begin in the same column.
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        ids, mask = (t.repeat_interleave(n, 0).to(device) for t in (ids, mask))
        logps, last = [], []

        def record(sequences, scores):  # a logits processor that changes nothing: it sees each step's logits go by
            if last:
                logps.append(last.pop().gather(-1, sequences[:, -1:])[:, 0])
            last.append((scores.float() / max(temperature, 1e-6)).log_softmax(-1))
            return scores

        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(caps), do_sample=temperature > 0,
                temperature=temperature or None, top_p=top_p, top_k=0, eos_token_id=self.stop_ids,
                pad_token_id=self.stop_ids[0], logits_processor=[record], use_cache=True,
            )[:, width:]  # fmt: skip
        logps = torch.stack(logps + [last.pop().gather(-1, out[:, -1:])[:, 0]], 1).tolist()
        result = []
        for i, tokens in enumerate(out.tolist()):
            tokens = tokens[: caps[i // n]]
            # The response ends with the first end token, whatever token pads the rest (it may be the same one).
            end = next((t + 1 for t, token in enumerate(tokens) if token in self.stop_ids), None)
            reason = "length" if end is None else "stop"
            result.append({"ids": tokens[:end], "logps": logps[i][: len(tokens[:end])], "finish_reason": reason})
        return [result[i : i + n] for i in range(0, len(result), n)]


class VLLMSampler:
    """A vLLM engine inside this process; the trainer pushes its weights into it after every step."""

    name = "vllm"

    def __init__(self, path, tokenizer, stop_ids, max_model_len, dtype="float32", seed=0, memory=0.35, sequences=256):
        # In-process engine: only then can weights be handed over without a copy through disk or sockets.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        import torch

        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        import vllm

        self.tokenizer, self.stop_ids, self.max_model_len = tokenizer, stop_ids, max_model_len
        self.vllm, options = vllm, {}
        if torch.cuda.is_available():
            options = {"gpu_memory_utilization": memory, "enable_prefix_caching": True}
        else:
            keep_cpu_weights_unpacked()
            options = {"enforce_eager": True}
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            options["distributed_executor_backend"] = "external_launcher"
        self.llm = vllm.LLM(
            model=path, tokenizer=tokenizer.name_or_path, dtype=dtype, seed=seed, max_model_len=max_model_len,
            tensor_parallel_size=1, max_num_seqs=min(sequences, 512), logprobs_mode="processed_logprobs",
            disable_log_stats=True, **options,
        )  # fmt: skip
        set_threads(threads)  # the CPU worker lowers it for the whole process and disables the setter

    def engine_model(self):
        """The engine's torch module: the one place that reaches into vLLM (checked with 0.32)."""
        try:
            return self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        except AttributeError as error:
            raise RuntimeError(f"vLLM {self.vllm.__version__} hides its model ({error}): use the pinned version") from error

    def sync(self, model) -> None:
        """Push every parameter of `model` into the engine; what it cached for the old ones is dropped."""
        self.engine_model().load_weights((name, p.detach()) for name, p in model.named_parameters())
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache after the weight update: requests still running?")

    def generate(self, prompts, n, max_tokens, temperature=1.0, top_p=1.0, seed=None) -> list[list[dict]]:
        """As HFSampler.generate; one request per prompt, so that its prefix is computed once for all n responses."""
        import torch

        if seed is not None:
            torch.manual_seed(seed)  # the engine draws from this process's generator
        caps = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        params = [
            self.vllm.SamplingParams(
                n=n, temperature=temperature, top_p=top_p, max_tokens=cap, logprobs=0, detokenize=False,
                stop_token_ids=self.stop_ids,
            )  # fmt: skip
            for cap in caps
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        result = []
        for request in self.llm.generate(requests, params, use_tqdm=False):
            result.append([])
            for out in request.outputs:
                ids = list(out.token_ids)
                logps = [entry[i].logprob for i, entry in zip(ids, out.logprobs, strict=True)]
                result[-1].append({"ids": ids, "logps": logps, "finish_reason": out.finish_reason})
        return result


def keep_cpu_weights_unpacked() -> None:
    """vLLM's CPU build repacks weights for its kernels, and packed ones cannot be updated: use plain F.linear."""
    import torch
    import vllm.model_executor.layers.utils as utils

    if not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        raise RuntimeError("this vLLM has no dispatch_cpu_unquantized_gemm: use the version in requirements-cpu.txt")

    def plain_linear(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain_linear


def load_model(path: str, device="cpu"):
    """A causal language model in float32 (the master weights) on `device`."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model ({path}) does not load: {str(error).splitlines()[0]}") from None
    return model.to(device)


def pick_sampler(name: str, log=print) -> str:
    """`auto` -> vllm on a CUDA machine that has it, else hf; says which and why."""
    import importlib.util

    import torch

    installed, cuda = importlib.util.find_spec("vllm") is not None, torch.cuda.is_available()
    if name == "vllm" and not installed:
        raise BadInput("--sampler vllm: the package vllm is not installed; see requirements.txt, or use --sampler hf")
    if name == "auto":
        name = "vllm" if installed and cuda else "hf"
        why = "CUDA found" if name == "vllm" else "no CUDA device" if installed else "vllm is not installed"
        log(f"sampler: {name} ({why})")
    return name


def make_sampler(kind, model, path, tokenizer, max_model_len, dtype="float32", seed=0, memory=0.35, sequences=256):
    """An HFSampler on `model`, or a VLLMSampler whose engine is built from `path`."""
    stop_ids = stop_tokens(model.generation_config, tokenizer)
    if kind == "hf":
        return HFSampler(model, tokenizer, stop_ids, max_model_len)
    return VLLMSampler(path, tokenizer, stop_ids, max_model_len, dtype, seed, memory, sequences)


def load_sampler(path: str, sampler: str = "auto", max_model_len: int | None = None, seed: int = 0, dtype="float32"):
    """A sampler for a finished model, as evaluate.py and baselines.py need it; made by the trainer's own code."""
    import torch

    tokenizer, kind = load_tokenizer(path), pick_sampler(sampler)
    model = load_model(path, "cuda" if kind == "hf" and torch.cuda.is_available() else "cpu")
    max_model_len = max_model_len or model.config.max_position_embeddings
    return make_sampler(kind, model, path, tokenizer, max_model_len, dtype, seed, memory=0.85)


# ---------------------------------------------------------------------------------------------------------------
# From responses to advantages


def score(responses: list[list[dict]], rows: list[dict], tokenizer, args) -> tuple[list[list[dict]], dict]:
    """Decode and check this process's responses; adds `text`, `correct`, `length`, `truncated` to each."""
    think_end = tokenizer.encode("</think>", add_special_tokens=False)
    flat = [r for group in responses for r in group]
    for r in flat:
        # Special tokens stay in the text: in many models </think> is one.
        r["text"] = tokenizer.decode(r["ids"], skip_special_tokens=False)
        for end in filter(None, (tokenizer.eos_token, tokenizer.pad_token)):
            r["text"] = r["text"].removesuffix(end).rstrip()
        r["length"] = response_length(r["ids"], args.count, think_end)
        r["truncated"] = int(r["finish_reason"] == "length")
    of = [row for row, group in zip(rows, responses, strict=True) for _ in group]
    correct, counts = check_answers(
        [r["text"] for r in flat], [row["answer"] for row in of], [row["kind"] for row in of],
        [row.get("choices") for row in of], args.require_think, args.verify_timeout,
    )  # fmt: skip
    for r, ok in zip(flat, correct, strict=True):
        r["correct"] = int(ok)
    return responses, counts


def to_rollouts(groups: list[list[dict]], rows: list[dict], args, step: int) -> dict:
    """The Rollouts dict of DESIGN: [P, G] arrays that the reward functions read."""
    table = {k: np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length", "truncated")}
    table["budget"] = np.array([row.get("budget") or np.nan for row in rows], dtype=np.float64)
    table["mode"] = [row.get("mode") for row in rows]
    return table | {"max_length": args.max_tokens, "step": step}


def rewards_and_advantages(rollouts: dict, args) -> tuple[np.ndarray, dict, np.ndarray]:
    """(total reward [P, G], its parts {name: [P, G]}, advantages [P, G])."""
    function = REWARDS[args.reward]
    total, parts = function(rollouts, **args.reward_args), {}
    if "parts" in inspect.signature(function).parameters:
        parts = function(rollouts, **args.reward_args, parts=True)
    rewards = total
    if args.advantage == "gdpo":  # decoupled: each part is normalised by itself before they are added
        rewards = np.stack(list(parts.values())) if parts else total[None]
    return total, parts, ADVANTAGES[args.advantage](rewards, rollouts, **args.advantage_args)


# ---------------------------------------------------------------------------------------------------------------
# The update. A batch is a flat list of responses {"prompt_ids", "ids", "logps", "advantage", "weight"}.


def micro_batches(batch: list[dict], limit: int) -> list[list[dict]]:
    """Longest first, as many as fit into `limit` tokens when padded to the longest: little padding, no surprise late."""
    def size(r):
        return len(r["prompt_ids"]) + len(r["ids"])

    parts = []
    for r in sorted(batch, key=size, reverse=True):
        if not parts or (len(parts[-1]) + 1) * size(parts[-1][0]) > limit:
            parts.append([])
        parts[-1].append(r)
    return parts


def share_of(batch: list[dict], rank: int, processes: int) -> list[dict]:
    """This process's part of the batch: dealt out by length, back and forth, so that all get as many tokens."""
    order = sorted(batch, key=lambda r: -len(r["prompt_ids"]) - len(r["ids"]))
    turns = (list(range(processes)) + list(reversed(range(processes)))) * (len(order) // processes + 1)
    return [r for r, turn in zip(order, turns, strict=False) if turn == rank]


def to_tensors(micro: list[dict], device) -> dict:
    """Padded input ids [N, width], and flat [T] tensors of the response tokens: where they are and what they carry."""
    import torch

    # Which tokens count follows from lengths alone: the end token is trained even if it is also the padding token.
    width = max(len(r["prompt_ids"]) + len(r["ids"]) for r in micro)
    ids = np.zeros((len(micro), width), dtype=np.int64)
    flat = {name: [] for name in ("row", "column", "target", "sampler_logp", "advantage", "weight")}
    for i, r in enumerate(micro):
        p, n = len(r["prompt_ids"]), len(r["ids"])
        ids[i, : p + n] = r["prompt_ids"] + r["ids"]
        flat["row"] += [i] * n
        flat["column"] += range(p - 1, p + n - 1)  # a token is predicted from the position before it
        flat["target"] += r["ids"]
        flat["sampler_logp"] += r["logps"]
        flat["advantage"] += [r["advantage"]] * n
        flat["weight"] += [r["weight"]] * n
    tensors = {k: torch.tensor(v, device=device) for k, v in flat.items()}
    return tensors | {"ids": torch.from_numpy(ids).to(device)}


def model_logps(model, t: dict, temperature: float, dtype: str = "float32"):
    """Log-probs and entropies [T] of the response tokens of to_tensors' `t` under `model`."""
    import torch

    from losses import token_logps

    with torch.autocast(t["ids"].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        # No attention mask: padding is on the right, where a causal model cannot see it from any real token.
        hidden = model.get_decoder()(input_ids=t["ids"], use_cache=False).last_hidden_state
        hidden = hidden[t["row"], t["column"]]
        return token_logps(hidden, model.get_output_embeddings().weight.to(hidden.dtype), t["target"], temperature)


def update(model, reference, optimizer, batch: list[dict], args, rank=0, processes=1, device="cpu") -> dict:
    """One pass of optimizer steps over the whole batch (the same list on every process); means of the diagnostics."""
    import torch
    import torch.distributed as dist

    from losses import policy_loss, response_weights

    sums, norms = torch.zeros(8, dtype=torch.float64), []
    for k in range(args.minibatches):
        part = batch[len(batch) * k // args.minibatches : len(batch) * (k + 1) // args.minibatches]
        # The denominator of the loss is that of all processes and micro-batches together, fixed before any is run.
        lengths = torch.tensor([len(r["ids"]) for r in part])
        weights = response_weights(lengths, args.loss_reduction, args.max_tokens).tolist()
        mine = share_of([r | {"weight": w} for r, w in zip(part, weights, strict=True)], rank, processes)
        optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches(mine, args.micro_tokens):
            t = to_tensors(micro, device)
            logp, entropy = model_logps(model, t, args.temperature, args.dtype)
            # With one optimizer step per batch the policy that is updated is the one that sampled.
            old = torch.tensor(sum((r["old_logps"] for r in micro), []), device=device) if args.minibatches > 1 else None
            old = logp.detach() if old is None else old
            ref = None
            if reference is not None:
                with torch.no_grad():
                    ref, _ = model_logps(reference, t, args.temperature, args.dtype)
            loss, stats = policy_loss(
                logp, old, t["advantage"], t["weight"], t["row"], ratio=args.ratio, clip_low=args.clip_low,
                clip_high=args.clip_high, sampler_logp=t["sampler_logp"], tis_cap=args.tis_cap or None,
                ref_logp=ref, kl_coef=args.kl_coef, kl_estimator=args.kl_estimator,
            )  # fmt: skip
            loss.backward()
            gap = (old - t["sampler_logp"]).abs()
            sums[:7] += torch.stack(
                [torch.tensor(float(len(logp))), loss.detach(), entropy.sum(), stats["clip_fraction"],
                 stats.get("kl", torch.zeros(())), gap.sum(), torch.tensor(float(t["ids"].numel()))]
            ).double().cpu()  # fmt: skip
            sums[7] = max(sums[7], gap.max().item())
        if processes > 1:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)  # a sum: the weights already divide by the whole batch
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item())
        optimizer.step()
    if processes > 1:
        sums, largest = sums.to(device), sums[7:].to(device)
        dist.all_reduce(sums)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        sums[7:] = largest
    tokens, loss, entropy, clipped, kl, gap, seen, gap_max = sums.tolist()
    return {
        "loss": loss / args.minibatches, "entropy": entropy / tokens, "clip_fraction": clipped / tokens,
        "kl": kl / tokens if reference is not None else None, "logp_gap": gap / tokens, "logp_gap_max": gap_max,
        "grad_norm": float(np.mean(norms)),
    }  # fmt: skip


def add_old_logps(model, batch: list[dict], args, device) -> None:
    """`old_logps` of every response under the policy that is about to be updated (needed for --minibatches > 1)."""
    import torch

    with torch.no_grad():
        for micro in micro_batches(batch, args.micro_tokens):
            t = to_tensors(micro, device)
            flat = model_logps(model, t, args.temperature, args.dtype)[0].tolist()
            for r in micro:
                r["old_logps"], flat = flat[: len(r["ids"])], flat[len(r["ids"]) :]


def learning_rate(step: int, args) -> float:
    """Learning rate of a step: linear warm-up, then constant, or cosine / linear down to 0 at the last step."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    return args.lr * {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[args.lr_schedule]


def make_optimizer(model, args):
    """AdamW over all parameters; with --optim adamw8bit its moments take 2 bytes a parameter instead of 8."""
    import torch

    options = {"lr": args.lr, "betas": tuple(args.betas), "weight_decay": args.weight_decay}
    if args.optim == "adamw":
        return torch.optim.AdamW(model.parameters(), **options)
    if not torch.cuda.is_available():
        raise BadInput("--optim adamw8bit needs a CUDA device: its kernels exist only there; use --optim adamw")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(model.parameters(), **options)


def check_sync(sampler, model, prompt_ids: list[int], args, device) -> float:
    """Sample a probe, compare the sampler's log-probs with the trainer's; the largest gap. A stale engine stops the run."""
    probe = sampler.generate([prompt_ids], 4, min(32, args.max_tokens), args.temperature, seed=args.seed)[0]
    batch = [r | {"prompt_ids": prompt_ids, "advantage": 0.0, "weight": 0.0} for r in probe]
    add_old_logps(model, batch, args, device)
    gap = max(abs(a - b) for r in batch for a, b in zip(r["logps"], r["old_logps"], strict=True))
    # Measured gaps: below 2e-5 in float32; bf16 kernels disagree by a few hundredths, rarely more.
    limit = 1e-3 if args.dtype == "float32" else 0.5
    stale = []
    if sampler.name == "vllm":
        # One small step at lr 1e-6 hides in bf16 noise, so the weights themselves are compared as well, where the
        # engine keeps them under the same name (it fuses q, k, v and the two halves of the MLP).
        engine = dict(sampler.engine_model().named_parameters())
        stale = [n for n, p in model.named_parameters() if n in engine and not same(engine[n], p)]
    if stale or not gap < limit:
        raise SystemExit(
            f"train_grpo.py: error: the sampler does not hold the trainer's weights: log-probs of a probe differ by "
            f"{gap:.2g} (limit {limit:g}), {len(stale)} weights differ ({', '.join(stale[:3])}). The weight update was "
            f"lost; a run that goes on would learn from another policy's responses."
        )
    return gap


def same(a, b) -> bool:
    """Equal values after the trainer's parameter is cast to the engine's type."""
    return bool((a.detach() == b.detach().to(a.device, a.dtype)).all())


# ---------------------------------------------------------------------------------------------------------------
# Metrics


def length_metrics(rollouts: dict) -> dict:
    """Length and its errors over the batch, and per requested budget (or per quarter of their range)."""
    length, budget = rollouts["length"].astype(float), rollouts["budget"]
    out = {"length": length.mean(), "length_p95": np.quantile(length, 0.95), "truncated": rollouts["truncated"].mean()}
    have = ~np.isnan(budget)
    if not have.any():
        return out
    asked, got = budget[have][:, None], length[have]
    error = (got - asked) / asked
    out |= {"signed_error": error.mean(), "abs_error": np.abs(error).mean()}
    out |= {"within_10": (np.abs(error) <= 0.1).mean(), "over_budget": (error > 0).mean(), "error_by_budget": {}}
    values = np.unique(asked)
    if len(values) > 8:  # many budgets: four buckets of equal width between the least and the greatest of this batch
        edges = np.linspace(values[0], values[-1] + 1, 5).astype(int)
        names = {f"{a}-{b - 1}": (asked[:, 0] >= a) & (asked[:, 0] < b) for a, b in zip(edges, edges[1:], strict=False)}
    else:
        names = {f"{v:g}": asked[:, 0] == v for v in values}
    for name, rows in names.items():
        if rows.any():
            e = error[rows]
            out["error_by_budget"][name] = {"signed": e.mean(), "abs": np.abs(e).mean(), "length": got[rows].mean()}
    return out


def plain(value):
    """numpy scalars and nan -> what JSON can hold (nan becomes null)."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else round(float(value), 8)
    return value.item() if isinstance(value, np.generic) else value


def show_samples(groups, rows, total, log) -> None:
    """Three decoded responses of the first step, with what they earned: where most mistakes can be seen."""
    for i in range(min(3, len(groups))):
        r, text = groups[i][0], groups[i][0]["text"]
        text = text if len(text) < 500 else text[:300] + " [...] " + text[-150:]
        log(f"  prompt   {rows[i]['prompt']!r}\n  response {text!r}")
        log(
            f"  answer {rows[i]['answer']!r}: {'right' if r['correct'] else 'wrong'}, {r['length']} tokens"
            f"{' (cut off)' if r['truncated'] else ''}, budget {rows[i].get('budget')}, reward {total[i, 0]:.3f}\n"
        )


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face folder plus trainer_state.pt. Complete or not there at all.


def save_checkpoint(out: str, step: int, model, tokenizer, optimizer, memory: dict, keep: int) -> str:
    """Write OUT/checkpoint-STEP under a temporary name, flush it to the disk, rename it; delete older ones."""
    import torch

    final, temporary = os.path.join(out, f"checkpoint-{step}"), os.path.join(out, f".writing-{step}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    state = {"step": step, "optimizer": optimizer.state_dict(), "memory": memory, "torch_rng": torch.get_rng_state()}
    torch.save(state, os.path.join(temporary, "trainer_state.pt"))
    for name in os.listdir(temporary):
        with open(os.path.join(temporary, name), "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(os.path.join(out, f"checkpoint-{old}"))
    return final


def checkpoints(out: str) -> list[int]:
    """Steps of the complete checkpoints in `out`, ascending."""
    names = [n.removeprefix("checkpoint-") for n in os.listdir(out) if n.startswith("checkpoint-")]
    return sorted(int(n) for n in names if n.isdigit())


def load_state(folder: str) -> dict:
    """trainer_state.pt of a checkpoint; BadInput when it is missing or damaged. No code in it is ever run."""
    import torch

    try:
        return torch.load(os.path.join(folder, "trainer_state.pt"), weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file; all mean the same to the user
        raise BadInput(
            f"--resume: the checkpoint {folder} is damaged ({type(error).__name__}: {str(error).splitlines()[0][:80]}); "
            f"delete that folder to go on from the one before"
        ) from None


def start_folder(args, rank: int) -> tuple[str | None, int]:
    """Prepare --out; (folder of the checkpoint to resume from or None, first step)."""
    steps = checkpoints(args.out) if args.resume else []
    if args.resume:
        if not steps:
            raise BadInput(f"--resume: --out ({args.out}) holds no complete checkpoint; start again with --overwrite")
        return os.path.join(args.out, f"checkpoint-{steps[-1]}"), steps[-1]
    if rank == 0:
        if args.overwrite and os.path.exists(os.path.join(args.out, "args.json")):
            shutil.rmtree(args.out)
        os.makedirs(args.out, exist_ok=True)
    return None, 0


def trim_metrics(out: str, step: int) -> None:
    """Drop the lines of metrics.jsonl from `step` on: the resumed run will write them again."""
    path = os.path.join(out, "metrics.jsonl")
    if os.path.exists(path):
        with open(path) as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] < step]
        with open(path, "w") as f:
            f.writelines(lines)


# ---------------------------------------------------------------------------------------------------------------
# Training


def set_up(args: argparse.Namespace, state, log) -> argparse.Namespace:
    """Everything the loop needs, loaded and checked: rows, tokenizer, model, reference, optimizer, sampler, memory."""
    import torch

    s = argparse.Namespace(memory={}, reference=None)
    s.folder, s.start = start_folder(args, state.process_index)
    state.wait_for_everyone()
    s.rows = load_rows(args)
    path = args.model
    if path is None:
        # One process makes the toy's base model, the others find it in the cache.
        if state.is_main_process:
            toy.make_base(os.path.dirname(os.path.abspath(args.out)), log=log)
        state.wait_for_everyone()
        path = toy.make_base(os.path.dirname(os.path.abspath(args.out)), log=lambda _: None)
    s.tokenizer = load_tokenizer(path)
    s.model = load_model(s.folder or path, state.device).train()
    context = s.model.config.max_position_embeddings
    longest = check_prompts(s.rows, s.tokenizer, args, context)
    if args.gradient_checkpointing:
        s.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.kl_coef:
        s.reference = load_model(path, state.device).eval().requires_grad_(False)
    s.optimizer = make_optimizer(s.model, args)
    if s.folder:
        saved = load_state(s.folder)
        s.optimizer.load_state_dict(saved["optimizer"])
        s.memory, s.start = saved["memory"], saved["step"]
    kind = pick_sampler(args.sampler, log)
    per_process = args.prompts_per_step * args.group_size // state.num_processes
    # The final evaluation of the toy asks for more than was trained, so its engine takes the whole context.
    room = context if args.model is None else longest + args.max_tokens
    s.sampler = make_sampler(
        kind, s.model, path, s.tokenizer, room, args.dtype, args.seed + state.process_index, args.vllm_memory, per_process
    )
    s.path = path
    if args.eval_data:
        name = args.eval_data
        s.held_out = toy.problems(name, "test", args.eval_limit) if name in toy.TASKS else load_problems(name)
        s.held_out = s.held_out[: args.eval_limit]
    torch.manual_seed(args.seed)
    return s


def train(args: argparse.Namespace) -> None:
    """The whole run; see the docstring of this file."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm

    # ---- Setup --------------------------------------------------------------------------------------------------
    state = PartialState()
    rank, processes, device, main = state.process_index, state.num_processes, state.device, state.is_main_process
    on_terminal = main and sys.stderr.isatty()
    bar = tqdm(total=args.steps, disable=not on_terminal, dynamic_ncols=True)
    log = (tqdm.write if on_terminal else lambda text: print(text, flush=True)) if main else lambda text: None
    began = time.monotonic()
    s = set_up(args, state, log)
    if main:
        with open(os.path.join(args.out, "args.json"), "w") as f:
            json.dump(vars(args) | {"resume": False, "overwrite": False}, f, indent=1)
        trim_metrics(args.out, s.start)
    log(
        f"{s.model.num_parameters() / 1e6:.2f}M parameters on {device}, {processes} process(es), {len(s.rows)} rows, "
        f"reward {args.reward}, advantage {args.advantage}, sampler {s.sampler.name}, steps {s.start}..{args.steps}"
    )
    # The engine was built from the starting model: give it the trainer's weights before anything is sampled.
    s.sampler.sync(s.model)
    check_sync(s.sampler, s.model, s.rows[0]["prompt_ids"], args, device)
    bar.update(s.start)

    for step in range(s.start, args.steps):
        # ---- Sample: this process's prompts, a group of responses to each ---------------------------------------
        clock = [time.monotonic()]
        rows = rows_of_step(s.rows, args, step)
        share = len(rows) // processes
        own = rows[rank * share : (rank + 1) * share]
        # One number per (seed, step, process): a resumed run needs no history of any generator.
        seed = int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0])
        groups = s.sampler.generate(
            [row["prompt_ids"] for row in own], args.group_size, args.max_tokens, args.temperature, seed=seed
        )
        clock.append(time.monotonic())

        # ---- Verify, then reward: all processes see the whole batch, so advantages cannot differ between them ---
        groups, counts = score(groups, own, s.tokenizer, args)
        if processes > 1:
            groups, counts = gather_object(groups), sum_counts(gather_object([counts]))
        rollouts = to_rollouts(groups, rows, args, step)
        total, parts, advantages = rewards_and_advantages(rollouts, args)
        if step == 0:
            show_samples(groups, rows, total, log)
        batch = [
            r | {"prompt_ids": row["prompt_ids"], "advantage": float(a), "weight": 0.0}
            for row, group, line in zip(rows, groups, advantages, strict=True)
            for r, a in zip(group, line, strict=True)
        ]
        clock.append(time.monotonic())

        # ---- Update ---------------------------------------------------------------------------------------------
        lr = learning_rate(step, args)
        for group in s.optimizer.param_groups:
            group["lr"] = lr
        if args.minibatches > 1:
            add_old_logps(s.model, batch, args, device)
        trained = update(s.model, s.reference, s.optimizer, batch, args, rank, processes, device)
        if not (math.isfinite(trained["loss"]) and math.isfinite(trained["grad_norm"])):
            raise SystemExit(f"train_grpo.py: error: step {step}: the loss or its gradient is not finite ({trained})")
        clock.append(time.monotonic())

        # ---- Push the new weights into the sampler --------------------------------------------------------------
        s.sampler.sync(s.model)
        if args.check_sync and (step == 0 or (step + 1) % args.check_sync == 0):
            check_sync(s.sampler, s.model, s.rows[0]["prompt_ids"], args, device)
        clock.append(time.monotonic())

        # ---- Log, evaluate, save --------------------------------------------------------------------------------
        metrics = {"step": step, "reward": total.mean(), "reward_std": total.std(-1).mean()}
        metrics |= {f"reward_{name}": part.mean() for name, part in parts.items()}
        metrics |= {"accuracy": rollouts["correct"].mean(), **length_metrics(rollouts)}
        metrics |= {"zero_variance": (np.ptp(total, -1) < 1e-9).mean(), **trained, "lr": lr, **counts}
        seconds = dict(zip(("sample", "verify", "train", "sync"), np.diff(clock), strict=True))
        metrics |= {f"seconds_{k}": v for k, v in seconds.items()}
        metrics |= {"tokens_per_second": rollouts["length"].sum() / (clock[-1] - clock[0]), "peak_gib": peak_memory()}
        if main:
            with open(os.path.join(args.out, "metrics.jsonl"), "a") as f:
                f.write(json.dumps(plain(metrics), allow_nan=False) + "\n")
        show_step(metrics, args, bar if on_terminal else None, log)
        done = step + 1
        if args.eval_every and done % args.eval_every == 0:
            evaluate_now(s, args, os.path.join(args.out, f"eval-{done}"), state, log)
        if main and (done == args.steps or (args.save_every and done % args.save_every == 0)):
            s.folder = save_checkpoint(args.out, done, s.model, s.tokenizer, s.optimizer, s.memory, args.keep)
        state.wait_for_everyone()

    # ---- Done ---------------------------------------------------------------------------------------------------
    bar.close()
    log(f"trained in {(time.monotonic() - began) / 60:.1f} min; model: {s.folder}")
    if args.model is None and main:
        evaluate_toy(s, args, log)
        log(f"all done in {(time.monotonic() - began) / 60:.1f} min")
    state.wait_for_everyone()


def sum_counts(counts: list[dict]) -> dict:
    """The verifier's counters of all processes, added up."""
    return {key: sum(c.get(key, 0) for c in counts) for key in sorted({k for c in counts for k in c})}


def peak_memory() -> float:
    """Most memory this process ever held, GiB: of the GPU where there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show_step(m: dict, args, bar, log) -> None:
    """One line a step, or the bar of a terminal."""
    error = f"  error {m['abs_error']:.1%}" if "abs_error" in m else ""
    text = f"reward {m['reward']:+.3f}  accuracy {m['accuracy']:.2f}  length {m['length']:.1f}{error}"
    if bar is not None:
        bar.set_postfix_str(text)
        bar.update()
        return
    spent = sum(m[f"seconds_{k}"] for k in ("sample", "verify", "train", "sync"))
    log(
        f"step {m['step'] + 1:4d}/{args.steps}  {text}  cut {m['truncated']:.2f}  entropy {m['entropy']:.2f}  "
        f"grad {m['grad_norm']:.2f}  gap {m['logp_gap_max']:.0e}  {spent:.1f} s"
    )


def evaluate_now(s, args, out: str, state, log) -> None:
    """A budget sweep over the held-out problems on the first process, while the others wait."""
    import evaluate

    if state.is_main_process:
        trained = sorted({row["budget"] for row in s.rows if row.get("budget")})
        asked = [int(b) for b in args.eval_budgets.split(",")] if args.eval_budgets else trained[:16]
        evaluate.evaluate(
            s.sampler, s.held_out, asked or [None], args.mode if args.mode != "both" else "exact", args.eval_n, out,
            wording=args.wording, temperature=args.temperature, top_p=1.0, max_tokens=args.max_tokens, seed=args.seed,
            count=args.count, require_think=args.require_think, trained_budgets=trained, model=s.path, log=lambda _: None,
        )  # fmt: skip
        log(f"evaluation: {out}/results.json")
    state.wait_for_everyone()


def evaluate_toy(s, args, log) -> None:
    """The toy's last act: trained and untrained budgets, the trained task and the one RL never saw, base beside it."""
    import evaluate

    budgets = [16, 24, 32, 40, 48, 56, 64, 80, 96, 128]
    problems = [p for task in toy.TASKS for p in toy.problems(task, "test", 100)]
    trained = parse_budgets(args.budgets)["values"] if args.budgets else None
    evaluate.evaluate(
        s.sampler, problems, budgets, "exact", 4, os.path.join(args.out, "eval"), wording=args.wording,
        temperature=args.temperature, top_p=1.0, seed=args.seed, trained_budgets=trained, model=s.folder, log=log,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    try:
        train(parse_args(argv))
    except BadInput as error:
        print(f"train_grpo.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
