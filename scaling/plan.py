"""Memory and work of training, from a model's config alone: `python -m scaling.bench plan` prints the memory table.

Counted in bytes per GPU, for dense models of the Llama family (Llama, Mistral, Qwen2, Qwen3), n parameters:

    trainer = state + the head's gradient + the larger of a micro-batch and the embedding's gradient
    state = weights 4 n + gradients 4 n + moments of AdamW 8 n (adamw8bit: 2 n)
            --fsdp: the N-th part of it; --lora: 4 n, and 16 bytes for each parameter of the adapters
            --param-dtype bfloat16: 2 n where 4 n stands; --kl-coef: 4 n more, not counted below
    micro-batch = tokens * (layers * saved + transient) + bf16 copies of the weights 2 n + the head's chunk
            --fsdp: copies of two layers, the embedding and the head only
    engine = bf16 weights 2 n + cache of keys and values + 2 GiB for CUDA graphs
    peak = trainer + engine; --vllm-sleep: the larger of trainer + graphs and state without gradients + engine
"""

import json
import os
import re
from collections.abc import Iterator

from data import BadInput

GIB = 2**30

# Sizes from the published config.json files.
QWEN2 = {"model_type": "qwen2", "vocab_size": 151_936, "tie_word_embeddings": True}
MODELS = {
    name: QWEN2 | dict(zip(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads"), sizes, strict=True,
    )) | more
    for name, sizes, more in (
        ("Qwen2.5-0.5B", (896, 4864, 24, 14, 2), {}),
        ("Qwen2.5-1.5B", (1536, 8960, 28, 12, 2), {}),
        ("R1-Distill-1.5B", (1536, 8960, 28, 12, 2), {"tie_word_embeddings": False}),
        ("Qwen2.5-3B", (2048, 11_008, 36, 16, 2), {}),
        ("Qwen2.5-7B", (3584, 18_944, 28, 28, 4), {"vocab_size": 152_064, "tie_word_embeddings": False}),
        ("Qwen2.5-14B", (5120, 13_824, 48, 40, 8), {"vocab_size": 152_064, "tie_word_embeddings": False}),
    )
}  # fmt: skip


def load_configs(model: str | None) -> dict[str, dict]:
    """{name: config}: the built-in sizes, one of them, or that of a folder, a config.json or a hub id."""
    if model is None:
        return MODELS
    known = {name: config for name, config in MODELS.items() if model in (name, name.split("-")[-1])}
    if known:
        return known
    path = os.path.join(model, "config.json") if os.path.isdir(model) else model
    if os.path.exists(path):
        with open(path) as f:
            return {model: checked(json.load(f), model)}
    if model[0] in "./~" or model.count("/") != 1:
        raise BadInput(
            f"--model ({model}) is no folder, config.json or OWNER/NAME, nor one of {', '.join(MODELS)}"
        )
    from transformers import AutoConfig

    try:
        return {model: checked(AutoConfig.from_pretrained(model).to_dict(), model)}
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--model ({model}): its config could not be loaded: {reason}") from None


NEEDED = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size".split()


def checked(config: dict, name: str) -> dict:
    """`config`, if it is one that the formulas below are right for."""
    missing = [k for k in NEEDED if k not in config]
    experts = [k for k in config if "expert" in k and config[k]]
    if missing or experts:
        raise BadInput(
            f"--model ({name}) is no dense Llama-like model ({(missing or experts)[0]}): plan knows those"
        )
    return config


def sizes(c: dict) -> tuple[int, ...]:
    """(layers, d, intermediate width, query width, key or value width, heads, vocabulary)."""
    heads, d = c["num_attention_heads"], c["hidden_size"]
    head_dim = c.get("head_dim") or d // heads
    kv = (c.get("num_key_value_heads") or heads) * head_dim
    return c["num_hidden_layers"], d, c["intermediate_size"], heads * head_dim, kv, heads, c["vocab_size"]


def parameters(c: dict) -> int:
    """Parameters of the model."""
    layers, d, wide, q, kv, heads, vocab = sizes(c)
    layer = d * (2 * q + 2 * kv) + 3 * d * wide + 2 * d
    if c["model_type"] == "qwen2" or c.get("attention_bias"):
        layer += (
            q + 2 * kv + (d if c["model_type"] != "qwen2" else 0)
        )  # Qwen2's output projection has no bias
    if c["model_type"] == "qwen3":
        layer += 2 * q // heads  # norms of queries and keys
    return layers * layer + d + vocab * d * (1 if c.get("tie_word_embeddings") else 2)


# ------------------------------------------------------------------------------------------------------------
# Work

# Peak of a GPU without sparsity, TFLOP/s: bf16 products summed in float32; float32 without tensor cores. By
# NVIDIA's data sheets (their bf16 figures "with sparsity" are twice these), the RTX 4090's by a white paper.
PEAKS = {
    r"H[12]00 NVL": (835, 60), r"H100 PCIe": (756, 51), r"\bH[12]00\b": (989, 67), r"\bA100\b": (312, 19.5),
    r"\bL40S\b": (362, 91.6), r"RTX 4090$": (165, 82.6),
}  # fmt: skip


def peak_tflops(device: str, dtype: str) -> float | None:
    """Peak of the GPU that torch calls `device`, TFLOP/s; None where it is not known, as of a part of one."""
    found = [peaks for name, peaks in PEAKS.items() if re.search(name, device) and " MIG " not in device]
    return found[0][dtype == "float32"] if found else None


def update_flops(c: dict, lengths: list[tuple[int, int]]) -> list[tuple]:
    """[(kind, in, out, FLOPs)] of one update without any waste: no padding, nothing computed twice.

    `lengths` are tokens of (prompt, response). A matrix [in, out] costs 2 in out per token forward, as much
    for the gradient of its input and again for its own: 6 in out. The layers see the tokens of prompts and
    responses, the head only responses (d -> V). Attention: q k^T and p v cost 2 * 2 * (heads * head_dim) per
    pair of positions, L^2 / 2 pairs a sequence, and twice that backward: 6 (heads * head_dim) L^2. Softmax,
    norms, embedding, AdamW: not counted.
    """
    layers, d, wide, q, kv, heads, vocab = sizes(c)
    totals = [prompt + response for prompt, response in lengths]
    tokens, responses = sum(totals), sum(response for _, response in lengths)
    shapes = [(d, q, 2), (d, kv, 2), (d, wide, 2), (wide, d, 1)]  # q and o; k and v; gate and up; down
    parts = [("linear", i, o, 6 * i * o * n * layers * tokens) for i, o, n in shapes]
    parts.append(("linear", d, vocab, 6 * d * vocab * responses))
    parts.append(("attention", heads, q // heads, 6 * q * layers * sum(n * n for n in totals)))
    return parts


# ------------------------------------------------------------------------------------------------------------
# Memory


def layer_bytes(c: dict, dtype: str, param_dtype: str = "float32") -> int:
    """Activations that a layer saves for its backward pass, bytes per token."""
    _, d, wide, q, kv, heads, _ = sizes(c)
    # Of each of the two norms: its input, the normalised input, its output. Of the attention: queries, keys,
    # values, output, and a log-sum per head. Of the MLP: gate, silu(gate), up and their product.
    if dtype == "float32":
        return 4 * (6 * d + 2 * q + 2 * kv + heads + 4 * wide)
    if param_dtype == "bfloat16":  # the two norms are taken in float32, all else is bf16
        return 2 * 8 * d + (2 * q + 2 * kv + 4 * wide) * 2 + 4 * heads
    # autocast: the residual stream and the norms stay in float32, but each of the five projections that read
    # a norm's output saves its own bf16 copy of it.
    return 2 * 2 * d * 4 + 5 * d * 2 + (2 * q + 2 * kv + 4 * wide) * 2 + 4 * heads


def head_bytes(c: dict, tokens: int, dtype: str, cuda: bool) -> int:
    """What losses.head_loss holds while it works on a chunk, above its inputs and their gradients."""
    from losses import CPU_LOGITS, GPU_LOGITS

    logits = min(GPU_LOGITS if cuda else CPU_LOGITS, tokens * c["vocab_size"])
    # Logits and probabilities in float32; in bf16 the logits, both forms of the probabilities, and float32
    # copies of the two for the entropy; also the head and a chunk's gradient of it.
    return 8 * logits if dtype == "float32" else 16 * logits + 4 * c["vocab_size"] * c["hidden_size"]


def state_bytes(
    c: dict, optim: str, shards: int = 1, lora: int = 0, param_dtype: str = "float32", gradients: bool = True
) -> int:
    """Weights, gradients and moments; the trainer holds all of them but, while it samples, gradients."""
    n, (layers, d, wide, q, kv, _, _) = parameters(c), sizes(c)
    held, moments = 2 if param_dtype == "bfloat16" else 4, 8 if optim == "adamw" else 2
    if lora:  # what adapters learn is float32
        return held * n + layers * lora * (2 * d + 2 * q + 2 * (d + kv) + 3 * (d + wide)) * (
            4 + 4 * gradients + moments
        )
    return int(n * (held + held * gradients + moments) / shards)


def trainer_bytes(
    c: dict, tokens: int, dtype: str, recompute: bool, optim: str, cuda: bool = False, shards: int = 1,
    lora: int = 0, param_dtype: str = "float32",
) -> int:  # fmt: skip
    """Peak memory of the trainer with `tokens` in a micro-batch, libraries and CUDA context not included."""
    layers, d, wide, q, kv, _, vocab = sizes(c)
    n, saved = parameters(c), layer_bytes(c, dtype, param_dtype)
    width, head = 4 if dtype == "float32" else 2, 4 * vocab * d
    stream = 4 if param_dtype == "float32" else 2  # bytes of a number in the residual stream
    layer = d * (2 * q + 2 * kv) + 3 * d * wide  # parameters of the matrices
    state = state_bytes(c, optim, shards, lora, param_dtype)
    if lora:
        head = 0
        saved += width * (5 * d + q + wide)  # an adapter keeps the input of its layer once more
    # With recomputed activations: the input of every layer, and all of the layer that is at work.
    kept = layers * stream * d + saved if recompute else layers * saved
    # Of the layer that is differentiated: gradients of three MLP activations and of two residual streams.
    transient = tokens * (3 * wide * width + 2 * stream * d)
    # After the last layer: its norm, the gathered hidden states, their gradient.
    running = tokens * (kept + 5 * stream * d) + max(transient, head_bytes(c, tokens, dtype, cuda))
    if shards > 1:  # whole at once: two layers and one's gradient before it is spread, embedding and head
        running += 2 * width * layer + 4 * layer + width * (n - layers * layer)
    elif dtype != param_dtype:
        running += 2 * n
    # The head's gradient waits for the embedding's; the two are added to those of earlier micro-batches.
    return int(state + head + max(running, head))


def engine_bytes(c: dict, length: int, responses: int = 8) -> int:
    """What vLLM needs for `responses` of `length` tokens at once: bf16 weights, cache, 2 GiB of graphs."""
    layers, _, _, _, kv, _, _ = sizes(c)
    return 2 * parameters(c) + responses * length * layers * 2 * kv * 2 + 2 * GIB


# From the cheapest to the dearest in time or in exactness; the first that fits is shown.
RECOMPUTE, SLEEP = "--gradient-checkpointing", "--gradient-checkpointing --vllm-sleep"
ATTEMPTS = (
    "", RECOMPUTE, SLEEP, f"{RECOMPUTE} --fsdp", f"{SLEEP} --fsdp", f"{SLEEP} --optim adamw8bit",
    f"{SLEEP} --optim adamw8bit --param-dtype bfloat16", f"{SLEEP} --lora 64 --param-dtype bfloat16",
)  # fmt: skip


def attempts(c: dict, longest: int, gpus: int, gpu_gib: float) -> Iterator[dict]:
    """For one model and GPU: every way to run it, {"flags", "peak_gib", "fits", ...}, the best one first."""
    engine = engine_bytes(c, longest) / GIB
    share = -(-engine * 20 // gpu_gib) / 20
    for flags in ATTEMPTS:
        if "--fsdp" in flags and gpus == 1:
            continue
        how = {
            "optim": "adamw8bit" if "adamw8bit" in flags else "adamw",
            "shards": gpus if "--fsdp" in flags else 1,
            "lora": 64 if "--lora" in flags else 0,
            "param_dtype": "bfloat16" if "--param-dtype" in flags else "float32",
        }
        for tokens in sorted({max(16_384, longest), longest}, reverse=True):
            # A tenth more for what the allocator cannot use, and 1 GiB for CUDA itself.
            recompute = "--gradient-checkpointing" in flags
            trainer = 1.1 * trainer_bytes(c, tokens, "bfloat16", recompute, cuda=True, **how) / GIB + 1
            peak = trainer + engine
            if "--vllm-sleep" in flags:
                peak = max(trainer + 2, 1.1 * state_bytes(c, gradients=False, **how) / GIB + 1 + engine)
            words = f"--dtype bfloat16 {flags} --micro-tokens {tokens} --vllm-memory {share:.2f}"
            found = {"flags": " ".join(words.split()), "fits": peak <= gpu_gib, "peak_gib": peak}
            yield found | {"trainer_gib": trainer, "engine_gib": engine}


def table(configs: dict, caps: list[int], gpus: list[int], gpu_gib: float, prompt: int) -> list[dict]:
    """For every model and response cap: the first flags that fit into GPUs of gpu_gib, and their peak.

    A number of GPUs is left out where it changes nothing.
    """
    rows = []
    for name, c in configs.items():
        for cap in caps:
            flags = set()
            for n in sorted(gpus):
                ways = list(attempts(c, prompt + cap, n, gpu_gib))
                least = min(ways, key=lambda w: w["peak_gib"]) | {"flags": "does not fit"}
                way = next((w for w in ways if w["fits"]), least)
                if way["flags"] not in flags:
                    rows.append({"model": name, "parameters": parameters(c), "cap": cap, "gpus": n} | way)
                flags.add(way["flags"])
    return rows


def markdown(rows: list[dict]) -> str:
    """table() as the table of docs/scaling.md, which `python -m scaling.plan` prints."""
    lines = [
        "| model | response cap | GPUs | peak, GiB | flags beside `--dtype bfloat16` |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        flags = f"`{r['flags'].removeprefix('--dtype bfloat16 ')}`" if r["fits"] else "does not fit"
        lines.append(f"| {r['model']} | {r['cap']:,} | {r['gpus']} or more | {r['peak_gib']:.0f} | {flags} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(table(MODELS, [4096, 16_384], [1, 4, 8], 80, 1024)))
