"""Times and weighs the pieces of the training loop: against the naive version, against TRL 1.16.0.

    python -m scaling.bench step [--full]       one update: ours and TRL's GRPOTrainer
    python -m scaling.bench logprobs            log-probs and their gradient: ours, full logits; by vocabulary
    python -m scaling.bench prompts             one update: each prompt once for its group, or once a response
    python -m scaling.bench padding             share of padded tokens: ours, TRL's; time of to_tensors
    python -m scaling.bench scale               step time against tokens, 1 and 2 processes
    python -m scaling.bench sampler             responses from the trainer's vLLM, from a bare vllm.LLM
    python -m scaling.bench verify              answers checked per second: ours, math-verify one by one
    python -m scaling.bench plan [--model M]    memory: model, cap, GPUs -> peak GiB, the flags it takes

Each prints a table and, last, one JSON line. Without --full the sizes are small: a minute on a laptop.
What is compared runs in processes that take turns; the first turn is a warm-up (see race.py).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import sys
import tempfile

import numpy as np
import torch

from data import BadInput, exit_code, one_line_errors
from scaling import plan
from scaling.race import DEVICE, clock, memory, print_table, race, timed
from studies.others import bench_sampler, bench_verify, trl_worker  # noqa: F401 (main runs bench_*)

TRL = "1.16.0"

# Sizes: the first is the default; the second, of --full (the acceptance setting), replaces what it names.
# On a GPU HALF_B stands for TINY.
TINY = {"layers": 4, "width": 256, "vocab": 32_768, "prompt": 32, "low": 16, "high": 160, "sequences": 16}
TINY |= {"flags": "--dtype float32 --micro-tokens 2048", "rounds": 5}
HALF_B = {"layers": 24, "width": 896, "vocab": 151_936, "prompt": 256, "low": 100, "high": 4000, "rounds": 5}
HALF_B |= {"flags": "--dtype bfloat16", "sequences": 64}
BASE = HALF_B if DEVICE == "cuda" else TINY
ACCEPTED = {"layers": 8, "vocab": 151_936, "sequences": 32, "high": 512} if DEVICE == "cpu" else {}
SETTINGS = {
    "step": (BASE, ACCEPTED),
    "logprobs": ({"vocabs": [32_768, 131_072, 262_144], "tokens": 512, "width": 64, "dtype": "float32",
                  "rounds": 5}, {"tokens": 2048, "width": 256}),
    "prompts": (BASE | {"vocab": 8192, "sequences": 32, "lengths": [[128, 64], [96, 96], [16, 160]]},
                {"vocab": 49_152, "layers": 8}),
    "padding": ({"sequences": 2048, "prompt": 150, "low": 100, "high": 4000, "micro_tokens": 16_384,
                 "vocab": 151_936, "processes": [1, 2, 8], "responses": 128}, {}),
    "scale": (BASE | {"vocab": 8192, "sequences": [4, 8, 16, 32, 64], "rounds": 3},
              {"layers": 8, "vocab": 32_768, "high": 512, "sequences": [2, 4, 8, 16, 32]}),
    "sampler": (BASE | {"vocab": 77, "prompts": 16, "group": 8, "max_tokens": 96}, {"max_tokens": 192}),
    "verify": ({"problems": 16, "group": 16, "rounds": 3}, {"problems": 128}),
    "plan": (TINY | {"budgets": [4096, 16_384], "gpus": [1, 4, 8], "gpu_gib": 80, "longest_prompt": 1024,
                     "rounds": 1, "recipe": "",
                     "checks": ["--micro-tokens 1024", "--micro-tokens 1024 --dtype bfloat16",
                                "--micro-tokens 2048 --gradient-checkpointing --kl-coef 0.1"]}, ACCEPTED),
}  # fmt: skip


# ---- step: the same update by train_grpo.update and by TRL's GRPOTrainer.
#
# Settings in which both are the same mathematics: loss a mean over all response tokens of the batch (TRL's
# default "dapo", ours --loss-reduction token_mean), clip 0.2, no KL, temperature 1, one optimizer step on
# policy (all ratios are 1), AdamW without weight decay, gradient clipped at norm 1, no sampler correction.
# TRL makes its advantages from rewards: their mean is 0 in each group of 8, and scale_rewards is "none".


def make_model(s: dict, kind: str = "Qwen2"):
    """Qwen2 (or Llama) with random weights, the same in every process, and heads of 64 (or 32)."""
    import transformers

    d, heads = s["width"], max(1, s["width"] // (64 if s["width"] >= 256 else 32))
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=s["vocab"], hidden_size=d, intermediate_size=4 * d, num_hidden_layers=s["layers"],
        num_attention_heads=heads, num_key_value_heads=2 if heads % 2 == 0 else 1, tie_word_embeddings=True,
        max_position_embeddings=32_768, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def make_batch(s: dict) -> list[dict]:
    """Random responses of U(low, high) tokens, as train_grpo.update takes them; advantages by groups of 8."""
    rng, batch, n = np.random.default_rng(0), [], s["sequences"]
    advantages = rng.normal(size=(-(-n // 8), 8))
    advantages = (advantages - advantages.mean(1, keepdims=True)).flatten().tolist()
    lengths = rng.integers(s["low"], s["high"] + 1, n).tolist()
    for length, advantage in zip(lengths, advantages, strict=False):
        # Ids from 3 on: TRL's tokenizer needs a few special ones.
        ids, mask = rng.integers(3, s["vocab"], length).astype(np.int32), np.ones(length, np.float32)
        if len(batch) % 8 == 0:
            prompt = rng.integers(3, s["vocab"], s["prompt"]).tolist()
        r = {"prompt_ids": prompt, "ids": ids, "weight": 1.0}
        # nan: no correction for the sampler.
        batch.append(r | {"logps": np.full(length, np.nan, np.float32), "mask": mask, "advantage": advantage})
    return batch


def make_args(s: dict) -> argparse.Namespace:
    """The trainer's flags for this update; those in s["flags"] win."""
    import train_grpo

    flags = f"--lr 1e-6 --tis-cap 0 --max-tokens {s['high']} {s['flags']}"
    return train_grpo.build_parser().parse_args(shlex.split(flags))


def make_trainer(s: dict, folder: str, variant: str) -> tuple:
    """(args, model, reference, optimizer, memory held by libraries before there was a model)

    The gradient that the optimizer's first step is about to use is written to `folder`.
    """
    import train_grpo
    from scaling import model as net

    args, path = make_args(s), os.path.join(folder, f"{variant}.pt")
    args.model = os.path.join(folder, "model")
    make_model({"width": 64, "layers": 1, "vocab": 8})  # loads transformers' Qwen2
    held = memory("VmRSS")
    made = net.build(args, make_model(s).train(), args.kl_coef > 0, train_grpo.DEVICE)

    def save(optimizer, *_):
        if not os.path.exists(path):
            torch.save([p.grad for group in optimizer.param_groups for p in group["params"]], path)

    made[2].register_step_pre_hook(save)
    return args, *made, held


def ours_worker(variant: str, s: dict, folder: str, pipe) -> None:
    import methods
    from scaling import shared_prompt
    from train_grpo import update

    shared_prompt.MOST = {"once": 1.0, "repeated": 0.0}.get(variant, shared_prompt.MOST)
    args, model, reference, optimizer, held = make_trainer(s, folder, variant)
    plain, batch = methods.Method(args, None), make_batch(s)

    def work():
        return {"padding": update(model, reference, optimizer, batch, plain, args)["padding"]}

    timed(work, pipe, held=held)


def difference(variants, folder: str) -> float:
    """|gradient - that of the second variant| / |the second's|."""
    ours, theirs = (torch.load(os.path.join(folder, f"{v}.pt"), map_location="cpu") for v in variants)
    apart = sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return (apart / sum(b.double().square().sum() for b in theirs)).sqrt().item()


def bench_step(s: dict, folder: str) -> dict:
    installed = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None
    if installed != TRL:
        raise BadInput(f"step needs TRL {TRL}, found: {installed}; pip install trl=={TRL}")
    found, rows = race({"ours": ours_worker, "trl": trl_worker}, s, folder), []
    apart = difference(found, folder)
    tokens = sum(len(r["prompt_ids"]) + len(r["ids"]) for r in make_batch(s))
    for name, f in found.items():
        f |= {"speedup": f["seconds"] / found["ours"]["seconds"], "memory": found["ours"]["peak"] / f["peak"]}
        rows.append([name, f"{f['seconds']:.2f}", f"{tokens / f['seconds']:,.0f}", f"{f['speedup']:.2f}"])
        rows[-1] += [f"{f['padding']:.1%}", mib(f["peak"]), mib(f["peak"] - f["held"]), f"{f['memory']:.2f}"]
    head = ["", "seconds", "tokens/s", "ours is faster", "padding", "peak MiB", "- libraries", "ours / it"]
    print_table(head, rows)
    print(f"{tokens:,} tokens; |our gradient - TRL's| / |TRL's| = {apart:.1e}")
    return {"tokens": tokens, "variants": found, "gradient_difference": apart}


def bench_prompts(s: dict, folder: str) -> dict:
    """One update of groups of 8 with each prompt computed once, and with a prompt for every response."""
    out, rows, workers = {}, [], dict.fromkeys(("once", "repeated"), ours_worker)
    for prompt, mean in s["lengths"]:
        at, name = tempfile.mkdtemp(dir=folder), f"{prompt}:{mean}"
        found = race(workers, s | {"prompt": prompt, "low": mean // 2, "high": mean * 3 // 2}, at)
        seconds, peak = ([f[k] for f in found.values()] for k in ("seconds", "peak"))
        out[name] = found | {"gradient_difference": difference(found, at)}
        rows.append([name, *(f"{x:.2f}" for x in (*seconds, seconds[1] / seconds[0])), *map(mib, peak)])
        rows[-1].append(f"{out[name]['gradient_difference']:.1e}")
    head = "prompt:response,once s,repeated s,faster,once MiB,repeated MiB,gradients apart"
    print_table(head.split(","), rows)
    return {"lengths": out}


# ---- logprobs, padding, scale


def logprobs_worker(variant: str, s: dict, folder: str, pipe) -> None:
    """Worker: forward and backward of one version at one vocabulary, from hidden states."""
    from scaling.model import ChunkedHead

    (name, vocab), dtype = variant.split("-"), getattr(torch, s["dtype"])
    torch.manual_seed(0)
    hidden = torch.randn(s["tokens"], s["width"], device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(int(vocab), s["width"], device=DEVICE) / s["width"] ** 0.5
    weight = weight.to(dtype).requires_grad_()
    targets = torch.randint(int(vocab), (s["tokens"],), device=DEVICE)
    advantage = torch.randn(s["tokens"], device=DEVICE)
    # What both versions must hold is not counted: the inputs, and the gradients, which do not exist yet.
    held = memory("VmRSS") + sum(t.numel() * t.element_size() for t in (hidden, weight))

    def work():
        hidden.grad = weight.grad = None
        if name == "ours":
            head, found = ChunkedHead(hidden, weight, 1.0), []
            for part in head.parts():
                found.append(head.logps(part, targets[part])[0])
                head.backward(part, targets[part], advantage[part])
            head.finish()
            logp = torch.cat(found)
        else:
            logp = (hidden @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            (logp * advantage).sum().backward()
        norm = torch.linalg.vector_norm(weight.grad, dtype=torch.float32)
        return {"check": [logp.sum().item(), norm.item()]}

    timed(work, pipe, held=held)


def bench_logprobs(s: dict, folder: str) -> dict:
    out, rows = {}, []
    for vocab in s["vocabs"]:
        found = race(dict.fromkeys((f"ours-{vocab}", f"full-{vocab}"), logprobs_worker), s, folder)
        ours, full = found.values()
        apart = max(abs(a / b - 1) for a, b in zip(ours["check"], full["check"], strict=True))
        out[vocab] = {"ours": ours, "full": full, "difference": apart}
        rows.append([f"{vocab:,}", f"{ours['seconds']:.3f}", f"{full['seconds']:.3f}"])
        rows[-1] += [mib(ours["peak"] - ours["held"]), mib(full["peak"] - full["held"]), f"{apart:.1e}"]
    print_table(["vocabulary", "ours s", "full s", "ours MiB", "full MiB", "difference"], rows)
    print(f"{s['tokens']} tokens, width {s['width']}, forward + backward; MiB above inputs and gradients")
    return {"vocabs": out}


def bench_padding(s: dict, folder: str) -> dict:
    """Padded tokens of one batch: our micro-batches on each process, and TRL's. The time of to_tensors."""
    import train_grpo

    batch, found, times = make_batch(s), {}, []
    real = sum(map(train_grpo.size, batch))
    for processes in s["processes"]:
        padded = []
        for train_grpo.WORLD, train_grpo.RANK in [(processes, rank) for rank in range(processes)]:
            micros = train_grpo.micro_batches(batch, s["micro_tokens"])
            padded.append(sum(len(m) * max(map(train_grpo.size, m)) for m in micros))
        found[f"ours, {processes} process(es)"] = 1 - real / sum(padded)
    train_grpo.WORLD, train_grpo.RANK = 1, 0
    # TRL pads responses to the longest one of the whole batch, then cuts it into parts of 8.
    found[f"trl {TRL}"] = 1 - real / len(batch) / max(map(train_grpo.size, batch))
    print_table(["batching", "padded"], [[name, f"{share:.2%}"] for name, share in found.items()])
    batch = batch[: s["responses"]]
    for _ in range(5):
        before = clock()
        for micro in train_grpo.micro_batches(batch, s["micro_tokens"]):
            train_grpo.to_tensors(micro)
        times.append((clock() - before) / sum(map(train_grpo.size, batch)) * 1e6)
    print(f"to_tensors: {np.median(times):.3f} microseconds a token, of {len(batch)} responses")
    return {"padding": found, "to_tensors": float(np.median(times))}


def scale_worker(s: dict, folder: str, threads: int) -> dict:
    """One process of 1 or 2: updates at each batch size, in turns."""
    torch.set_num_threads(threads)
    from accelerate import PartialState

    import methods
    import train_grpo

    state = PartialState(cpu=DEVICE == "cpu")
    args, model, _, optimizer, _ = make_trainer(s, folder, f"scale-{state.num_processes}")
    # All of the mean length: n times the sequences are n times the tokens.
    mean = (s["low"] + s["high"]) // 2
    batches = [make_batch(s | {"sequences": n, "low": mean, "high": mean}) for n in s["sequences"]]
    plain, turns = methods.Method(args, None), []
    for _ in range(1 + s["rounds"]):
        seconds, norms = [], []
        for batch in batches:
            before = clock()
            norms.append(train_grpo.update(model, None, optimizer, batch, plain, args)["grad_norm"])
            seconds.append(clock() - before)
        turns.append(seconds)
    if state.num_processes > 1:
        state.destroy_process_group()
    tokens = [sum(map(train_grpo.size, batch)) for batch in batches]
    return {"tokens": tokens, "seconds": np.median(turns[1:], axis=0).tolist(), "grad_norm": norms}


def bench_scale(s: dict, folder: str) -> dict:
    """Seconds of an update against its tokens, and the straight line through them."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    out, rows, threads = {}, [], torch.get_num_threads()
    where = {"run_id": "scale", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
    for n in (1, 2) if DEVICE == "cpu" or torch.cuda.device_count() > 1 else (1,):
        # All processes together get the threads that a single one gets.
        launch = elastic_launch(LaunchConfig(1, 1, n, **where), scale_worker)
        found = out[n] = launch(s, folder, max(1, threads // n))[0]
        slope, start = np.polyfit(found["tokens"], found["seconds"], 1)
        found["r2"] = float(np.corrcoef(found["tokens"], found["seconds"])[0, 1] ** 2)
        rows.append([n, *(f"{x:.3f}" for x in found["seconds"]), f"{1 / slope:,.0f}", f"{found['r2']:.4f}"])
    print_table(["processes", *(f"{t:,} tokens" for t in out[1]["tokens"]), "tokens/s", "R^2"], rows)
    norms = [found["grad_norm"] for found in out.values()]
    return out | {"grad_norm_difference": float(np.max(np.abs(np.array(norms) / norms[0] - 1)))}


# ---- plan


def bench_plan(s: dict, folder: str) -> dict:
    """The memory table of plan.py, and how well its formula does on a model that fits here."""
    configs = plan.load_configs(s["model"])
    if s["recipe"]:
        import train_grpo

        args = train_grpo.build_parser().parse_args([f"@recipes/{s['recipe']}.args"])
        given = args, s["gpus"][0], s["gpu_gib"], s["longest_prompt"]
        rows = [plan.of_flags(c, *given) for c in configs.values()]
        cells = [[name, *(f"{r[k]:.1f}" for k in ("trainer_gib", "engine_gib", "peak_gib")), r["fits"]]
                 for name, r in zip(configs, rows, strict=True)]  # fmt: skip
        print_table(["model", "trainer, GiB", "engine, GiB", "peak, GiB", f"fits {s['gpu_gib']}"], cells)
        return {"rows": rows}
    rows = plan.table(configs, s["budgets"], s["gpus"], s["gpu_gib"], s["longest_prompt"])
    print(plan.markdown(rows))
    print(f"per GPU of {s['gpu_gib']} GiB, prompts of {s['longest_prompt']} tokens; computed, not measured")
    tiny, checks, told = make_model(s), [], []
    tiny.save_pretrained(os.path.join(folder, "model"))
    # The C library hands back what is freed, so that what is held can be seen. (A GPU's allocator says it.)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for flags in s["checks"]:  # a small model, on this machine
        setting = s | {"flags": f"{s['flags']} {flags}"}
        found, a = race({"ours": ours_worker}, setting, folder)["ours"], make_args(setting)
        how = {"optim": a.optim, "shards": 1, "lora": a.lora, "recompute": a.gradient_checkpointing}
        how["reference"], measured = a.kl_coef > 0, found["peak"] - found["held"]
        predicted = plan.trainer_bytes(tiny.config.to_dict(), a.micro_tokens, a.dtype, how, DEVICE == "cuda")
        ratio = predicted / measured
        checks.append({"flags": flags, "predicted": predicted, "measured": measured, "ratio": ratio})
        told.append([flags, mib(predicted), mib(measured), f"{ratio:.2f}"])
    print_table(["check on this machine", "predicted MiB", "measured MiB", "ratio"], told)
    return {"rows": rows, "checks": checks}


# ---- Command line


def mib(n: float) -> str:
    return f"{n / 2**20:,.0f}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = one_line_errors(argparse.ArgumentParser("scaling.bench", description=__doc__, **options))
    parser.add_argument("command", choices=SETTINGS)
    parser.add_argument("--full", action="store_true", help="the acceptance setting: minutes")
    parser.add_argument("--model", help="plan: folder, hub id or 0.5B, 1.5B, ... (default: all these)")
    parser.add_argument("--set", nargs="+", default=[], metavar="K=V", help="change sizes (see SETTINGS)")
    return parser.parse_args(argv)


@exit_code("scaling.bench")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    small, full = SETTINGS[args.command]
    s = small | (full if args.full else {}) | ({"model": args.model} if args.command == "plan" else {})
    for word in args.set:
        k, _, value = word.partition("=")
        if k not in s or not value:
            raise BadInput(f"--set ({word}) must be K=V with K one of: {', '.join(s)}")
        s[k] = value if isinstance(s[k], str) else json.loads(value)
    with tempfile.TemporaryDirectory() as folder:
        found = globals()[f"bench_{args.command}"](s, folder)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({"command": args.command, "settings": s, "device": device} | found))


if __name__ == "__main__":
    sys.exit(main())
