"""Times and weighs the pieces of the training loop: against the naive version, against TRL 1.16.0.

    python -m scaling.bench step [--full]       one update: ours, TRL's GRPOTrainer, the machine's own matmul rate
    python -m scaling.bench logprobs            log-probs and their gradient: ours, full logits; by vocabulary
    python -m scaling.bench padding             share of padded tokens: ours, TRL's batching
    python -m scaling.bench scale               step time against tokens, 1 and 2 processes
    python -m scaling.bench sampler             responses from the trainer's vLLM, from a bare vllm.LLM
    python -m scaling.bench verify              answers checked per second: ours, math-verify one by one
    python -m scaling.bench plan [--model M]    memory: model, response cap, GPUs -> peak GiB and the flags it takes

Each prints a table and, last, one JSON line. Without --full the sizes are small: a minute on a laptop.
Every variant runs in a process of its own, which is what its peak memory is measured in; the processes take
turns (A B A B ...), so that a machine that slows down slows all of them down. The first turn is a warm-up.
"""

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import os
import shlex
import socket
import sys
import tempfile
from typing import TYPE_CHECKING

import numpy as np

from data import BadInput, one_line_errors
from scaling import plan, race

if TYPE_CHECKING:  # libraries that are loaded late
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

TRL = "1.16.0"

HERE = os.path.dirname(os.path.abspath(__file__))

# Sizes: "small" is the default; --full (the acceptance setting), then a CUDA device replace what they name.
TINY = {"layers": 4, "width": 256, "vocab": 32_768, "prompt": 32, "low": 16, "high": 160, "dtype": "float32"}
TINY["train_args"] = "--micro-tokens 2048"
HALF_B = {"layers": 24, "width": 896, "vocab": 151_936, "prompt": 256, "dtype": "bfloat16"}
HALF_B["train_args"] = "--micro-tokens 16384"
ACCEPTED = {"layers": 8, "vocab": 151_936, "sequences": 32, "high": 512}
SETTINGS = {
    "step": {
        "small": TINY | {"sequences": 16, "rounds": 5}, "full": ACCEPTED,
        "cuda": HALF_B | {"sequences": 64, "low": 100, "high": 4000},
    },
    "logprobs": {
        "small": {
            "vocabs": [32_768, 65_536, 131_072, 262_144], "tokens": 512, "width": 64, "dtype": "float32",
            "rounds": 5,
        },
        "full": {"tokens": 2048, "width": 256}, "cuda": {"tokens": 8192, "width": 1536, "dtype": "bfloat16"},
    },
    "padding": {"small": {
        "sequences": 2048, "prompt_low": 50, "prompt_high": 250, "low": 100, "high": 4000,
        "micro_tokens": 16_384, "processes": [1, 2, 8],
    }},
    "scale": {
        "small": TINY | {"vocab": 8192, "sequences": [4, 8, 16, 32, 64], "rounds": 3},
        "full": {"layers": 8, "vocab": 32_768, "high": 512, "sequences": [2, 4, 8, 16, 32], "rounds": 5},
        "cuda": HALF_B | {"sequences": [16, 32, 64, 128, 256], "high": 2048},
    },
    "sampler": {
        "small": {
            "layers": 2, "width": 128, "vocab": 67, "prompts": 16, "group": 8, "prompt": 24, "max_tokens": 96,
            "dtype": "float32", "rounds": 5,
        },
        "full": {"prompts": 32, "max_tokens": 192},
        "cuda": HALF_B | {"prompts": 128, "group": 16, "max_tokens": 4096},
    },
    "verify": {"small": {"problems": 16, "group": 16, "rounds": 3}, "full": {"problems": 128, "rounds": 5}},
    "plan": {
        "small": TINY | {
            "budgets": [4096, 8192, 16_384], "gpus": [1, 4, 8], "gpu_gib": 80, "longest_prompt": 1024,
            "sequences": 16, "rounds": 1,
            "checks": ["--micro-tokens 1024", "--micro-tokens 2048 --gradient-checkpointing",
                       "--micro-tokens 1024 --dtype bfloat16 --param-dtype bfloat16"],
        },
        "full": ACCEPTED,
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# step: the same update by update.update and by TRL's GRPOTrainer.
#
# Settings in which both are the same mathematics: loss a mean over all response tokens of the batch (TRL's
# default "dapo", ours --loss-reduction token_mean), clip 0.2, no KL, temperature 1, one optimizer step on
# policy (all ratios are 1), AdamW without weight decay, gradient clipped at norm 1, no sampler correction.
# TRL makes its advantages from rewards: their mean is 0 in each group of 8, and scale_rewards is "none".


def step_config(s: dict) -> "PretrainedConfig":
    """Qwen2 with heads of 64; 8 layers of width 256 have 7.9M parameters beside the (tied) embedding."""
    from transformers import Qwen2Config

    d, heads = s["width"], max(1, s["width"] // 64)
    return Qwen2Config(
        vocab_size=s["vocab"], hidden_size=d, intermediate_size=4 * d, num_hidden_layers=s["layers"],
        num_attention_heads=heads, num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=32_768, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def step_model(s: dict) -> "PreTrainedModel":
    """The model with random weights, the same in every process."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(step_config(s))


def step_rollouts(s: dict, spread: bool = False) -> list[dict]:
    """Random responses of U(low, high) tokens, as update.update takes them; advantages by groups of 8.

    With `spread` the lengths are not drawn but spread evenly from low to high.
    """
    rng = np.random.default_rng(0)
    advantages = rng.normal(size=(-(-s["sequences"] // 8), 8))
    advantages = (advantages - advantages.mean(1, keepdims=True)).flatten()
    lengths = rng.integers(s["low"], s["high"] + 1, s["sequences"])
    lengths = np.linspace(s["low"], s["high"], s["sequences"]).astype(int) if spread else lengths
    batch = []
    for i, length in enumerate(lengths.tolist()):
        # Ids from 3 on: TRL's tokenizer needs a few special ones.
        prompt = rng.integers(3, s["vocab"], s["prompt"]).tolist()
        ids = rng.integers(3, s["vocab"], length).tolist()
        # nan is the trainer's word for "the sampler gave no log-prob": no correction.
        r = {"prompt_ids": prompt, "ids": ids, "logps": [float("nan")] * len(ids), "group": i // 8}
        batch.append(r | {"advantage": float(advantages[i]), "correct": 0.0, "truncated": 0.0})
    return batch


def step_args(s: dict) -> argparse.Namespace:
    """The trainer's flags for this update; those in s["train_args"] win."""
    import train_grpo

    flags = "--loss-reduction token_mean --minibatches 1 --clip-low 0.2 --clip-high 0.2 --tis-cap 0"
    flags += f" --kl-coef 0 --temperature 1 --grad-clip 1 --lr 1e-6 --max-tokens {s['high']}"
    flags += f" --dtype {s['dtype']} {s['train_args']}"
    return train_grpo.build_parser().parse_args(shlex.split(flags))


def step_imports(device: str) -> int:
    """Memory held once all libraries are loaded: what both sides hold before they have a model."""
    step_model({"width": 64, "layers": 1, "vocab": 8})  # loads transformers' Qwen2
    return race.held_bytes(device)


def save_gradient(optimizer, path: str) -> None:
    """Writes the gradient that the optimizer's first step is about to use."""
    import torch

    def save(optimizer, args, kwargs):
        if not os.path.exists(path):
            torch.save([p.grad for group in optimizer.param_groups for p in group["params"]], path)

    optimizer.register_step_pre_hook(save)


def step_ours(variant: str, s: dict, folder: str) -> None:
    """Worker: our update."""
    import torch
    from update import make_optimizer, update

    device, batch, args = race.pick_device(), step_rollouts(s), step_args(s)
    imports = step_imports(device)
    model = step_model(s).to(device, getattr(torch, args.param_dtype)).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = make_optimizer(model, args)
    save_gradient(optimizer, os.path.join(folder, "ours.pt"))

    def work():
        stats = update(model, None, optimizer, batch, args, device=device)
        return {"padding": stats["padding"], "grad_norm": stats["grad_norm"]}

    race.timed(work, device, imports=imports)


def step_trl(variant: str, s: dict, folder: str) -> None:
    """Worker: TRL's trainer itself; only the generation is replaced, through its own `rollout_func`."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # about rollout_func
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from update import make_optimizer

    device, batch, groups = race.pick_device(), step_rollouts(s), s["sequences"] // 8
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "prompt": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    imports = step_imports(device)
    model = step_model(s).to(device)
    optimizer = make_optimizer(model, step_args(s))
    save_gradient(optimizer, os.path.join(folder, f"{variant}.pt"))
    # TRL's defaults are kept where they do not change the mathematics: 8 sequences per device, padding,
    # recomputed activations (gradient_checkpointing), its chunked head.
    options = {"gradient_checkpointing": False} if variant == "trl_no_recompute" else {}
    options |= {"use_liger_kernel": True} if variant == "trl_liger" else {}
    config = GRPOConfig(
        output_dir=os.path.join(folder, variant), per_device_train_batch_size=8, num_generations=8,
        gradient_accumulation_steps=groups, max_completion_length=s["high"], scale_rewards="none",
        bf16=s["dtype"] == "bfloat16", use_cpu=device == "cpu", max_steps=10**6, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0, **options,
    )  # fmt: skip

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not sys.stdin.readline():
                raise SystemExit  # no more turns
            self.began = race.clock(device)

        def on_step_end(self, args, state, control, **kwargs):  # after the optimizer's step
            seconds = race.clock(device) - self.began
            race.tell(seconds=seconds, peak=race.peak_bytes(device), imports=imports, padding=padding())

    def rollouts(prompts, trainer):
        ours = {"prompt_ids": [r["prompt_ids"] for r in batch], "completion_ids": [r["ids"] for r in batch]}
        return ours | {"logprobs": None}

    def reward(completion_ids, **kwargs):
        return [r["advantage"] for r in batch]

    def padding():  # of what the trainer made of the rollouts, seen in the micro-batches it keeps
        masks = [torch.cat([m["prompt_mask"], m["completion_mask"]], 1) for m in trainer._buffered_inputs]
        return 1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)

    trainer = GRPOTrainer(
        model, reward, config, Dataset.from_dict({"prompt": ["prompt"] * groups}), processing_class=tokenizer,
        callbacks=[Turns()], optimizers=(optimizer, None), rollout_func=rollouts,
    )  # fmt: skip
    trainer.train()


def step_floor(variant: str, s: dict, folder: str) -> None:
    """Worker: seconds of the update's matrix products at this machine's best rate for their shapes."""
    import torch

    device, batch = race.pick_device(), step_rollouts(s)
    dtype = getattr(torch, s["dtype"])
    lengths = [(len(r["prompt_ids"]), len(r["ids"])) for r in batch]
    parts = plan.update_flops(step_config(s).to_dict(), lengths)
    length = int(np.mean([sum(both) for both in lengths]))

    def rate(flops, product):  # FLOP/s, best of 3
        best = float("inf")
        for _ in range(3):
            before = race.clock(device)
            product()
            best = min(best, race.clock(device) - before)
        return flops / best

    def linear(i, o):
        """Rate of y = x W, dx = dy W^T, dW = x^T dy together, the best over numbers of tokens at once."""
        rates = []
        for m in (256, 1024) if o > 50_000 and device == "cpu" else (512, 2048, 8192):
            x, w, y = (torch.randn(*shape, device=device).to(dtype) for shape in ((m, i), (i, o), (m, o)))
            flops = 2 * m * i * o
            products = [(x, w, y.clone()), (y, w.T, x.clone()), (x.T, y, w.clone())]
            seconds = [flops / rate(flops, lambda p=p: torch.mm(p[0], p[1], out=p[2])) for p in products]
            rates.append(3 * flops / sum(seconds))
        return max(rates)

    def attention(heads, head_dim):
        q = torch.randn(8 * heads, length, head_dim, device=device).to(dtype)
        out = torch.empty(8 * heads, length, length, device=device, dtype=dtype)
        return rate(2 * q.shape[0] * length**2 * head_dim, lambda: torch.bmm(q, q.transpose(1, 2), out=out))

    for _ in sys.stdin:
        rates = [linear(a, b) if kind == "linear" else attention(a, b) for kind, a, b, _ in parts]
        race.tell(
            seconds=sum(part[3] / r for part, r in zip(parts, rates, strict=True)),
            flops=sum(part[3] for part in parts), rates=rates, shapes=[part[:3] for part in parts],
        )  # fmt: skip


def bench_step(s: dict) -> dict:
    """One update, ours against TRL's, and the floor that the machine's matrix products set."""
    if trl_version() != TRL:
        raise BadInput(f"bench.py step needs TRL {TRL}, found: {trl_version()}; pip install trl=={TRL}")
    if s["sequences"] % 8:
        raise BadInput(f"sequences ({s['sequences']}) must be a multiple of 8, TRL's sequences per device")
    variants = ["ours", "trl", "trl_no_recompute"]
    if race.pick_device() == "cuda" and importlib.util.find_spec("liger_kernel"):
        variants.append("trl_liger")
    with tempfile.TemporaryDirectory() as folder:
        # TRL's other ways are slow and stand beside the race: one turn each.
        found = race.race("step", ["ours", "floor", *variants[1:]], s, folder, few=variants[2:])
        gradients = {v: gradient_distance(folder, v) for v in variants[1:] if "failed" not in found[v]}
    tokens = sum(len(r["prompt_ids"]) + len(r["ids"]) for r in step_rollouts(s))
    floor, ours = found["floor"], found["ours"]
    rows = []
    columns = {
        "seconds": ".2f", "tokens_per_second": ",.0f", "speedup": ".2f", "tflops": ".3f",
        "floor_share": ".0%", "padding": ".1%", "peak_mib": ",.0f", "net_mib": ",.0f",
        "net_ratio": ".2f", "peak_ratio": ".2f", "gradient_difference": ".1e",
    }  # fmt: skip
    for v in variants:
        f = found[v]
        if "failed" in f:
            print(f"{v} failed: {f['failed']}")
            continue
        f |= {"net": f["peak"] - f["imports"], "gradient_difference": gradients.get(v, 0.0)}
        f |= {"peak_mib": f["peak"] / 2**20, "net_mib": f["net"] / 2**20}
        f |= {"net_ratio": ours["net"] / f["net"], "peak_ratio": ours["peak"] / f["peak"]}
        f |= {"speedup": f["seconds"] / ours["seconds"], "floor_share": floor["seconds"] / f["seconds"]}
        f |= {"tokens_per_second": tokens / f["seconds"], "tflops": floor["flops"] / f["seconds"] / 1e12}
        rows.append([v, *(format(f[k], form) for k, form in columns.items())])
    race.print_table(["variant", *columns], rows)
    for (kind, a, b), r in zip(floor["shapes"], floor["rates"], strict=True):
        print(f"  {kind} {a} x {b}: {r / 1e9:,.0f} GFLOP/s")
    print(
        f"floor: {floor['flops'] / 1e12:.3f} TFLOP of products at these rates: {floor['seconds']:.2f} s "
        f"for {tokens:,} tokens\nspeedup: ours against it; net: above the imported libraries; ratios: "
        f"ours / it; trl: its defaults, with recomputed activations; gradient_difference: |ours - it| / |it|"
    )
    return {"tokens": tokens, "variants": found}


def trl_version() -> str | None:
    """The installed version of TRL."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None


def gradient_distance(folder: str, variant: str) -> float:
    """|ours - theirs| / |theirs| over all parameters, of the first update."""
    import torch

    files = [os.path.join(folder, f"{v}.pt") for v in ("ours", variant)]
    ours, theirs = (torch.load(path, map_location="cpu", weights_only=True) for path in files)
    apart = sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return (apart / sum(b.double().square().sum() for b in theirs)).sqrt().item()


# ------------------------------------------------------------------------------------------------------------
# logprobs: values and gradients of log-probs from hidden states


def full_logps(hidden: "torch.Tensor", weight: "torch.Tensor", targets: "torch.Tensor") -> tuple:
    """The naive version: all logits [T, V] at once; log-probs and entropies [T]."""
    import torch

    logps = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropy


def logprobs_worker(variant: str, s: dict, folder: str) -> None:
    """Worker: forward and backward of one version at one vocabulary."""
    import torch
    from losses import head_loss

    device, (name, vocab) = race.pick_device(), variant.split("-")
    torch.manual_seed(0)
    vocab, dtype = int(vocab), getattr(torch, s["dtype"])
    hidden = torch.randn(s["tokens"], s["width"], device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, s["width"], device=device) / s["width"] ** 0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (s["tokens"],), device=device)
    advantage = torch.randn(s["tokens"], device=device)
    # What both versions must hold is not counted: the inputs, and the gradients, which do not exist yet.
    held = race.held_bytes(device) + sum(t.numel() * t.element_size() for t in (hidden, weight))

    def work():
        hidden.grad = weight.grad = None
        if name == "ours":
            loss_of = lambda logp, part: (logp * advantage[part]).sum()  # noqa: E731
            loss, logp, entropy = head_loss(hidden, weight, targets, loss_of)
        else:
            logp, entropy = full_logps(hidden, weight, targets)
            loss = (logp * advantage).sum()
        loss.backward()
        norm = torch.linalg.vector_norm(weight.grad, dtype=torch.float32)  # without a float32 copy of it
        return {"check": [logp.sum().item(), entropy.sum().item(), norm.item()]}

    race.timed(work, device, held=held)


def bench_logprobs(s: dict) -> dict:
    """Time and working memory of both versions for each vocabulary."""
    found, rows = {}, []
    for vocab in s["vocabs"]:
        with tempfile.TemporaryDirectory() as folder:
            pair = race.race("logprobs", [f"ours-{vocab}", f"full-{vocab}"], s, folder)
        ours, full = (pair[f"{name}-{vocab}"] for name in ("ours", "full"))
        for f in (ours, full):
            f["working"] = f["peak"] - f["held"]
        pairs = zip(ours["check"], full["check"], strict=True)
        difference = max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)
        found[vocab] = {"ours": ours, "full": full, "difference": difference}
        rows.append(
            [f"{vocab:,}", f"{ours['seconds']:.3f}", f"{full['seconds']:.3f}",
             f"{ours['seconds'] / full['seconds']:.2f}", race.mib(ours["working"]), race.mib(full["working"]),
             f"{difference:.1e}"]
        )  # fmt: skip
    race.print_table(["vocabulary", "ours s", "full s", "ratio", "ours MiB", "full MiB", "difference"], rows)
    working = [f["ours"]["working"] for f in found.values()]
    print(
        f"{s['tokens']} tokens, width {s['width']}, forward + backward; MiB above inputs and gradients; "
        f"ours, most / least over the vocabularies: {max(working) / max(min(working), 1):.2f}"
    )
    return {"vocabs": found, "memory_spread": max(working) / max(min(working), 1)}


# ------------------------------------------------------------------------------------------------------------
# padding, scale


def bench_padding(s: dict) -> dict:
    """Share of padded tokens of one batch: our micro-batches on each process, and TRL's."""
    from update import micro_batches, share_of, total_length

    rng, rows, found = np.random.default_rng(0), [], {}
    lengths = rng.integers(
        [s["prompt_low"], s["low"]], [s["prompt_high"] + 1, s["high"] + 1], (s["sequences"], 2)
    )
    batch = [{"prompt_ids": range(prompt), "ids": range(response)} for prompt, response in lengths.tolist()]
    real = int(lengths.sum())

    def note(name, padded, batches, uneven=0.0):
        found[name] = {"padding": 1 - real / padded, "micro_batches": batches, "uneven": uneven}
        rows.append([name, f"{1 - real / padded:.2%}", f"{batches:,}", f"{uneven:.2%}"])

    for processes in s["processes"]:
        shares = [share_of(batch, rank, processes) for rank in range(processes)]
        count = max(len(micro_batches(share, s["micro_tokens"])) for share in shares)
        parts = [micro_batches(share, s["micro_tokens"], count) for share in shares]  # as update() does
        padded = [sum(len(m) * max(map(total_length, m)) for m in part) for part in parts]
        uneven = max(padded) * processes / sum(padded) - 1
        note(f"ours, {processes} process(es)", sum(padded), sum(map(len, parts)), uneven)
    # TRL pads prompts to the longest prompt and responses to the longest response of the whole batch, then
    # cuts it into parts of 8. Its own functions do it here.
    if trl_version():
        import torch
        from trl.trainer.utils import pad, split_tensor_dict

        sides = (("prompt", 0, "left"), ("completion", 1, "right"))
        masks = {k: pad([torch.ones(n) for n in lengths[:, i].tolist()], 0, side) for k, i, side in sides}
        parts = split_tensor_dict(masks, len(lengths) // 8)
        note(f"trl {trl_version()}", sum(m.numel() for part in parts for m in part.values()), len(parts))
    else:
        print(f"trl is not installed, its line is missing: pip install trl=={TRL}")
    race.print_table(["batching", "padded", "micro-batches", "most loaded process"], rows)
    print(f"{s['sequences']} sequences, prompts U({s['prompt_low']}, {s['prompt_high']}), ", end="")
    print(f"responses U({s['low']}, {s['high']}); ours: {s['micro_tokens']} tokens at once; TRL: 8 sequences")
    return {"tokens": real, "batching": found}


def scale_worker(variant: str, s: dict, folder: str) -> None:
    """Worker: one process of 1 or 2; in a turn one update at each batch size."""
    from accelerate import PartialState
    from update import make_optimizer, update

    state = PartialState(cpu=race.pick_device() == "cpu")
    device, args = state.device, step_args(s)
    model = step_model(s).to(device).train()
    optimizer = make_optimizer(model, args)
    # Evenly spread lengths: n times the sequences are n times the tokens, and the same padding.
    batches = [step_rollouts(s | {"sequences": n}, spread=True) for n in s["sequences"]]

    def work():
        seconds, norms = [], []
        for batch in batches:
            before = race.clock(device.type)
            who = state.process_index, state.num_processes, device
            stats = update(model, None, optimizer, batch, args, *who)
            seconds.append(race.clock(device.type) - before)
            norms.append(stats["grad_norm"])
        return {"seconds": seconds, "grad_norm": norms}

    race.timed(work, device.type)


def bench_scale(s: dict) -> dict:
    """Seconds of an update against its tokens, and the straight line through them."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = torch.get_num_threads()
    two = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    two["OMP_NUM_THREADS"] = str(max(1, threads // 2))  # both processes together get what the single one gets
    env = {f"2-{rank}": two | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)}
    enough = race.pick_device() == "cpu" or torch.cuda.device_count() > 1
    with tempfile.TemporaryDirectory() as folder:
        found = race.race("scale", ["1-0", ("2-0", "2-1")][: 1 + enough], s, folder, env)
    batches = [step_rollouts(s | {"sequences": n}, spread=True) for n in s["sequences"]]
    tokens = [sum(len(r["prompt_ids"]) + len(r["ids"]) for r in batch) for batch in batches]
    out, lines = {"tokens": tokens}, []
    for name, f in found.items():
        seconds = np.array(f["seconds"])
        slope, start = np.polyfit(tokens, seconds, 1)
        unexplained = np.sum((seconds - start - slope * np.array(tokens)) ** 2)
        r2 = 1 - unexplained / np.sum((seconds - seconds.mean()) ** 2)
        out[name[0]] = {"seconds": seconds.tolist(), "r2": r2, "tokens_per_second": 1 / slope}
        out[name[0]] |= {"start": start, "grad_norm": f["grad_norm"]}
        lines.append(f"{name[0]} process(es): {start:.3f} s + tokens / {1 / slope:,.0f} per s, R^2 {r2:.4f}")
    head = ["tokens", *(f"{n} process(es), s" for n in out if n != "tokens")]
    times = [out[n]["seconds"] for n in out if n != "tokens"]
    race.print_table(
        head, [[f"{t:,}", *(f"{x:.3f}" for x in xs)] for t, *xs in zip(tokens, *times, strict=True)]
    )
    print("\n".join(lines))
    if enough:
        pairs = zip(out["1"]["grad_norm"], out["2"]["grad_norm"], strict=True)
        out["grad_norm_difference"] = max(abs(a - b) / b for a, b in pairs)
        print(f"gradient norms of 1 and 2 processes differ by {out['grad_norm_difference']:.1e} at most")
    return out


# ------------------------------------------------------------------------------------------------------------
# sampler, verify


def sampler_worker(variant: str, s: dict, folder: str) -> None:
    """Worker: responses to the same prompts, from sampler.py's engine or from a plain vllm.LLM."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, for both
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import sampler

    device, rng = race.pick_device(), np.random.default_rng(0)
    prompts = rng.integers(6, s["vocab"], (s["prompts"], s["prompt"])).tolist()
    limit, rows = s["prompt"] + s["max_tokens"], s["prompts"] * s["group"]
    path, tokenizer, model = os.path.join(folder, "model"), *sampler_model(s)
    if not os.path.exists(path):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    if variant == "ours":
        engine = sampler.make_sampler("vllm", model, path, tokenizer, limit, s["dtype"], 0, 0.3, rows)
    else:
        import vllm

        options = {"gpu_memory_utilization": 0.3} if device == "cuda" else {}
        options |= {"enforce_eager": True} if variant == "bare_eager" else {}
        llm = vllm.LLM(path, dtype=s["dtype"], max_model_len=limit, **options)
        params = vllm.SamplingParams(
            n=s["group"], max_tokens=s["max_tokens"], logprobs=None if variant == "bare" else 0
        )
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]

    def work():
        if variant == "ours":
            groups = engine.generate(prompts, s["group"], s["max_tokens"])
            return {"tokens": sum(len(r["ids"]) for group in groups for r in group)}
        answers = llm.generate(requests, params, use_tqdm=False)
        return {"tokens": sum(len(out.token_ids) for answer in answers for out in answer.outputs)}

    for _ in sys.stdin:
        before = race.clock(device)
        if variant == "ours":
            engine.sync(model)
        after = race.clock(device)
        found = work()
        race.tell(seconds=(race.clock(device) - after) / found["tokens"], sync=after - before, **found)


def sampler_model(s: dict) -> tuple:
    """(tokenizer of the toy, a Llama with random weights of the wanted size)."""
    import torch
    from transformers import LlamaForCausalLM

    from toy import task as toy

    torch.manual_seed(0)
    tokenizer = toy.make_tokenizer()
    config = toy.make_model(tokenizer, 0).config
    heads = s["width"] // (64 if s["width"] > 512 else 32)
    config.update({
        "vocab_size": s["vocab"], "hidden_size": s["width"], "intermediate_size": 4 * s["width"],
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": s["width"] // heads,
        "num_hidden_layers": s["layers"], "max_position_embeddings": s["prompt"] + s["max_tokens"],
    })  # fmt: skip
    return tokenizer, LlamaForCausalLM(config)


def bench_sampler(s: dict) -> dict:
    """Tokens per second of the colocated engine and of a bare one, each in its process."""
    if importlib.util.find_spec("vllm") is None:
        raise BadInput("bench.py sampler needs vllm: see the README and requirements-test.txt")
    variants = ["ours", "bare", "bare_logps"]
    if race.pick_device() == "cpu":
        variants.append("bare_eager")  # as ours: there, compiling takes longer than it saves
    with tempfile.TemporaryDirectory() as folder:
        found = race.race("sampler", variants, s, folder)
    rows = []
    for name, f in found.items():
        f["tokens_per_second"] = 1 / f["seconds"]
        rows.append([name, f"{f['tokens']:,}", f"{1 / f['seconds']:,.0f}"])
        rows[-1].append(f"{found['bare']['seconds'] / f['seconds']:.2f}")
    race.print_table(["sampler", "tokens", "tokens/s", "of bare"], rows)
    print(
        "bare: LLM.generate with vLLM's defaults; bare_logps: with the log-probs that the loss needs; ",
        end="",
    )
    print("bare_eager: and not compiled, as ours on a CPU")
    print(f"ours: the weights are pushed in {found['ours']['sync']:.3f} s")
    return {"variants": found}


def answers_to_check(s: dict) -> tuple[list[str], list[str]]:
    """(responses, references): groups of answers to problems of MATH, about half of them right."""
    with gzip.open(os.path.join(HERE, "tests", "data", "math_train_small.jsonl.gz"), "rt") as f:
        golds = [json.loads(line)["answer"] for line in f]
    rng, responses, references = np.random.default_rng(0), [], []
    for p in range(s["problems"]):
        gold = golds[p % len(golds)]
        wrong = [golds[i] for i in rng.integers(0, len(golds), 3)] + [f"{gold} + 1", f"2({gold})"]
        for _ in range(s["group"]):
            answer = gold if rng.random() < 0.5 else wrong[rng.integers(len(wrong))]
            other = answer.replace("\\dfrac", "\\frac").replace("\\frac", "\\tfrac")
            answer = other if rng.random() < 0.3 else answer
            thought = " ".join(["Let me see: so we get $x$, then wait."] * int(rng.integers(10, 200)))
            responses.append(f"{thought}</think> The answer is $\\boxed{{{answer}}}$.")
            references.append(gold)
    return responses, references


def verify_worker(variant: str, s: dict, folder: str) -> None:
    """Worker: checks the answers."""
    responses, references = answers_to_check(s)

    def ours():
        from verifier import check_answers

        verdicts, counts = check_answers(responses, references, ["math"] * len(responses))
        return {"right": sum(verdicts), "counts": counts}

    def one_by_one():
        from math_verify import parse, verify

        pairs = zip(responses, references, strict=True)
        return {"right": sum(verify(parse(f"${gold}$"), parse(response)) for response, gold in pairs)}

    race.timed(ours if variant == "ours" else one_by_one, "cpu")


def bench_verify(s: dict) -> dict:
    """Answers per second of verifier.check_answers, and of math-verify called for one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        found = race.race("verify", ["ours", "math_verify"], s, folder)
    n, rows = s["problems"] * s["group"], []
    for name, f in found.items():
        f["per_second"] = n / f["seconds"]
        rows.append([name, f"{f['seconds']:.3f}", f"{f['per_second']:,.0f}", str(f["right"])])
    race.print_table(["checker", "seconds", "answers/s", "right"], rows)
    print(f"{n} answers; ours: {found['ours']['counts']}")
    return {"answers": n, "variants": found}


# ------------------------------------------------------------------------------------------------------------
# plan


def bench_plan(s: dict, model: str | None) -> dict:
    """The memory table of plan.py, and how well its formula does on a model that fits here."""
    given = s["budgets"], s["gpus"], s["gpu_gib"], s["longest_prompt"]
    rows = plan.table(plan.load_configs(model), *given)
    cells = [
        [r["model"], f"{r['cap']:,}", f"{r['gpus']}+",
         *(f"{r[k]:.1f}" for k in ("peak_gib", "trainer_gib", "engine_gib")), r["flags"]]
        for r in rows
    ]  # fmt: skip
    race.print_table(["model", "response cap", "GPUs", "peak GiB", "trainer GiB", "vLLM GiB", "flags"], cells)
    print(f"per GPU of {given[2]} GiB, prompts up to {given[3]} tokens; computed, not measured")
    # The check: a small model, on this machine, with and without recomputed activations.
    checks, config = [], step_config(s).to_dict()
    for flags in s["checks"]:
        setting = s | {"train_args": flags}
        with tempfile.TemporaryDirectory() as folder:
            found = race.race("step", ["ours"], setting, folder)["ours"]
        a = step_args(setting)
        how = {"recompute": a.gradient_checkpointing, "optim": a.optim, "param_dtype": a.param_dtype}
        predicted = plan.trainer_bytes(config, a.micro_tokens, a.dtype, **how)
        checks.append({"flags": flags, "predicted": predicted, "measured": found["peak"] - found["imports"]})
        checks[-1]["ratio"] = predicted / checks[-1]["measured"]
    race.print_table(
        ["check on this machine", "predicted MiB", "measured MiB", "ratio"],
        [
            [c["flags"], race.mib(c["predicted"]), race.mib(c["measured"]), f"{c['ratio']:.2f}"]
            for c in checks
        ],
    )
    return {"rows": rows, "checks": checks}


# ------------------------------------------------------------------------------------------------------------
# Command line


COMMANDS = {
    "step": bench_step, "logprobs": bench_logprobs, "padding": bench_padding, "scale": bench_scale,
    "sampler": bench_sampler, "verify": bench_verify, "plan": bench_plan,
}  # fmt: skip


def worker(command: str, variant: str, s: dict, folder: str) -> None:
    """Runs one variant in this process."""
    race.be_worker()
    if command != "scale":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # several visible ones would make TRL refuse
    if command == "step":
        work = {"ours": step_ours, "floor": step_floor}.get(variant, step_trl)
    else:
        workers = {"logprobs": logprobs_worker, "scale": scale_worker, "sampler": sampler_worker}
        work = (workers | {"verify": verify_worker})[command]
    work(variant, s, folder)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Flags, checked."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("bench.py", description=__doc__, **options)
    one_line_errors(parser)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--full", action="store_true", help="the acceptance setting: minutes")
    parser.add_argument("--model", help="plan: folder, hub id, config.json or 0.5B, 1.5B, ... (all these)")
    parser.add_argument("--set", nargs="+", default=[], metavar="K=V", help="change sizes (see SETTINGS)")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> dict:
    """The sizes that the flags and the machine ask for."""
    table = SETTINGS[args.command]
    s = dict(table["small"])
    if args.full:
        s |= table.get("full", {})
    if "cuda" in table and race.pick_device() == "cuda":
        s |= table["cuda"]
    for word in args.set:
        k, _, value = word.partition("=")
        if k not in s or not value:
            raise BadInput(f"--set ({word}) must be K=V with K one of: {', '.join(s)}")
        s[k] = value if isinstance(s[k], str) else json.loads(value)
    return s


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    argv = ["plan" if word == "--plan" else word for word in (sys.argv[1:] if argv is None else argv)]
    if argv[1:2] == ["--worker"]:
        command, _, variant, s, folder = argv
        worker(command, variant, json.loads(s), folder)
        return 0
    try:
        args = parse_args(argv)
        s = settings(args)
        found = bench_plan(s, args.model) if args.command == "plan" else COMMANDS[args.command](s)
    except BadInput as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"command": args.command, "settings": s, "machine": race.machine()} | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
