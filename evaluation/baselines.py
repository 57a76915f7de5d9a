# PYTHON_ARGCOMPLETE_OK
r"""What people do instead of RL: length control at decoding time, and small edits of finished checkpoints.

    python -m evaluation.baselines sweep --model DIR --data math500 --budgets 512,1024 --n 16 --out out/baselines
    python -m evaluation.baselines merge --base A --tuned B --out C
    python -m evaluation.baselines thinkedit --model A --samples out/eval/samples.jsonl --out C --heads 20
    python -m evaluation.baselines tops --samples out/eval/samples.jsonl --out rows.jsonl

sweep asks without a budget sentence and writes OUT/METHOD/samples.jsonl and results.json for each METHOD:
  none        no control
  s1          budget forcing (2501.19393): thinks up to the budget; an earlier stop is dropped, "Wait" takes
              its place; at the budget `</think>` and "Final Answer:" are put in, then the answer is sampled
  truncate    hard truncation: the same without "Wait"
  cut         harder still: the response itself ends at the budget, and what is there is graded
  stop_scale  the odds of `</think>` and of the end token times k while it thinks (after 2505.07961); k is
              fitted per budget on held-out problems, so that the mean length is the budget
  majority    a vote over k short responses that share the budget
Lengths are generated plus injected tokens, end token included. The functions take any sampler of sampler.py
and return its completions with more fields: waits (stops overridden), injected (tokens), forced (end put in).
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

import data
import verifier
from data import BadInput
from evaluation import engines
from sampler import load_sampler, think_token
from toy import task as toy

if TYPE_CHECKING:  # libraries that are loaded late
    import torch

METHODS = ("none", "s1", "truncate", "cut", "stop_scale", "majority")
BATCH = 1024  # responses sampled between two writes
OPEN_CAP = 8192  # tokens of an uncontrolled response
# The first that the tokenizer can write; the toy's cannot write the published texts.
WAIT_TEXTS, FINAL_TEXTS = ("Wait", "wait"), ("\n\nFinal Answer:", "")
MORE = ("waits", "injected", "forced", "votes")  # what a baseline's samples have beyond the contract
SHARD = 4 << 30  # bytes (in float32) of a weight file that merge writes, and holds in memory
CHUNK = 1 << 24  # weights counted at once
# Their blocks have the same parts under the same names.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# ------------------------------------------------------------------------------------------------------------
# Decoding. Prompts are lists of token ids; budgets and lengths are tokens of the response.


def think_then_answer(
    sampler, prompts: list, n: int, think: int, total: int, *, waits: int = 0, wait: Sequence[int] = (),
    final: Sequence[int] = (), force: bool = True, stop_scale: float = 1.0, temperature: float = 0.6,
    top_p: float = 0.95, seed: int = 0,
) -> list[list[dict]]:  # fmt: skip
    """n responses per prompt that think for at most `think` tokens and are at most `total` tokens long.

    Up to `waits` times a stop before `think` is replaced by the tokens `wait`. Thinking that has not ended by
    itself then gets `</think>` and the tokens `final`; without `force` the response ends there instead.
    """
    end, rng = think_token(sampler.tokenizer), np.random.default_rng(seed)
    sampling = {"temperature": temperature, "top_p": top_p}
    stops = {"stop_ids": [*sampler.stop_ids, end], "stop_scale": stop_scale}
    start = {"waits": 0, "injected": 0, "forced": False, "finish_reason": None, "done": False}
    rows = [start | {"prompt": list(prompt), "ids": []} for prompt in prompts for _ in range(n)]
    # The first round shares the work on each prompt; later ones continue every response by itself.
    made = sampler.generate(prompts, n, think, seed=int(rng.integers(2**31)), **stops, **sampling)
    made, thinking = [completion for group in made for completion in group], rows
    while thinking:
        for row, completion in zip(thinking, made, strict=True):
            patience = wait if row["waits"] < waits else ()
            add_thinking(row, completion, think, end, patience, final, force)
        thinking = [row for row in thinking if not row["done"]]
        caps = [think - len(row["ids"]) for row in thinking]
        made = resume(sampler, thinking, caps, rng, **stops, **sampling)
    # The answer is sampled as the model gives it: the odds of its end are not scaled.
    asked = [row for row in rows if row["finish_reason"] is None and len(row["ids"]) < total]
    made = resume(sampler, asked, [total - len(row["ids"]) for row in asked], rng, **sampling)
    for row, completion in zip(asked, made, strict=True):
        row["ids"] += completion["ids"]
        row["finish_reason"] = completion["finish_reason"]
    for row in rows:
        row["finish_reason"] = row["finish_reason"] or "length"
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def resume(sampler, rows: list[dict], caps: list[int], rng, **options) -> list[dict]:
    """One continuation for every row."""
    if not rows:
        return []
    prompts, seed = [row["prompt"] + row["ids"] for row in rows], int(rng.integers(2**31))
    return [group[0] for group in sampler.generate(prompts, 1, caps, seed=seed, **options)]


def add_thinking(
    row: dict, completion: dict, think: int, end: int, wait: Sequence[int], final: Sequence[int], force: bool
) -> None:
    """Append what was thought; then go on after `wait`, or end the thinking (`done`)."""
    ids, stopped = list(completion["ids"]), completion["finish_reason"] == "stop"
    stop = ids.pop() if stopped else None
    row["ids"] += ids
    # At least one token must follow "Wait", else the end would be forced right behind it.
    if stopped and wait and think - len(row["ids"]) > len(wait):
        row["ids"] += wait
        row["waits"] += 1
        row["injected"] += len(wait)
        return
    row["done"] = True
    if stop == end:
        row["ids"].append(end)
    elif force:
        row["ids"] += [end, *final]
        row["injected"] += 1 + len(final)
        row["forced"] = True
    else:
        row["ids"] += [stop] if stopped else []
        row["finish_reason"] = completion["finish_reason"]


def majority(
    sampler, prompts: list, n: int, votes: int, think: int, share: int, **options
) -> list[list[dict]]:
    """n votes per prompt, each of `votes` hard-truncated responses of at most `share` tokens.

    A completion is that of the first response with the winning answer, but `length` is that of all of them
    together; `votes` lists their answers. `options` are those of think_then_answer.
    """
    short = think_then_answer(sampler, prompts, n * votes, think, share, **options)
    out = [[] for _ in prompts]
    for group, kept in zip(short, out, strict=True):
        for part in (group[i : i + votes] for i in range(0, n * votes, votes)):
            answers = [spoken_answer(sampler.tokenizer, completion) for completion in part]
            length = sum(len(c["ids"]) for c in part)
            kept.append(part[winner(answers)] | {"length": length, "votes": answers})
    return out


def winner(answers: list[str | None]) -> int:
    """Index of the first occurrence of the most frequent answer; ties go to the one that came first."""
    counts = Counter(answer for answer in answers if answer is not None)
    return answers.index(max(counts, key=counts.get)) if counts else 0


def spoken_answer(tokenizer, completion: dict) -> str | None:
    """What a response answers, as a string to compare: its last box, else all after `</think>`."""
    if completion["finish_reason"] != "stop":  # cut off: no answer to vote for
        return None
    text = tokenizer.decode(completion["ids"][:-1]).split("</think>")[-1]
    text = (verifier.boxed_answers(text) or [text])[-1]
    # Two spellings of one number are two answers: the vote compares text, not mathematics.
    return re.sub(r"\s+", "", text).strip(".$").lower() or None


def calibrate(
    mean_length: Callable, budget: int, tries: int = 10, bound: float = 8.0, tolerance: float = 0.02
) -> dict:
    """The k whose mean_length(k) (tokens; falls as k grows) is nearest to `budget`, searched from log k = 0.

    Ends within `tolerance` of the budget, at +-bound or after `tries` calls: {"k", "mean_length", "tries"}.
    """
    seen, low, high, x = [], None, None, 0.0  # low, high: (log k, log length), too long and too short
    for _ in range(tries):
        seen.append((math.exp(x), mean_length(math.exp(x))))
        if abs(seen[-1][1] - budget) <= tolerance * budget or (abs(x) == bound and None in (low, high)):
            break
        point = x, math.log(seen[-1][1] / budget)
        low, high = (point, high) if point[1] > 0 else (low, point)
        if low and high:
            # The length is nearly a power of k: the straight line between the two ends is soon there. Kept
            # off the ends, so that a bend cannot hold it at one of them.
            share = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)
            x = low[0] + share * (high[0] - low[0])
        else:
            x = max(-bound, min(bound, x + math.copysign(2.0, point[1])))
    k, length = min(seen, key=lambda pair: abs(pair[1] - budget))
    return {"k": k, "mean_length": length, "tries": len(seen)}


# ------------------------------------------------------------------------------------------------------------
# The sweep


def first_writable(tokenizer, texts: tuple[str, ...], flag: str) -> list[int]:
    """Token ids of the first of `texts` that the tokenizer has no unknown token for."""
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
            return ids
    raise BadInput(f"{flag} {texts[0]!r} cannot be written by the model's tokenizer: give another text")


def plan(method: str, budget: int | None, s: dict) -> tuple[int, int]:
    """(tokens of thinking, of the whole response) at most; BadInput where they do not fit."""
    open_cap, least = s["max_tokens"] or OPEN_CAP, len(s["final"]) + 2  # </think>, one token of answer
    if method in ("none", "stop_scale"):
        cap = min(open_cap if method == "none" else s["max_tokens"] or 2 * budget, s["room"])
        return cap, cap
    total = budget // s["votes"] if method == "majority" else budget
    if method == "majority" or s["reserve"]:
        # The answer stays inside the budget; a vote keeps a quarter for it unless told otherwise.
        think = total - max(s["reserve"] or total // 4, least + 1)
    else:
        # As published, the budget is the thinking's, and the answer comes on top.
        think, total = total, min(total + least - 1 + s["answer_tokens"], s["room"])
    if method == "cut":
        think = total = budget
    if think < 1 or total > s["room"] or method != "cut" and total < think + least:
        given = (
            f"--reserve {s['reserve']}, --votes {s['votes']} and a context of {s['room']} tokens of response"
        )
        raise BadInput(f"--budgets {budget}: with {given} {method} has no place for thinking and answer")
    return think, total


def respond(method: str, sampler, prompts: list[list[int]], n: int, budget: int | None, s: dict) -> list:
    """Completions of one baseline at one budget (tokens; None for method none); `s` is made by settings()."""
    (think, total), sampling = plan(method, budget, s), s["sampling"]
    if method in ("none", "cut"):
        return sampler.generate(prompts, n, total, **sampling)
    if method == "stop_scale":
        k = s["scales"][budget]["k"]
        return think_then_answer(sampler, prompts, n, think, total, force=False, stop_scale=k, **sampling)
    if method == "majority":
        return majority(sampler, prompts, n, s["votes"], think, total, final=s["final"], **sampling)
    options = {"final": s["final"], "wait": s["wait"], "waits": s["waits"] if method == "s1" else 0}
    return think_then_answer(sampler, prompts, n, think, total, **options, **sampling)


def settings(
    tokenizer, room: int, methods: Sequence[str] = METHODS, *, waits: int = 100, reserve: int = 0,
    votes: int = 4, max_tokens: int | None = None, answer_tokens: int = 512, wait_text: str | None = None,
    final_text: str | None = None, temperature: float = 0.6, top_p: float = 0.95, seed: int = 0,
) -> dict:  # fmt: skip
    """What plan() and respond() need; `room` is what the longest prompt leaves of the context (tokens)."""
    if think_token(tokenizer) is None and set(methods) - {"none", "cut"}:
        raise BadInput("the model's tokenizer has no token </think> to force: use --methods none,cut")
    s = {"waits": waits, "reserve": reserve, "votes": votes, "room": room}
    s |= {"max_tokens": max_tokens, "answer_tokens": answer_tokens}
    s["wait"] = first_writable(tokenizer, (wait_text,) if wait_text else WAIT_TEXTS, "--wait-text")
    final = FINAL_TEXTS if final_text is None else (final_text,)
    s["final"] = first_writable(tokenizer, final, "--final-text")
    return s | {"sampling": {"temperature": temperature, "top_p": top_p, "seed": seed}}


def to_rows(
    method: str,
    problem: dict,
    prompt: str,
    budget: int | None,
    completions: list[dict],
    tokenizer,
    think_end: int | None,
) -> Iterator[dict]:
    """Completions as samples of the Sample contract, not yet graded, with the field `baseline`."""
    for i, completion in enumerate(completions):
        ids, finish = list(completion["ids"]), completion["finish_reason"]
        # Only the end token is left out: in many tokenizers `</think>` is a special token, too.
        response = tokenizer.decode(ids[:-1] if finish == "stop" else ids, skip_special_tokens=False)
        kept = ("id", "source", "problem", "answer", "kind", "choices")
        row = {key: problem[key] for key in kept if key in problem} | {"sample": i}
        # The prompt asks for no length, so there is no mode.
        row |= {"prompt": prompt, "budget": budget, "mode": None, "response": response}
        row |= {"length": completion.get("length", len(ids)), "finish_reason": finish, "baseline": method}
        if think_end in ids and "length" not in completion:
            row["thinking_length"] = engines.thinking_length(ids, [think_end])
        yield row | {key: completion[key] for key in MORE if key in completion}


def grade(rows: list[dict]) -> None:
    """Set `correct`. A truncated response is wrong, as everywhere; those of "cut" are read as they are."""
    verdicts, _ = verifier.check_answers(
        [row["response"] for row in rows], [row["answer"] for row in rows],
        [row["kind"] for row in rows], [row.get("choices") for row in rows],
    )  # fmt: skip
    for row, verdict in zip(rows, verdicts, strict=True):
        row["correct"] = bool(verdict) and (row["finish_reason"] == "stop" or row["baseline"] == "cut")


def fit_scale(sampler, prompts: list[list[int]], budget: int, s: dict) -> dict:
    """calibrate() on held-out prompts, 4 responses each, drawn with the same seed for every k."""

    def mean_length(k: float) -> float:
        found = respond("stop_scale", sampler, prompts, 4, budget, s | {"scales": {budget: {"k": k}}})
        return float(np.mean([len(c["ids"]) for group in found for c in group]))

    return calibrate(mean_length, budget)


def run_method(
    method: str, sampler, problems: list[dict], prompts: list, budgets: list, args, s, log=print
) -> dict:
    """Sample, grade and write one baseline; returns what it did, {budget: means over the samples}."""
    folder, did = os.path.join(args.out, method), {}
    end, size = think_token(sampler.tokenizer), args.n * (s["votes"] if method == "majority" else 1)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "samples.jsonl"), "w", encoding="utf-8") as f:
        for budget in budgets if method != "none" else [None]:
            seen = []
            for start in range(0, len(problems), max(1, BATCH // size)):
                part = slice(start, start + max(1, BATCH // size))
                # No two batches draw with the same seed.
                sampling = s["sampling"] | {"seed": args.seed * 1_000_003 + start}
                ids = [ids for _, ids in prompts[part]]
                found = respond(method, sampler, ids, args.n, budget, s | {"sampling": sampling})
                rows = []
                for problem, (prompt, _), group in zip(problems[part], prompts[part], found, strict=True):
                    rows += to_rows(method, problem, prompt, budget, group, sampler.tokenizer, end)
                grade(rows)
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                seen += [[r["correct"], r["length"], r.get("waits", 0), r.get("forced", False)] for r in rows]
            names = ("accuracy", "mean_length", "stops_overridden", "end_forced")
            means = dict(zip(names, np.mean(seen, 0, float).tolist(), strict=True))
            did["none" if budget is None else str(budget)] = means
            log(f"{method} at {budget}: " + ", ".join(f"{key} {value:.4g}" for key, value in means.items()))
    return did


def plain_prompt(problem: dict) -> str:
    """The question without a budget sentence; the toy's tokenizer knows no other instruction either."""
    wording = "tulu" if problem.get("source") in toy.TASKS else "l1"
    return data.budget_prompt(problem["problem"], None, None, problem.get("kind") or "math", wording)


def sweep(args: argparse.Namespace) -> None:
    """All baselines of --methods on one model and one set of problems."""
    import evaluate

    budgets = evaluate.budget_list(args.budgets)
    if None in budgets:
        raise BadInput(f"--budgets {args.budgets!r}: give token counts; the run without a budget is a method")
    problems = evaluate.load_data(args.data, args.limit, args.seed)
    fitted = held_out_problems(args, problems) if "stop_scale" in args.methods else []
    tokenizer = data.load_tokenizer(args.model)
    asked = [plain_prompt(problem) for problem in problems]
    prompts = [(text, data.encode_prompt(tokenizer, text)) for text in asked]
    fitted = [data.encode_prompt(tokenizer, plain_prompt(problem)) for problem in fitted]
    longest = max(len(ids) for ids in [ids for _, ids in prompts] + fitted)
    room = data.load_config(args.model).max_position_embeddings - longest
    flags = {key: value for key, value in vars(args).items() if key in settings.__kwdefaults__}
    s = settings(tokenizer, room, args.methods, **flags)
    # What does not fit is found now: weights take minutes to load.
    most = max(plan(method, budget, s)[1] for method in args.methods for budget in budgets)
    sampler = load_sampler(args.model, args.sampler, longest + most, args.seed)
    if fitted:
        s["scales"] = {budget: fit_scale(sampler, fitted, budget, s) for budget in budgets}
        for budget, fit in s["scales"].items():
            print(f"stop_scale at {budget}: k {fit['k']:.3g}, mean held-out length {fit['mean_length']:.1f}")
    for method in args.methods:
        did = run_method(method, sampler, problems, prompts, budgets, args, s)
        about = {"model": args.model, "baseline": method, "sampler": sampler.name, "n": args.n, "did": did}
        about |= s["sampling"] | {key: value for key, value in s.items() if key != "sampling"}
        write_results(os.path.join(args.out, method), about)


def held_out_problems(args: argparse.Namespace, problems: list[dict]) -> list[dict]:
    """Problems to fit stop_scale on, none of them a tested one."""
    import evaluate

    if args.calibration:
        found = evaluate.load_data(args.calibration, None, args.seed)
    elif {problem["source"] for problem in problems} <= set(toy.TASKS):
        found = toy.problems("toy", "train", args.held_out, args.seed)
    else:
        raise BadInput("stop_scale needs --calibration: problems to fit k on; or leave it out of --methods")
    tested = {problem["problem"] for problem in problems}
    found = [problem for problem in found if problem["problem"] not in tested][: args.held_out]
    if not found:
        raise BadInput(f"--calibration {args.calibration}: all its problems are in --data; name others")
    return found


def write_results(folder: str, about: dict) -> None:
    """results.json and pictures by evaluate.py from the samples in `folder`; `about` is added to them."""
    import evaluate

    path = os.path.join(folder, "results.json")
    code = evaluate.main(["--samples", os.path.join(folder, "samples.jsonl"), "--out", folder, "--overwrite"])
    if code:
        raise BadInput(f"evaluate.py could not read {folder}/samples.jsonl: see above")
    with open(path, encoding="utf-8") as f:
        results = json.load(f)
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        json.dump(evaluate.jsonable(results | about), f, indent=1, allow_nan=False)
    os.replace(f"{path}.tmp", path)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


@contextlib.contextmanager
def new_folder(out: str) -> Iterator[str]:
    """A temporary folder beside `out` that takes its name when all went well, and goes when not."""
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".baselines_", dir=parent)
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def weight_files(folder: str, flag: str) -> dict[str, str]:
    """{tensor name: safetensors file} of a model folder; BadInput where there are none."""
    from safetensors import SafetensorError, safe_open

    index, single = (os.path.join(folder, f"model.safetensors{end}") for end in (".index.json", ""))
    try:
        if os.path.exists(index):
            with open(index, encoding="utf-8") as f:
                named = json.load(f)["weight_map"]
            return {name: os.path.join(folder, file) for name, file in named.items()}
        if os.path.exists(single):
            with safe_open(single, "pt") as f:
                return dict.fromkeys(f.keys(), single)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise BadInput(f"{flag} {folder}: its weights cannot be read ({data.first_line(error)})") from None
    raise BadInput(f"{flag} {folder} holds no model.safetensors: give a local folder of a Hugging Face model")


def read_tensor(files: dict[str, str], name: str) -> "torch.Tensor":
    """One tensor: nothing else of its file is read."""
    from safetensors import safe_open

    with safe_open(files[name], "pt") as f:
        return f.get_tensor(name)


def shards(a: dict[str, str], b: dict[str, str]) -> tuple[list[list[str]], int]:
    """Tensor names split into files of up to SHARD bytes; number of weights. BadInput if models differ."""
    from safetensors import safe_open

    if set(a) != set(b):
        names = ", ".join(sorted(set(a) ^ set(b))[:3])
        raise BadInput(f"--base and --tuned are different models: only one of them has {names}")
    parts, sizes = [[]], []
    for name in b:
        with safe_open(a[name], "pt") as one, safe_open(b[name], "pt") as other:
            shapes = [f.get_slice(name).get_shape() for f in (one, other)]
        if shapes[0] != shapes[1]:
            raise BadInput(f"--base and --tuned are different models: {name} is {shapes[0]} and {shapes[1]}")
        sizes.append(math.prod(shapes[0]))
        if parts[-1] and 4 * sum(sizes[-len(parts[-1]) - 1 :]) > SHARD:
            parts.append([])
        parts[-1].append(name)
    return parts, sum(sizes)


def magnitude_bits(a: dict, b: dict) -> Iterator:
    """|b - a| of all weights as int32, a chunk at a time: floats from 0 up sort as their bits do."""
    import torch

    for name in b:
        pair = [read_tensor(files, name).flatten().split(CHUNK) for files in (a, b)]
        for one, other in zip(*pair, strict=True):
            yield (other.float() - one.float()).abs().view(torch.int32)


def largest_threshold(chunks: Callable, count: int) -> int:
    """The `count`-th largest of the int32 values of chunks() (called twice), exactly and without sorting."""
    import torch

    def find(values: Iterator, bins: int, rank: int) -> tuple[int, int]:
        """The bin that holds the rank-th largest value, and its rank in there."""
        counts = sum(torch.bincount(v, minlength=bins) for v in values).tolist()
        while counts[-1] < rank:
            rank -= counts.pop()
        return len(counts) - 1, rank

    # First the upper 16 bits of the value, then, among those that share them, the lower ones.
    high, rank = find((c >> 16 for c in chunks()), 1 << 15, count)
    low, _ = find((c[c >> 16 == high] & 0xFFFF for c in chunks()), 1 << 16, rank)
    return high << 16 | low


def merge(base: str, tuned: str, out: str, keep: float = 0.25, scale: float = 0.7) -> tuple[int, int]:
    """base + scale * (the share `keep` of the largest updates of `tuned`, zero elsewhere); DLER (2510.15110).

    The largest are found over all weights together, exactly; what equals the smallest of them is kept too.
    Holds one tensor of each model and one file to be written. Types and other files are those of `tuned`.
    Returns the numbers of weights and of kept updates.
    """
    import torch
    from safetensors.torch import save_file

    a, b = weight_files(base, "--base"), weight_files(tuned, "--tuned")
    (parts, total), index, kept = shards(a, b), {}, 0
    count = round(keep * total)
    # Nothing is above the largest int32: no update is kept. A weight that did not move is no update.
    threshold = max(1, largest_threshold(lambda: magnitude_bits(a, b), count)) if count else 2**31 - 1
    with new_folder(out) as folder:
        for i, names in enumerate(parts, 1):
            file, tensors = f"model-{i:05d}-of-{len(parts):05d}.safetensors", {}
            for name in names:
                one, other = read_tensor(a, name), read_tensor(b, name)
                tensors[name] = torch.empty_like(other, memory_format=torch.contiguous_format)
                chunks = [t.flatten().split(CHUNK) for t in (one, other)]
                for x, y, to in zip(*chunks, tensors[name].view(-1).split(CHUNK), strict=True):
                    x, y = x.float(), y.float()
                    chosen = (y - x).abs().view(torch.int32) >= threshold
                    # lerp gives exactly y at scale 1, where x + (y - x) may be off by a rounding.
                    to.copy_(torch.where(chosen, torch.lerp(x, y, scale), x))
                    kept += int(chosen.sum())
            file = "model.safetensors" if len(parts) == 1 else file
            save_file(tensors, os.path.join(folder, file), {"format": "pt"})
            index |= dict.fromkeys(names, file)
        if len(parts) > 1:
            with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
                json.dump({"metadata": {}, "weight_map": index}, f, indent=1)
        for file in os.listdir(tuned):
            # Config and tokenizer; not the weights, nor a trainer's state.
            if re.search(r"\.(json|jinja|txt|model)$", file) and not file.endswith(".index.json"):
                shutil.copy(os.path.join(tuned, file), folder)
    return total, kept


def thinking_samples(
    samples: Iterable[dict], tokenizer, long: int, short: int, limit: int | None
) -> tuple[list, list]:
    """(long, short): [(ids of prompt and thinking, where the thinking starts)] by tokens of thinking."""
    found = ([], [])
    for sample in samples:
        thinking, closed, _ = str(sample.get("response")).partition("</think>")
        ids = tokenizer.encode(thinking, add_special_tokens=False)
        if not closed or not ids or not isinstance(sample.get("prompt"), str):
            continue  # thinking that never ended has no length
        group = found[0] if len(ids) > long else found[1] if len(ids) < short else None
        if group is not None and (limit is None or len(group) < limit):
            prompt = data.encode_prompt(tokenizer, sample["prompt"])
            group.append((prompt + ids, len(prompt)))
    return found


def thinking_means(model, groups: tuple[list, list]) -> tuple:
    """Means over thinking tokens, then over samples: residuals [2, layers, d] of long and short responses
    behind the attention, and the heads' outputs before W_o on the short ones [layers, heads x d_head]."""
    import torch

    layers, seen = model.model.layers, {}

    def watch(key):  # a hook that keeps what goes into a module: [T, width] in float32
        return lambda module, inputs: seen.__setitem__(key, inputs[0][0].detach().float())

    places = {("r", i): layer.post_attention_layernorm for i, layer in enumerate(layers)}
    places |= {("h", i): layer.self_attn.o_proj for i, layer in enumerate(layers)}
    hooks = [module.register_forward_pre_hook(watch(key)) for key, module in places.items()]
    means = []
    for group in groups:
        sums = {}
        for ids, start in group:
            with torch.no_grad():
                model.model(torch.tensor([ids], device=model.device))
            # The positions that predict the thinking tokens, as in the official code.
            for key, value in seen.items():
                sums[key] = sums.get(key, 0) + value[start - 1 : len(ids) - 1].mean(0) / len(group)
        means.append([torch.stack([sums[k, i] for i in range(len(layers))]) for k in "rh"])
    for hook in hooks:
        hook.remove()
    return torch.stack([residual for residual, _ in means]), means[1][1]


def remove_direction(weight: "torch.Tensor", direction: "torch.Tensor", w: float = 1.0) -> "torch.Tensor":
    """W - w (W v) v^T for the unit vector v along `direction`; W is [d_head, d], its columns the output."""
    import torch

    v = direction / direction.norm()
    return weight - w * torch.outer(weight @ v, v)


def thinkedit(model, groups: tuple[list, list], heads: int, w: float = 1.0) -> list[tuple[int, int, float]]:
    """Edits `model`: the `heads` attention heads that write most of "think shortly" no longer write it.

    ThinkEdit (2503.22048): v of a layer is the unit vector from long to short thinking; a head's contribution
    is its mean output along v on the short responses. Returns (layer, head, contribution), largest first.
    """
    import torch

    residuals, outputs = thinking_means(model, groups)
    short = torch.nn.functional.normalize(residuals[1] - residuals[0], dim=-1)
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    n = model.config.num_attention_heads
    by_width = [(v @ p.weight.float()) * z for v, p, z in zip(short, projections, outputs, strict=True)]
    values, places = torch.stack(by_width).view(len(projections) * n, -1).sum(1).topk(heads)
    chosen = [(i // n, i % n, value) for value, i in zip(values.tolist(), places.tolist(), strict=True)]
    for layer, head, _ in chosen:
        weight = projections[layer].weight  # [d, heads x d_head]
        part = slice(head * weight.shape[1] // n, (head + 1) * weight.shape[1] // n)
        with torch.no_grad():
            edited = remove_direction(weight[:, part].T.float(), short[layer], w)
            weight[:, part] = edited.T.to(weight.dtype)
    return chosen


def thinkedit_command(args: argparse.Namespace) -> None:
    """Load, edit, save; thinkedit.json in the new folder says which heads were edited."""
    samples, tokenizer = read_samples(args.samples), data.load_tokenizer(args.model)
    groups = thinking_samples(samples, tokenizer, args.long, args.short, args.limit)
    n_long, n_short = map(len, groups)
    if not n_long or not n_short:
        found = f"{n_long} thoughts longer than {args.long} tokens, {n_short} shorter than {args.short}"
        raise BadInput(f"--samples {args.samples} has {found}; both are needed: see --long and --short")
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    config = data.load_config(args.model)
    if config.model_type not in ARCHITECTURES:
        raise BadInput(f"--model is a {config.model_type}: heads are known of {', '.join(ARCHITECTURES)}")
    total = config.num_hidden_layers * config.num_attention_heads
    if args.heads > total:
        raise BadInput(f"--heads ({args.heads}) is more than the {total} attention heads of {args.model}")
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {args.model} does not load: {data.first_line(error)}") from None
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    edited = thinkedit(model, groups, args.heads, args.weight)
    with new_folder(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        about = {"model": args.model, "long": n_long, "short": n_short, "weight": args.weight}
        with open(os.path.join(folder, "thinkedit.json"), "w") as f:
            json.dump(about | {"layer_head_contribution": edited}, f, indent=1)
    where = ", ".join(f"{layer}.{head}" for layer, head, _ in edited)
    print(f"thinkedit: {n_long} long, {n_short} short responses; {len(edited)} of {total} heads: {where}")


# ------------------------------------------------------------------------------------------------------------
# Selection


def read_samples(path: str) -> list[dict]:
    """Saved samples of a .jsonl(.gz) file; BadInput where one lacks what names its problem and its text."""
    samples = data.read_file(path)
    for at, sample in enumerate(samples, 1):
        if not isinstance(sample, dict) or not {"id", "problem", "response"} <= sample.keys():
            raise BadInput(
                f"--samples {path}, record {at}: a sample has id, problem, response; see evaluate.py"
            )
        texts = [sample["problem"], sample["response"], sample.get("source") or "", sample.get("kind") or ""]
        length = sample.get("length")
        if not all(isinstance(text, str) for text in texts) or type(length) not in (int, type(None)):
            raise BadInput(
                f"--samples {path}, record {at}: problem, response, source and kind must be texts, and "
                f"length a whole number of tokens or null"
            )
    return samples


def shortest_correct(samples: list[dict]) -> list[dict]:
    """Of every problem the shortest right response, over all its budgets or efforts; TOPS (2502.18080)."""
    best = {}
    for sample in samples:
        key, length = (sample.get("source"), sample["problem"]), sample.get("length")
        if sample.get("correct") and length is not None:
            if key not in best or length < best[key]["length"]:
                best[key] = sample
    return list(best.values())


def supervised_row(sample: dict) -> dict:
    """A Row without a budget, plus `messages` (the question, the response) for supervised training."""
    # The trained model is to choose its own effort: the prompt names none, whatever the sample was asked.
    prompt = plain_prompt(sample)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": sample["response"]}]
    row = {key: sample.get(key) for key in ("id", "problem", "answer", "source")}
    row |= {"kind": sample.get("kind") or "math", "prompt": prompt, "budget": None, "mode": None}
    row |= {"choices": sample["choices"]} if sample.get("choices") else {}
    return row | {"messages": turns, "length": sample["length"], "effort": sample.get("budget")}


def tops(args: argparse.Namespace) -> None:
    """Supervised rows of the shortest right responses."""
    samples = read_samples(args.samples)
    chosen = shortest_correct(samples)
    if not chosen:
        raise BadInput(f"--samples {args.samples} has no right response of known length: nothing was written")
    data.write_rows([supervised_row(sample) for sample in chosen], args.out)
    problems = len({(sample.get("source"), sample["problem"]) for sample in samples})
    efforts = Counter(str(sample.get("budget")) for sample in chosen)
    told = ", ".join(f"{effort} {n}" for effort, n in efforts.most_common())
    print(f"tops: {len(chosen)} of {problems} problems have a right response; chosen by budget: {told}")
    print(f"tops: mean length {np.mean([s['length'] for s in chosen]):.1f} tokens; written to {args.out}")


# ------------------------------------------------------------------------------------------------------------
# Command line


def sweep_flags(add: Callable) -> None:
    """The flags of `sweep`; `add` is a parser's add_argument."""
    add("--model", required=True, help="model folder or hub id")
    add("--data", required=True, help="data sets, comma-separated: presets, files of problems, toy, toy_ood")
    add("--budgets", required=True, help="tokens, comma-separated: 512,1024")
    add("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default all)")
    add("--n", type=int, default=1, help="responses (or votes) per problem and budget")
    add("--out", required=True, help="folder; every method gets a folder in it")
    add("--temperature", type=float, default=0.6, help="of sampling; 0 is greedy")
    add("--top-p", type=float, default=0.95, help="share of the probability that is kept in sampling")
    add("--max-tokens", type=int, help="cap of none (default 8192 tokens) and stop_scale (2 x budget)")
    add("--answer-tokens", type=int, default=512, help="s1, truncate: cap of the answer (L1: 20)")
    add("--reserve", type=int, default=0, help="tokens of the budget kept for the answer (default: on top)")
    add("--waits", type=int, default=100, help="s1: stops overridden at most, per response (L1: 100)")
    add("--wait-text", help='s1: put in the place of a stop (default "Wait")')
    add("--final-text", help=r'put in behind a forced </think> (default "\n\nFinal Answer:")')
    add("--votes", type=int, default=4, help="majority: responses that share a budget")
    add("--calibration", help="stop_scale: problems to fit k on, as --data (the toy brings its own)")
    add("--held-out", type=int, default=16, help="stop_scale: how many of them, 4 responses each")
    add("--sampler", choices=("auto", "vllm", "hf"), default="auto", help="auto: vllm on CUDA if installed")
    add("--seed", type=int, default=0, help="seed of the sampling and of the toy's problems")
    add("--limit", type=int, help="problems per data set (default all; 200 of the toy's)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags of all commands, not yet checked."""
    about = "Length control without RL, edits of checkpoints, selection of samples."
    parser = argparse.ArgumentParser(prog="baselines.py", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        return data.one_line_errors(made).add_argument

    sweep_flags(command("sweep", "run decoding-time baselines over budgets"))
    add = command("merge", "DLER: base + scale x the largest updates of the tuned model")
    add("--base", required=True, help="folder of the model before training")
    add("--tuned", required=True, help="folder of the model after training")
    add("--out", required=True, help="folder to write")
    add("--keep", type=float, default=0.25, help="share of the weights, largest update first, that is kept")
    add("--scale", type=float, default=0.7, help="factor on the kept updates")
    add = command("thinkedit", "ThinkEdit: no head writes the direction of short thinking any more")
    add("--model", required=True, help="model folder or hub id")
    add("--samples", required=True, help="samples (.jsonl, .jsonl.gz) of this model, by evaluate.py")
    add("--out", required=True, help="folder to write")
    add("--heads", type=int, default=20, help="heads to edit (paper: 20 at 1.5B, 40 at 8B, 160 at 32B)")
    add("--long", type=int, default=1000, help="thinking of more tokens than this is long")
    add("--short", type=int, default=100, help="thinking of fewer tokens than this is short")
    add("--weight", type=float, default=1.0, help="how much of the direction is removed; 1 is all")
    add("--limit", type=int, help="responses of each kind at most (default all)")
    add = command("tops", "TOPS: the shortest right response of every problem, as supervised rows")
    add("--samples", required=True, help="samples (.jsonl, .jsonl.gz) at several budgets or efforts")
    add("--out", required=True, help="file to write: .jsonl, .jsonl.gz or .parquet")
    return data.one_line_errors(parser).parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is opened; turn the methods into a list."""
    least = {"n": 1, "max_tokens": 1, "answer_tokens": 1, "reserve": 0, "waits": 0, "votes": 1}
    least |= {"held_out": 1, "seed": 0, "limit": 1, "heads": 1, "long": 0, "short": 1}
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and value < low:
            raise BadInput(f"--{name.replace('_', '-')} ({value}) must be {low} or more")
    # Written so that nan, which compares false with everything, is refused as well.
    if args.command == "merge" and not (0 <= args.keep <= 1 and math.isfinite(args.scale)):
        raise BadInput(f"--keep ({args.keep}) is a share from 0 to 1, --scale ({args.scale}) a finite number")
    if args.command == "thinkedit" and not (args.short <= args.long and math.isfinite(args.weight)):
        raise BadInput(f"--short ({args.short}) must not be above --long ({args.long}), --weight be finite")
    if args.command in ("sweep", "tops"):
        check_sweep(args) if args.command == "sweep" else data.check_out(args.out)
    elif os.path.exists(args.out):
        raise BadInput(f"--out {args.out} exists: name a new folder")


def check_sweep(args: argparse.Namespace) -> None:
    """The rules of the sweep's flags."""
    args.methods = list(dict.fromkeys(args.methods.split(",")))
    if os.path.isfile(args.out):
        raise BadInput(f"--out {args.out} is a file: name a folder")
    for method in args.methods:
        if method not in METHODS:
            raise BadInput(f"--methods {method!r} is unknown: use some of {', '.join(METHODS)}")
        if os.path.exists(os.path.join(args.out, method)):
            raise BadInput(f"--out {args.out} holds a run of {method}: name another folder")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise BadInput(f"--temperature ({args.temperature}) is from 0, --top-p ({args.top_p}) in (0, 1]")


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    try:
        args = parse_args(argv)
        check_args(args)
        if args.command == "merge":
            total, kept = merge(args.base, args.tuned, args.out, args.keep, args.scale)
            print(f"merge: {kept} of {total} updates kept ({kept / total:.1%}); written to {args.out}")
        else:
            {"sweep": sweep, "thinkedit": thinkedit_command, "tops": tops}[args.command](args)
    except BadInput as error:
        print(f"baselines.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
