# PYTHON_ARGCOMPLETE_OK
r"""What people do instead of RL: length control at decoding time, and small edits of finished checkpoints.

    python -m evaluation.baselines sweep --model DIR --data math500 --budgets 512,1024 --n 16 --out out/base
    python -m evaluation.baselines merge --base A --tuned B --out C
    python -m evaluation.baselines thinkedit --model A --samples out/eval/samples.jsonl --out C --heads 20
    python -m evaluation.baselines tops --samples out/eval/samples.jsonl --out rows.jsonl

sweep asks without a budget sentence; each METHOD's evaluation goes to OUT/METHOD, one table to the screen:
  none        no control
  s1          budget forcing (2501.19393): thinks up to the budget; an earlier stop is dropped, "Wait" takes
              its place; at the budget `</think>` and "Final Answer:" are put in, then the answer is sampled
  truncate    hard truncation: the same without "Wait"
  cut         harder still: the response itself ends at the budget, and what is there is graded
  stop_scale  the odds of `</think>` and of the end token times k while it thinks (after 2505.07961); k is
              fitted per budget on held-out problems, so that the mean length is the budget
  majority    a vote over short responses that share the budget
Lengths are generated plus injected tokens, end token included. Samples have further fields: baseline (the
method), waits (stops overridden), injected (tokens), forced (end put in), votes.
"""

import argparse
import glob
import itertools
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

import data
import evaluate
from data import BadInput
from evaluation import engines, metrics, report
from evaluation.samples import read_samples, write_json
from toy import task as toy

if TYPE_CHECKING:  # loaded late
    import torch

METHODS = ("none", "s1", "truncate", "cut", "stop_scale", "majority")
BATCH = 1024  # responses sampled between two writes
OPEN_CAP = 8192  # tokens of an uncontrolled response
WAITS = 100  # stops that s1 overrides at most, per response (L1's choice)
HELD_OUT = 16  # problems that stop_scale's k is fitted on, 4 responses each
# The first that the tokenizer can write; the toy's cannot write the published texts.
WAIT_TEXTS, FINAL_TEXTS = ("Wait", "wait"), ("\n\nFinal Answer:", "")
SHARD = 4 << 30  # bytes of a weight file that merge writes
# Their blocks have the same parts under the same names.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

# ------------------------------------------------------------------------------------------------------------
# Decoding. Prompts are lists of token ids; budgets and lengths are tokens of the response.


def think_token(tokenizer) -> int | None:
    """The id of `</think>`; None where the tokenizer has no single token for it."""
    ids = tokenizer.encode("</think>", add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def stop_bias(ids: list[int], scale: float) -> dict[int, float]:
    """{id: log scale}, to be added to the logits of the tokens `ids`: it multiplies their odds by `scale`.

    Above 1 responses get shorter, below 1 longer. The idea is that of 2505.07961, whose own formula was not
    found.
    """
    # Added, not multiplied: a factor on the logit itself would push a negative one the wrong way.
    if not 0 < scale < math.inf:
        raise BadInput(f"stop scale {scale} must be above 0: 2 doubles the odds of a stop, 0.5 halves them")
    return {} if scale == 1 else dict.fromkeys(sorted(ids), math.log(scale))


def first_writable(tokenizer, texts: tuple[str, ...]) -> list[int]:
    """Token ids of the first of `texts` that the tokenizer has no unknown token for."""
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
            return ids
    raise BadInput(f"the model's tokenizer cannot write {texts[0]!r}: use --methods none,cut,stop_scale")


class Baseline:
    """One method in a sampler's place: evaluate() asks it for responses at a budget that no prompt states."""

    def __init__(
        self, method: str, sampler, tokenizer, room: int, *, votes: int = 4, answer_tokens: int = 512,
        max_tokens: int | None = None, waits: int = WAITS, scales: dict | None = None,
    ):  # fmt: skip
        """`room`: what the longest prompt leaves of the context (tokens); `scales`: k by budget."""
        self.method, self.sampler, self.tokenizer, self.room = method, sampler, tokenizer, room
        self.votes, self.answer_tokens, self.max_tokens, self.waits = votes, answer_tokens, max_tokens, waits
        self.name, self.scales = getattr(sampler, "name", None), scales or {}
        self.batch = BATCH // votes if method == "majority" else BATCH
        self.end = think_token(tokenizer)
        if self.end is None and method not in ("none", "cut"):
            raise BadInput("the model's tokenizer has no token </think> to force: use --methods none,cut")
        forces = method in ("s1", "truncate", "majority")
        self.final = first_writable(tokenizer, FINAL_TEXTS) if forces else []
        self.wait = first_writable(tokenizer, WAIT_TEXTS) if method == "s1" else []

    def caps(self, budget: int | None) -> tuple[int, int]:
        """(tokens of thinking, of the whole response) at most; BadInput where they do not fit."""
        least = len(self.final) + 2  # </think>, one token of answer
        if self.method in ("none", "stop_scale"):
            cap = self.max_tokens or (OPEN_CAP if self.method == "none" else 2 * budget)
            return min(cap, self.room), min(cap, self.room)
        if self.method == "cut":
            think = total = budget
        elif self.method == "majority":
            # The answer stays inside the share: a quarter is kept for it.
            total = budget // self.votes
            think = total - max(total // 4, least + 1)
        else:
            # As published, the budget is the thinking's, and the answer comes on top.
            think, total = budget, min(budget + least - 1 + self.answer_tokens, self.room)
        if think < 1 or total > self.room or self.method != "cut" and total < think + least:
            given = f"with --votes {self.votes} and {self.room} tokens of context for the response"
            raise BadInput(f"--budgets {budget}: {given} {self.method} has no place for thought and answer")
        return think, total

    def generate(self, prompts: list, n: int, budget: int | None, seed: int, **sampling) -> list[list[dict]]:
        """n responses (majority: n x votes) per prompt: {"ids", "truncated"} and further fields.

        `sampling`: temperature and top_p.
        """
        think, total = self.caps(budget)
        if self.method in ("none", "cut"):
            return self.sampler.generate(prompts, n, [total] * len(prompts), seed=seed, **sampling)
        if self.method != "majority":
            scale = self.scales.get(budget, 1.0)
            return self.think_then_answer(prompts, n, think, total, seed, sampling, scale)
        return self.think_then_answer(prompts, n * self.votes, think, total, seed, sampling)

    def think_then_answer(
        self, prompts: list, n: int, think: int, total: int, seed: int, sampling: dict, scale: float = 1.0
    ) -> list[list[dict]]:
        """n responses per prompt that think for at most `think` tokens and are at most `total` tokens long.

        s1 replaces a stop before `think` by "Wait". Thinking that did not end by itself then gets `</think>`
        and the final text; under stop_scale the response ends there instead.
        """
        rng, stop_ids = np.random.default_rng(seed), [*self.sampler.stop_ids, self.end]
        options = sampling | {"stop_ids": stop_ids, "logit_bias": stop_bias(stop_ids, scale) or None}
        start = {"waits": 0, "injected": 0, "forced": False, "truncated": None, "done": False}
        rows = [start | {"prompt": list(prompt), "ids": []} for prompt in prompts for _ in range(n)]
        # The first round shares the work on each prompt; later ones continue every response by itself.
        caps, draw = [think] * len(prompts), int(rng.integers(2**31))
        made = self.sampler.generate(prompts, n, caps, seed=draw, **options)
        made, thinking = [response for group in made for response in group], rows
        while thinking:
            for row, response in zip(thinking, made, strict=True):
                self.add_thinking(row, response, think)
            thinking = [row for row in thinking if not row["done"]]
            made = self.go_on(thinking, think, rng, options)
        # The answer is sampled as the model gives it: the odds of its end are not scaled.
        asked = [row for row in rows if row["truncated"] is None and len(row["ids"]) < total]
        for row, response in zip(asked, self.go_on(asked, total, rng, sampling), strict=True):
            row["ids"] += response["ids"].tolist()
            row["truncated"] = response["truncated"]
        for row in rows:
            row["truncated"] = 1 if row["truncated"] is None else row["truncated"]
            row["ids"] = np.array(row["ids"], np.int32)
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def go_on(self, rows: list[dict], total: int, rng: np.random.Generator, options: dict) -> list[dict]:
        """One continuation of every row, up to `total` tokens of the response."""
        prompts = [row["prompt"] + row["ids"] for row in rows]
        caps, seed = [total - len(row["ids"]) for row in rows], int(rng.integers(2**31))
        made = self.sampler.generate(prompts, 1, caps, seed=seed, **options) if rows else []
        return [group[0] for group in made]

    def add_thinking(self, row: dict, response: dict, think: int) -> None:
        """Append what was thought; then go on after "Wait", or end the thinking (`done`)."""
        ids, stopped = response["ids"].tolist(), not response["truncated"]
        stop = ids.pop() if stopped else None
        row["ids"] += ids
        # At least one token must follow "Wait", else the end would be forced right behind it.
        patient = self.wait and row["waits"] < self.waits
        if stopped and patient and think - len(row["ids"]) > len(self.wait):
            row["ids"] += self.wait
            row["waits"] += 1
            row["injected"] += len(self.wait)
            return
        row["done"] = True
        if stop == self.end:
            row["ids"].append(stop)
        elif self.method == "stop_scale":
            row["ids"] += [stop] if stopped else []
            row["truncated"] = response["truncated"]
        else:
            row["ids"] += [self.end, *self.final]
            row["injected"] += 1 + len(self.final)
            row["forced"] = True

    def respond(
        self, requests: list[dict], n: int, temperature: float, top_p: float, seed: int, think_end: str
    ) -> list[list[dict]]:
        """As engines.respond: responses as fields of samples, with those of this module."""
        found, more = [], ("waits", "injected", "forced")
        for budget, group in itertools.groupby(requests, key=lambda request: request["budget"]):
            group = list(group)
            prompts = [request["ids"].tolist() for request in group]
            made = self.generate(prompts, n, budget, seed, temperature=temperature, top_p=top_p)
            for request, responses in zip(group, made, strict=True):
                rows = []
                for response in responses:
                    rows.append(engines.to_text(response, self.tokenizer, think_end))
                    rows[-1] |= {key: response[key] for key in more if key in response}
                if self.method == "majority":
                    kind, parts = request["problem"]["kind"], range(0, len(rows), self.votes)
                    rows = [elect(rows[i : i + self.votes], kind, think_end) for i in parts]
                found.append([row | {"baseline": self.method} for row in rows])
        return found


def elect(votes: list[dict], kind: str, think_end: str = "</think>") -> dict:
    """The first response with the most frequent answer; its `length` is that of all of them together."""
    answers = [metrics.spoken_answer(vote | {"kind": kind}, think_end) for vote in votes]
    kept = dict(votes[metrics.winner(answers) or 0])
    kept.pop("thinking_length", None)  # the length is that of all votes, the thinking would be one's
    return kept | {"length": sum(vote["length"] for vote in votes), "votes": answers}


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


def fit_scale(baseline: Baseline, prompts: list[list[int]], budget: int, sampling: dict) -> dict:
    """calibrate() on held-out prompts, 4 responses each, drawn with the same seed for every k."""

    def mean_length(k: float) -> float:
        baseline.scales[budget] = k
        found = baseline.generate(prompts, 4, budget, **sampling)
        return float(np.mean([len(response["ids"]) for group in found for response in group]))

    return calibrate(mean_length, budget)


def wording_of(problems: list[dict]) -> str:
    """The toy's tokenizer knows no other instruction than its own."""
    return "tulu" if {problem.get("source") for problem in problems} <= set(toy.TASKS) else "l1"


def held_out_problems(args: argparse.Namespace, problems: list[dict]) -> list[dict]:
    """Problems to fit stop_scale on, none of them a tested one."""
    if args.calibration:
        found = evaluate.load_data(args.calibration, None, args.seed)
    elif wording_of(problems) == "tulu":
        found = toy.problems("toy", "train", HELD_OUT, args.seed)
    else:
        raise BadInput("stop_scale needs --calibration: problems to fit k on; or leave it out of --methods")
    tested = {problem["problem"] for problem in problems}
    found = [problem for problem in found if problem["problem"] not in tested][:HELD_OUT]
    if not found:
        raise BadInput(f"--calibration {args.calibration}: all its problems are in --data; name others")
    return found


def sweep(args: argparse.Namespace) -> None:
    """All baselines of --methods on one model and one set of problems; one table at the end."""
    budgets = evaluate.budget_list(args.budgets)
    if None in budgets:
        raise BadInput(f"--budgets {args.budgets!r}: give token counts; the run without a budget is a method")
    problems = evaluate.load_data(args.data, args.limit, args.seed)
    fitted = held_out_problems(args, problems) if "stop_scale" in args.methods else []
    wording, tokenizer = wording_of(problems), data.load_tokenizer(args.model)
    context = data.load_config(args.model).max_position_embeddings
    asked = evaluate.plan(problems + fitted, [None], "none", wording, tokenizer, context)
    prompts = [request["ids"].tolist() for request in asked]
    longest = max(map(len, prompts))
    options = {"votes": args.votes, "answer_tokens": args.answer_tokens, "max_tokens": args.max_tokens}
    made = {m: Baseline(m, None, tokenizer, context - longest, **options) for m in args.methods}
    # What does not fit is found now: weights take minutes to load.
    most = max(baseline.caps(budget)[1] for baseline in made.values() for budget in budgets)
    sampler = engines.open_sampler(args.model, args.sampler, longest + most, args.seed)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    summaries = {}
    for method, baseline in made.items():
        baseline.sampler, baseline.name, about = sampler, sampler.name, {"baseline": method} | options
        for budget in budgets if method == "stop_scale" else ():
            fit = fit_scale(baseline, prompts[len(problems) :], budget, sampling)
            baseline.scales[budget] = fit["k"]
            about.setdefault("scales", {})[str(budget)] = fit
            print(f"stop_scale at {budget}: k {fit['k']:.3g}, mean held-out length {fit['mean_length']:.1f}")
        results = evaluate.evaluate(
            baseline, problems, budgets if method != "none" else [None], "none", args.n,
            os.path.join(args.out, method), tokenizer=tokenizer, context=context, wording=wording,
            model=args.model, about=about, log=lambda line: None, **sampling,
        )  # fmt: skip
        for name, part in results["datasets"].items():
            summaries.setdefault(name, {})[method] = part["budgets"]
        print(f"{method}: written to {os.path.join(args.out, method)}")
    for name, methods in summaries.items():
        rows = report.summary_rows(methods)
        print(f"\n{name}: accuracy at mean length (tokens)\n{report.plain_table(rows)}")
    print(f"\npaired: python -m evaluation.compare {args.out}/* --out {args.out.rstrip('/')}_compared")


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def weight_files(folder: str, flag: str) -> dict[str, str]:
    """{tensor name: safetensors file} of a model folder; BadInput where there are none."""
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        for file in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
            with safe_open(file, "pt") as f:
                found |= dict.fromkeys(f.keys(), file)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{flag} {folder}: its weights cannot be read ({data.first_line(error)})") from None
    if not found:
        raise BadInput(f"{flag} {folder} holds no model.safetensors: give a local Hugging Face model folder")
    return found


def read_tensor(files: dict[str, str], name: str) -> "torch.Tensor":
    """One tensor: nothing else of its file is read."""
    from safetensors import safe_open

    with safe_open(files[name], "pt") as f:
        return f.get_tensor(name)


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
    Holds the merged model and one tensor of each. Types and other files are those of `tuned`. Returns the
    numbers of weights and of kept updates.
    """
    import torch
    from huggingface_hub import save_torch_state_dict

    a, b = weight_files(base, "--base"), weight_files(tuned, "--tuned")
    if set(a) != set(b):
        names = ", ".join(sorted(set(a) ^ set(b))[:3])
        raise BadInput(f"--base and --tuned are different models: only one of them has {names}")

    def updates():  # floats from 0 up sort as their bits do
        for name in b:
            one, other = read_tensor(a, name), read_tensor(b, name)
            if one.shape != other.shape:
                shapes = f"{list(one.shape)} and {list(other.shape)}"
                raise BadInput(f"--base and --tuned are different models: {name} is {shapes}")
            yield (other.float() - one.float()).abs().flatten().view(torch.int32)

    total = sum(update.numel() for update in updates())
    count, kept, merged = round(keep * total), 0, {}
    # Nothing is above the largest int32: no update is kept. A weight that did not move is no update.
    threshold = max(1, largest_threshold(updates, count)) if count else 2**31 - 1
    for name in b:
        other = read_tensor(b, name)
        x, y = read_tensor(a, name).float(), other.float()
        chosen = (y - x).abs().view(torch.int32) >= threshold
        # lerp gives exactly y at scale 1, where x + (y - x) may be off by a rounding.
        merged[name] = torch.where(chosen, torch.lerp(x, y, scale), x).to(other.dtype)
        kept += int(chosen.sum())
    os.makedirs(out)
    for file in os.listdir(tuned):
        # Config and tokenizer; not the weights, nor a trainer's state.
        if re.search(r"\.(json|jinja|txt|model)$", file) and not file.endswith(".index.json"):
            shutil.copy(os.path.join(tuned, file), out)
    save_torch_state_dict(merged, out, max_shard_size=SHARD)
    return total, kept


def thinking_samples(samples: Iterable[dict], tokenizer, long: int, short: int) -> tuple[list, list]:
    """(long, short): [(ids of prompt and thinking, where the thinking starts)] by tokens of thinking."""
    found = ([], [])
    for sample in samples:
        thinking, closed, _ = sample["response"].partition("</think>")
        ids = tokenizer.encode(thinking, add_special_tokens=False)
        if not closed or not ids:
            continue  # thinking that never ended has no length
        group = found[0] if len(ids) > long else found[1] if len(ids) < short else None
        if group is not None:
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
    samples = read_samples(args.samples, ("id", "problem", "prompt", "response"))
    tokenizer = data.load_tokenizer(args.model)
    groups = thinking_samples(samples, tokenizer, args.long, args.short)
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
    edited = thinkedit(model, groups, args.heads)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    about = {"model": args.model, "long": n_long, "short": n_short, "layer_head_contribution": edited}
    write_json(os.path.join(args.out, "thinkedit.json"), about)
    where = ", ".join(f"{layer}.{head}" for layer, head, _ in edited)
    print(f"thinkedit: {n_long} long, {n_short} short responses; {len(edited)} of {total} heads: {where}")


# ------------------------------------------------------------------------------------------------------------
# Selection


def shortest_correct(samples: Iterable[dict]) -> list[dict]:
    """Of every problem the shortest right response, over all its budgets or efforts; TOPS (2502.18080)."""
    best = {}
    for sample in samples:
        key, length = (sample.get("source"), sample["problem"]), sample["length"]
        if sample["correct"] and length is not None and (key not in best or length < best[key]["length"]):
            best[key] = sample
    return list(best.values())


def supervised_row(sample: dict) -> dict:
    """A Row without a budget, plus `messages` (the question, the response) for supervised training."""
    # The trained model is to choose its own effort: the prompt names none, whatever the sample was asked.
    kind = sample.get("kind") or "math"
    prompt = data.budget_prompt(sample["problem"], None, None, kind, wording_of([sample]))
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": sample["response"]}]
    row = {key: sample.get(key) for key in ("id", "problem", "answer", "source")}
    row |= {"kind": kind, "prompt": prompt, "budget": None, "mode": None}
    row |= {"choices": sample["choices"]} if sample.get("choices") else {}
    return row | {"messages": turns, "length": sample["length"], "effort": sample.get("budget")}


def tops(args: argparse.Namespace) -> None:
    """Supervised rows of the shortest right responses."""
    samples = list(read_samples(args.samples, ("id", "problem", "response", "length", "correct")))
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags of all commands, not yet checked."""
    about = "Length control without RL, edits of checkpoints, selection of samples."
    parser = argparse.ArgumentParser("evaluation.baselines", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, text):
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        return data.one_line_errors(made).add_argument

    add = command("sweep", "run decoding-time baselines over budgets")
    add("--model", required=True, help="model folder or hub id")
    add("--data", required=True, help="data sets, comma-separated: presets, files of problems, toy, toy_ood")
    add("--budgets", required=True, help="tokens, comma-separated: 512,1024")
    add("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default all)")
    add("--n", type=int, default=1, help="responses (or votes) per problem and budget (default 1)")
    add("--out", required=True, help="folder; every method gets a folder in it")
    add("--temperature", type=float, default=0.6, help="of sampling; 0 is greedy (default 0.6)")
    add("--top-p", type=float, default=0.95, help="share of the probability that is kept (default 0.95)")
    add("--max-tokens", type=int, help="cap of none (default 8192 tokens) and stop_scale (2 x budget)")
    add(
        "--answer-tokens", type=int, default=512, help="s1, truncate: cap of the answer (default 512; L1: 20)"
    )
    add("--votes", type=int, default=4, help="majority: responses that share a budget (default 4)")
    add("--calibration", help="stop_scale: problems to fit k on, as --data (the toy brings its own)")
    add("--sampler", choices=("auto", "vllm", "hf"), default="auto", help="auto: vllm on CUDA if installed")
    add("--seed", type=int, default=0, help="seed of the sampling and of the toy's problems (default 0)")
    add("--limit", type=int, help="problems per data set (default all; 200 of the toy's)")

    add = command("merge", "DLER: base + scale x the largest updates of the tuned model")
    add("--base", required=True, help="folder of the model before training")
    add("--tuned", required=True, help="folder of the model after training")
    add("--out", required=True, help="folder to write")
    add("--keep", type=float, default=0.25, help="share of the weights that keep their update (default 0.25)")
    add("--scale", type=float, default=0.7, help="factor on the kept updates (default 0.7)")

    add = command("thinkedit", "ThinkEdit: no head writes the direction of short thinking any more")
    add("--model", required=True, help="model folder or hub id")
    add("--samples", required=True, help="samples (.jsonl, .jsonl.gz) of this model, by evaluate.py")
    add("--out", required=True, help="folder to write")
    add("--heads", type=int, default=20, help="heads to edit (paper: 20 at 1.5B, 40 at 8B, 160 at 32B)")
    add("--long", type=int, default=1000, help="thinking of more tokens than this is long (default 1000)")
    add("--short", type=int, default=100, help="thinking of fewer tokens than this is short (default 100)")

    add = command("tops", "TOPS: the shortest right response of every problem, as supervised rows")
    add("--samples", required=True, help="samples (.jsonl, .jsonl.gz) at several budgets or efforts")
    add("--out", required=True, help="file to write: .jsonl, .jsonl.gz or .parquet")
    return data.one_line_errors(parser).parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is opened; turn the methods into a list."""
    least = {"n": 1, "max_tokens": 1, "answer_tokens": 1, "votes": 1, "seed": 0, "limit": 1, "heads": 1}
    for name, low in (least | {"long": 0, "short": 1}).items():
        value = getattr(args, name, None)
        if value is not None and value < low:
            raise BadInput(f"--{name.replace('_', '-')} ({value}) must be {low} or more")
    # Written so that nan, which compares false with everything, is refused as well.
    if args.command == "merge" and not (0 <= args.keep <= 1 and math.isfinite(args.scale)):
        raise BadInput(f"--keep ({args.keep}) is a share from 0 to 1, --scale ({args.scale}) a finite number")
    if args.command == "thinkedit" and not args.short <= args.long:
        raise BadInput(f"--short ({args.short}) must not be above --long ({args.long})")
    if args.command == "tops":
        data.check_out(args.out)
        return
    evaluate.check_writable(args.out)
    if args.command != "sweep":
        if os.path.exists(args.out):
            raise BadInput(f"--out {args.out} exists: name a new folder")
        return
    args.methods = list(dict.fromkeys(args.methods.split(",")))
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
        print(f"evaluation.baselines: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
