"""Budget sweeps during training, with the trainer's own engine."""

import json
import os

from data import BadInput, budget_prompt
from evaluate import evaluate, load_data

ASKED = ("problem", "budget", "mode", "kind")


def evaluate_now(sampler, rows: list[dict], budgets: list[int], args, state, name: str) -> None:
    """Asks for `budgets` on --eval-data; samples, results and report go to OUT/name. All processes together.

    Rows that ask for their budgets in another sentence than --wording would make it measure something else.
    """
    row = next((row for row in rows if row.get("budget")), None)
    if row and row["prompt"] != budget_prompt(*(row[key] for key in ASKED), args.wording):
        raise BadInput(f"--wording {args.wording} is not how --data asks: {row['prompt'][-80:]!r}")
    # One cap for all budgets, so that one which is not obeyed shows the length it gets and not the cap.
    cap, mode = 2 * max(budgets, default=args.max_tokens // 2), "max" if args.mode == "max" else "exact"
    # The trainer's engine has room for the longest of these.
    tokenizer, context = sampler.tokenizer, sampler.max_model_len
    told = print if state.is_main_process else lambda *words: None
    evaluate(
        sampler, load_data(args.eval_data, 200, 0), budgets or [None], mode, 2, f"{args.out}/{name}",
        wording=args.wording, temperature=args.temperature, top_p=1.0, max_tokens=cap, seed=args.seed,
        model=args.model, log=told, require_think=args.require_think, think_end=args.think_end, state=state,
        tokenizer=tokenizer, context=context,
    )  # fmt: skip
    if name == "eval" and state.is_main_process:
        told(before_and_after(args.out))


def before_and_after(out: str) -> str:
    """A table of OUT/eval-0 and OUT/eval: mean absolute error and accuracy at every budget, per data set."""
    folders = [f"{out}/eval-0", f"{out}/eval"]
    if not os.path.exists(f"{folders[0]}/results.json"):
        return f"results: {folders[1]}"
    before, after = (json.load(open(f"{folder}/results.json"))["datasets"] for folder in folders)
    lines = []
    for name in after:
        lines.append(f"{name:12} asked   error before -> after     right before -> after")
        for budget, new in after[name]["budgets"].items():
            old = before.get(name, {"budgets": {}})["budgets"].get(budget)
            if old is None:
                continue
            error = f"{old['abs_error']:7.1%} -> {new['abs_error']:6.1%}" if "abs_error" in new else " " * 17
            lines.append(f"{budget:>18}   {error}           {old['accuracy']:6.1%} -> {new['accuracy']:6.1%}")
    return "\n".join([*lines, f"pictures, samples and the report: {folders[1]}"])
