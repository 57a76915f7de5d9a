"""What a method needs around its reward: other prompts, forced tokens, memory, a second look at answers.

train_grpo.py calls this file at five points of a step, and all of it is off unless a flag asks for it:

    before sampling    scheduled (curriculum budgets), requests (prompts and forced tokens of a group)
    sampling           sample (puts the forced tokens into the responses), monitor rows, reference samples
    after the check    cut_outliers (DOT), score_conciseness (CRF), informative (dynamic sampling)
    rewards            fields (what a reward reads besides lengths), reward_options (targets that move)
    after the update   learn (HAPO, PALU), metrics

`memory` is the one dict that lives on from step to step and is saved with every checkpoint: plain numbers in
lists and dicts. A response is a dict {"prompt_ids", "ids", "logps", "text", "length", "correct", ...}.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from data import BadInput, budget_prompt, encode_prompt, load_config, load_tokenizer
from rewards import curriculum_budget, dot_threshold
from verifier import boxed_answers, check_answers

# What rewards and advantages read from a batch besides correct, truncated, length, budget, mode and step ...
USES = {
    "hapo_cosine": ["history"], "hapo_linear": ["history"], "palu": ["target"],
    "laser": ["well_formed"], "laser_d": ["well_formed"], "laser_de": ["well_formed", "repetitive"],
    "surrogate_format_length": ["well_formed"], "longwriter_range": ["range"], "affectgpt": ["labels"],
    "curriculum_triangular": ["well_formed", "scheduled_budget"],
    "curriculum_band": ["well_formed", "scheduled_budget"],
    "hbpo": ["subgroup_budget"], "adaptthink": ["no_think", "ref_accuracy"],
    "o1_pruner": ["ref_accuracy", "ref_length"], "crf": ["conciseness", "difficulty"],
    "tldr": ["level"], "adaptive_deep": ["long_mode"],
}  # fmt: skip
# ... and the flag that provides it, where one must be given. The other fields are always at hand.
PROVIDED_BY = {
    "scheduled_budget": ("budget_schedule", "step"), "subgroup_budget": ("subgroups", "hbpo"),
    "no_think": ("subgroups", "adaptthink"), "level": ("subgroups", "levels"),
    "long_mode": ("subgroups", "modes"), "ref_accuracy": ("reference_samples", "K"),
    "ref_length": ("reference_samples", "K"), "conciseness": ("conciseness_model", "DIR"),
}  # fmt: skip
# Reward parameters that are set from here during the run: giving them as flags would be a second truth.
MANAGED = {
    "curriculum_triangular": ("b0", "gamma", "period"), "curriculum_band": ("b0", "gamma", "period"),
    "laser_d": ("targets",), "laser_de": ("targets",),
}  # fmt: skip


def used(args) -> list[str]:
    """Names of the extra fields that this run's reward and advantage read."""
    return sorted({*USES.get(args.reward, ()), *USES.get(args.advantage, ())})


def check_flags(args) -> None:
    """Rules between the flags of this file; needs neither data nor model."""
    for name in used(args):
        flag, value = PROVIDED_BY.get(name, (None, None))
        given = getattr(args, flag) if flag else True
        if not given or given == "none" or (flag == "subgroups" and given != value):
            way_out = f"--{flag.replace('_', '-')} {value}"
            raise BadInput(
                f"--reward {args.reward} with --advantage {args.advantage} needs {name}: give {way_out}"
            )
    for name in MANAGED.get(args.reward, ()):
        if name in args.reward_args:
            way_out = "--method-args" if name == "targets" else "--schedule-args"
            raise BadInput(f"--reward-args {name} of {args.reward} moves during the run: use {way_out}")
    for flag in ("method", "subgroup", "schedule"):
        for name, value in getattr(args, flag + "_args").items():
            values = value if isinstance(value, list) else [value]
            if any(isinstance(x, (int, float)) and not x > 0 for x in values) or not values:
                raise BadInput(f"--{flag}-args {name}={value} must be more than 0")
    options, size = args.subgroup_args, args.group_size
    parts = len(options.get("budgets", HBPO_BUDGETS)) if args.subgroups == "hbpo" else 1
    parts = 2 if args.subgroups in ("adaptthink", "modes") else parts
    if size % parts:
        raise BadInput(f"--group-size ({size}): --subgroups {args.subgroups} needs a multiple of {parts}")
    texts = {"levels": 3, "modes": 2}.get(args.subgroups)
    if "texts" in options and (len(options["texts"]) != texts or not all(map(str, options["texts"]))):
        raise BadInput(f"--subgroup-args texts: --subgroups {args.subgroups} needs a list of {texts} texts")
    if args.method_args.get("history", "min") not in ("min", "mean"):
        raise BadInput(f"--method-args history={args.method_args['history']} must be min or mean")
    if args.subgroups == "elastic":
        room = options.get("think", 1024) + options.get("solution", 1024)
        if args.max_tokens <= room:
            raise BadInput(
                f"--max-tokens ({args.max_tokens}) must exceed think + solution ({room}) by the length of "
                f"</think>, which stands between them: use {room + 4}"
            )
    if args.budget_schedule != "none":
        highest = max(budget_at(step, args) for step in (0, args.steps))
        if highest > args.max_tokens:
            raise BadInput(
                f"--budget-schedule reaches {highest} tokens: raise --max-tokens ({args.max_tokens})"
            )
    # A single outlier of G values lies at most (G - 1) / sqrt(G) sample deviations above their mean.
    if args.dot and args.dot >= (size - 1) / math.sqrt(size):
        least = next(g for g in range(2, 10**6) if (g - 1) / math.sqrt(g) > args.dot)
        raise BadInput(
            f"--dot {args.dot:g} can cut nothing in groups of {size}: use --group-size {least} or more"
        )


def key(row: dict) -> str:
    """What a prompt is remembered by: its id without the copy number that data.py --copies appends."""
    return re.sub(r"#\d+$", "", str(row["id"]))


# ------------------------------------------------------------------------------------------------------------
# Before sampling: budgets of a curriculum, caps


def linear(t: int, start: float = 256, end: float = 87, steps: int = 600) -> float:
    """From start to end tokens in equal differences; then it stays. Train Long, Think Short, 2508.08940."""
    return start + (end - start) * min(1, t / steps)


def exponential(t: int, start: float = 256, end: float = 87, steps: int = 600) -> float:
    """From start to end tokens in equal ratios; then it stays."""
    return start * (end / start) ** min(1, t / steps)


def staircase(t: int, start: float = 256, gamma: float = 0.7, period: int = 150) -> float:
    """max(1, start gamma^floor(t / period)): the paper's own schedule, 2508.08940."""
    return float(curriculum_budget(t, start, gamma, period))


SCHEDULES = {"none": lambda t: math.nan, "step": staircase, "linear": linear, "exponential": exponential}


def budget_at(step: int, args) -> int:
    """The curriculum's budget in whole tokens: one number for the prompt, the reward and the metrics."""
    return max(1, int(SCHEDULES[args.budget_schedule](step, **args.schedule_args)))


def scheduled(rows: list[dict], step: int, args) -> list[dict]:
    """The rows with the budget of this step in place of their own; as they are without a schedule."""
    if args.budget_schedule == "none":
        return rows
    budget, changed = budget_at(step, args), []
    for row in rows:
        mode = (row.get("mode") or "exact") if args.mode == "both" else args.mode
        prompt = budget_prompt(row["problem"], budget, mode, row["kind"], args.wording)
        changed.append(row | {"budget": budget, "mode": mode, "prompt": prompt})
    return changed


def response_cap(row: dict, args, memory: dict) -> int:
    """Tokens after which this prompt's responses are cut: --max-tokens, its budget, or PALU's target."""
    cap = row.get("budget") if args.cut_at_budget else None
    if args.reward == "palu":
        cap = memory.get("palu", {}).get(key(row))
    return min(args.max_tokens, cap or args.max_tokens)


# ------------------------------------------------------------------------------------------------------------
# Subgroups. Each function returns the requests that make up a prompt's group: {"prompt_ids", "n"}, and where
# it applies "forced" (tokens put at the start of the response), "mix", "cap" and "tags" (notes on every
# response). A prefix that no loss may touch simply belongs to the prompt.

HBPO_BUDGETS = (512, 1024, 2048, 2560)


def plain(row: dict, n: int, tokenizer) -> list[dict]:
    """n responses to the prompt as it is."""
    return [{"prompt_ids": encode_prompt(tokenizer, row["prompt"]), "n": n}]


def hbpo(
    row: dict, n: int, tokenizer, budgets: Sequence[int] = HBPO_BUDGETS,
    prefix: str = "I will answer the question within {} tokens.", in_prompt: bool = False,
) -> list[dict]:  # fmt: skip
    """n/K responses for each of K budgets, named by the first sentence of the thinking. 2507.15844.

    The sentence is neither counted in the length nor trained. `in_prompt`: it ends the question instead.
    """
    made = []
    for budget in budgets:
        sentence = prefix.format(budget)
        ids = encode_prompt(tokenizer, row["prompt"] + "\n" + sentence if in_prompt else row["prompt"])
        ids += [] if in_prompt else tokenizer.encode(sentence, add_special_tokens=False)
        made.append({"prompt_ids": ids, "n": n // len(budgets), "tags": {"subgroup_budget": budget}})
    return made


def adaptthink(
    row: dict, n: int, tokenizer, think_word: str | None = "Alright", no_think_tokens: int | None = None
) -> list[dict]:
    """Half of the group begins with a forced </think>, the other half with `think_word`. 2505.13417.

    The first token is trained: its behaviour probability is 1/2, whatever the policy's is. With think_word
    null the other half is sampled freely, and the first token's behaviour is 1/2 forced + 1/2 policy.
    """
    ids, half = encode_prompt(tokenizer, row["prompt"]), math.log(0.5)
    end = one_token(tokenizer, "</think>", "--subgroups adaptthink")
    # mix (a, b): log behaviour = log(exp(a) + exp(b) pi), pi the sampling policy's probability.
    fixed, mixed, policy = (half, -math.inf), (half, half), (-math.inf, half)
    quick = {"prompt_ids": ids, "n": n // 2, "forced": end, "tags": {"no_think": 1}, "cap": no_think_tokens}
    slow = {"prompt_ids": ids, "n": n // 2, "forced": [], "tags": {"no_think": 0}}
    if think_word is None:
        return [quick | {"mix": {None: mixed}}, slow | {"mix": {end[0]: mixed, None: policy}}]
    word = one_token(tokenizer, think_word, "--subgroup-args think_word")
    return [quick | {"mix": {None: fixed}}, slow | {"forced": word, "mix": {None: fixed}}]


def elastic(row: dict, n: int, tokenizer, think: int = 1024, solution: int = 1024) -> list[dict]:
    """At most `think` tokens of thinking, a forced </think>, `solution` tokens after it. 2505.05315."""
    end = tuple(tokenizer.encode("</think>", add_special_tokens=False))
    return [plain(row, n, tokenizer)[0] | {"cap": think, "solution": (end, solution)}]


LEVELS = ("short", "medium", "long")
LEVEL_TEXTS = ("Keep the reasoning short.", "Reason at medium length.", "Reason at length.")


def levels(row: dict, n: int, tokenizer, texts: Sequence[str] = LEVEL_TEXTS) -> list[dict]:
    """A line of the prompt asks for short, medium or long reasoning: the levels take turns. 2505.07961."""
    at = row.get("position", 0) % 3
    ids = encode_prompt(tokenizer, row["prompt"] + "\n" + texts[at])
    return [{"prompt_ids": ids, "n": n, "tags": {"level": LEVELS[at]}}]


MODE_TEXTS = ("[Please answer with Short CoT]", "[Please answer with Long CoT]")


def modes(row: dict, n: int, tokenizer, texts: Sequence[str] = MODE_TEXTS) -> list[dict]:
    """Half of the group is told to think short, the other half long. 2505.20101."""
    prompts = [encode_prompt(tokenizer, row["prompt"] + "\n" + text) for text in texts]
    return [{"prompt_ids": ids, "n": n // 2, "tags": {"long_mode": k}} for k, ids in enumerate(prompts)]


SUBGROUPS = {
    "none": plain, "hbpo": hbpo, "adaptthink": adaptthink, "elastic": elastic, "levels": levels,
    "modes": modes,
}  # fmt: skip


def one_token(tokenizer, word: str, flag: str) -> list[int]:
    """[id] of a word that must be one token."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise BadInput(f"{flag}: {word!r} must be one token of the tokenizer, which makes it {len(ids)}")
    return ids


REQUEST = {"forced": [], "tags": {}}


def requests(row: dict, n: int, tokenizer, args, memory: dict) -> list[dict]:
    """The requests of one prompt's group, n responses in all; "cap" includes the forced tokens."""
    made = SUBGROUPS[args.subgroups](row, n, tokenizer, **args.subgroup_args)
    cap = response_cap(row, args, memory)
    expected = min(cap, row.get("budget") or cap)
    return [REQUEST | {"expected": expected} | q | {"cap": min(cap, q.get("cap") or cap)} for q in made]


def longest_prompt(rows: list[dict], tokenizer, args) -> int:
    """Tokens of the longest prompt of the run, with what schedule and subgroups add to it."""
    longest = max(len(encode_prompt(tokenizer, row["prompt"])) for row in rows)
    row = rows[0] | {"position": 0}
    asked = [scheduled([row], step, args)[0] | {"position": step} for step in (0, 1, 2, args.steps)]
    made = [q for r in asked for q in requests(r, args.group_size, tokenizer, args, {})]
    return longest + max(len(q["prompt_ids"]) for q in made) - len(encode_prompt(tokenizer, row["prompt"]))


# ------------------------------------------------------------------------------------------------------------
# Sampling


def sample(
    sampler, plans: list[list[dict]], temperature: float, seed: int, finished: Callable | None = None
) -> list[list[dict]]:
    """One group of responses per plan (a list of requests that ask for equally many); forced tokens included.

    `finished(i, group)` is called as soon as a plan's responses are there, while others still generate.
    A forced token that is trained has the sampler log-prob nan; positions that are not trained stand in
    r["untrained"]; r["mix"] is the correction of the first token's behaviour probability (see adaptthink).
    """
    flat = [(q, i) for i, plan in enumerate(plans) for q in plan]
    if not flat:
        return []
    first, groups = flat[0][0], [{} for _ in plans]  # {request: its responses}: they come in any order

    def complete(k, responses):
        q, i = flat[k]
        for r in responses:
            add_forced(r, q)
        groups[i][k] = responses
        if len(groups[i]) == len(plans[i]):
            groups[i] = [r for _, part in sorted(groups[i].items()) for r in part]
            if finished and "solution" not in first:
                finished(i, groups[i])

    prompts = [q["prompt_ids"] + q["forced"] for q, _ in flat]
    caps, expected = [q["cap"] - len(q["forced"]) for q, _ in flat], [q["expected"] for q, _ in flat]
    options = {"seed": seed, "finished": complete, "expected": expected}
    sampler.generate(prompts, first["n"], caps, temperature, **options)
    if "solution" in first:
        add_solutions(sampler, sum(groups, []), *first["solution"], temperature, seed + 1)
        for i, group in enumerate(groups) if finished else ():
            finished(i, group)
    return groups


def add_forced(r: dict, q: dict) -> None:
    """Makes a response whole: forced tokens, prompt, notes, and what the policy would have begun with."""
    r |= {"prompt_ids": q["prompt_ids"], "ids": q["forced"] + r["ids"], **q["tags"]}
    r["logps"] = [math.nan] * len(q["forced"]) + r["logps"]
    if "mix" in q and r["ids"]:
        a, b = r["mix"] = q["mix"].get(r["ids"][0], q["mix"][None])
        if not q["forced"]:
            r["logps"][0] = float(np.logaddexp(a, b + r["logps"][0]))


def add_solutions(
    sampler, responses: list[dict], end: tuple, solution: int, temperature: float, seed: int
) -> None:
    """Elastic Reasoning's second budget: </think> where the first one is used up, then `solution` tokens."""
    unfinished = []
    for r in responses:
        ids, stopped = r["ids"], r["finish_reason"] == "stop"
        found = [t for t in range(len(end), len(ids) + 1) if tuple(ids[t - len(end) : t]) == end]
        if stopped and not found:
            continue
        if not found:
            found = [len(ids) + len(end)]
            r["untrained"] = list(range(len(ids), found[0]))  # the policy did not choose it: no loss on it
            r["ids"], r["logps"] = ids + list(end), r["logps"] + [0.0] * len(end)
        left = found[0] + solution - len(r["ids"])
        if left < 0 or (left == 0 and not stopped):
            cut = slice(0, found[0] + solution)
            r |= {"ids": r["ids"][cut], "logps": r["logps"][cut], "finish_reason": "length"}
        elif not stopped:
            unfinished.append((r, left))
    if not unfinished:
        return
    prompts = [r["prompt_ids"] + r["ids"] for r, _ in unfinished]
    more = sampler.generate(prompts, 1, [left for _, left in unfinished], temperature, seed=seed)
    for (r, _), [rest] in zip(unfinished, more, strict=True):
        r |= {"ids": r["ids"] + rest["ids"], "logps": r["logps"] + rest["logps"]}
        r["finish_reason"] = rest["finish_reason"]


def new_prompts(rows: list[dict], args, memory: dict) -> list[dict]:
    """The rows, each prompt once, that the starting model has not been asked yet (--reference-samples)."""
    if not args.reference_samples:
        return []
    known = memory.setdefault("reference", {})
    return list({key(row): row for row in rows if key(row) not in known}.values())


def remember_reference(rows: list[dict], groups: list[list[dict]], memory: dict) -> None:
    """memory["reference"][prompt] = [accuracy, mean length] of the starting model's responses."""
    for row, group in zip(rows, groups, strict=True):
        numbers = (float(np.mean([r[name] for r in group])) for name in ("correct", "length"))
        memory["reference"][key(row)] = list(numbers)


def monitor_rows(rows: list[dict], step: int, args) -> list[dict]:
    """LASER-D's monitor set at the steps at which it is sampled: the same drawn rows every time; else []."""
    if args.reward not in ("laser_d", "laser_de") or step % option("every", args):
        return []
    size = min(len(rows), option("size", args))
    return [rows[i] for i in np.random.default_rng([args.seed, 77]).choice(len(rows), size, replace=False)]


def laser_targets(
    correct: np.ndarray,
    length: np.ndarray,
    l_max: int,
    every: int = 20,
    size: int = 500,
    samples: int = 8,
    low: int = 1024,
    step: int = 1024,
) -> dict:
    """LASER-D's targets {"easy", "medium", "hard"} in tokens from a monitor set [M, n]. 2505.15612 (code).

    Class by the share of right answers, borders 1/3 and 2/3. Target: the least T = low, low + step, ...
    with floor(share of the class's responses of at most T tokens x m) >= 1, m = floor(2n/3), floor(n/3), 1;
    l_max where there is none.
    """
    correct, length = np.asarray(correct), np.asarray(length)
    n, thirds = correct.shape[1], 3 * correct.sum(1)
    classes = {
        "easy": (thirds > 2 * n, 2 * n // 3),
        "medium": ((thirds > n) & (thirds <= 2 * n), n // 3),
        "hard": (thirds <= n, 1),
    }
    targets = {}
    for name, (rows, m) in classes.items():
        found = np.sort(length[rows].ravel())
        enough = (t for t in range(low, l_max + 1, step) if (found <= t).sum() * m >= len(found) > 0)
        targets[name] = int(next(enough, l_max))
    return targets


def set_targets(groups: list[list[dict]], args, memory: dict) -> None:
    """memory["laser"] from the responses to the monitor set."""
    correct, length = (np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length"))
    memory["laser"] = laser_targets(correct, length, args.max_tokens, **args.method_args)


def palu_budget(
    target: float | None,
    correct: np.ndarray,
    length: np.ndarray,
    l_max: int,
    c: float = 0.8,
    tau: float = 0.5,
) -> int:
    """PALU's next budget of a prompt from its group of this epoch [G]. 2510.10168, second-hand.

    Pass rate >= c: less by Q_1 - Q_(1 - tau) of the right answers' lengths (at least 1 is left); else l_max.
    """
    right = np.asarray(length)[np.asarray(correct) > 0]
    if len(right) < c * len(length) or not len(right):
        return l_max
    return max(1, int(target - (right.max() - np.quantile(right, 1 - tau))))


def word_range(budget: int | None, width: float = 0.1) -> list[float]:
    """LongWriter-Zero's range around a budget, for rows that bring no "range" of their own."""
    return [budget * (1 - width), budget * (1 + width)]


# ------------------------------------------------------------------------------------------------------------
# After the check


def cut_outliers(groups: list[list[dict]], rows: list[dict], tokenizer, args) -> None:
    """DOT (2601.03969): very long answers of groups that are all right are cut and checked once more.

    What is left is what is trained. An answer lost by the cut is wrong; one that is still there stays right.
    """
    if not args.dot:
        return
    batch = {k: np.array([[r[k] for r in g] for g in groups]) for k in ("correct", "length", "truncated")}
    cut = []
    for row, group, limit in zip(rows, groups, dot_threshold(batch, args.dot) if groups else [], strict=True):
        for r in group:
            r["dot_threshold"] = float(limit)
            if r["length"] - limit >= args.dot_margin:  # never true for nan
                t = int(limit)
                r |= {"ids": r["ids"][:t], "logps": r["logps"][:t], "length": t, "dot_cut": 1}
                r["text"] = tokenizer.decode(r["ids"], skip_special_tokens=False)
                cut.append((r, row))
    verdicts, _ = check_answers(
        [r["text"] for r, _ in cut], [row["answer"] for _, row in cut], [row["kind"] for _, row in cut],
        [row.get("choices") for _, row in cut], args.require_think, args.verify_timeout,
    )  # fmt: skip
    for (r, _), right in zip(cut, verdicts, strict=True):
        r["correct"] = int(right)


def load_conciseness(path: str, device) -> Callable:
    """A function texts -> scores in [0, 1]: the sigmoid of a one-label classifier's logit on each text."""
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(path)
    labels = load_config(path, tokenizer).num_labels
    if labels != 1:
        raise BadInput(f"--conciseness-model ({path}) has {labels} labels: one is needed, its logit")
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    model, info = AutoModelForSequenceClassification.from_pretrained(path, **options)
    if info["missing_keys"]:
        raise BadInput(f"--conciseness-model ({path}) is no classifier: it lacks {min(info['missing_keys'])}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model, limit = model.to(device).eval(), model.config.max_position_embeddings

    def score(texts: list[str]) -> list[float]:
        scores = []
        for start in range(0, len(texts), 16):
            inputs = tokenizer(texts[start : start + 16], padding=True, truncation=True, max_length=limit)
            ids, mask = (torch.tensor(inputs[k], device=device) for k in ("input_ids", "attention_mask"))
            with torch.no_grad():
                scores += model(input_ids=ids, attention_mask=mask).logits[:, 0].sigmoid().tolist()
        return scores

    return score


def score_conciseness(groups: list[list[dict]], score: Callable | None) -> None:
    """CRF's r["conciseness"] from the reward model; nothing without one."""
    flat = sum(groups, []) if score else []
    for r, value in zip(flat, score([r["text"] for r in flat]) if score else [], strict=True):
        r["conciseness"] = value


def informative(rollouts: dict, total: np.ndarray, args) -> np.ndarray:
    """[P] of bool: does the group hold a difference to learn from? In correctness (DAPO) or in total reward.

    With a length reward the two differ: a group that is all right has no equal rewards any more.
    """
    right = rollouts["correct"] * (1 - rollouts["truncated"])
    return np.ptp(right if args.dynamic_sampling == "correct" else total, 1) > 1e-9


# ------------------------------------------------------------------------------------------------------------
# Rewards: the fields of USES


def well_formed(r: dict, require_think: bool) -> bool:
    r"""Finished, one </think> (none is fine unless required), then \boxed{...} or one bare word (the toy)."""
    ends = r["text"].count("</think>")
    answer = r["text"].rsplit("</think>", 1)[-1].strip()
    parsed = boxed_answers(answer)[0] if boxed_answers(answer) else re.fullmatch(r"[-+\w./,%$]+", answer)
    return not r["truncated"] and (ends == 1 or (ends == 0 and not require_think)) and bool(parsed)


def repetitive(text: str) -> bool:
    """Whether its last ten words occur four times or more (LASER-DE's own detector has other constants)."""
    words = text.split()
    return " ".join(words).count(" ".join(words[-10:])) >= 4 if len(words) >= 40 else False


def count_labels(text: str) -> int:
    """Comma-separated labels in the answer, the text after </think>."""
    return len([label for label in text.rsplit("</think>", 1)[-1].split(",") if label.strip()])


def known_length(past: tuple = (0, 0, 0), history: str = "min") -> float:
    """HAPO's h, the "min" or "mean" of past right answers' lengths: from (number, sum, least)."""
    n, total, least = past
    return math.nan if not n else float(least) if history == "min" else total / n


def length_range(row: dict, args) -> list[float]:
    """[lo, hi] of a row, or around its budget."""
    if not row.get("range") and not row.get("budget"):
        raise ValueError("rows without a budget and without a range; give --budgets")
    return row.get("range") or word_range(row["budget"], **args.method_args)


# --method-args: the constants of what a reward brings with it.
METHODS = {
    "hapo_cosine": known_length, "hapo_linear": known_length, "palu": palu_budget,
    "laser_d": laser_targets, "laser_de": laser_targets, "longwriter_range": word_range,
}  # fmt: skip


def option(name: str, args) -> object:
    """A constant of --method-args, or its default."""
    return args.method_args.get(name, inspect.signature(METHODS[args.reward]).parameters[name].default)


def fields(groups: list[list[dict]], rows: list[dict], args, memory: dict) -> dict:
    """The extra fields of a batch by name: [P, G] of responses, [P] of prompts."""

    def each(function):
        return np.array([[function(r) for r in group] for group in groups], dtype=np.float64)

    def reference(k):
        return np.array([memory["reference"][key(row)][k] for row in rows])

    def past(row):
        return known_length(memory.get("history", {}).get(key(row), (0, 0, 0)), **args.method_args)

    make = {
        "well_formed": lambda: each(lambda r: well_formed(r, args.require_think)),
        "repetitive": lambda: each(lambda r: repetitive(r["text"])),
        "labels": lambda: each(lambda r: count_labels(r["text"])),
        "conciseness": lambda: each(lambda r: r["conciseness"]),
        # How hard a question is for CRF was not found: the group's accuracy stands in for it.
        "difficulty": lambda: each(lambda r: r["correct"]).mean(1),
        "subgroup_budget": lambda: each(lambda r: r["subgroup_budget"]),
        "no_think": lambda: each(lambda r: r["no_think"]),
        "long_mode": lambda: each(lambda r: r["long_mode"]),
        "level": lambda: [group[0]["level"] for group in groups],
        "history": lambda: np.array([past(row) for row in rows]),
        "target": lambda: np.array([response_cap(row, args, memory) for row in rows], dtype=np.float64),
        "range": lambda: np.array([length_range(row, args) for row in rows]),
        "ref_accuracy": lambda: reference(0),
        "ref_length": lambda: reference(1),
        "scheduled_budget": lambda: np.array([float(row["budget"]) for row in rows]),
    }
    return {name: make[name]() for name in used(args)}


def invented(rows: list[dict], args) -> tuple[list[list[dict]], dict]:
    """(groups, memory) that try a reward out before any model is loaded; every second answer is right."""
    r = {"truncated": 0, "text": "</think> 1", "conciseness": 0.5, "subgroup_budget": 1, "level": "short"}
    group = [
        r | {"correct": k % 2, "length": min(k, args.max_tokens), "no_think": k % 2, "long_mode": k % 2}
        for k in range(1, args.group_size + 1)
    ]
    return [group] * len(rows), {"reference": {key(row): [0.5, 1.0] for row in rows}}


def reward_options(step: int, args, memory: dict) -> dict:
    """Hyper-parameters of the reward that move during the run; see MANAGED."""
    if args.reward in ("curriculum_triangular", "curriculum_band"):
        return {"b0": budget_at(step, args), "gamma": 1.0}
    if args.reward in ("laser_d", "laser_de") and "laser" in memory:
        return {"targets": memory["laser"]}
    return {}


# ------------------------------------------------------------------------------------------------------------
# After the rewards


def learn(groups: list[list[dict]], rows: list[dict], args, memory: dict) -> None:
    """Updates the memory of HAPO and PALU with all responses of a step, rewarded by the old one."""
    for row, group in zip(rows, groups, strict=True):
        right = [r["length"] for r in group if r["correct"] and not r["truncated"]]
        if "history" in used(args) and right:
            n, total, least = memory.setdefault("history", {}).get(key(row), (0, 0, math.inf))
            memory["history"][key(row)] = [n + len(right), total + sum(right), min([least, *right])]
        if args.reward == "palu":
            before = response_cap(row, args, memory)
            arrays = [[r[name] for r in group] for name in ("correct", "length")]
            next_one = palu_budget(before, *arrays, args.max_tokens, **args.method_args)
            memory.setdefault("palu", {})[key(row)] = next_one


def split_metrics(groups: list[list[dict]], tag: str) -> dict:
    """{value of tag: (mean length, accuracy)} over the responses of a batch."""
    cells = {}
    for r in sum(groups, []):
        cells.setdefault(r[tag], []).append((r["length"], r["correct"]))
    return {value: np.mean(cells[value], 0) for value in sorted(cells)}


def metrics(groups: list[list[dict]], rollouts: dict, total: np.ndarray, args, memory: dict) -> dict:
    """The method's own quantities for metrics.jsonl; {} for a method that has none."""
    m, flat = {}, sum(groups, [])
    if "history" in rollouts:
        known = np.isfinite(rollouts["history"])
        m["history_length"] = rollouts["history"][known].mean() if known.any() else math.nan
        m["history_known"] = known.mean()
    if args.reward == "palu":
        m["palu_budget"] = rollouts["target"].mean()
    if args.budget_schedule != "none":
        m["scheduled_budget"] = budget_at(rollouts["step"], args)
    m |= {f"laser_{name}": target for name, target in memory.get("laser", {}).items()}
    names = ("ref_accuracy", "ref_length", "conciseness", "well_formed", "repetitive", "labels")
    m |= {name: rollouts[name].mean() for name in names if name in rollouts}
    if args.dot:
        limits, cut = np.array([g[0]["dot_threshold"] for g in groups]), [r for r in flat if "dot_cut" in r]
        m["dot_threshold"] = np.nanmean(limits) if np.isfinite(limits).any() else math.nan
        m |= {"dot_cut": len(cut), "dot_lost": sum(not r["correct"] for r in cut)}
    if args.subgroups == "hbpo":
        m["length_by_subgroup"] = {
            f"{b:g}": x[0] for b, x in split_metrics(groups, "subgroup_budget").items()
        }
        m["reward_by_subgroup"] = {}
        budgets = np.array([[r["subgroup_budget"] for r in g] for g in groups])
        for b in np.unique(budgets):
            m["reward_by_subgroup"][f"{b:g}"] = total[budgets == b].mean()
    if args.subgroups == "levels":
        m["length_by_level"] = {level: x[0] for level, x in split_metrics(groups, "level").items()}
    for subgroups, tag, names in (
        ("adaptthink", "no_think", ("think", "no_think")),
        ("modes", "long_mode", ("short", "long")),
    ):
        if args.subgroups == subgroups:
            for name, (length, accuracy) in zip(names, split_metrics(groups, tag).values(), strict=True):
                m |= {f"{name}_length": length, f"{name}_accuracy": accuracy}
    if args.subgroups == "elastic":
        m["forced_share"] = np.mean(["untrained" in r for r in flat])
    return m
