"""Edits of finished checkpoints and selection of samples, for `python -m evaluation.baselines`.

merge      keeps the largest updates of a trained model (DLER)
thinkedit  edits the attention heads that write "think shortly" (ThinkEdit)
tops       the shortest right answers as rows for supervised training (TOPS)
"""

import argparse
import glob
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

import data
from data import BadInput
from evaluation.samples import read_samples, write_json
from toy import task as toy

if TYPE_CHECKING:  # loaded late
    import torch

SHARD = 4 << 30  # bytes of a weight file that merge writes
# Their blocks have the same parts under the same names.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def read_weights(folder: str, flag: str) -> dict[str, "torch.Tensor"]:
    """The tensors of a model folder, mapped from its files; BadInput where there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    if not files:
        raise BadInput(f"{flag} {folder} holds no model.safetensors: give a local Hugging Face model folder")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{flag} {folder}: its weights cannot be read ({data.first_line(error)})") from None


def largest_threshold(chunks: Callable, count: int) -> int:
    """The `count`-th largest of the int32 values of chunks() (called twice), exactly and without sorting."""
    import torch

    def find(values: Iterator, bins: int, rank: int) -> tuple[int, int]:
        """The bin that holds the rank-th largest value, and its rank in there."""
        counts = sum(torch.bincount(v, minlength=bins) for v in values).tolist()
        while counts[-1] < rank:
            rank -= counts.pop()
        return len(counts) - 1, rank

    # First the upper 16 bits of the value, then, among those that share them, the lower ones.
    high, rank = find((c >> 16 for c in chunks()), 1 << 15, count)
    low, _ = find((c[c >> 16 == high] & 0xFFFF for c in chunks()), 1 << 16, rank)
    return high << 16 | low


def merge(base: str, tuned: str, out: str, keep: float = 0.25, scale: float = 0.7) -> tuple[int, int]:
    """base + scale * (the share `keep` of the largest updates of `tuned`, zero elsewhere); DLER (2510.15110).

    The largest are found over all weights together, exactly; what equals the smallest of them is kept too.
    Types and other files are those of `tuned`. Returns the numbers of weights and of kept updates.
    """
    import torch
    from huggingface_hub import save_torch_state_dict

    a, b = read_weights(base, "--base"), read_weights(tuned, "--tuned")
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (a, b)]
    odd = sorted(name for name in set(a) | set(b) if shapes[0].get(name) != shapes[1].get(name))
    if odd:
        raise BadInput(f"--base and --tuned are different models: see their {', '.join(odd[:3])}")

    def updates():  # floats from 0 up sort as their bits do
        return ((b[name].float() - a[name].float()).abs().flatten().view(torch.int32) for name in b)

    total, kept, merged = sum(tensor.numel() for tensor in b.values()), 0, {}
    # Nothing is above the largest int32: no update is kept. A weight that did not move is no update.
    count = round(keep * total)
    threshold = max(1, largest_threshold(updates, count)) if count else 2**31 - 1
    for name, tensor in b.items():
        x, y = a[name].float(), tensor.float()
        chosen = (y - x).abs().view(torch.int32) >= threshold
        # lerp gives exactly y at scale 1, where x + (y - x) may be off by a rounding.
        merged[name] = torch.where(chosen, torch.lerp(x, y, scale), x).to(tensor.dtype)
        kept += int(chosen.sum())
    os.makedirs(out)
    for file in os.listdir(tuned):
        # Config and tokenizer; not the weights, nor a trainer's state.
        if re.search(r"\.(json|jinja|txt|model)$", file) and not file.endswith(".index.json"):
            shutil.copy(os.path.join(tuned, file), out)
    save_torch_state_dict(merged, out, max_shard_size=SHARD)
    return total, kept


def thinking_samples(samples: Iterable[dict], tokenizer, long: int, short: int) -> tuple[list, list]:
    """(long, short): [(ids of prompt and thinking, where the thinking starts)] by tokens of thinking."""
    found = ([], [])
    for sample in samples:
        thinking, closed, _ = sample["response"].partition("</think>")
        ids = tokenizer.encode(thinking, add_special_tokens=False)
        if closed and ids and not short <= len(ids) <= long:  # thinking that never ended has no length
            prompt = data.encode_prompt(tokenizer, sample["prompt"])
            found[len(ids) < short].append((prompt + ids, len(prompt)))
    return found


def thinking_means(model, groups: tuple[list, list]) -> tuple:
    """Means over thinking tokens, then over samples: residuals [2, layers, d] of long and short responses
    behind the attention, and the heads' outputs before W_o on the short ones [layers, heads x d_head]."""
    import torch

    layers, seen = model.model.layers, {}

    def watch(key):  # a hook that keeps what goes into a module: [T, width] in float32
        return lambda module, inputs: seen.__setitem__(key, inputs[0][0].detach().float())

    places = {("r", i): layer.post_attention_layernorm for i, layer in enumerate(layers)}
    places |= {("h", i): layer.self_attn.o_proj for i, layer in enumerate(layers)}
    hooks = [module.register_forward_pre_hook(watch(key)) for key, module in places.items()]
    means = []
    for group in groups:
        sums = {}
        for ids, start in group:
            with torch.no_grad():
                model.model(torch.tensor([ids], device=model.device))
            # The positions that predict the thinking tokens, as in the official code.
            for key, value in seen.items():
                sums[key] = sums.get(key, 0) + value[start - 1 : len(ids) - 1].mean(0) / len(group)
        means.append([torch.stack([sums[k, i] for i in range(len(layers))]) for k in "rh"])
    for hook in hooks:
        hook.remove()
    return torch.stack([residual for residual, _ in means]), means[1][1]


def remove_direction(weight: "torch.Tensor", direction: "torch.Tensor") -> "torch.Tensor":
    """W - (W v) v^T for the unit vector v along `direction`; W is [d_head, d], its columns the output."""
    v = direction / direction.norm()
    return weight - (weight @ v)[:, None] * v


def thinkedit(model, groups: tuple[list, list], heads: int) -> list[tuple[int, int, float]]:
    """Edits `model`: the `heads` attention heads that write most of "think shortly" no longer write it.

    ThinkEdit (2503.22048): v of a layer is the unit vector from long to short thinking; a head's contribution
    is its mean output along v on the short responses. Returns (layer, head, contribution), largest first.
    """
    import torch

    residuals, outputs = thinking_means(model, groups)
    short = torch.nn.functional.normalize(residuals[1] - residuals[0], dim=-1)
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    n = model.config.num_attention_heads
    by_width = [(v @ p.weight.float()) * z for v, p, z in zip(short, projections, outputs, strict=True)]
    values, places = torch.stack(by_width).view(len(projections) * n, -1).sum(1).topk(heads)
    chosen = [(i // n, i % n, value) for value, i in zip(values.tolist(), places.tolist(), strict=True)]
    for layer, head, _ in chosen:
        weight = projections[layer].weight  # [d, heads x d_head]
        part = slice(head * weight.shape[1] // n, (head + 1) * weight.shape[1] // n)
        with torch.no_grad():
            edited = remove_direction(weight[:, part].T.float(), short[layer])
            weight[:, part] = edited.T.to(weight.dtype)
    return chosen


def thinkedit_command(args: argparse.Namespace) -> None:
    """Load, edit, save; thinkedit.json in the new folder says which heads were edited."""
    samples = read_samples(args.samples, ("id", "problem", "prompt", "response"))
    tokenizer = data.load_tokenizer(args.model)
    groups = thinking_samples(samples, tokenizer, args.long, args.short)
    n_long, n_short = map(len, groups)
    if not n_long or not n_short:
        found = f"{n_long} thoughts longer than {args.long} tokens, {n_short} shorter than {args.short}"
        raise BadInput(f"--samples {args.samples} has {found}; both are needed: see --long and --short")
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    config = data.load_config(args.model)
    if config.model_type not in ARCHITECTURES:
        raise BadInput(f"--model is a {config.model_type}: heads are known of {', '.join(ARCHITECTURES)}")
    total = config.num_hidden_layers * config.num_attention_heads
    if args.heads > total:
        raise BadInput(f"--heads ({args.heads}) is more than the {total} attention heads of {args.model}")
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {args.model} does not load: {data.first_line(error)}") from None
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    edited = thinkedit(model, groups, args.heads)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    about = {"model": args.model, "long": n_long, "short": n_short, "layer_head_contribution": edited}
    write_json(os.path.join(args.out, "thinkedit.json"), about)
    where = ", ".join(f"{layer}.{head}" for layer, head, _ in edited)
    print(f"thinkedit: {n_long} long, {n_short} short responses; {len(edited)} of {total} heads: {where}")


# ------------------------------------------------------------------------------------------------------------
# Selection


def wording_of(problems: list[dict]) -> str:
    """The toy's tokenizer knows no other instruction than its own."""
    return "tulu" if {problem.get("source") for problem in problems} <= set(toy.TASKS) else "l1"


def shortest_correct(samples: Iterable[dict]) -> list[dict]:
    """Of every problem the shortest right response, over all its budgets or efforts; TOPS (2502.18080)."""
    best = {}
    for sample in samples:
        key, length = (sample.get("source"), sample["problem"]), sample["length"]
        if sample["correct"] and length is not None and (key not in best or length < best[key]["length"]):
            best[key] = sample
    return list(best.values())


def supervised_row(sample: dict) -> dict:
    """A Row without a budget, plus `messages` (the question, the response) for supervised training."""
    # The trained model is to choose its own effort: the prompt names none, whatever the sample was asked.
    kind = sample.get("kind") or "math"
    prompt = data.budget_prompt(sample["problem"], None, None, kind, wording_of([sample]))
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": sample["response"]}]
    row = {key: sample.get(key) for key in ("id", "problem", "answer", "source")}
    row |= {"kind": kind, "prompt": prompt, "budget": None, "mode": None}
    row |= {"choices": sample["choices"]} if sample.get("choices") else {}
    return row | {"messages": turns, "length": sample["length"], "effort": sample.get("budget")}


def tops(args: argparse.Namespace) -> None:
    """Supervised rows of the shortest right responses."""
    samples = list(read_samples(args.samples, ("id", "problem", "response", "length", "correct")))
    chosen = shortest_correct(samples)
    if not chosen:
        raise BadInput(f"--samples {args.samples} has no right response of known length: nothing was written")
    data.write_rows([supervised_row(sample) for sample in chosen], args.out)
    problems = len({(sample.get("source"), sample["problem"]) for sample in samples})
    efforts = Counter(str(sample.get("budget")) for sample in chosen)
    told = ", ".join(f"{effort} {n}" for effort, n in efforts.most_common())
    print(f"tops: {len(chosen)} of {problems} problems have a right response; chosen by budget: {told}")
    print(f"tops: mean length {np.mean([s['length'] for s in chosen]):.1f} tokens; written to {args.out}")
