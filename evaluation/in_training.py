"""Budget sweeps during training, with the trainer's own engine."""

from data import BadInput, budget_prompt
from evaluate import before_and_after, evaluate, load_data


def evaluate_now(sampler, rows: list[dict], budgets: list[int], args, state, name: str) -> None:
    """Asks for `budgets` on --eval-data; samples, results and report go to OUT/name. All processes call it together."""
    row = next((row for row in rows if row.get("budget")), None)
    if row and row["prompt"] != budget_prompt(
        *(row[k] for k in ("problem", "budget", "mode", "kind")), args.wording
    ):
        raise BadInput(
            f"--wording {args.wording} is not how --data asks for a budget: {row['prompt'][-80:]!r}"
        )
    # One cap for all budgets, so that one which is not obeyed shows the length it gets and not the cap.
    cap, mode = 2 * max(budgets, default=args.max_tokens // 2), "max" if args.mode == "max" else "exact"
    told = print if state.is_main_process else lambda *words: None
    evaluate(
        sampler, load_data(args.eval_data, 200, 0), budgets or [None], mode, 2, f"{args.out}/{name}",
        wording=args.wording, temperature=args.temperature, top_p=1.0, max_tokens=cap, seed=args.seed, state=state,
        model=args.model, log=told, require_think=args.require_think, think_end=args.think_end,
    )  # fmt: skip
    if name == "eval":
        told(before_and_after(args.out))
