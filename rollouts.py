"""One training batch: rows -> responses, checked -> rollouts -> rewards and advantages.

sample_batch() is one step's worth of it: the next rows of the data, a group of responses to each of them, the
verdict on every response; with dynamic sampling, groups that teach nothing are replaced. Which rows, prompts
and samples these are depends on (seed, step, data position) alone, on every process alike.

`s` is the trainer's state: s.rows, s.tokenizer, s.sampler, s.model, s.reference, s.memory (methods.py), ...
"""

import contextlib
import inspect
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import evaluate
import faults
import methods
from data import BadInput, annotate, encode_prompt, load_problems
from rewards import ADVANTAGES, REWARDS
from toy import task as toy
from verifier import check_answers

# ------------------------------------------------------------------------------------------------------------
# Which rows


def load_rows(args) -> list[dict]:
    """Training rows of the Row contract; a budget distribution given here replaces the rows' own budgets."""
    rows = toy.problems(args.data, "train", 8000) if args.data in toy.TASKS else load_problems(args.data)
    rows = rows[: args.limit or None]  # methods with a memory need prompts that come back
    if args.budgets:
        mode = "none" if args.budgets == "none" else args.mode
        rows = annotate(rows, args.budgets, mode, args.wording, 1, args.seed)
    if not all(row.get("prompt") for row in rows):
        raise BadInput(f"--data ({args.data}) has rows without a prompt: use data.py, or give --budgets")
    budgets = [row["budget"] for row in rows if row.get("budget")]
    # Without a budget these rewards are plain correctness: the run would look fine and learn no length.
    needed = args.reward.startswith(("lcpo", "tulu", "peaked")) or args.cut_at_budget
    if needed and not budgets and args.budget_schedule == "none":
        has = "--budgets none asks for none" if args.budgets else f"--data ({args.data}) has none"
        raise BadInput(f"--reward ({args.reward}) needs budgets, but {has}: give --budgets")
    if budgets and max(budgets) > args.max_tokens:
        raise BadInput(
            f"a budget of {max(budgets)} tokens exceeds --max-tokens ({args.max_tokens}), the response cap: "
            f"raise --max-tokens or draw smaller budgets"
        )
    return rows


def check_prompts(rows: list[dict], tokenizer, args, context: int) -> int:
    """Length of the longest prompt in tokens, after checking that it leaves room for a response."""
    longest = methods.longest_prompt(rows, tokenizer, args)
    if longest + args.max_tokens > context:
        raise BadInput(
            f"the longest prompt ({longest} tokens) and --max-tokens ({args.max_tokens}) exceed the model's "
            f"context ({context}): lower --max-tokens, or drop long prompts with data.py --max-prompt-tokens"
        )
    return longest


def draw_rows(rows: list[dict], args, first: int, count: int, epochs: dict) -> list[dict]:
    """`count` rows from position `first` on: the data in a new random order every epoch, without end.

    `epochs` remembers the order and the budgets of an epoch; it may be empty at any time.
    """
    # No iterator and no generator is kept between steps: a position says it all, so a resume needs no more.
    chosen = []
    for position in range(first, first + count):
        epoch, i = divmod(position, len(rows))
        if epoch not in epochs:
            epochs.pop(epoch - 2, None)
            order = np.random.default_rng([args.seed, epoch]).permutation(len(rows))
            epochs[epoch] = order, resampled(rows, args, epoch) if args.resample_budgets else rows
        order, drawn = epochs[epoch]
        chosen.append(drawn[order[i]] | {"position": position})
    return chosen


def resampled(rows: list[dict], args, epoch: int) -> list[dict]:
    """The rows with the budgets of this epoch; the first epoch keeps those that were checked at the start."""
    if epoch == 0:
        return rows
    return annotate(rows, args.budgets, args.mode, args.wording, 1, args.seed + 1_000_003 * epoch)


# ------------------------------------------------------------------------------------------------------------
# From responses to advantages


def roll_out(
    s, args, state, rows: list[dict], n: int, key: list[int], plain: bool = False
) -> tuple[list, dict]:
    """n checked responses to each row, drawn from `key`: each process samples its share, every one gets all.

    `plain`: prompts as they are, without subgroups or cuts (monitor sets, reference samples).
    """
    rank, processes = state.process_index, state.num_processes
    own = rows[len(rows) * rank // processes : len(rows) * (rank + 1) // processes]
    lap(s, "rest")
    if plain:
        prompts = [encode_prompt(s.tokenizer, row["prompt"]) for row in own]
        alike = methods.REQUEST | {"n": n, "cap": args.max_tokens, "expected": args.max_tokens}
        plans = [[alike | {"prompt_ids": p}] for p in prompts]
    else:
        plans = [methods.requests(row, n, s.tokenizer, args, s.memory) for row in own]
    # One number per (seed, step, process, ...): a resumed run needs no generator's history.
    seed = int(np.random.SeedSequence([args.seed, key[0], rank, *key[1:]]).generate_state(1)[0])
    groups, checks = [], []
    # Answers are checked while others are still being written: the checkers are processes of their own.
    with ThreadPoolExecutor(1) as thread:

        def check(i, group):
            checks.append(thread.submit(score, [group], [own[i]], s.tokenizer, args))

        with contextlib.suppress(faults.Stopped), faults.interruptible():
            groups = methods.sample(s.sampler, plans, args.temperature, seed, check)
        lap(s, "sample")
        counts = evaluate.sum_counts([c.result() for c in checks]) if groups else {}
    if not plain and groups:
        methods.cut_outliers(groups, own, s.tokenizer, args)
        methods.score_conciseness(groups, s.conciseness)
    # A signal to one of them ends the step for all: they go on together or not at all.
    counts["signals"] = int(faults.ASKED["signal"] > 0)
    # Every process gets the whole batch, so memory and advantages cannot differ between them.
    if processes > 1:
        groups, counts = evaluate.gather(groups), evaluate.sum_counts(evaluate.gather([counts]))
    lap(s, "verify")
    if counts.pop("signals"):
        raise faults.Stopped
    return groups, counts


def lap(s, name: str | None = None) -> None:
    """Adds the time since the last call to s.seconds[name]."""
    now = time.monotonic()
    if name:
        s.seconds[name] += now - s.clock
    s.clock = now


def sample_batch(s, args, state, step: int) -> tuple[list, list, dict, dict]:
    """(rows, groups, counters of the answer check, metrics) of a step; updates memory and data position.

    With dynamic sampling groups without information are replaced, at most --refills times; what is missing
    then stays missing. If no group holds any, the first ones are taken as they are.
    """
    from weights import as_reference

    rows, groups, seen_rows, seen, counts = [], [], [], [], []
    processes, dynamic = state.num_processes, args.dynamic_sampling != "none"
    if monitor := methods.monitor_rows(s.rows, step, args):
        found, _ = roll_out(
            s, args, state, monitor, methods.option("samples", args), [step, 0, 2], plain=True
        )
        methods.set_targets(found, args, s.memory)
    for turn in range(1 + dynamic * args.refills):
        missing = -(-(args.prompts_per_step - len(groups)) // processes) * processes
        position = s.memory.get("position", step * args.prompts_per_step)
        new_rows = methods.scheduled(draw_rows(s.rows, args, position, missing, s.epochs), step, args)
        s.memory["position"] = position + missing
        new, new_counts = roll_out(
            s, args, state, new_rows, args.group_size, [step, turn] if turn else [step]
        )
        counts.append(new_counts)
        if unknown := methods.new_prompts(new_rows, args, s.memory):
            with as_reference(s.reference, s.model.device) as starting:
                s.sampler.sync(starting)
                key = [step, turn, 1]
                found, _ = roll_out(s, args, state, unknown, args.reference_samples, key, plain=True)
            s.sampler.sync(s.model)
            methods.remember_reference(unknown, found, s.memory)
        seen_rows, seen = seen_rows + new_rows, seen + new
        if dynamic:
            rollouts = to_rollouts(new, new_rows, args, step, s.memory)
            total, _, _ = rewards_and_advantages(rollouts, args, s.memory)
            keep = methods.informative(rollouts, total, args)
            new_rows, new = ([x for x, k in zip(xs, keep, strict=True) if k] for xs in (new_rows, new))
        rows, groups = rows + new_rows, groups + new
        if len(groups) >= args.prompts_per_step:
            break
    s.seen, counts = (seen, seen_rows), evaluate.sum_counts(counts)
    if not dynamic:
        return rows, groups, counts, {}
    rows, groups = rows[: args.prompts_per_step], groups[: args.prompts_per_step]
    m = {"kept_groups": len(groups), "sampled_groups": len(seen)}
    m["sampled_accuracy"] = np.mean([r["correct"] for g in seen for r in g])
    if not groups:
        rows, groups = seen_rows[: args.prompts_per_step], seen[: args.prompts_per_step]
    return rows, groups, counts, m


def score(groups: list[list[dict]], rows: list[dict], tokenizer, args) -> dict:
    """Adds text, length, truncated, correct to each response; returns the counters of the answer check."""
    flat = [(r, row) for row, group in zip(rows, groups, strict=True) for r in group]
    for r, _ in flat:
        stopped = r["finish_reason"] == "stop"
        # Only the end token is cut off: </think> is a special token in many models, and must stay readable.
        r["text"] = tokenizer.decode(r["ids"][:-1] if stopped else r["ids"], skip_special_tokens=False)
        r["length"] = len(r["ids"])
        r["truncated"] = int(not stopped)
    # A response that was cut off earns nothing for its answer in any method: it is not worth checking.
    whole = [(r, row) for r, row in flat if not r["truncated"]]
    correct, counts = check_answers(
        [r["text"] for r, _ in whole], [row["answer"] for _, row in whole], [row["kind"] for _, row in whole],
        [row.get("choices") for _, row in whole], args.require_think, args.verify_timeout,
    )  # fmt: skip
    for r, _ in flat:
        r["correct"] = 0
    for (r, _), ok in zip(whole, correct, strict=True):
        r["correct"] = int(ok)
    return counts


def to_rollouts(groups: list[list[dict]], rows: list[dict], args, step: int, memory: dict) -> dict:
    """One batch as the reward functions read it: arrays [P, G] of responses and [P] of prompts."""
    # A missing budget is nan, not -1: a sentinel would be taken for a number by some reward sooner or later.
    table = {k: np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length", "truncated")}
    table["budget"] = np.array([row.get("budget") or np.nan for row in rows], dtype=np.float64)
    table["mode"] = [row.get("mode") for row in rows]
    table |= {"max_length": args.max_tokens, "step": step}
    return table | methods.fields(groups, rows, args, memory)


def rewards_and_advantages(rollouts: dict, args, memory: dict) -> tuple[np.ndarray, dict, np.ndarray]:
    """(total reward [P, G], its parts {name: [P, G]}, advantages [P, G])."""
    function, parts = REWARDS[args.reward], {}
    # Reward functions are copied into other projects, so they know nothing of args: names match by signature.
    options = args.reward_args | methods.reward_options(rollouts["step"], args, memory)
    total = function(rollouts, **options)
    if "parts" in inspect.signature(function).parameters:
        parts = function(rollouts, **options, parts=True)
    rewards = total
    if args.advantage == "gdpo":  # decoupled: each part is normalised by itself before they are added
        rewards = np.stack(list(parts.values())) if parts else total[None]
    return total, parts, ADVANTAGES[args.advantage](rewards, rollouts, **args.advantage_args)


def check_reward(rows: list[dict], args) -> None:
    """Try reward and advantage on an invented batch: what does not fit shows now, not after sampling."""
    rows = methods.scheduled(rows[:2], 0, args)
    groups, memory = methods.invented(rows, args)
    try:
        rewards_and_advantages(to_rollouts(groups, rows, args, 0, memory), args, memory)
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(
            f"--reward {args.reward} with --advantage {args.advantage} does not work here: {error.args[0]}"
        ) from None
