"""Weights that are not one plain tensor each: adapters (LoRA) and shards (FSDP2), and how they become whole.

whole_weights() is what the sampler is given and what checkpoints hold, one tensor at a time, so that no
process needs room for a second model. All processes call it together: a shard is gathered from all of them.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
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


def shard(model, forward, bf16: bool, device) -> None:
    """Spreads weights, gradients and optimizer over the processes; `forward(model, ids)` is its forward().

    The first process holds the model; on the others it may be without contents (device_map="meta").
    """
    contents = model.state_dict() if dist.get_rank() == 0 else {}
    if model.device.type == "meta":
        model.to_empty(device="cpu")  # room that costs memory only where it is written to
        model.tie_weights()
    # FSDP gathers a layer's weights around that module's forward(); the decoder alone is called in training.
    model.forward = lambda ids: forward(model, ids)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, contents, options=options)
    for buffer in model.buffers():  # those of rotary embeddings are in no state
        dist.broadcast(buffer, 0)


def whole(p):
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def whole_weights(model):
    """(name, weight) of every parameter of the plain architecture: adapters merged, shards gathered."""
    if isinstance(model, FSDPModule):
        # After a pass without gradient the root still holds gathered weights, rounded to the compute type.
        model.reshard()
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
    """{"optimizer", "adapter"}: what a checkpoint holds beside whole weights, whole on the first process."""
    adapter = {name: whole(p).cpu() for name, p in model.named_parameters() if ".lora_" in name}
    if not isinstance(model, FSDPModule):  # bitsandbytes unwraps its state in its own methods alone
        return {"optimizer": optimizer.state_dict(), "adapter": adapter}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {"optimizer": get_optimizer_state_dict(model, optimizer, options=options), "adapter": adapter}


def load_trained_state(model, optimizer, saved: dict) -> None:
    """What trained_state() gave; every process reads it and keeps its own shards."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    if saved["adapter"]:
        set_model_state_dict(model, saved["adapter"], options=options)
    if isinstance(model, FSDPModule):
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
    else:
        optimizer.load_state_dict(saved["optimizer"])
