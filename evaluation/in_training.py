"""Budget sweeps during training, with the trainer's own engine."""

import numpy as np

from data import BadInput, budget_prompt
from evaluate import budget_list, evaluate, load_data, plan, read_results
from evaluation.report import plain_table, show


def plan_evaluation(rows: list[dict], tokenizer, context: int, args) -> dict:
    """What evaluate_now asks: {"problems", "budgets", "mode", "max_tokens"}, and the "room" it needs.

    All that can be wrong is found here, before a model is loaded. Rows that ask for their budgets in another
    sentence than --wording would make the evaluation measure something else.
    """
    row, fields = next((row for row in rows if row.get("budget")), None), "problem budget mode kind".split()
    if row and row["prompt"] != budget_prompt(*map(row.get, fields), args.wording):
        asks = f"--wording {args.wording} is not how --data asks: {row['prompt'][-80:]!r}"
        raise BadInput(f"{asks}; give the --wording or --sentence that data.py had")
    drawn = sorted({row["budget"] for row in rows if row.get("budget")})
    asked = drawn if len(drawn) < 6 else np.quantile(drawn, [0.125, 0.375, 0.625, 0.875]).astype(int).tolist()
    asked = budget_list(args.eval_budgets, "--eval-budgets") if args.eval_budgets else asked or [None]
    problems, mode = load_data(args.eval_data, 200, 0), "max" if args.mode == "max" else "exact"
    longest = max(len(q["ids"]) for q in plan(problems, asked, mode, args.wording, tokenizer, context))
    # One cap for all budgets, so that one which is not obeyed shows the length it gets and not the cap.
    cap = min(2 * max((b for b in asked if b), default=args.max_tokens), context - longest)
    found = {"problems": problems, "budgets": asked, "mode": mode, "trained_budgets": drawn}
    return found | {"max_tokens": cap, "room": longest + cap}


def evaluate_now(sampler, asked: dict, args, state, name: str, resume=False) -> None:
    """Asks what plan_evaluation made; samples, results and report go to OUT/name. Every process calls it.

    With `resume` what is there already stays: it has to be the same model's.
    """
    told = print if state.is_main_process else lambda *words: None
    evaluate(
        sampler, n=2, out=f"{args.out}/{name}", wording=args.wording, temperature=args.temperature, top_p=1.0,
        seed=args.seed, model=args.model, log=told, resume=resume, require_think=args.require_think,
        think_end=args.think_end, state=state, tokenizer=sampler.tokenizer,
        context=sampler.max_model_len, **{k: v for k, v in asked.items() if k != "room"},
    )  # fmt: skip
    if name == "eval" and state.is_main_process:
        told(before_and_after(args.out))


def before_and_after(out: str) -> str:
    """A table of OUT/eval-0 and OUT/eval: mean absolute error and accuracy at every budget, per data set."""
    before, after = (read_results(f"{out}/{name}/results.json") for name in ("eval-0", "eval"))
    if not before:
        return f"results: {out}/eval"
    rows = [["data", "asked", "error before -> after", "right before -> after"]]
    for name, part in after["datasets"].items():
        for budget, new in part["budgets"].items():
            if old := before["datasets"].get(name, {"budgets": {}})["budgets"].get(budget):
                changes = [f"{show(old[key])} -> {show(new[key])}" for key in ("abs_error", "accuracy")]
                rows.append([name, budget, *changes])
    return f"{plain_table(rows)}\npictures, samples and the report: {out}/eval"
