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
from scaling import model as net  # noqa: E402


def whole(model):
    return {name: weight.clone() for name, weight in net.whole_weights(model)}


def reference_logps(model, args, batch):
    """Log-probs under the starting model of what is this process's share."""
    for r in batch:
        r["weight"] = 0.0
    with net.without_adapters(model):
        train_grpo.add_logps(model, batch, "ref_logps", args)
    return [(tuple(r["ids"]), r["ref_logps"]) for r in batch if "ref_logps" in r]


def main(path, out, flags):
    args = arguments("--minibatches", "2", "--lr", "1e-3", "--micro-tokens", "64", "--kl-coef", "0.1", *flags)
    args.model = path
    model, reference, optimizer = net.build(args, None, True, train_grpo.DEVICE)
    method, found = methods.Method(args, None), {"first": None, "losses": [], "norms": []}
    start = reference_logps(reference, args, random_batch(seed=9))
    # One step without moments: what is near 0 stays near 0.
    plain = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    stats = train_grpo.update(model, reference, plain, random_batch(seed=8), method, args)
    found |= {"first": whole(model), "first_loss": stats["loss"], "first_norm": stats["grad_norm"]}
    for k in range(4):
        # The last batch has fewer responses than there are processes: one of them has none of its own.
        batch = random_batch(1 if k == 3 else 7, seed=k)
        stats = train_grpo.update(model, reference, optimizer, batch, method, args)
        found["losses"].append(stats["loss"])
        found["norms"].append(stats["grad_norm"])
        if k == 1:  # a checkpoint in the middle
            found["masters"] = {n: net.whole(p).clone() for n, p in model.named_parameters()}
            again = reference_logps(reference, args, random_batch(seed=9))
            assert all((a[1] == b[1]).all() for a, b in zip(start, again, strict=True))
            again = [r | {"weight": 0.0} for r in random_batch(seed=9)]
            train_grpo.add_logps(model, again, "old_logps", args)  # a pass without gradient
            train_grpo.save_checkpoint(out + ".run", 2, model, Nothing(), optimizer, {"step": 2}, args)
    found["weights"] = whole(model)
    # Another process's life: from the checkpoint on.
    folder = os.path.join(out + ".run", "checkpoint-2")
    saved = torch.load(os.path.join(folder, "trainer_state.pt"), map_location="cpu", weights_only=True)
    again = net.load_model(path if args.lora else folder, args)
    model, reference, optimizer = net.build(args, again, True, train_grpo.DEVICE)
    net.load_trained_state(model, optimizer, saved)
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
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    if train_grpo.WORLD > 1:
        state = PartialState(cpu=train_grpo.DEVICE.type == "cpu")
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
    if train_grpo.WORLD > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort the interpreter's own end
