"""Times and weighs the pieces of the training loop: against the naive version, against TRL 1.16.0.

    python bench.py step [--full]       one update: ours, TRL's GRPOTrainer, the machine's own matmul rate
    python bench.py logprobs            log-probs and their gradient: ours, full logits; by vocabulary

Each prints a table and, last, one JSON line. Without --full the sizes are small: a minute on a laptop.
Every variant runs in a process of its own, which is what its peak memory is measured in; the processes take
turns (A B A B ...), so that a machine that slows down slows all of them down. The first turn is a warm-up.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from data import BadInput, one_line_errors

TRL = "1.16.0"

# Sizes: CPU default, CPU with --full (the acceptance setting), CUDA (with or without --full). The first
# alternatives of a key are the defaults, the later ones replace what they name.
SETTINGS = {
    "step": {
        "small": {
            "layers": 4, "width": 256, "vocab": 32_768, "sequences": 16, "prompt": 32, "low": 16, "high": 160,
            "dtype": "float32", "rounds": 5, "train_args": "--micro-tokens 2048",
        },
        "full": {"layers": 8, "vocab": 151_936, "sequences": 32, "high": 512},
        "cuda": {
            "layers": 24, "width": 896, "vocab": 151_936, "sequences": 64, "prompt": 256, "low": 100,
            "high": 4000, "dtype": "bfloat16", "train_args": "--micro-tokens 16384",
        },
    },
    "logprobs": {
        "small": {
            "vocabs": [32_768, 65_536, 131_072, 262_144], "tokens": 512, "width": 64, "rounds": 5,
            "dtype": "float32",
        },
        "full": {"tokens": 2048, "width": 256},
        "cuda": {"tokens": 8192, "width": 1536, "dtype": "bfloat16"},
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Processes that take turns. A worker reads a line per turn from stdin and answers with one JSON line.


def start(command: str, variant: str, s: dict, folder: str, env: dict | None = None) -> subprocess.Popen:
    """A worker process for one variant; its error messages go to a file in `folder`."""
    words = [sys.executable, os.path.abspath(__file__), command, "--worker", variant, json.dumps(s), folder]
    with open(os.path.join(folder, f"{variant}.log"), "a") as log:
        worker = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | (env or {}),
        )  # fmt: skip
    worker.name = variant
    return worker


def turn(worker: subprocess.Popen, folder: str) -> dict:
    """Lets the worker take one turn; what it measured."""
    try:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it died: its last words are in the log
    line = worker.stdout.readline()
    if not line:
        with open(os.path.join(folder, f"{worker.name}.log")) as log:
            words = [w for w in log.read().splitlines() if w.strip()]
        raise SystemExit(
            f"bench.py: error: {worker.name} died (exit code {worker.wait()}): {words[-1:] or 'no word'}"
        )
    return json.loads(line)


def race(command: str, variants: list[str], s: dict, folder: str, rounds: int | None = None) -> dict:
    """Turns A B A B ... of the variants; {variant: last report, "seconds": median, "all": every turn's}."""
    workers, rounds = [start(command, variant, s, folder) for variant in variants], rounds or s["rounds"]
    try:
        for worker in workers:
            turn(worker, folder)  # loads, allocates, and warms up: not counted
        reports = {w.name: [] for w in workers}
        for _ in range(rounds):
            for worker in workers:
                reports[worker.name].append(turn(worker, folder))
    finally:
        for worker in workers:
            worker.stdin.close()
        for worker in workers:
            worker.wait()
    times = {name: [r["seconds"] for r in found] for name, found in reports.items()}
    return {n: f[-1] | {"seconds": statistics.median(times[n]), "all": times[n]} for n, f in reports.items()}


def tell(**report) -> None:
    """The worker's answer to a turn."""
    print(json.dumps(report), file=ANSWERS, flush=True)


ANSWERS = sys.stdout


def timed(work, device: str, **extra) -> None:
    """A worker's loop: for every turn does `work()` and tells seconds and peak memory (see `peak_bytes`)."""
    for _ in sys.stdin:
        before = clock(device)
        found = work() or {}
        tell(seconds=clock(device) - before, peak=peak_bytes(device), **extra, **found)


def clock(device: str) -> float:
    """Seconds, after all that was started on the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def pick_device() -> str:
    """cuda where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def status_bytes(name: str) -> int:
    """VmRSS (resident now) or VmHWM (most ever) of this process, bytes."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))
    except OSError:  # no Linux. (There, ru_maxrss would include what the parent held when it started us.)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(device: str) -> int:
    """Most memory so far: allocated on the GPU, or resident, the imported libraries included."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def held_bytes(device: str) -> int:
    """Memory held now; called after the imports it is the part that is not the variant's own."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return status_bytes("VmRSS")


# ------------------------------------------------------------------------------------------------------------
# step: the same update by train_grpo.update and by TRL's GRPOTrainer.
#
# Settings in which both are the same mathematics: loss a mean over all response tokens of the batch (TRL's
# default "dapo", ours --loss-reduction token_mean), clip 0.2, no KL, temperature 1, one optimizer step on
# policy (all ratios are 1), AdamW without weight decay, gradient clipped at norm 1, no sampler correction.
# TRL makes its advantages from rewards: their mean is 0 in each group of 8, and scale_rewards is "none".


def step_config(s: dict):
    """Qwen2 with heads of 64; 8 layers of width 256 have 7.9M parameters beside the (tied) embedding."""
    from transformers import Qwen2Config

    d, heads = s["width"], max(1, s["width"] // 64)
    return Qwen2Config(
        vocab_size=s["vocab"], hidden_size=d, intermediate_size=4 * d, num_hidden_layers=s["layers"],
        num_attention_heads=heads, num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=32_768, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def step_model(s: dict):
    """The model with random weights, the same in every process."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(step_config(s))


def step_rollouts(s: dict) -> list[dict]:
    """Random responses of U(low, high) tokens, as train_grpo.update takes them; advantages by groups of 8."""
    rng = np.random.default_rng(0)
    advantages = rng.normal(size=(-(-s["sequences"] // 8), 8))
    advantages = (advantages - advantages.mean(1, keepdims=True)).flatten()
    batch = []
    for i in range(s["sequences"]):
        # Ids from 3 on: TRL's tokenizer needs a few special ones.
        prompt = rng.integers(3, s["vocab"], s["prompt"]).tolist()
        ids = rng.integers(3, s["vocab"], rng.integers(s["low"], s["high"] + 1)).tolist()
        # nan is the trainer's word for "the sampler gave no log-prob": no correction.
        r = {"prompt_ids": prompt, "ids": ids, "logps": [float("nan")] * len(ids), "group": i // 8}
        batch.append(r | {"advantage": float(advantages[i]), "correct": 0.0, "truncated": 0.0})
    return batch


def step_args(s: dict):
    """The trainer's flags for this update; those in s["train_args"] win."""
    import train_grpo

    flags = "--loss-reduction token_mean --minibatches 1 --clip-low 0.2 --clip-high 0.2 --tis-cap 0"
    flags += f" --kl-coef 0 --temperature 1 --grad-clip 1 --lr 1e-6 --max-tokens {s['high']}"
    flags += f" --dtype {s['dtype']} {s['train_args']}"
    return train_grpo.build_parser().parse_args(shlex.split(flags))


def step_imports(device: str) -> int:
    """Memory held once all libraries are loaded: what both sides hold before they have a model."""
    import losses  # noqa: F401

    step_model({"width": 64, "layers": 1, "vocab": 8})  # loads transformers' Qwen2
    return held_bytes(device)


def save_gradient(optimizer, path: str) -> None:
    """Writes the gradient that the optimizer's first step is about to use."""
    import torch

    def save(optimizer, args, kwargs):
        if not os.path.exists(path):
            torch.save([p.grad for group in optimizer.param_groups for p in group["params"]], path)

    optimizer.register_step_pre_hook(save)


def step_ours(s: dict, folder: str) -> None:
    """Worker: train_grpo.update."""
    import train_grpo

    device, batch, args = pick_device(), step_rollouts(s), step_args(s)
    imports = step_imports(device)
    model = step_model(s).to(device).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = train_grpo.make_optimizer(model, args)
    save_gradient(optimizer, os.path.join(folder, "ours.pt"))

    def work():
        stats = train_grpo.update(model, None, optimizer, batch, args, device=device)
        return {"padding": stats["padding"], "grad_norm": stats["grad_norm"]}

    timed(work, device, imports=imports)


def step_trl(s: dict, folder: str, variant: str) -> None:
    """Worker: TRL's trainer itself; only the generation is replaced, through its own `rollout_func`."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # about rollout_func
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import train_grpo

    device, batch, groups = pick_device(), step_rollouts(s), s["sequences"] // 8
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "prompt": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    imports = step_imports(device)
    model = step_model(s).to(device)
    optimizer = train_grpo.make_optimizer(model, step_args(s))
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
            self.began = clock(device)

        def on_step_end(self, args, state, control, **kwargs):  # after the optimizer's step
            seconds = clock(device) - self.began
            tell(seconds=seconds, peak=peak_bytes(device), imports=imports, padding=padding())

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


def step_flops(config, batch: list[dict]) -> list[tuple]:
    """[(kind, in, out, FLOPs)] of one update without any waste: no padding, nothing computed twice.

    A matrix [in, out] costs 2 in out per token forward, as much for the gradient of its input and again for
    its own: 6 in out. The layers see the tokens of prompts and responses, the head only responses (d -> V).
    Attention: q k^T and p v cost 2 * 2 * (heads * head_dim) per pair of positions, L^2 / 2 pairs a sequence,
    and twice that backward: 6 (heads * head_dim) L^2. Softmax, norms, embedding, AdamW: not counted.
    """
    c, d = config, config.hidden_size
    head_dim = d // c.num_attention_heads
    kv = c.num_key_value_heads * head_dim
    lengths = [len(r["prompt_ids"]) + len(r["ids"]) for r in batch]
    tokens, responses = sum(lengths), sum(len(r["ids"]) for r in batch)
    wide = c.intermediate_size
    shapes = [(d, d, 2), (d, kv, 2), (d, wide, 2), (wide, d, 1)]  # q and o; k and v; gate and up; down
    parts = [("linear", i, o, 6 * i * o * n * c.num_hidden_layers * tokens) for i, o, n in shapes]
    parts.append(("linear", d, c.vocab_size, 6 * d * c.vocab_size * responses))
    squares = sum(length**2 for length in lengths)
    parts.append(("attention", c.num_attention_heads, head_dim, 6 * d * squares * c.num_hidden_layers))
    return parts


def step_floor(s: dict) -> None:
    """Worker: seconds of the update's matrix products at this machine's best rate for their shapes."""
    import torch

    device, batch = pick_device(), step_rollouts(s)
    dtype = getattr(torch, s["dtype"])
    parts = step_flops(step_config(s), batch)
    length = int(np.mean([len(r["prompt_ids"]) + len(r["ids"]) for r in batch]))

    def rate(flops, product):  # FLOP/s, best of 3
        best = float("inf")
        for _ in range(3):
            before = clock(device)
            product()
            best = min(best, clock(device) - before)
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
        tell(
            seconds=sum(part[3] / r for part, r in zip(parts, rates, strict=True)),
            flops=sum(part[3] for part in parts), rates=rates, shapes=[part[:3] for part in parts],
        )  # fmt: skip


def bench_step(s: dict) -> dict:
    """One update, ours against TRL's, and the floor that the machine's matrix products set."""
    import importlib.util
    from importlib.metadata import version

    if importlib.util.find_spec("trl") is None or version("trl") != TRL:
        raise BadInput(f"bench.py step compares with TRL: pip install trl=={TRL}")
    if s["sequences"] % 8:
        raise BadInput(f"sequences ({s['sequences']}) must be a multiple of 8, TRL's sequences per device")
    variants = ["ours", "trl", "trl_no_recompute"]
    if pick_device() == "cuda" and importlib.util.find_spec("liger_kernel"):
        variants.append("trl_liger")
    with tempfile.TemporaryDirectory() as folder:
        found = race("step", [*variants, "floor"], s, folder)
        gradients = {v: gradient_distance(folder, v) for v in variants[1:]}
    tokens = sum(len(r["prompt_ids"]) + len(r["ids"]) for r in step_rollouts(s))
    floor, ours = found["floor"], found["ours"]
    rows = []
    for v in variants:
        f = found[v]
        f |= {"net": f["peak"] - f["imports"], "tokens_per_second": tokens / f["seconds"]}
        f |= {"speedup": f["seconds"] / ours["seconds"], "floor_share": floor["seconds"] / f["seconds"]}
        f["gradient_difference"] = gradients.get(v, 0.0)
        rows.append(
            [v, f"{f['seconds']:.2f}", f"{f['tokens_per_second']:,.0f}", f"{f['speedup']:.2f}",
             f"{f['floor_share']:.0%}", f"{f['padding']:.1%}", mib(f["peak"]), mib(f["net"]),
             f"{ours['net'] / f['net']:.2f}", f"{ours['peak'] / f['peak']:.2f}", f"{gradients.get(v, 0):.1e}"]
        )  # fmt: skip
    head = ["variant", "seconds", "tokens/s", "x ours", "of floor", "padding", "peak MiB", "net MiB"]
    head += ["ours / net", "ours / peak", "gradient"]
    print_table(head, rows)
    for (kind, a, b), r in zip(floor["shapes"], floor["rates"], strict=True):
        print(f"  {kind} {a} x {b}: {r / 1e9:,.0f} GFLOP/s")
    print(
        f"floor: {floor['flops'] / 1e12:.3f} TFLOP of products at these rates: {floor['seconds']:.2f} s "
        f"for {tokens:,} tokens; net: above the imported libraries; trl: its defaults, with recomputed "
        f"activations; trl_no_recompute: without; gradient: |ours - it| / |it|"
    )
    return {"tokens": tokens, "variants": found}


def gradient_distance(folder: str, variant: str) -> float:
    """|ours - theirs| / |theirs| over all parameters, of the first update."""
    import torch

    files = [os.path.join(folder, f"{v}.pt") for v in ("ours", variant)]
    ours, theirs = (torch.load(path, map_location="cpu", weights_only=True) for path in files)
    apart = sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return (apart / sum(b.double().square().sum() for b in theirs)).sqrt().item()


# ------------------------------------------------------------------------------------------------------------
# logprobs: values and gradients of log-probs from hidden states


def full_logps(hidden, weight, targets, temperature: float = 1.0):
    """The naive version: all logits [T, V] at once; log-probs and entropies [T]."""
    import torch

    logps = ((hidden @ weight.T).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropy


def logprobs_worker(s: dict, variant: str) -> None:
    """Worker: forward and backward of one version at one vocabulary."""
    import torch

    from losses import token_logps

    device, (name, vocab) = pick_device(), variant.split("-")
    torch.manual_seed(0)
    vocab, dtype, compute = int(vocab), getattr(torch, s["dtype"]), {"ours": token_logps, "full": full_logps}
    hidden = torch.randn(s["tokens"], s["width"], device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, s["width"], device=device) / s["width"] ** 0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (s["tokens"],), device=device)
    advantage = torch.randn(s["tokens"], device=device)
    # What both versions must hold is not counted: the inputs, and the gradients, which do not exist yet.
    held = held_bytes(device) + sum(t.numel() * t.element_size() for t in (hidden, weight))

    def work():
        hidden.grad = weight.grad = None
        logp, entropy = compute[name](hidden, weight, targets, 1.0)
        (logp * advantage).sum().backward()
        return {"check": [logp.sum().item(), entropy.sum().item(), weight.grad.float().norm().item()]}

    timed(work, device, held=held)


def bench_logprobs(s: dict) -> dict:
    """Time and working memory of both versions for each vocabulary."""
    found, rows = {}, []
    for vocab in s["vocabs"]:
        with tempfile.TemporaryDirectory() as folder:
            pair = race("logprobs", [f"ours-{vocab}", f"full-{vocab}"], s, folder)
        ours, full = (pair[f"{name}-{vocab}"] for name in ("ours", "full"))
        for f in (ours, full):
            f["working"] = f["peak"] - f["held"]
        pairs = zip(ours["check"], full["check"], strict=True)
        difference = max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)
        found[vocab] = {"ours": ours, "full": full, "difference": difference}
        rows.append(
            [f"{vocab:,}", f"{ours['seconds']:.3f}", f"{full['seconds']:.3f}",
             f"{ours['seconds'] / full['seconds']:.2f}", mib(ours["working"]), mib(full["working"]),
             f"{difference:.1e}"]
        )  # fmt: skip
    print_table(["vocabulary", "ours s", "full s", "ratio", "ours MiB", "full MiB", "difference"], rows)
    working = [f["ours"]["working"] for f in found.values()]
    print(
        f"{s['tokens']} tokens, width {s['width']}, forward + backward; MiB above inputs and gradients; "
        f"ours, most / least over the vocabularies: {max(working) / max(min(working), 1):.2f}"
    )
    return {"vocabs": found, "memory_spread": max(working) / max(min(working), 1)}


# ------------------------------------------------------------------------------------------------------------
# Command line


def mib(n: float) -> str:
    """Bytes as MiB."""
    return f"{n / 2**20:,.0f}"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        first, *rest = (str(cell) for cell in row)
        cells = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def machine() -> dict:
    """What the figures were measured on."""
    import torch
    import transformers

    threads = f"{torch.get_num_threads()} CPU threads"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


COMMANDS = {"step": bench_step, "logprobs": bench_logprobs}


def worker(command: str, variant: str, s: dict, folder: str) -> None:
    """Runs one variant in this process; stdout belongs to the answers, all other words go to stderr."""
    global ANSWERS
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if command == "logprobs":
        logprobs_worker(s, variant)
    elif variant == "ours":
        step_ours(s, folder)
    elif variant == "floor":
        step_floor(s)
    else:
        step_trl(s, folder, variant)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Flags, checked."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("bench.py", description=__doc__, **options)
    one_line_errors(parser)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--full", action="store_true", help="the acceptance setting: minutes")
    parser.add_argument("--set", nargs="+", default=[], metavar="K=V", help="change sizes (see SETTINGS)")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace) -> dict:
    """The sizes that the flags and the machine ask for."""
    table = SETTINGS[args.command]
    s = dict(table["small"])
    if args.full:
        s |= table.get("full", {})
    if "cuda" in table and pick_device() == "cuda":
        s |= table["cuda"]
    for word in args.set:
        k, _, value = word.partition("=")
        if k not in s or not value:
            raise BadInput(f"--set ({word}) must be K=V with K one of: {', '.join(s)}")
        s[k] = value if isinstance(s[k], str) else json.loads(value)
    return s


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[1:2] == ["--worker"]:
        command, _, variant, s, folder = argv
        worker(command, variant, json.loads(s), folder)
        return 0
    try:
        args = parse_args(argv)
        s = settings(args)
        found = COMMANDS[args.command](s)
    except BadInput as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"command": args.command, "settings": s, "machine": machine()} | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
