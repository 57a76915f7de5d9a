"""Edits of finished checkpoints and selection of samples.

    python -m evaluation.baselines merge --base A --tuned B --out C
    python -m evaluation.baselines thinkedit --model A --samples out/eval/samples.jsonl --out C --heads 20
    python -m evaluation.baselines tops --samples out/eval/samples.jsonl --out rows.jsonl

merge      keeps the largest updates of a trained model (DLER)
thinkedit  edits the attention heads that write "think shortly" (ThinkEdit)
tops       the shortest right answers as rows for supervised training (TOPS)
"""

import argparse
import os
from collections.abc import Callable

import data
from data import BadInput
from evaluate import pick_wording
from evaluation.samples import check_writable, read_samples, write_json

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # the same parts under the same names


def add_commands(command: Callable) -> None:
    """The flags; command(function, text) makes a command and returns its add_argument."""
    add = command(merge, "DLER: base + scale x the largest updates of the tuned model")
    add("--base", required=True, help="folder of the model before training")
    add("--tuned", required=True, help="folder of the model after training")
    add("--out", required=True, help="folder to write")
    add("--keep", type=float, default=0.25, help="share of the weights that keep their update (default 0.25)")
    add("--scale", type=float, default=0.7, help="factor on the kept updates (default 0.7)")

    add = command(thinkedit, "ThinkEdit: no head writes the direction of short thinking any more")
    add("--model", required=True, help="model folder or hub id")
    add("--samples", required=True, help="samples (.jsonl, .jsonl.gz) of this model, by evaluate.py")
    add("--out", required=True, help="folder to write")
    add("--heads", type=int, default=20, help="heads to edit (paper: 20 at 1.5B, 40 at 8B, 160 at 32B)")
    add("--long", type=int, default=1000, help="thinking of more tokens than this is long (default 1000)")
    add("--short", type=int, default=100, help="thinking of fewer tokens than this is short (default 100)")

    add = command(tops, "TOPS: the shortest right response of every problem, as supervised rows")
    add("--samples", required=True, help="samples (.jsonl, .jsonl.gz) at several budgets or efforts")
    add("--out", required=True, help="file to write: .jsonl, .jsonl.gz or .parquet")


def check_new(folder: str) -> None:
    """BadInput, before a model is loaded, where a new folder cannot be made."""
    check_writable(folder)
    if os.path.exists(folder):
        raise BadInput(f"--out {folder} exists: name a new folder")


def merge(args: argparse.Namespace) -> None:
    """base + scale * (the share `keep` of the largest updates of `tuned`, zero elsewhere); DLER (2510.15110).

    The largest are found over all weights together; what equals the smallest of them is kept too.
    """
    import torch

    check_new(args.out)
    if not 0 <= args.keep <= 1:
        raise BadInput(f"--keep ({args.keep}) is a share from 0 to 1")
    base = data.load_pretrained(args.base, "AutoModelForCausalLM", "--base")
    tuned = data.load_pretrained(args.tuned, "AutoModelForCausalLM", "--tuned")
    before, after = (dict(model.named_parameters()) for model in (base, tuned))
    if {name: p.shape for name, p in before.items()} != {name: p.shape for name, p in after.items()}:
        raise BadInput(f"--base {args.base} and --tuned {args.tuned} are different models")
    # Four bytes a weight; sorted only as far as the threshold needs.
    updates = [(after[k].detach().float() - before[k].detach().float()).abs().flatten() for k in after]
    updates = torch.cat(updates).numpy()
    total, count, kept = len(updates), round(args.keep * len(updates)), 0
    updates.partition(total - max(count, 1))
    threshold = float(updates[total - count]) if count else float("inf")
    with torch.no_grad():
        for name, p in after.items():
            x, y = before[name].float(), p.float()
            chosen = ((y - x).abs() >= threshold) & (x != y)  # what did not move is no update
            # lerp gives exactly y at scale 1, where x + (y - x) may be off by a rounding.
            p.copy_(torch.where(chosen, torch.lerp(x, y, args.scale), x))
            kept += int(chosen.sum())
    tuned.save_pretrained(args.out)
    data.load_tokenizer(args.tuned).save_pretrained(args.out)
    print(f"merge: {kept} of {total} updates kept ({kept / total:.1%}); written to {args.out}")


def thinking_means(model, groups: tuple[list, list]) -> tuple:
    """Means over thinking tokens, then over samples: residuals [2, layers, d] of long and short responses
    behind the attention, and the heads' outputs before W_o on the short ones [layers, heads x d_head].
    `groups`: (long, short), each [(ids of prompt and thinking, where the thinking starts)]."""
    import torch

    seen, means = [], []
    # In the order of a forward pass: what goes into W_o, then the residual behind it.
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.post_attention_layernorm):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].float()))
    for group in groups:
        sums = [0, 0]
        for ids, start in group:
            seen.clear()
            with torch.no_grad():
                model.model(torch.tensor([ids], device=model.device))
            # The positions that predict the thinking tokens, as in the official code.
            found = [x[start - 1 : len(ids) - 1].mean(0) for x in seen]
            sums = [old + torch.stack(found[i::2]) / len(group) for i, old in enumerate(sums)]
        means.append(sums)
    return torch.stack([residuals for _, residuals in means]), means[1][0]


def remove_direction(weight, direction):
    """W - (W v) v^T for the unit vector v along `direction`; W is [d_head, d], its columns the output."""
    v = direction / direction.norm()
    return weight - (weight @ v)[:, None] * v


def edit_heads(model, groups: tuple[list, list], heads: int) -> list[tuple[int, int, float]]:
    """Edits `model`: the `heads` attention heads that write most of "think shortly" no longer write it.

    ThinkEdit (2503.22048): v of a layer is the unit vector from long to short thinking; a head's contribution
    is its mean output along v on the short responses. Returns (layer, head, contribution), largest first.
    """
    import torch

    residuals, outputs = thinking_means(model, groups)
    short = torch.nn.functional.normalize(residuals[1] - residuals[0], dim=-1)
    projections = [layer.self_attn.o_proj.weight for layer in model.model.layers]  # [d, heads x d_head]
    n = model.config.num_attention_heads
    by_width = [(v @ w.float()) * z for v, w, z in zip(short, projections, outputs, strict=True)]
    values, places = torch.stack(by_width).view(len(projections) * n, -1).sum(1).topk(heads)
    chosen = [(i // n, i % n, value) for value, i in zip(values.tolist(), places.tolist(), strict=True)]
    with torch.no_grad():
        for layer, head, _ in chosen:
            part = projections[layer].view(len(short[layer]), n, -1)[:, head]
            part.copy_(remove_direction(part.T.float(), short[layer]).T)
    return chosen


def thinkedit(args: argparse.Namespace) -> None:
    """Load, edit, save; thinkedit.json in the new folder says which heads were edited."""
    check_new(args.out)
    for name, least in {"heads": 1, "long": 0, "short": 1}.items():
        if getattr(args, name) < least:
            raise BadInput(f"--{name} ({getattr(args, name)}) must be {least} or more")
    if args.short > args.long:
        raise BadInput(f"--short ({args.short}) must not be above --long ({args.long})")
    tokenizer, groups = data.load_tokenizer(args.model), ([], [])
    for sample in read_samples(args.samples, ("id", "problem", "prompt", "response")):
        thinking, closed, _ = sample["response"].partition("</think>")
        ids = tokenizer.encode(thinking, add_special_tokens=False)
        if closed and ids and not args.short <= len(ids) <= args.long:  # what never ended has no length
            prompt = data.encode_prompt(tokenizer, sample["prompt"])
            groups[len(ids) < args.short].append((prompt + ids, len(prompt)))
    n_long, n_short = map(len, groups)
    if not n_long or not n_short:
        found = f"{n_long} thoughts longer than {args.long} tokens, {n_short} shorter than {args.short}"
        raise BadInput(f"--samples {args.samples} has {found}; both are needed: see --long and --short")
    config = data.load_config(args.model)
    if config.model_type not in ARCHITECTURES:
        raise BadInput(f"--model is a {config.model_type}: heads are known of {', '.join(ARCHITECTURES)}")
    import torch

    model = data.load_pretrained(args.model, "AutoModelForCausalLM", "--model")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    edited = edit_heads(model, groups, args.heads)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    about = {"model": args.model, "long": n_long, "short": n_short, "layer_head_contribution": edited}
    write_json(os.path.join(args.out, "thinkedit.json"), about)
    print(f"thinkedit: {n_long} long, {n_short} short responses; {len(edited)} heads edited")


def tops(args: argparse.Namespace) -> None:
    """Of every problem the shortest right response, over all its budgets, as a supervised row; 2502.18080."""
    data.check_out(args.out)
    best, problems = {}, set()
    for s in read_samples(args.samples, ("id", "problem", "response", "length", "correct")):
        key = s.get("source"), s["problem"]
        problems.add(key)
        if s["correct"] and s["length"] is not None:
            best[key] = min(best.get(key, s), s, key=lambda s: s["length"])
    if not best:
        raise BadInput(f"--samples {args.samples} has no right response of known length: nothing was written")
    rows = []
    for s in best.values():
        # The trained model is to choose its own effort: the prompt names none, whatever the sample was asked.
        kind, wording = s.get("kind") or "math", pick_wording(None, [s])
        prompt = data.budget_prompt(s["problem"], None, None, kind, wording)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": s["response"]}]
        row = {key: s.get(key) for key in ("id", "problem", "answer", "source", "length")}
        row |= {"kind": kind, "prompt": prompt, "budget": None, "mode": None, "messages": turns}
        row |= {"effort": s.get("effort") or s.get("budget")} | (
            {"choices": s["choices"]} if s.get("choices") else {}
        )
        rows.append(row)
    data.write_rows(rows, args.out)
    print(f"tops: {len(rows)} of {len(problems)} problems have a right response; written to {args.out}")
