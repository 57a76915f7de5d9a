r"""What people do instead of RL: length control at decoding time, and small edits of finished checkpoints.

    python -m evaluation.baselines sweep --model DIR --data math500 --budgets 512,1024 --n 16 --out out/base
    python -m evaluation.baselines merge|thinkedit|tops ...         see studies/edits.py

sweep asks without a budget sentence; each METHOD's evaluation goes to OUT/METHOD, one table to the screen:
  none        no control
  s1          budget forcing (2501.19393): thinks up to the budget; an earlier stop is dropped, "Wait" takes
              its place; at the budget `</think>` and "Final Answer:" are put in, then the answer is sampled
  truncate    hard truncation: the same without "Wait"
  cut         harder still: the response itself ends at the budget, and what is there is graded
  stop_scale  the odds of `</think>` and of the end token times k while it thinks (after 2505.07961); k is
              fitted per budget, so that the mean length over the first 16 problems is the budget
Lengths are generated plus injected tokens, end token included. Samples have further fields: baseline (the
method), waits (stops overridden), injected (tokens) and forced (end put in).
"""

import argparse
import itertools
import math
import os
import sys

import numpy as np

import data
import evaluate
from data import BadInput, exit_code
from evaluation import engines, report
from evaluation.samples import check_writable
from studies import edits

METHODS = ("none", "s1", "truncate", "cut", "stop_scale")
WAITS = 100  # stops that s1 overrides at most, per response (L1's choice)
FITTED = 16  # problems whose lengths, not answers, stop_scale's k is fitted on, 4 responses each
# The first that the tokenizer can write; the toy's cannot write the published texts.
WAIT_TEXTS, FINAL_TEXTS = ("Wait", "wait"), ("\n\nFinal Answer:", "")

# ---- Decoding. Prompts are lists of token ids; budgets and lengths are tokens of the response.


def stop_bias(ids: list[int], scale: float) -> dict[int, float]:
    """{id: log scale}, to be added to the logits of the tokens `ids`: it multiplies their odds by `scale`.

    Above 1 responses get shorter, below 1 longer. The idea is that of 2505.07961, whose own formula was not
    found.
    """
    # Added, not multiplied: a factor on the logit itself would push a negative one the wrong way.
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

    def __init__(self, method: str, sampler, tokenizer, room: int, answer_tokens=512, max_tokens=None):
        """`room`: what the longest prompt leaves of the context (tokens)."""
        self.method, self.sampler, self.tokenizer, self.room = method, sampler, tokenizer, room
        self.answer_tokens, self.max_tokens, self.scales = answer_tokens, max_tokens, {}  # k by budget
        ids = tokenizer.encode("</think>", add_special_tokens=False)
        self.end = ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None
        if self.end is None and method not in ("none", "cut"):
            raise BadInput("the model's tokenizer has no token </think> to force: use --methods none,cut")
        self.final = first_writable(tokenizer, FINAL_TEXTS) if method in ("s1", "truncate") else []
        self.wait = first_writable(tokenizer, WAIT_TEXTS) if method == "s1" else []

    def caps(self, budget: int | None) -> tuple[int, int]:
        """(tokens of thinking, of the whole response) at most; BadInput where they do not fit."""
        if self.method in ("none", "stop_scale"):
            cap = self.max_tokens or (evaluate.OPEN_CAP if self.method == "none" else 2 * budget)
            return min(cap, self.room), min(cap, self.room)
        # As published, the budget is the thinking's; `</think>`, final text and answer come on top.
        least = 0 if self.method == "cut" else len(self.final) + 2
        if budget + least > self.room:
            given = f"a context with {self.room} tokens for the response"
            raise BadInput(f"--budgets {budget}: {given} has no place for it under {self.method}")
        return budget, budget + (least and min(least - 1 + self.answer_tokens, self.room - budget))

    def generate(self, prompts: list, n: int, budget: int | None, seed: int, **sampling) -> list[list[dict]]:
        """n responses per prompt: {"ids", "truncated"} and further fields; `sampling`: temperature, top_p.

        s1 replaces a stop before the budget by "Wait". Thinking that did not end by itself then gets
        `</think>` and the final text; under stop_scale the response ends there instead.
        """
        think, total = self.caps(budget)
        if self.method in ("none", "cut"):
            return self.sampler.generate(prompts, n, [total] * len(prompts), seed=seed, **sampling)
        rng, stop_ids = np.random.default_rng(seed), [*self.sampler.stop_ids, self.end]
        bias = stop_bias(stop_ids, self.scales.get(budget, 1.0))
        start = {"waits": 0, "injected": 0, "forced": False, "truncated": None, "done": False}
        rows = [start | {"prompt": list(prompt), "ids": []} for prompt in prompts for _ in range(n)]
        while thinking := [row for row in rows if not row["done"]]:
            made = self.go_on(thinking, think, rng, stop_ids=stop_ids, logit_bias=bias, **sampling)
            for row, response in zip(thinking, made, strict=True):
                self.add_thinking(row, response, think)
        # The answer is sampled as the model gives it: the odds of its end are not scaled.
        asked = [row for row in rows if row["truncated"] is None and len(row["ids"]) < total]
        for row, response in zip(asked, self.go_on(asked, total, rng, **sampling), strict=True):
            row["ids"] += response["ids"].tolist()
            row["truncated"] = response["truncated"]
        for row in rows:
            row["truncated"] = 1 if row["truncated"] is None else row["truncated"]
            row["ids"] = np.array(row["ids"], np.int32)
        return [rows[i : i + n] for i in range(0, len(rows), n)]

    def go_on(self, rows: list[dict], total: int, rng: np.random.Generator, **options) -> list[dict]:
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
        patient = self.wait and row["waits"] < WAITS
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

    def respond(self, requests, n, temperature, top_p, seed, think_end) -> list[list[dict]]:
        """As engines.respond: responses as fields of samples, with those of this module."""
        found, sampling = [], {"temperature": temperature, "top_p": top_p}
        for budget, group in itertools.groupby(requests, key=lambda request: request["budget"]):
            prompts = [request["ids"].tolist() for request in group]
            for responses in self.generate(prompts, n, budget, seed, **sampling):
                more = [{k: r[k] for k in ("waits", "injected", "forced") if k in r} for r in responses]
                texts = [engines.to_text(r, self.tokenizer, think_end) for r in responses]
                found.append([a | b | {"baseline": self.method} for a, b in zip(texts, more, strict=True)])
        return found


# ---- The sweep


def fit_scale(baseline: Baseline, prompts: list, budget: int, sampling: dict, tries: int = 10) -> tuple:
    """(k, mean length): the k that makes the mean length of 4 responses to each prompt nearest to `budget`.

    The length falls as k grows: bisection of log k from -8 to 8, every k with the same seed, to 2%.
    """
    seen, low, high = [], -8.0, 8.0
    while len(seen) < tries and not (seen and abs(seen[-1][1] - budget) <= 0.02 * budget):
        x = (low + high) / 2
        baseline.scales[budget] = math.exp(x)
        made = baseline.generate(prompts, 4, budget, **sampling)
        seen.append((math.exp(x), float(np.mean([len(r["ids"]) for group in made for r in group]))))
        low, high = (x, high) if seen[-1][1] > budget else (low, x)
    baseline.scales[budget], length = min(seen, key=lambda pair: abs(pair[1] - budget))
    return baseline.scales[budget], length


def sweep(args: argparse.Namespace) -> None:
    """All baselines of --methods on one model and one set of problems; one table at the end."""
    check_args(args)
    budgets = evaluate.budget_list(args.budgets)
    if None in budgets:
        raise BadInput(f"--budgets {args.budgets!r}: give token counts; the run without a budget is a method")
    problems = evaluate.load_data(args.data, args.limit, args.seed)
    wording = evaluate.pick_wording(args.wording, problems, model=args.model)
    tokenizer = data.load_tokenizer(args.model)
    context = data.load_config(args.model).max_position_embeddings
    asked = evaluate.plan(problems, [None], "none", wording, tokenizer, context)
    prompts = [request["ids"].tolist() for request in asked]
    longest = max(map(len, prompts))
    options = {"answer_tokens": args.answer_tokens, "max_tokens": args.max_tokens}
    made = {m: Baseline(m, None, tokenizer, context - longest, **options) for m in args.methods}
    # What does not fit is found now: weights take minutes to load.
    most = max(baseline.caps(budget)[1] for baseline in made.values() for budget in budgets)
    sampler = engines.open_sampler(args.model, args.sampler, longest + most, args.seed)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    summaries = {}
    for method, baseline in made.items():
        baseline.sampler, baseline.name, about = sampler, sampler.name, {"baseline": method} | options
        for budget in budgets if method == "stop_scale" else ():
            k, length = fit_scale(baseline, prompts[:FITTED], budget, sampling)
            about.setdefault("scales", {})[str(budget)] = k
            print(f"stop_scale at {budget}: k {k:.3g}, mean length {length:.1f}")
        results = evaluate.evaluate(
            baseline, problems, budgets if method != "none" else [None], "none", args.n,
            os.path.join(args.out, method), tokenizer=tokenizer, context=context, wording=wording,
            model=args.model, about=about, log=lambda line: None, **sampling,
        )  # fmt: skip
        for name, part in results["datasets"].items():
            summaries.setdefault(name, {})[method] = part["budgets"]
        print(f"{method}: written to {os.path.join(args.out, method)}")
    for name, methods in summaries.items():
        table = report.plain_table(report.summary_rows(methods))
        print(f"\n{name}: accuracy at mean length (tokens)\n{table}")
    print(f"\npaired: python -m evaluation.compare {args.out}/* --out {args.out.rstrip('/')}_compared")


# ---- Command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags of all commands, not yet checked; `run` is the command's function."""
    about = "Length control without RL, edits of checkpoints, selection of samples."
    parser = argparse.ArgumentParser("-m evaluation.baselines", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, text):
        made = commands.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=function)
        return data.one_line_errors(made).add_argument

    add = command(sweep, "run decoding-time baselines over budgets")
    add("--model", required=True, help="model folder or hub id")
    add("--data", required=True, help="data sets, comma-separated: presets, files of problems, toy, toy_ood")
    add("--budgets", required=True, help="tokens, comma-separated: 512,1024")
    add("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default all)")
    add("--n", type=int, default=1, help="responses per problem and budget (default 1)")
    add("--out", required=True, help="folder; every method gets a folder in it")
    add("--temperature", type=float, default=0.6, help="of sampling; 0 is greedy (default 0.6)")
    add("--top-p", type=float, default=0.95, help="share of the probability that is kept (default 0.95)")
    add("--max-tokens", type=int, help="cap of none (default 8192 tokens) and stop_scale (2 x budget)")
    add("--answer-tokens", type=int, default=512, help="s1, truncate: the answer's cap (default 512; L1: 20)")
    add("--wording", "--sentence", help="of prompts: l1, tulu or your own (default: as in training, or l1)")
    add("--sampler", choices=("auto", "vllm", "hf"), default="auto", help="auto: vllm on CUDA if installed")
    add("--seed", type=int, default=0, help="seed of the sampling and of the toy's problems (default 0)")
    add("--limit", type=int, help="problems per data set (default all; 200 of the toy's)")
    edits.add_commands(command)
    return data.one_line_errors(parser).parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a model is opened; turn the methods into a list."""
    least = {"n": 1, "max_tokens": 1, "answer_tokens": 1, "seed": 0, "limit": 1, "temperature": 0}
    for name, low in least.items():
        value = getattr(args, name)
        # Written so that nan, which compares false with everything, is refused as well.
        if value is not None and not low <= value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} ({value}) must be {low} or more")
    if not 0 < args.top_p <= 1:
        raise BadInput(f"--top-p ({args.top_p}) is a share above 0, at most 1")
    check_writable(args.out)
    args.methods = list(dict.fromkeys(args.methods.split(",")))
    for method in args.methods:
        if method not in METHODS:
            raise BadInput(f"--methods {method!r} is unknown: use some of {', '.join(METHODS)}")
        if os.path.exists(os.path.join(args.out, method)):
            raise BadInput(f"--out {args.out} holds a run of {method}: name another folder")


@exit_code("evaluation.baselines")
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(main())
