"""The model card of a trained checkpoint (README.md in its folder), and the way to the hub.

    python -m integrations.card out/run/checkpoint-500 --eval out/run/eval     the card, and its table
    python -m integrations.card out/run/checkpoint-500 --push-to-hub ME/NAME

The card says how to ask the model for a length, how well it obeys, and how it was made. The trainer's state
stays here. A card that is there is kept: only its table is written anew.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys

import train_grpo
from data import BadInput, first_line, one_line_errors

STATE = ["trainer_state.pt"]  # of use to --resume only
BEGIN, END = "<!-- length control -->", "<!-- end of length control -->"
NO_BUDGETS = "(The prompts of this run asked for no length.)"
CARD = """---
{about}
---

# {name}

{base}, trained by reinforcement learning for {steps} steps with nanoL1 (`--reward {reward}`,
`--advantage {advantage}`).

Budgets trained: {budgets}. Outside of them a model may well not obey.

## How to ask for a length

The budget is a sentence of the user's turn, in these very words, with PROBLEM and N filled in:

{prompts}

It counts the generated tokens of the whole response. Sample at temperature {temperature:g}, as in training.
`vllm serve FOLDER_OR_NAME` serves the model as it is.

## Length control

{begin}
Not measured yet.
{end}

## How it was made

```sh
{command}
```
"""
COLUMNS = {  # of the table: figure in results.json, heading
    "n": "samples", "accuracy": "accuracy", "mean_length": "mean length", "abs_error": "mean error",
    "signed_error": "signed error", "within_10": "within 10%", "over_budget": "over budget",
    "truncated": "cut off",
}  # fmt: skip


def check_login(repo: str | None) -> None:
    """BadInput, before anything is trained, where `repo` (owner/name) cannot be uploaded to: no login."""
    if not repo:
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise BadInput(f"--push-to-hub ({repo}) must be OWNER/NAME")
    from huggingface_hub import get_token

    if not get_token():
        raise BadInput(f"--push-to-hub {repo}: not logged in to the hub: `hf auth login`, or set HF_TOKEN")


def templates(rows: list[dict]) -> list[str]:
    """User turns as the model was trained on them: PROBLEM and N in the place of problem and budget."""
    found: dict[str, int] = {}
    for row in rows:
        if row.get("budget") and row["problem"] in row["prompt"]:
            before, after = row["prompt"].split(row["problem"], 1)
            text = before + "PROBLEM" + re.sub(rf"\b{row['budget']}\b", "N", after)
            found[text] = found.get(text, 0) + 1
    return sorted(found, key=found.get, reverse=True)[:3]


def budgets_text(rows: list[dict]) -> str:
    """The budgets that were trained, in words."""
    budgets = sorted({row["budget"] for row in rows if row.get("budget")})
    if not budgets:
        return "none"
    if len(budgets) <= 12:
        return ", ".join(map(str, budgets)) + " tokens"
    return f"{budgets[0]} to {budgets[-1]} tokens ({len(budgets)} different ones)"


def table(results: dict) -> str:
    """Markdown: a line per data set and budget of a results.json; budgets that were trained are marked."""
    trained = results.get("trained_budgets") or []
    lines = ["| data | asked for | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(COLUMNS))
    for name, part in results["datasets"].items():
        for budget, cell in part["budgets"].items():
            asked = "no length" if budget == "none" else budget
            if trained and budget != "none" and not is_trained(int(budget), trained):
                asked += " (untrained)"
            lines.append(f"| {name} | {asked} | {' | '.join(show(key, cell.get(key)) for key in COLUMNS)} |")
    note = "Lengths in generated tokens, end token included; error: |length - budget| / budget, averaged"
    if "n" in results:
        note += f"; {results['n']} per problem and budget at temperature {results['temperature']:g}"
    return "\n".join(lines) + f"\n\n{note}" + (f", mode {results['mode']}." if results.get("mode") else ".")


def is_trained(budget: int, trained: list[int]) -> bool:
    """Whether a budget was trained: one of a few, or inside the range that many were drawn from."""
    return budget in trained if len(trained) <= 12 else min(trained) <= budget <= max(trained)


def show(key: str, value: float | None) -> str:
    """A cell of the table: counts, tokens and shares; empty where a figure is not known."""
    if value is None:
        return ""
    return f"{value:.0f}" if key in ("n", "mean_length") else f"{value:.1%}"


def command_line(args: dict) -> str:
    """The command that makes a run with these flags: those that are not the default."""
    words, defaults = ["python", "train_grpo.py"], vars(train_grpo.build_parser().parse_args([]))
    for name, value in args.items():
        if value in ({}, defaults.get(name)):
            continue
        pairs = (
            [f"{k}={json.dumps(v)}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
        )
        words += [f"--{name.replace('_', '-')}", *(pairs if value is not True else [])]
    return shlex.join(words)


def run_of(folder: str) -> tuple[dict, list[dict]]:
    """(flags, training rows) of the run that a checkpoint belongs to."""
    path = os.path.join(os.path.dirname(os.path.abspath(folder)), "args.json")
    try:
        with open(path, encoding="utf-8") as f:
            args = json.load(f)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is no checkpoint of a run ({error}): name OUT/checkpoint-N") from None
    return args, train_grpo.load_rows(argparse.Namespace(**args))


def write_card(folder: str, args: dict, rows: list[dict]) -> None:
    """README.md of a checkpoint, without a table yet; `args`: the run's flags, `rows`: its training rows."""
    from huggingface_hub import ModelCardData

    name, base = os.path.basename(os.path.dirname(os.path.abspath(folder))), args["model"]
    on_hub = bool(base) and not os.path.isdir(base)
    about = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", base_model=base if on_hub else None,
        tags=["length-control", "reasoning", "grpo", "nanoL1"],
    )  # fmt: skip
    fields = {
        "about": about.to_yaml().strip(), "name": name, "steps": args["steps"], "reward": args["reward"],
        "base": f"`{base if on_hub else os.path.basename(base)}`" if base else "A toy model that adds digits",
        "advantage": args["advantage"], "budgets": budgets_text(rows), "temperature": args["temperature"],
        "prompts": "\n\nor\n\n".join(f"```\n{text}\n```" for text in templates(rows)) or NO_BUDGETS,
        "command": command_line(args), "begin": BEGIN, "end": END,
    }  # fmt: skip
    text = CARD.format(**fields)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
        f.write(text)


def fill_in(folder: str, evaluation: str) -> None:
    """Put table and pictures of the evaluation in the folder `evaluation` into a checkpoint's card."""
    path, source = os.path.join(folder, "README.md"), os.path.join(evaluation, "results.json")
    try:
        with open(source, encoding="utf-8") as f:
            results = json.load(f)
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except (OSError, ValueError) as error:
        raise BadInput(f"{error}: give a checkpoint with a README.md and an evaluation's folder") from None
    if BEGIN not in text or END not in text:
        raise BadInput(f"{path} has no place for the table: put lines {BEGIN} and {END} there")
    body = table(results)
    for picture in [p for p in results.get("pictures", []) if p.startswith("violins")]:
        shutil.copy(os.path.join(evaluation, picture), folder)
        body += f"\n\n![requested and produced length]({picture})"
    head, tail = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"{head}{BEGIN}\n{body}\n{END}{tail}")


def push(folder: str, repo: str, log=print) -> None:
    """Upload a checkpoint to the hub as `repo`, without the trainer's state; BadInput where that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=STATE,
            commit_message=f"{os.path.basename(folder)}, trained with nanoL1",
        )  # fmt: skip
    except (HfHubHTTPError, OSError) as error:
        again = f"python -m integrations.card {folder} --push-to-hub {repo}"
        raise BadInput(f"--push-to-hub {repo} failed ({first_line(error)}); later: {again}") from None
    log(f"uploaded: {done.commit_url}")


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    parser = argparse.ArgumentParser(
        "integrations.card", description=__doc__.split("\n", 1)[0], allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="folder of a checkpoint: OUT/checkpoint-N")
    parser.add_argument("--eval", help="folder of a finished evaluation of it: table and pictures")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to the hub")
    try:
        args = one_line_errors(parser).parse_args(argv)
        check_login(args.push_to_hub)
        if not os.path.exists(os.path.join(args.checkpoint, "README.md")):
            write_card(args.checkpoint, *run_of(args.checkpoint))
        if args.eval:
            fill_in(args.checkpoint, args.eval)
        if args.push_to_hub:
            push(args.checkpoint, args.push_to_hub)
    except BadInput as error:
        print(f"integrations.card: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
