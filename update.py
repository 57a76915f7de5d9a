"""The update: a checked batch of responses -> micro-batches -> gradients -> optimizer steps.

A batch is a flat list of responses {"prompt_ids", "ids", "logps", "advantage", ...}, the same list on every
process; where tokens were forced, "untrained" lists those without a loss, and "mix" corrects the first one's
old log-prob. A response belongs to one minibatch (an optimizer step), there to one process, there to one
micro-batch (a forward and backward pass). Logits of a whole micro-batch never exist: see losses.head_loss.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from data import BadInput, first_line
from losses import drpo_weights, head_loss, mixture_logp, policy_loss, response_weights, token_logps
from scaling import plan
from weights import as_reference, is_sharded, whole

if TYPE_CHECKING:  # libraries that are loaded late
    from transformers import PreTrainedModel

SUMMED = "clip_fraction kl loss entropy logp_gap tokens padded real drpo_kl".split()

# ------------------------------------------------------------------------------------------------------------
# Micro-batches


def micro_batches(batch: list[dict], limit: int, count: int = 0) -> list[list[dict]]:
    """Longest first, as many as fit into `limit` tokens when padded to the longest; at least `count` of them.

    A batch with fewer responses than `count` is filled up with fillers.
    """
    # With budgets from 100 to 4000, batches in random order would be half padding. Longest first also means
    # that the micro-batch which needs most memory is the first one: what fits once, fits to the end of the
    # step.
    parts = []
    for r in sorted(batch, key=total_length, reverse=True):
        if not parts or (len(parts[-1]) + 1) * total_length(parts[-1][0]) > limit:
            parts.append([])
        parts[-1].append(r)
    while parts and len(parts) < count:
        most = max(range(len(parts)), key=lambda i: (len(parts[i]), i))  # of equals the shortest
        half, r = len(parts[most]) // 2, parts[most][-1]
        halves = [parts[most][:half], parts[most][half:]] if half else [[r], [filler(r)]]
        parts[most : most + 1] = halves
    return parts


def filler(r: dict) -> dict:
    """A copy of a response that takes part in a pass and neither teaches nor counts."""
    return r | {"weight": 0.0, "filler": True}


def total_length(r: dict) -> int:
    """Tokens of prompt and response."""
    return len(r["prompt_ids"]) + len(r["ids"])


def trained_positions(r: dict) -> Sequence[int]:
    """Places in r["ids"] of the tokens that the loss sees: all but those that were forced on the policy."""
    untrained = r.get("untrained")
    n = len(r["ids"])
    return [t for t in range(n) if t not in untrained] if untrained else range(n)


def share_of(batch: list[dict], rank: int, processes: int) -> list[dict]:
    """This process's part of the batch: dealt out by length, back and forth, so that all get equally much."""
    turns = [*range(processes), *reversed(range(processes))]
    order = sorted(batch, key=total_length, reverse=True)
    return [r for i, r in enumerate(order) if turns[i % len(turns)] == rank]


def to_tensors(micro: list[dict], device) -> dict:
    """Padded input ids [N, width], and flat [T] tensors of the response tokens: place, target, cargo."""
    # Which tokens count follows from lengths alone: the end token is trained even if it is also the padding.
    ids = np.zeros((len(micro), max(map(total_length, micro))), dtype=np.int64)
    names = "row column target sampler_logp old_logp ref_logp advantage weight mix_a mix_b".split()
    flat = {name: [] for name in names}
    for i, r in enumerate(micro):
        p, kept = len(r["prompt_ids"]), trained_positions(r)
        ids[i, : total_length(r)] = r["prompt_ids"] + r["ids"]
        flat["row"] += [i] * len(kept)
        flat["column"] += [p + t - 1 for t in kept]  # a token is predicted from the position before it
        flat["target"] += [r["ids"][t] for t in kept]
        flat["sampler_logp"] += [r["logps"][t] for t in kept]
        flat["old_logp"] += r.get("old_logps", [])
        flat["ref_logp"] += r.get("ref_logps", [])
        flat["advantage"] += [r["advantage"]] * len(kept)
        flat["weight"] += [r["weight"]] * len(kept)
        a, b = r.get("mix", (-math.inf, 0.0))
        flat["mix_a"] += [a, *[-math.inf] * (len(kept) - 1)][: len(kept)]
        flat["mix_b"] += [b, *[0.0] * (len(kept) - 1)][: len(kept)]
    tensors = {k: torch.tensor(v, device=device) for k, v in flat.items()}
    return tensors | {
        "ids": torch.from_numpy(ids).to(device),
        "mixed": torch.tensor(any("mix" in r for r in micro)),
    }


# ------------------------------------------------------------------------------------------------------------
# Forward and backward


def hidden_states(model, t: dict, args) -> torch.Tensor:
    """Last hidden states [T, d] from which the response tokens of to_tensors' `t` are predicted."""
    with torch.autocast(t["ids"].device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        # No attention mask: padding is on the right, where no real token of a causal model can see it.
        hidden = model.get_decoder()(input_ids=t["ids"], use_cache=False).last_hidden_state
    hidden = hidden[t["row"], t["column"]]
    return hidden.bfloat16() if args.dtype == "bfloat16" else hidden


def run(model, t: dict, args, loss_of: Callable | None = None) -> tuple[torch.Tensor, ...]:
    """token_logps of the response tokens of to_tensors' `t` under `model`; with `loss_of` head_loss."""
    hidden, head = hidden_states(model, t, args), model.get_output_embeddings().weight
    if loss_of is None:
        return token_logps(hidden, head, t["target"], args.temperature)
    return head_loss(hidden, head, t["target"], loss_of, args.temperature)


def model_logps(model, t: dict, args, loss_of: Callable | None = None) -> tuple[torch.Tensor, ...]:
    """run(); a sharded model is called as a module, so that its weights are gathered around it."""
    return model(t, args, loss_of) if is_sharded(model) else run(model, t, args, loss_of)


def loss_of_tokens(logp: torch.Tensor, t: dict, args, part: slice = slice(None)) -> tuple:
    """(loss, diagnostics, old and sampler's log-probs) of the tokens `part` of `t`; all that --flags say."""
    # With one optimizer step a batch, and in the first of several, the policy is still the one that sampled.
    old = t["old_logp"][part] if len(t["old_logp"]) else logp.detach()
    old = mixture_logp(old, t["mix_a"][part], t["mix_b"][part]) if t["mixed"] else old
    sampled = torch.where(t["sampler_logp"][part].isnan(), old, t["sampler_logp"][part])
    if args.objective == "drpo":  # linear: its gradient is the objective's, its value says nothing
        return (t["weight"][part] * logp).sum(), {}, old, sampled
    loss, stats = policy_loss(
        logp, old, t["advantage"][part], t["weight"][part], t["row"][part], ratio=args.ratio,
        clip_low=args.clip_low, clip_high=args.clip_high, dual_clip=args.dual_clip or None,
        sampler_logp=sampled, tis_cap=args.tis_cap or None,
        ref_logp=t["ref_logp"][part] if len(t["ref_logp"]) else None,
        kl_coef=args.kl_coef, kl_estimator=args.kl_estimator,
    )  # fmt: skip
    return loss, stats | {"loss": loss.detach()}, old, sampled


def backward(model, micro: list[dict], args, device, sums: dict) -> torch.Tensor:
    """Adds a micro-batch's gradient to p.grad and its diagnostics to `sums`; its largest log-prob gap."""
    t = to_tensors(micro, device)
    if args.ratio == "sequence":  # a token's loss depends on its whole response: the head runs once more
        logp, entropy = model_logps(model, t, args)
        loss = loss_of_tokens(logp, t, args)[0]
    else:
        part_loss = lambda logp, part: loss_of_tokens(logp, t, args, part)[0]  # noqa: E731
        loss, logp, entropy = model_logps(model, t, args, part_loss)
    # Gradients of micro-batches add up in p.grad; their weights make the sum the mean over the minibatch.
    loss.backward()
    _, stats, old, sampled = loss_of_tokens(logp.detach(), t, args)
    gap = (old - sampled).abs()
    stats |= {"entropy": entropy.sum(), "logp_gap": gap.sum(), "tokens": torch.tensor(len(logp))}
    stats |= {"padded": torch.tensor(t["ids"].numel()), "real": torch.tensor(sum(map(total_length, micro)))}
    if not micro[0].get("filler"):
        sums |= {k: sums[k] + v.double().cpu() for k, v in stats.items()}
    return gap.max()


def deal_out(batch: list[dict], args, rank: int, processes: int) -> tuple[list, list, list]:
    """(minibatches, this process's share of each, passes for each); sets every response's token weight."""
    n = args.minibatches
    parts = [batch[len(batch) * k // n : len(batch) * (k + 1) // n] for k in range(n)]
    for part in parts:
        # The denominator of the loss is that of all processes and micro-batches, fixed before any is run.
        lengths = torch.tensor([len(trained_positions(r)) for r in part])
        weights = response_weights(lengths, args.loss_reduction, args.max_tokens)
        for r, weight in zip(part, weights.tolist(), strict=True):
            r["weight"] = weight
    shares = [[share_of(part, i, processes) for i in range(processes)] for part in parts]
    # With sharded weights each pass is a matter of all processes: they run equally many, an idle one fillers.
    for part, each in zip(parts, shares, strict=True):
        spare = [filler(min(part, key=total_length))] if part else []
        each[:] = [share or spare for share in each]
    counts = [max(len(micro_batches(share, args.micro_tokens)) for share in part) for part in shares]
    return parts, [part[rank] for part in shares], counts


def update(
    model,
    reference: "PreTrainedModel | None",
    optimizer,
    batch: list[dict],
    args,
    rank: int = 0,
    processes: int = 1,
    device="cpu",
) -> dict:
    """Optimizer steps over the batch (the same list on every process); means of the diagnostics."""
    n, gap_max, norms = args.minibatches, torch.zeros(1, device=device), []
    sums = dict.fromkeys(SUMMED, torch.zeros((), dtype=torch.float64))
    parts, shares, counts = deal_out(batch, args, rank, processes)
    for k in range(1, n):  # the first optimizer step updates the policy that sampled: its ratios are 1
        add_logps(model, shares[k], args, device, count=counts[k])
    if reference is not None:  # in one go, before any activation of the policy is held
        with as_reference(reference, device) as starting:
            for mine, count in zip(shares, counts, strict=True):
                add_logps(starting, mine, args, device, "ref_logps", count)
    for part, mine, count in zip(parts, shares, counts, strict=True):
        if not part:  # fewer informative responses than optimizer steps
            continue
        optimizer.zero_grad(set_to_none=True)
        if args.objective == "drpo":
            for name, value in weigh_drpo(model, part, mine, args, processes, device, count).items():
                sums[name] = sums[name] + value / processes
        for micro in micro_batches(mine, args.micro_tokens, count):
            gap_max = torch.maximum(gap_max, backward(model, micro, args, device, sums))
        learned = [p for p in model.parameters() if p.requires_grad]
        for p in learned if processes > 1 else []:
            # A sum, not a mean: the weights divide by the whole batch already.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.mul_(processes) if is_sharded(model) else dist.all_reduce(p.grad)
        norms.append(whole(torch.nn.utils.clip_grad_norm_(learned, args.grad_clip)).item())
        optimizer_step(optimizer, args.seed)
    optimizer.zero_grad(set_to_none=True)  # the sampler may need the room
    if processes > 1:
        total = torch.stack(list(sums.values())).to(device)
        dist.all_reduce(total)
        dist.all_reduce(gap_max, dist.ReduceOp.MAX)
        sums = dict(zip(sums, total.cpu(), strict=True))
    sums = {k: v.item() for k, v in sums.items()}
    means = {
        "loss": sums["loss"] / n,
        "logp_gap_max": gap_max.item(),
        "grad_norm": float(np.mean(norms or [0])),
    }
    per_token = ["entropy", "clip_fraction", *(["kl"] if reference is not None else []), "logp_gap"]
    means |= {k: sums[k] / max(sums["tokens"], 1) for k in per_token}
    if args.objective == "drpo":
        means["drpo_kl"] = sums["drpo_kl"] / n
    return means | {"padding": 1 - sums["real"] / max(sums["padded"], 1)}


def training_speed(
    model,
    reference: "PreTrainedModel | None",
    batch: list[dict],
    args,
    seconds: float,
    processes: int = 1,
    device="cpu",
) -> dict:
    """{"train_tflops": TFLOP/s of a process, "train_mfu": their share of the GPU's peak, where it is known}.

    Counted is what the update of `batch` needs (plan.update_flops): padding and recomputation are no work.
    """
    try:
        config = plan.checked(model.config.to_dict(), "")
    except BadInput:  # no dense Llama-like model: its FLOPs are not known
        return {}
    parts = plan.update_flops(config, [(len(r["prompt_ids"]), len(r["ids"])) for r in batch])
    # Of 6 FLOPs 2 are the forward pass. Frozen weights need no gradient: 4. Passes without gradient: 2 each.
    forward = (reference is not None) + (args.objective == "drpo") + 1 - 1 / args.minibatches
    spent = sum(f * (4 if args.lora and kind == "linear" else 6) for kind, _, _, f in parts) / 6
    spent += forward * sum(part[3] for part in parts) / 3
    found = {"train_tflops": spent / seconds / processes / 1e12}
    if torch.device(device).type == "cuda":
        peak = plan.peak_tflops(torch.cuda.get_device_name(device), args.dtype)
        found |= {"train_mfu": found["train_tflops"] / peak} if peak else {}
    return found


def weigh_drpo(
    model, part: list[dict], mine: list[dict], args, processes: int, device, count: int = 0
) -> dict:
    """Sets the token weights of this process's responses to DRPO's gradient; its loss and its KL."""
    # An answer's pull depends on all answers to its prompt, so a pass without gradient comes first.
    add_logps(model, mine, args, device, "new_logps", count)
    mine = [r for r in mine if not r.get("filler")]
    table = torch.zeros(len(part), 3, dtype=torch.float64)  # score, tokens, sum of old - new
    places = {id(r): i for i, r in enumerate(part)}
    for r in mine:
        new = np.array(r["new_logps"])
        moved = float(np.sum(np.array(r.get("old_logps", new)) - new))
        table[places[id(r)]] = torch.tensor([new.mean() if len(new) else 0.0, len(new), moved])
    if processes > 1:
        table = table.to(device)
        dist.all_reduce(table)
    score, length, moved = table.cpu().T
    kl = moved.sum() / length.sum().clamp(min=1)
    group, right = (torch.tensor([r[k] for r in part]) for k in ("group", "correct"))
    loss, weights = drpo_weights(score, length, group, right, kl, **args.objective_args)
    for r in mine:
        r["weight"] = weights[places[id(r)]].item()
    return {"loss": loss, "drpo_kl": kl}


def add_logps(model, batch: list[dict], args, device, name: str = "old_logps", count: int = 0) -> None:
    """r[name]: log-probs of the trained tokens of every response under the policy as it is now."""
    # Not the sampler's log-probs: a ratio compares two policies, and is 1 where the policy has not changed.
    with torch.no_grad():
        for micro in micro_batches(batch, args.micro_tokens, count):
            flat = model_logps(model, to_tensors(micro, device), args)[0].tolist()
            for r in micro:
                n = len(trained_positions(r))
                r[name], flat = flat[:n], flat[n:]


def learning_rate(step: int, args) -> float:
    """Learning rate of a step: linear warm-up, then constant, or cosine / linear down to 0 at the end."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.steps - args.warmup_steps)
    factors = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}
    return args.lr * factors[args.lr_schedule]


def make_optimizer(model, args) -> torch.optim.Optimizer:
    """AdamW over all that learns; --optim adamw8bit: its moments take 2 bytes a parameter instead of 8."""
    options = {"lr": args.lr, "betas": tuple(args.betas), "weight_decay": args.weight_decay}
    learned = [p for p in model.parameters() if p.requires_grad]
    if args.optim == "adamw":
        return torch.optim.AdamW(learned, fused=True, **options)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(learned, **options)


def round_at_random(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 -> bfloat16, up or down with the odds that make the mean exact."""
    # bfloat16 is the upper half of the bits: a random lower half, added, carries as often as it should.
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return noise.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def optimizer_step(optimizer, seed: int) -> None:
    """optimizer.step(); weights in bfloat16 take it one at a time in float32 and are rounded at random.

    Its 8 bits lose changes below a 256th: rounded to the nearest, most weights would never move
    (2010.06192). At random they follow the float32 ones in the mean. The draw depends on `seed` and the
    number of the step alone.
    """
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    if learned[0].dtype == torch.float32:
        optimizer.step()
        return
    gradients = [p.grad for p in learned]
    optimizer.zero_grad(set_to_none=True)  # what has no gradient is left out of a step
    for i, p in enumerate(learned):
        if gradients[i] is None:
            continue
        weight, p.data = p.data, p.data.float()
        p.grad, gradients[i] = gradients[i].float(), None
        optimizer.step()
        p.grad = None
        draw = np.random.SeedSequence([seed, int(optimizer.state[p]["step"]), i]).generate_state(1)[0]
        generator = torch.Generator(p.device).manual_seed(int(draw))
        p.data = weight.copy_(round_at_random(p.data, generator))


def check_memory(model, reference: "PreTrainedModel | None", optimizer, prompt: int, args, device) -> None:
    """One update as large as any will be: BadInput, now and not in hour ten, where it does not fit.

    Its responses have `prompt` tokens of prompt and reach the cap. Nothing is learned: the weights of the
    tokens are 0, the optimizer's state is dropped again.
    """
    longest = prompt + args.max_tokens
    r = {"prompt_ids": [0] * prompt, "ids": [0] * args.max_tokens, "logps": [0.0] * args.max_tokens}
    batch = [r | {"advantage": 0.0, "weight": 0.0} for _ in range(max(1, args.micro_tokens // longest))]
    fresh = not optimizer.state
    try:
        if reference is not None:
            with as_reference(reference, device) as starting:
                add_logps(starting, batch, args, device, "ref_logps")
        backward(model, batch, args, device, dict.fromkeys(SUMMED, torch.zeros(())))
        if fresh:
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the training loop sets it at every step
            optimizer_step(optimizer, args.seed)
            optimizer.state.clear()
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "memory" not in str(error):
            raise
        raise BadInput(
            f"--micro-tokens ({args.micro_tokens}) does not fit into memory: an update with {len(batch)} "
            f"responses of {args.max_tokens} tokens, with prompts {longest}, was tried "
            f"({first_line(error)}); lower --micro-tokens, --max-tokens or --vllm-memory, or add "
            f"--gradient-checkpointing, --vllm-sleep or --optim adamw8bit"
        ) from None
    optimizer.zero_grad(set_to_none=True)
