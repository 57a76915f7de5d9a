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
from pathlib import Path

from data import BadInput, exit_code, first_line, one_line_errors
from evaluate import read_results, report
from train_grpo import load_rows

TEMPLATE = Path(__file__).with_name("card_page.md")


def template(rows: list[dict]) -> str:
    """A user turn as the model was trained on it: PROBLEM and N in the place of problem and budget."""
    row = next((row for row in rows if row.get("budget") and row["problem"] in row["prompt"]), None)
    if row is None:
        return "(The prompts of this run asked for no length.)"
    before, after = row["prompt"].split(row["problem"], 1)
    return before + "PROBLEM" + re.sub(rf"\b{row['budget']}\b", "N", after)


def write_card(folder: str, evaluation: str | None) -> None:
    """README.md of a checkpoint, from its run's args.json, rows and evaluation (None: OUT/eval, if there)."""
    out = Path(folder).resolve().parent
    if not (out / "args.json").exists():
        raise BadInput(f"{folder} is no checkpoint of a run: {out} has no args.json")
    args = json.loads((out / "args.json").read_text(encoding="utf-8"))
    rows = load_rows(argparse.Namespace(**args))
    budgets = sorted({row["budget"] for row in rows if row.get("budget")})
    few = ", ".join(map(str, budgets)) if len(budgets) < 9 else f"{budgets[0]} to {budgets[-1]}"
    done, text = Path(evaluation or out / "eval"), "Not measured yet."
    if found := read_results(str(done / "results.json")):
        text = report.markdown_table(found)
        for picture in sorted(done.glob("violins*.png")):
            shutil.copy(picture, folder)
            text += f"\n\n![requested and produced length]({picture.name})"
    elif evaluation:
        raise BadInput(f"--eval ({evaluation}) holds no results.json: name a finished evaluation's folder")
    local = os.path.isdir(args["model"])
    card = TEMPLATE.read_text(encoding="utf-8").format(
        name=out.name, base=os.path.basename(args["model"]) if local else args["model"],
        base_line="" if local else f"base_model: {args['model']}\n", prompt=template(rows), table=text,
        budgets=f"{few} tokens" if budgets else "none", settings=json.dumps(args, indent=1),
        **{key: args[key] for key in ("steps", "reward", "advantage", "method", "temperature")},
    )  # fmt: skip
    Path(folder, "README.md").write_text(card, encoding="utf-8")


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


@exit_code("integrations.card")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("integrations.card", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="folder of a checkpoint")
    parser.add_argument("--eval", help="folder of an evaluation (default: eval beside the checkpoint)")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to the hub")
    args = one_line_errors(parser).parse_args(argv)
    write_card(args.checkpoint, args.eval)
    if args.push_to_hub:
        push(args.checkpoint, args.push_to_hub)


if __name__ == "__main__":
    sys.exit(main())
