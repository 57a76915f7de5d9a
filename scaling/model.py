"""The model as the loop sees it: what is trained, log-probs of tokens, adapters (LoRA) and shards (FSDP2)."""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as whole_state
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data import BadInput, load_config
from scaling import shared_prompt

# ---- What is trained


def load_model(path: str, args, frozen: bool = False, empty: bool = False):
    """A causal language model in CPU memory; learning weights are float32, others of the compute type.

    empty: without contents, for shard() to fill.
    """
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if args.dtype == "bfloat16" and (frozen or args.lora) else torch.float32
    try:  # neither a pickle nor classes of its own: a model folder runs no code here
        options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
        options |= {"device_map": "meta"} if empty else {}
        config = load_config(path)
        for c in map(vars, (config, config.get_text_config())):  # what samples knows no dropout
            c.update({k: 0.0 for k, v in c.items() if "drop" in k and isinstance(v, float)})
        model = transformers.AutoModelForCausalLM.from_pretrained(path, config=config, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"the model in {path} does not load ({str(error).splitlines()[0]})") from None
    for p in model.parameters():
        p.data = p.data.clone()  # a file's bytes may lie unaligned, and kernels then round otherwise
    return model.eval().requires_grad_(False) if frozen else model.train()


def build(args, model=None, with_reference: bool = False, device="cpu"):
    """(model, reference, optimizer) on `device` or sharded. `model`: a checkpoint's, or None.

    reference: the starting model, frozen; with adapters the model itself, see without_adapters(); or None.
    """
    empty = args.fsdp and dist.get_rank() > 0  # one process reads the weights and hands out shards
    model = model or load_model(args.model, args, empty=empty)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.lora:
        add_lora(model, args.lora, args.seed)
    reference = model if args.lora else None
    shard(model, args.dtype == "bfloat16", device) if args.fsdp else model.to(device)
    if with_reference and not args.lora:  # after the model is in its place: not both whole in one memory
        reference = load_model(args.model, args, frozen=True, empty=empty)
        shard(reference, args.dtype == "bfloat16", device) if args.fsdp else reference.to(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    if args.optim == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return model, reference, AdamW8bit(learned, lr=args.lr)
    return model, reference, torch.optim.AdamW(learned, lr=args.lr, fused=True)


# ---- Log-probs of tokens and their gradient, a chunk of them at a time: [tokens x vocabulary] never exists.
#
# A vocabulary of 150,000 makes the logits the largest thing in training by far. With p = softmax(z),
# z = W h / T and g = dloss/dlogp, the gradients are known as soon as g is, while the chunk's p is at hand:
#
#     dlogp/dz = onehot - p,    dh = g W^T (onehot - p) / T,    dW = g (onehot - p) h^T / T
#
# Three matrix products a chunk, as plain autograd needs; nothing is recomputed, nothing is kept.

LOGITS = {"cpu": 2**24, "cuda": 2**27}  # of one chunk: 64 MiB and 512 MiB in float32


class ChunkedHead:
    """The output layer `weight` [V, d] over hidden states [T, d], of which it takes a slice after the other:

    for part in head.parts():
        logp, entropy = head.logps(part, target)    float32 [t], nats; target [t]
        head.backward(part, target, g)              g = dloss/dlogp [t]; must follow logps() of the same part
    head.finish()                                   on from the hidden states, through the model
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, temperature: float):
        self.output, self.parameter, self.temperature = hidden, weight, temperature
        self.hidden, self.weight = hidden.detach(), weight.detach().to(hidden.dtype)
        self.size = max(1, LOGITS[hidden.device.type] // len(weight))
        rows = min(self.size, len(hidden))
        # Allocated once: on a CPU fresh pages for every chunk would cost a tenth of the time.
        self.logits = hidden.new_empty(rows, len(weight))
        self.p = hidden.new_empty(rows, len(weight), dtype=torch.float32)
        self.d_hidden = self.d_weight = None

    def parts(self) -> list[slice]:
        return [slice(i, i + self.size) for i in range(0, max(1, len(self.hidden)), self.size)]

    def softmax(self, part: slice, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(p [t, V], z [t, V], log-probs [t] of `target`)"""
        h = self.hidden[part]
        z = torch.mm(h, self.weight.T, out=self.logits[: len(h)]).float()
        # Divided in float32, after the product: in any type the same with and without gradient.
        z = z.div_(self.temperature) if self.temperature != 1 else z
        p = torch.softmax(z, -1, out=self.p[: len(h)])
        norm = z.amax(-1) - p.amax(-1).log()  # logsumexp without exponentials: p at the top is never 0
        return p, z, z.gather(-1, target[:, None])[:, 0] - norm

    @torch.no_grad()
    def all_logps(self, target: torch.Tensor) -> torch.Tensor:
        """Log-probs [T] of `target` [T], without gradient."""
        return torch.cat([self.softmax(part, target[part])[2] for part in self.parts()])

    @torch.no_grad()
    def logps(self, part: slice, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of `target` [t] and entropies [t]."""
        p, z, logp = self.softmax(part, target)
        mean = torch.bmm(p[:, None], z[:, :, None])[:, 0, 0]  # of z under p, without a table of products
        return logp, z.gather(-1, target[:, None])[:, 0] - logp - mean

    @torch.no_grad()
    def backward(self, part: slice, target: torch.Tensor, g: torch.Tensor) -> None:
        """Adds the gradient of a loss with dloss/dlogp = g to d_hidden [T, d] and d_weight [V, d]."""
        h, p, slope = self.hidden[part], self.p[: len(target)], (-g / self.temperature)[:, None]
        if self.d_hidden is None:
            self.d_hidden = torch.empty_like(self.hidden)
            if self.parameter.requires_grad:  # in float32, for many chunks add up in it
                self.d_weight = torch.zeros_like(self.weight, dtype=torch.float32)
        # p - onehot in float32, then rounded: for a token of p = 0.9999 the difference is all that matters.
        p[torch.arange(len(target), device=p.device), target] -= 1
        p = p.to(h.dtype)
        self.d_hidden[part] = slope * (p @ self.weight)
        if self.d_weight is not None and h.dtype == torch.float32:
            self.d_weight.addmm_(p.T, slope * h)
        elif self.d_weight is not None:
            self.d_weight += p.T @ (slope * h).to(h.dtype)

    def finish(self) -> None:
        """Hands the gradients on: to the weight's, and from the hidden states back through the model."""
        if self.d_weight is not None:  # autograd would keep a copy
            held, new = self.parameter.grad, self.d_weight.to(self.parameter.dtype)
            self.parameter.grad = new if held is None else held.add_(new)
            self.d_weight = None
        self.output.backward(self.d_hidden)


def hidden_states(model, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Last hidden states [N, width, d]. No mask: a causal model cannot see the padding on the right."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.bfloat16() if bf16 else hidden


def output_head(model, t: dict, args) -> ChunkedHead:
    """The output layer over the hidden states [T, d] that predict the response tokens.

    t: ids [N, width], row and column [T] of the places from which the tokens are predicted; prompt [N], the
    prompts' lengths where those that are alike shall be computed once, or None.
    """
    bf16 = args.dtype == "bfloat16"
    if t["prompt"] is not None and shared_prompt.fits(model, args):
        flat = shared_prompt.hidden_states(model, t, bf16)
    else:  # a sharded model is called as a module: that gathers its weights
        hidden = model(t["ids"]) if args.fsdp else hidden_states(model, t["ids"], bf16)
        flat = hidden[t["row"], t["column"]]
    return ChunkedHead(flat, model.get_output_embeddings().weight, args.temperature)


# ---- Adapters and shards

ADAPTER = "default"


def add_lora(model, rank: int, seed: int) -> None:
    """Freezes the model; adapters of `rank` beside all its linear layers learn (2106.09685), scaled by 2."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    torch.manual_seed(seed)  # the same adapters on every process
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data  # few, and those that learn
    # Recomputed activations need an input with a gradient, and the embedding's is frozen now.
    model.enable_input_require_grads()


@contextlib.contextmanager
def without_adapters(model):
    """For as long as the block lasts, the model is the one that the adapters were added to."""
    adapted = [module for module in model.modules() if hasattr(module, "set_scale")]
    training = model.training
    for layer in adapted:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield model.eval()
    finally:
        for layer in adapted:
            layer.set_scale(ADAPTER, 1.0)
        model.train(training)


def shard(model, bf16: bool, device) -> None:
    """Spreads float32 weights, gradients and optimizer over the processes (FSDP2); bf16: to compute in.

    The first process holds the model; on the others it may be without contents.
    """
    contents = model.state_dict() if dist.get_rank() == 0 else {}
    if model.device.type == "meta":
        model.to_empty(device="cpu")  # room that costs memory only where it is written to
        model.tie_weights()
    # FSDP gathers weights around a module's forward(), and training calls the decoder: so that is forward().
    model.forward = lambda ids: hidden_states(model, ids, bf16)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    options = whole_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    whole_state.set_model_state_dict(model, contents, options=options)
    for buffer in model.buffers():  # those of rotary embeddings are in no state
        dist.broadcast(buffer, 0)


def is_plain(model) -> bool:
    """Whether every weight is one tensor: no adapters, no shards."""
    return not isinstance(model, FSDPModule) and not hasattr(model, "peft_config")


def whole(p: torch.Tensor) -> torch.Tensor:
    """A parameter in one piece, gathered where it is sharded."""
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def reshard(model) -> None:
    """After a pass without gradient the root still holds gathered weights, rounded to the compute type."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_weights(model):
    """(name, weight) of every parameter of the plain architecture: adapters merged, shards gathered.

    One tensor at a time, so that no process needs room for a second model. All processes call it together.
    """
    reshard(model)
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole(p)
        if name.endswith(".base_layer.weight"):
            owner = modules[name.removesuffix(".base_layer.weight")]
            a, b = (whole(getattr(owner, side)[ADAPTER].weight) for side in ("lora_A", "lora_B"))
            weight = (weight + owner.scaling[ADAPTER] * (b @ a)).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def trained_state(model, optimizer) -> dict:
    """{"optimizer", "adapter"}: what a checkpoint holds beside weights, in memory of the first process."""
    reshard(model)
    adapter = {name: whole(p).cpu() for name, p in model.named_parameters() if ".lora_" in name}
    if not isinstance(model, FSDPModule):  # bitsandbytes unwraps its state in its own methods alone
        return {"optimizer": optimizer.state_dict(), "adapter": adapter}
    options = whole_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = whole_state.get_optimizer_state_dict(model, optimizer, options=options)
    return {"optimizer": moments, "adapter": adapter}


def load_trained_state(model, optimizer, saved: dict) -> None:
    """What trained_state() gave, or {} at a start; every process maps the file and keeps its own shards."""
    if not saved:
        return
    options = whole_state.StateDictOptions(full_state_dict=True, strict=False)
    if saved["adapter"]:
        whole_state.set_model_state_dict(model, saved["adapter"], options=options)
    if isinstance(model, FSDPModule):
        whole_state.set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
    else:
        optimizer.load_state_dict(saved["optimizer"])
