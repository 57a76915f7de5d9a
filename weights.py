"""Weights that are not one plain tensor each: adapters (LoRA) and shards (FSDP2), and how they become whole.

whole_weights() is what the sampler is given and what checkpoints hold, one tensor at a time, so that no
process needs room for a second model. All processes call it together: a shard is gathered from all of them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data import BadInput

ADAPTER = "default"


def add_lora(model, rank: int) -> None:
    """Freezes the model; adapters of `rank` beside all its linear layers learn (2106.09685), scaled by 2."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise BadInput(f"--lora {rank} needs the package peft: pip install peft") from None
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data  # few, and those that learn
    # Recomputed activations need an input with a gradient, and the embedding's is frozen now.
    model.enable_input_require_grads()


@contextlib.contextmanager
def as_reference(model, device) -> Iterator:
    """The starting model on `device`, for as long as the block lasts.

    `model` with adapters is the trained one: they are left out. One in CPU memory (--offload-reference) is
    copied to the device; afterwards the copies are dropped.
    """
    adapted = [module for module in model.modules() if hasattr(module, "set_scale")]
    training, device = model.training, torch.device(device)
    tables = [(m, table) for m in model.modules() for table in (m._parameters, m._buffers)]
    held = [(m, name, t) for m, table in tables for name, t in table.items() if t is not None]
    away, copies = [(m, name, t) for m, name, t in held if t.device.type != device.type], {}
    try:
        for layer in adapted:
            layer.set_scale(ADAPTER, 0.0)
        for module, name, t in away:
            if id(t) not in copies:  # input and output embeddings may be one
                copies[id(t)] = t.detach().to(device, non_blocking=True)
                if isinstance(t, torch.nn.Parameter):
                    copies[id(t)] = torch.nn.Parameter(copies[id(t)], requires_grad=False)
            setattr(module, name, copies[id(t)])
        yield model.eval()
    finally:
        for module, name, t in away:
            setattr(module, name, t)
        for layer in adapted:
            layer.set_scale(ADAPTER, 1.0)
        model.train(training)


def shard(model, run: Callable, args, device, processes: int) -> None:
    """Spreads weights, gradients and optimizer over the processes; `run` becomes the module's forward()."""
    # FSDP gathers a layer's weights around that module's forward(). The head is used outside of
    # transformers' own forward, so ours takes its place: then it is gathered like the rest.
    model.forward = functools.partial(run, model)
    mesh = torch.distributed.init_device_mesh(device.type, (processes,))
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    # The tensors of a batch keep their types: log-probs and advantages are no activations.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(model) -> bool:
    """Whether shard() was applied to it."""
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered from all processes where it is sharded, without gradient."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def whole_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of every parameter of the plain architecture: adapters merged, shards gathered."""
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        owner = modules[name.rpartition(".")[0].removesuffix(".base_layer")]
        if ".lora_" in name:
            continue
        weight = whole(p)
        if name.endswith(".base_layer.weight"):
            a, b = (whole(getattr(owner, side)[ADAPTER].weight) for side in ("lora_A", "lora_B"))
            weight = (weight + owner.scaling[ADAPTER] * (b @ a)).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight


def trained_state(model, optimizer) -> dict:
    """{"optimizer", "adapter"}: what a checkpoint holds beside whole weights; alike on every process."""
    adapter = {name: whole(p).cpu() for name, p in model.named_parameters() if ".lora_" in name}
    state = optimizer.state_dict()
    if is_sharded(model):
        entries = {i: {k: whole(v).cpu() if torch.is_tensor(v) else v for k, v in entry.items()}
                   for i, entry in state["state"].items()}  # fmt: skip
        state = state | {"state": entries}
    return {"optimizer": state, "adapter": adapter}


def load_trained_state(model, optimizer, saved: dict) -> None:
    """What trained_state() gave; every process holds all of it and keeps its own shards."""
    from torch.distributed.tensor import distribute_tensor

    def like(p, value):
        if not (isinstance(p, DTensor) and torch.is_tensor(value) and value.shape == p.shape):
            return value
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in saved["adapter"]:
                p.copy_(like(p, saved["adapter"][name].to(p.device)))
    state, parameters = saved["optimizer"], [p for g in optimizer.param_groups for p in g["params"]]
    entries = {i: {k: like(parameters[i], v) for k, v in e.items()} for i, e in state["state"].items()}
    optimizer.load_state_dict(state | {"state": {}})
    # load_state_dict would round the moments of bfloat16 weights to their type.
    for i, entry in entries.items():
        p = parameters[i]
        optimizer.state[p] = {k: v.to(p.device) if torch.is_tensor(v) else v for k, v in entry.items()}
