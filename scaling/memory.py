"""The early word of --check-memory: what does not fit into memory fails now, not in hour ten."""

import numpy as np
import torch

import train_grpo
from data import BadInput, first_line
from scaling.model import without_adapters


def check_memory(model, reference, optimizer, longest: int, args, sampler=None) -> None:
    """One update as large as any will be: prompt and response of `longest` tokens, --micro-tokens at once.

    Weights, moments and gradients are in memory meanwhile, as in the second minibatch of a step. Afterwards
    all is as before: gradients are gone, an optimizer that was new has no state. BadInput where it fails.
    """
    fresh, rates = not optimizer.state, [group["lr"] for group in optimizer.param_groups]
    zeros = np.zeros(args.max_tokens, np.float32)
    r = {"ids": zeros.astype(np.int32), "logps": zeros, "mask": zeros, "advantage": 0.0, "weight": 0.0}
    rows = train_grpo.WORLD * max(1, args.micro_tokens // longest)  # no two share a prompt
    batch = [r | {"prompt_ids": [i % 50] * (longest - args.max_tokens)} for i in range(rows)]
    if args.vllm_sleep and sampler:  # as it is during an update; the next load() wakes it
        sampler.sleep()
    try:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
        if fresh:  # gradients of 0 at a learning rate of 0: the moments are made, the weights stay
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
        if args.kl_coef:
            with without_adapters(reference):
                train_grpo.add_logps(reference, batch, "ref_logps", args)
        for micro in train_grpo.micro_batches(batch, args.micro_tokens):
            train_grpo.backward(model, micro, args)
    except (RuntimeError, MemoryError) as error:  # torch's own, on a GPU and on a CPU, is a RuntimeError
        told = str(error)
        if isinstance(error, RuntimeError) and "out of memory" not in told and "allocate" not in told:
            raise
        raise BadInput(
            f"--micro-tokens ({args.micro_tokens}) does not fit into memory: an update with responses of "
            f"{args.max_tokens} tokens was tried ({first_line(error)[:99]}); lower it, --max-tokens "
            f"or --vllm-memory, or add --gradient-checkpointing, --vllm-sleep, --optim adamw8bit or --lora 32"
        ) from None
    finally:
        if fresh:
            optimizer.state.clear()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
