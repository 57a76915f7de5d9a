"""The memory that training takes, from a model's config alone: `python bench.py plan` prints the table.

Counted in bytes per GPU, for dense models of the Llama family (Llama, Mistral, Qwen2, Qwen3), n parameters:

    trainer = weights 4 n + gradients 4 n + moments of AdamW 8 n (adamw8bit: 2 n) + the larger of
        a micro-batch: tokens * (layers * saved + transient) + bf16 copies of the weights 2 n + the head
        the optimizer's temporary copies

The engine lives beside it: its weights in bf16 (2 n), its key-value cache, its CUDA graphs.
"""

import json
import os

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


def checked(config: dict, name: str) -> dict:
    """`config`, if it is one that the formulas below are right for."""
    missing = [
        k for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size") if k not in config
    ]
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


def layer_bytes(c: dict, dtype: str) -> int:
    """Activations that a layer saves for its backward pass, bytes per token."""
    _, d, wide, q, kv, heads, _ = sizes(c)
    # Of each of the two norms: its input, the normalised input, its output. Of the attention: queries, keys,
    # values, output, and a log-sum per head. Of the MLP: gate, silu(gate), up and their product.
    if dtype == "float32":
        return 4 * (6 * d + 2 * q + 2 * kv + heads + 4 * wide)
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


def trainer_bytes(c: dict, tokens: int, dtype: str, recompute: bool, optim: str, cuda: bool = False) -> int:
    """Peak memory of the trainer with `tokens` in a micro-batch, libraries and CUDA context not included."""
    layers, d, wide, _, _, _, vocab = sizes(c)
    n, saved = parameters(c), layer_bytes(c, dtype)
    state = n * (4 + 4 + (8 if optim == "adamw" else 2))
    # With recomputed activations: the input of every layer, and all of the layer that is at work.
    kept = layers * 4 * d + saved if recompute else layers * saved
    # Of the layer that is differentiated: gradients of three MLP activations and of two residual streams.
    transient = tokens * (3 * wide * (4 if dtype == "float32" else 2) + 2 * 4 * d)
    # After the last layer: its norm, the gathered hidden states, their gradient.
    running = tokens * (kept + 5 * 4 * d) + max(transient, head_bytes(c, tokens, dtype, cuda))
    running += 0 if dtype == "float32" else 2 * n
    # The head's gradient waits for the embedding's; the two are added to those of earlier micro-batches.
    head = 4 * vocab * d
    return state + head + max(running, head)


def engine_bytes(c: dict, length: int, responses: int = 16) -> int:
    """What vLLM needs for `responses` of `length` tokens at once: bf16 weights, cache, 2 GiB of graphs."""
    layers, _, _, _, kv, _, _ = sizes(c)
    return 2 * parameters(c) + responses * length * layers * 2 * kv * 2 + 2 * GIB


# From the cheapest to the dearest in time; the first that fits is shown.
ATTEMPTS = (
    ("--dtype bfloat16", False, "adamw"),
    ("--dtype bfloat16 --gradient-checkpointing", True, "adamw"),
    ("--dtype bfloat16 --gradient-checkpointing --optim adamw8bit", True, "adamw8bit"),
)


def table(configs: dict, caps: list[int], gpu_gib: float, prompt: int) -> list[dict]:
    """For every model and response cap: the first flags that fit into a GPU of gpu_gib, and their peak."""
    rows = []
    for name, c in configs.items():
        for cap in caps:
            longest, engine = prompt + cap, engine_bytes(c, prompt + cap) / GIB
            share = f"--vllm-memory {-(-engine * 20 // gpu_gib) / 20:.2f}"
            row = {"model": name, "parameters": parameters(c), "cap": cap, "engine_gib": engine}
            tries = []
            for flags, recompute, optim in ATTEMPTS:
                for tokens in sorted({max(16_384, longest), longest}, reverse=True):
                    trainer = trainer_bytes(c, tokens, "bfloat16", recompute, optim, cuda=True)
                    # A tenth more for what the allocator cannot use, and 1 GiB for CUDA itself.
                    row = row | {"trainer_gib": 1.1 * trainer / GIB + 1, "fits": True}
                    tries.append(row | {"flags": f"{flags} --micro-tokens {tokens} {share}"})
            fitting = [t for t in tries if t["trainer_gib"] + engine <= gpu_gib]
            rows.append((fitting or [tries[-1] | {"fits": False, "flags": "does not fit"}])[0])
    return rows
