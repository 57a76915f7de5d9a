"""Started by test_sharded.py, alone or by torchrun: updates of a model as train_grpo.py makes it.

two_processes.py MODEL FILE [FLAGS ...]: what the updates did, the weights, and those of a copy that goes on
from a checkpoint, into FILE.
"""

import os
import sys

import torch
from accelerate import PartialState

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from test_loss import arguments, random_batch  # noqa: E402

import methods  # noqa: E402
import train_grpo  # noqa: E402
from scaling import sharded  # noqa: E402


def build(path, args):
    """(model, optimizer) as main() makes them; in a sharded run only the first process reads the weights."""
    import transformers

    options = {"device_map": "meta"} if args.fsdp and train_grpo.RANK else {}
    frozen_type = torch.bfloat16 if args.lora and args.dtype == "bfloat16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=frozen_type, **options).train()
    if args.lora:
        torch.manual_seed(0)
        sharded.add_lora(model, args.lora)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bf16 = args.dtype == "bfloat16"
    if args.fsdp:
        sharded.shard(model, lambda m, ids: train_grpo.hidden_states(m, ids, bf16), bf16, torch.device("cpu"))
    return model, train_grpo.make_optimizer(model, args)


def whole(model):
    return {name: weight.clone() for name, weight in train_grpo.whole_weights(model)}


def reference_logps(model, args, batch):
    """Log-probs under the starting model of what is this process's share."""
    for r in batch:
        r["weight"] = 0.0
    with train_grpo.as_starting_model(model, args):
        train_grpo.add_logps(model, batch, "ref_logps", args)
    return [(tuple(r["ids"]), r["ref_logps"]) for r in batch if "ref_logps" in r]


def main(path, out, flags):
    args = arguments("--minibatches", "2", "--lr", "1e-3", "--micro-tokens", "64", "--kl-coef", "0.1", *flags)
    model, optimizer = build(path, args)
    method, found = methods.Method(args, None), {"first": None, "losses": [], "norms": []}
    reference = model if args.lora else build(path, args)[0].requires_grad_(False)
    start = reference_logps(reference, args, random_batch(seed=9))
    # One step without moments: what is near 0 stays near 0.
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    stats = train_grpo.update(model, reference, plain, random_batch(seed=8), method, args)
    found |= {"first": whole(model), "first_loss": stats["loss"], "first_norm": stats["grad_norm"]}
    saved = None
    for k in range(4):
        # The last batch has fewer responses than there are processes: one of them has none of its own.
        batch = random_batch(1 if k == 3 else 7, seed=k)
        stats = train_grpo.update(model, reference, optimizer, batch, method, args)
        found["losses"].append(stats["loss"])
        found["norms"].append(stats["grad_norm"])
        if k == 1:  # a checkpoint in the middle
            masters = {n: sharded.whole(p).clone() for n, p in model.named_parameters()}
            again = reference_logps(reference, args, random_batch(seed=9))
            assert all((a[1] == b[1]).all() for a, b in zip(start, again, strict=True))
            again = [r | {"weight": 0.0} for r in random_batch(seed=9)]
            train_grpo.add_logps(model, again, "old_logps", args)  # a pass without gradient
            state = {"step": 2}
            train_grpo.save_checkpoint(out + ".run", 2, model, Nothing(), optimizer, state, args)
            found["masters"] = masters
    found["weights"] = whole(model)
    # Another process's life: from the checkpoint on.
    folder = os.path.join(out + ".run", "checkpoint-2")
    saved = torch.load(os.path.join(folder, "trainer_state.pt"), map_location="cpu", weights_only=True)
    model, optimizer = build(path if args.lora else folder, args)
    if args.fsdp or args.lora:
        sharded.load_trained_state(model, optimizer, saved)
    else:
        optimizer.load_state_dict(saved["optimizer"])
    reference = model if args.lora else reference
    for k in (2, 3):
        batch = random_batch(1 if k == 3 else 7, seed=k)
        train_grpo.update(model, reference, optimizer, batch, method, args)
    found["again"] = whole(model)
    if train_grpo.RANK == 0:
        torch.save(found | {"processes": train_grpo.WORLD}, out)


class Nothing:
    """A tokenizer that has nothing to save."""

    def save_pretrained(self, folder):
        pass


if __name__ == "__main__":
    if train_grpo.WORLD > 1:
        state = PartialState(cpu=True)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    if train_grpo.WORLD > 1:
        state.destroy_process_group()
