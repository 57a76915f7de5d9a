"""Memory of training from a model's config alone; `python -m scaling.bench plan` prints and checks it.

In bytes per GPU, for dense models of the Llama family (Llama, Mistral, Qwen2, Qwen3) with n parameters:

    trainer = state + a micro-batch, or the embedding's gradient where that is larger
    state = weights 4 n + gradients 4 n + moments of AdamW 8 n (adamw8bit: 2 n) + starting model 2 n
            --fsdp: the N-th part of it; --lora: 2 n, and 16 bytes for each parameter of the adapters
    micro-batch = tokens * (layers * saved + transient) + bf16 weights 2 n + the output layer's chunk
            --fsdp: copies of two layers, the embedding and the output layer only
    engine = bf16 weights 2 n + cache of keys and values + 2 GiB for CUDA graphs
    peak = trainer + engine; --vllm-sleep: the larger of trainer + graphs and state without gradients + engine
"""

from collections.abc import Iterator

from data import BadInput, load_config

GIB = 2**30

# Sizes from the published config.json files.
QWEN2 = {"model_type": "qwen2", "vocab_size": 151_936, "tie_word_embeddings": True}
NAMES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
MODELS = {
    name: QWEN2 | dict(zip(NAMES, sizes, strict=True)) | more
    for name, sizes, more in (
        ("Qwen2.5-0.5B", (896, 4864, 24, 14, 2), {}),
        ("Qwen2.5-1.5B", (1536, 8960, 28, 12, 2), {}),
        ("R1-Distill-1.5B", (1536, 8960, 28, 12, 2), {"tie_word_embeddings": False}),
        ("Qwen2.5-3B", (2048, 11_008, 36, 16, 2), {}),
        ("Qwen2.5-7B", (3584, 18_944, 28, 28, 4), {"vocab_size": 152_064, "tie_word_embeddings": False}),
        ("Qwen2.5-14B", (5120, 13_824, 48, 40, 8), {"vocab_size": 152_064, "tie_word_embeddings": False}),
    )
}


def load_configs(model: str | None) -> dict[str, dict]:
    """{name: config}: the built-in sizes, one of them (1.5B), or that of a folder or a hub id."""
    known = {name: c for name, c in MODELS.items() if model in (None, name, name.split("-")[-1])}
    if known:
        return known
    c = load_config(model).to_dict()
    missing = [k for k in (*NAMES[:4], "vocab_size") if k not in c]
    missing += [k for k in c if "expert" in k and c[k]]
    if missing:
        raise BadInput(f"--model ({model}) is no dense Llama-like model ({missing[0]}): plan knows those")
    return {model: c}


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
        layer += q + 2 * kv + d * (c["model_type"] != "qwen2")  # Qwen2's output projection has no bias
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


def head_bytes(c: dict, tokens: int, dtype: str, cuda: bool, learns: bool) -> int:
    """What model.ChunkedHead holds while it works on a chunk, above the hidden states and their gradient."""
    from scaling.model import LOGITS

    vocab, d = c["vocab_size"], c["hidden_size"]
    logits, weight = min(LOGITS["cuda" if cuda else "cpu"], tokens * vocab), vocab * d
    if dtype == "float32":  # logits and probabilities; the weight's gradient
        return 8 * logits + 4 * weight * learns
    # In bf16: logits and probabilities in both types; the weight once more; a chunk's gradient and their sum.
    return 12 * logits + 2 * weight + 6 * weight * learns


def state_bytes(c: dict, dtype: str, how: dict, gradients: bool = True) -> int:
    """Weights, gradients (none while it samples), moments and starting model."""
    n, (layers, d, wide, q, kv, _, _) = parameters(c), sizes(c)
    frozen, moments = 2 if dtype == "bfloat16" else 4, 8 if how["optim"] == "adamw" else 2
    if how["lora"]:  # the starting model is the model without them
        adapters = layers * how["lora"] * (2 * d + 2 * q + 2 * (d + kv) + 3 * (d + wide))
        return (frozen * n + adapters * (4 + 4 * gradients + moments)) // how["shards"]
    return n * (4 + 4 * gradients + moments + frozen * how["reference"]) // how["shards"]


def trainer_bytes(c: dict, tokens: int, dtype: str, how: dict, cuda: bool = False) -> int:
    """Peak memory of the trainer with `tokens` in a micro-batch, libraries and CUDA context not included.

    how: optim, shards, lora (0: none), recompute and reference (whether they are in use).
    """
    layers, d, wide, q, kv, _, vocab = sizes(c)
    n, saved, learns = parameters(c), layer_bytes(c, dtype), not how["lora"]
    width = 4 if dtype == "float32" else 2
    layer = d * (2 * q + 2 * kv) + 3 * d * wide  # parameters of the matrices
    if how["lora"]:
        saved += width * (5 * d + q + wide)  # an adapter keeps the input of its layer once more
    # With recomputed activations: the input of every layer, and all of the layer that is at work.
    kept = layers * 4 * d + saved if how["recompute"] else layers * saved
    # Of the layer that is differentiated: gradients of three MLP activations and of two residual streams.
    transient = tokens * (3 * wide * width + 8 * d)
    # After the last layer: its norm, the gathered hidden states, their gradient.
    head = head_bytes(c, tokens, dtype, cuda, learns)
    running = tokens * (kept + 20 * d) + max(transient, head)
    if how["shards"] > 1:  # whole at once: two layers and one's gradient, embedding, head
        running += 2 * width * layer + 4 * layer + width * (n - layers * layer)
    elif dtype == "bfloat16" and learns:
        running += 2 * n
    return int(state_bytes(c, dtype, how) + max(running, 8 * vocab * d * learns))


def engine_bytes(c: dict, length: int, responses: int = 8) -> int:
    """What vLLM needs for `responses` of `length` tokens at once: bf16 weights, cache, 2 GiB of graphs."""
    layers, _, _, _, kv, _, _ = sizes(c)
    return 2 * parameters(c) + responses * length * layers * 2 * kv * 2 + 2 * GIB


# From the cheapest to the dearest in time or in exactness; the first that fits is shown.
SLEEP = "--gradient-checkpointing --vllm-sleep"
ATTEMPTS = ("", "--gradient-checkpointing", SLEEP, "--gradient-checkpointing --fsdp", f"{SLEEP} --fsdp",
            f"{SLEEP} --optim adamw8bit", f"{SLEEP} --lora 32")  # fmt: skip


def attempts(c: dict, longest: int, gpus: int, gpu_gib: float) -> Iterator[dict]:
    """For one model and GPU: every way to run it, {"flags", "peak_gib", "fits", ...}, the best one first."""
    engine = engine_bytes(c, longest) / GIB
    share = -(-engine * 20 // gpu_gib) / 20
    for flags in (f for f in ATTEMPTS if gpus > 1 or "--fsdp" not in f):
        how = {"optim": "adamw8bit" if "adamw8bit" in flags else "adamw", "reference": True}
        how |= {"shards": gpus if "--fsdp" in flags else 1, "lora": 32 if "--lora" in flags else 0}
        how["recompute"] = "--gradient-checkpointing" in flags
        for tokens in sorted({max(16_384, longest), longest}, reverse=True):
            words = f"{flags} --micro-tokens {tokens} --vllm-memory {share:.2f}".strip()
            yield {"flags": words} | peak(c, tokens, how, engine, "--vllm-sleep" in flags, gpu_gib)


def peak(c: dict, tokens: int, how: dict, engine: float, sleep: bool, gpu_gib: float) -> dict:
    """{"fits", "peak_gib", "trainer_gib", "engine_gib"} with an engine that holds `engine` GiB."""
    # A tenth more for what the allocator cannot use, and 1 GiB for CUDA itself.
    trainer = 1.1 * trainer_bytes(c, tokens, "bfloat16", how, cuda=True) / GIB + 1
    most = trainer + engine
    if sleep:
        most = max(trainer + 2, 1.1 * state_bytes(c, "bfloat16", how, gradients=False) / GIB + 1 + engine)
    return {"fits": most <= gpu_gib, "peak_gib": most, "trainer_gib": trainer, "engine_gib": engine}


def of_flags(c: dict, args, gpus: int, gpu_gib: float, prompt: int) -> dict:
    """peak() of the trainer's flags as they are; the engine takes all of --vllm-memory."""
    how = {"optim": args.optim, "shards": gpus if args.fsdp else 1, "lora": args.lora}
    how |= {"recompute": args.gradient_checkpointing, "reference": args.kl_coef > 0}
    tokens = max(args.micro_tokens, prompt + args.max_tokens)
    return peak(c, tokens, how, args.vllm_memory * gpu_gib, args.vllm_sleep, gpu_gib)


def table(configs: dict, caps: list[int], gpus: list[int], gpu_gib: float, prompt: int) -> list[dict]:
    """For every model and response cap: the first flags that fit into GPUs of gpu_gib, and their peak.

    A number of GPUs is left out where it changes nothing.
    """
    rows = []
    for name, c in configs.items():
        for cap in caps:
            found = {}
            for n in sorted(gpus):
                ways = list(attempts(c, prompt + cap, n, gpu_gib))
                least = min(ways, key=lambda w: w["peak_gib"]) | {"flags": "does not fit"}
                way = next((w for w in ways if w["fits"]), least)
                way |= {"model": name, "parameters": parameters(c), "cap": cap, "gpus": n}
                found.setdefault(way["flags"], way)
            rows += found.values()
    return rows


def markdown(rows: list[dict]) -> str:
    """table() as the table of docs/scaling.md, which `python -m scaling.bench plan` prints."""
    lines = ["| model | response cap | GPUs | peak, GiB | flags |", "| --- | ---: | ---: | ---: | --- |"]
    for r in rows:
        flags = f"`{r['flags']}`" if r["fits"] else "does not fit"
        lines.append(f"| {r['model']} | {r['cap']:,} | {r['gpus']} or more | {r['peak_gib']:.0f} | {flags} |")
    return "\n".join(lines)
