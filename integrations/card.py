"""The model card of a trained checkpoint (README.md in its folder), and the way to the hub.

    python -m integrations.card out/run/checkpoint-500 [--eval out/run/eval] [--push-to-hub ME/NAME]

The card says how to ask the model for a length, how well it obeys, and how it was made. The trainer's state
stays here.
"""

import argparse
import json
import os
import re
import shutil
import sys

from data import BadInput, first_line, one_line_errors
from evaluate import read_results, report, run
from train_grpo import load_rows

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [length-control, reasoning, grpo, nanoL1]
{base_line}---

# {name}

`{base}`, trained by reinforcement learning for {steps} steps with nanoL1 (`--reward {reward}`,
`--advantage {advantage}`, `--method {method}`).

## How to ask for a length

Budgets trained: {budgets}. Outside of them a model may well not obey. The budget is a sentence of the user's
turn, in these very words, with PROBLEM and N filled in:

```
{prompt}
```

It counts the generated tokens of the whole response. Sample at temperature {temperature:g}, as in training.

## Length control

{table}

## How it was made

`python train_grpo.py` with these settings:

```json
{settings}
```
"""


def template(rows: list[dict]) -> str:
    """A user turn as the model was trained on it: PROBLEM and N in the place of problem and budget."""
    row = next((row for row in rows if row.get("budget") and row["problem"] in row["prompt"]), None)
    if row is None:
        return "(The prompts of this run asked for no length.)"
    before, after = row["prompt"].split(row["problem"], 1)
    return before + "PROBLEM" + re.sub(rf"\b{row['budget']}\b", "N", after)


def write_card(folder: str, evaluation: str | None) -> None:
    """README.md of a checkpoint, from its run's args.json, rows and evaluation (None: OUT/eval, if there)."""
    out = os.path.dirname(os.path.abspath(folder))
    try:
        with open(os.path.join(out, "args.json")) as f:
            args = json.load(f)
    except OSError:
        raise BadInput(f"{folder} is no checkpoint of a run: {out} has no args.json") from None
    rows = load_rows(argparse.Namespace(**args))
    budgets = sorted({row["budget"] for row in rows if row.get("budget")})
    few = ", ".join(map(str, budgets)) if len(budgets) < 9 else f"{budgets[0]} to {budgets[-1]}"
    done = evaluation or os.path.join(out, "eval")
    found = read_results(os.path.join(done, "results.json"))
    text = report.markdown_table(found) if found else "Not measured yet."
    if evaluation and not found:
        raise BadInput(f"--eval ({evaluation}) holds no results.json: name a finished evaluation's folder")
    for picture in sorted(os.listdir(done)) if found else []:
        if picture.startswith("violins") and picture.endswith(".png"):
            shutil.copy(os.path.join(done, picture), folder)
            text += f"\n\n![requested and produced length]({picture})"
    local = os.path.isdir(args["model"])
    card = CARD.format(
        name=os.path.basename(out), base=os.path.basename(args["model"]) if local else args["model"],
        base_line="" if local else f"base_model: {args['model']}\n", prompt=template(rows), table=text,
        budgets=f"{few} tokens" if budgets else "none", settings=json.dumps(args, indent=1),
        **{key: args[key] for key in ("steps", "reward", "advantage", "method", "temperature")},
    )  # fmt: skip
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
        f.write(card)


def push(folder: str, repo: str) -> None:
    """Upload a checkpoint to the hub as `repo` (owner/name), without the trainer's state."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=["trainer_state.pt"])
    except (HfHubHTTPError, OSError, ValueError) as error:  # not logged in, refused, no such name
        raise BadInput(f"--push-to-hub {repo} failed ({first_line(error)}): `hf auth login` first") from None
    print(f"uploaded: {done.commit_url}")


def command(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser("integrations.card", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("--eval", help="folder of an evaluation (default: eval beside the checkpoint)")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to the hub")
    args = one_line_errors(parser).parse_args(argv)
    write_card(args.checkpoint, args.eval)
    if args.push_to_hub:
        push(args.checkpoint, args.push_to_hub)


def main(argv: list[str] | None = None) -> int:
    return run("integrations.card", command, argv)


if __name__ == "__main__":
    sys.exit(main())
