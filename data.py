# PYTHON_ARGCOMPLETE_OK
"""Problems in, budget-annotated training rows out.

    python data.py deepscaler --budgets uniform:100:4000 --mode exact --wording l1 --out l1_exact.jsonl

Reads local JSON / JSONL / CSV / Parquet files, the named sets of PRESETS, or any Hugging Face dataset id;
draws a token budget for every problem; writes the budget sentence into the prompt and the same number into
`budget`. Needs nothing else of this project (only --export does: hosts.py), so that it can be copied alone.
"""

import argparse
import contextlib
import csv
import gzip
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # libraries that are loaded late
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LETTERS = "ABCDEFGHIJ"
MODES = ("exact", "max", "both", "none")
EXPORTS = ("verl", "trl", "open-instruct")
MAX_BUDGET = 10_000_000  # tokens; beyond any context, so a larger number is a typing error


class BadInput(ValueError):
    """A user's mistake, told in one line: the value, the rule, the reason and the way out."""


def one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Errors of a complete parser become BadInput, one line instead of the usage; serves tab-completion."""

    def fail(message: str):
        raise BadInput(f"{message} (python {parser.prog} --help lists the flags)")

    parser.error = fail
    # A shell that has argcomplete asks what may come next; a subcommand's parser is a part of its parent's.
    if "_ARGCOMPLETE" in os.environ and " " not in parser.prog:
        import argcomplete

        if parser.fromfile_prefix_chars:  # @FILE stands for no argument of its own
            files = argcomplete.completers.FilesCompleter()
            parser.add_argument("recipe", nargs="*").completer = lambda prefix, **known: [
                "@" + name for name in files(prefix.removeprefix("@"))
            ]
        argcomplete.autocomplete(parser)
    return parser


# ------------------------------------------------------------------------------------------------------------
# Prompts: what the model is asked. The wordings are those of the published training data.

STEPS = "Let's think step by step and output the final answer"
SENTENCES = {
    "l1": {"exact": "Think for {} tokens.", "max": "Think for maximum {} tokens."},
    "tulu": {"exact": "Think for {} tokens.", "max": "Think for up to {} tokens."},
}
WORDINGS = tuple(SENTENCES)
BLANK_LINE = ("aime2025",)  # sets of mathematics whose instruction L1's scripts set off by a blank line


def option_letters(problem: str) -> str:
    """Letters of the options that a problem shows: "A, B, C, D, E". L1 named A-D even where E was right."""
    shown = [*itertools.takewhile(lambda x: re.search(rf"^{x}[.)] |\({x}\)", problem, re.M), LETTERS)]
    return ", ".join(shown if len(shown) > 1 else LETTERS[:4])


def budget_prompt(
    problem: str,
    budget: int | None,
    mode: str | None,
    kind: str = "math",
    wording: str = "l1",
    apart: bool = False,
) -> str:
    """The user turn: the problem and, where `budget` (tokens) is not None, the sentence that asks for it.

    `apart`: a blank line before l1's mathematics instruction, as L1 has it for the sets in BLANK_LINE.
    """
    if wording not in WORDINGS:
        raise BadInput(f"wording {wording!r} is unknown: use one of {', '.join(WORDINGS)}")
    # L1 sets its multiple-choice instruction off by a blank line, its mathematics one by a space.
    plain = f"\n\n{STEPS}" if apart else f" {STEPS}"
    options = f"\n\n{STEPS} (eg, {option_letters(problem)})" if kind == "choice" else plain
    text = f"{problem}{options} within \\boxed{{}}."
    # The AI2 blog's form: the sentence on a line of its own, and no other instruction.
    text, separator = (problem, "\n") if wording == "tulu" else (text, " ")
    if budget is None:
        return text
    # L1's generators wrote "Think for -1 tokens." where they meant no budget: here that is an error.
    if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
        raise BadInput(f"budget {budget!r} must be a whole number of tokens, 1 or more (None: no budget)")
    # A budget without a mode would be asked for in one way and rewarded in another.
    if mode not in ("exact", "max"):
        raise BadInput(f"a budget of {budget} tokens needs mode exact or max, not {mode!r}")
    return text + separator + SENTENCES[wording][mode].format(int(budget))


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of one user turn, ready for generation: the one way in, for data, training and evaluation."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        # transformers 5 returns a BatchEncoding here, transformers 4 the bare list.
        return list(ids if isinstance(ids, list) else ids["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub id; BadInput where there is none."""
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if os.path.isdir(name):
        # transformers makes an EMPTY tokenizer from a folder that has only a config.json: look for the files.
        if not any(os.path.exists(os.path.join(name, file)) for file in files):
            raise BadInput(f"{name} holds no tokenizer ({files[0]}): save the tokenizer beside the model")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise BadInput(f"tokenizer folder {name} does not exist")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"tokenizer {name!r} could not be loaded: {first_line(error)}") from error


def stop_ids(config, tokenizer) -> list[int]:
    """TEMPORARY until datarewards lands."""
    ids = {tokenizer.eos_token_id}
    declared = getattr(config, "eos_token_id", None)
    ids.update(declared if isinstance(declared, list) else [declared])
    return sorted(i for i in ids if i is not None)


def load_config(path: str, tokenizer=None) -> "PretrainedConfig":
    """Configuration of a model folder or hub id; BadInput where it is missing or unfit for `tokenizer`."""
    from transformers import AutoConfig

    try:
        # A folder that brings its own classes runs no code here.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} has no usable config.json: {first_line(error)}") from None
    size = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and size and len(tokenizer) > size:
        raise BadInput(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, its model {size}: they do not belong "
            f"together; copy the model's own tokenizer there"
        )
    return config


# ------------------------------------------------------------------------------------------------------------
# Budgets

NUMBER = r"-?\d{1,12}"
BUDGET_FORMS = {  # name: (example, what must follow the name)
    "uniform": ("uniform:100:4000", f"{NUMBER}:{NUMBER}"),
    "log": ("log:256:23170", f"{NUMBER}:{NUMBER}"),
    "bucket": ("bucket:100,1024,4096", f"{NUMBER}(,{NUMBER})*"),
    "fixed": ("fixed:512", NUMBER),
    "none": ("none", ""),
}


def parse_budgets(spec: str) -> dict:
    """A distribution from its text: {"name", "low", "high", "values"}; tokens, both ends included."""
    spec = spec.replace(" ", "")
    name, _, rest = spec.partition(":")
    if name not in BUDGET_FORMS or not re.fullmatch(BUDGET_FORMS[name][1], rest, re.ASCII):
        forms = ", ".join(example for example, _ in BUDGET_FORMS.values())
        raise BadInput(f"budgets {spec!r} is malformed: write whole numbers of tokens as in {forms}")
    values = [int(number) for number in re.findall(NUMBER, rest)]
    if name != "none" and (min(values) < 1 or max(values) > MAX_BUDGET):
        raise BadInput(f"budgets {spec!r}: a budget must be from 1 to {MAX_BUDGET} tokens")
    if name in ("uniform", "log") and values[0] > values[1]:
        swapped = f"{name}:{values[1]}:{values[0]}"
        raise BadInput(f"budgets {spec!r}: {values[0]} is above {values[1]}, smallest first: {swapped}")
    low, high = min(values, default=None), max(values, default=None)
    return {"name": name, "low": low, "high": high, "values": values}


def draw_budgets(dist: dict, n: int, rng: np.random.Generator) -> list[int | None]:
    """n budgets in tokens from a parsed distribution; the same generator state gives the same budgets."""
    low, high = dist["low"], dist["high"]
    if dist["name"] == "none":
        return [None] * n
    if dist["name"] == "uniform":
        drawn = rng.integers(low, high, size=n, endpoint=True)
    elif dist["name"] == "log":
        # int(2^U(log2 a, log2 b)) as L1 draws its log-uniform set; the clip undoes rounding at the two ends.
        exponents = rng.uniform(math.log2(low), math.log2(high), size=n)
        drawn = np.clip(np.floor(2.0**exponents), low, high).astype(np.int64)
    else:  # bucket, fixed
        drawn = np.asarray(dist["values"])[rng.integers(0, len(dist["values"]), size=n)]
    return [int(budget) for budget in drawn]


def count_distinct(dist: dict) -> int:
    """How many different budgets a distribution can give."""
    ends_only = dist["name"] in ("uniform", "log")
    return dist["high"] - dist["low"] + 1 if ends_only else len(set(dist["values"]))


def annotate(
    problems: list[dict], budgets: str | dict, mode: str, wording: str = "l1", copies: int = 1, seed: int = 0
) -> list[dict]:
    """Problems -> Rows: `copies` rows a problem, each with its own budget; one seed, one result."""
    dist = parse_budgets(budgets) if isinstance(budgets, str) else budgets
    if mode not in MODES:
        raise BadInput(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if (mode == "none") != (dist["name"] == "none"):
        raise BadInput(f"mode {mode} does not go with budgets {dist['name']}: both are none, or neither is")
    rng = np.random.default_rng(seed)
    drawn = draw_budgets(dist, len(problems) * copies, rng)
    groups = [drawn[i : i + copies] for i in range(0, len(drawn), copies)]
    # The copies of a problem differ wherever the distribution has enough budgets for that.
    for group in groups if count_distinct(dist) >= copies else []:
        for k in range(copies):
            while group[k] in group[:k]:
                group[k] = draw_budgets(dist, 1, rng)[0]
    # The modes are drawn after all budgets, so that a seed means the same budgets whatever the mode.
    coins = rng.random(len(drawn)) < 0.5
    rows = []
    for i, budget in enumerate(itertools.chain(*groups)):
        problem, row_mode = problems[i // copies], None if budget is None else mode
        row = {key: problem[key] for key in ("id", "problem", "answer", "kind", "source")}
        if copies > 1:
            row["id"] = f"{problem['id']}#{i % copies}"
        if mode == "both":
            row_mode = "exact" if coins[i] else "max"
        row["prompt"] = budget_prompt(problem["problem"], budget, row_mode, problem["kind"], wording)
        row |= {"budget": budget, "mode": row_mode}
        rows.append(row | {key: problem[key] for key in ("level", "subject", "choices") if key in problem})
    return rows


# ------------------------------------------------------------------------------------------------------------
# Layouts: what the columns of the published sets are called. Each function turns one record into the plain
# form (problem | passage + question, choices, answer | answers, id, level, subject), or raises Skip.


class Skip(Exception):
    """A record that cannot become a problem; the message is the reason under which it is counted."""


def last_box(text: str) -> str | None:
    """The contents of the last \\boxed{...} in a solution, braces balanced."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 7 : i]
    return None


GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def from_gpqa(row: dict) -> dict:
    """GPQA lists the right option first: the order shown is drawn from the question, so it never changes."""
    order = np.random.default_rng(zlib.crc32(row["Question"].encode())).permutation(4)
    choices = [row[GPQA_OPTIONS[i]] for i in order]
    answer = LETTERS[int(np.argmin(order))]
    return {"id": row.get("Record ID"), "question": row["Question"], "choices": choices, "answer": answer}


# What stands at the end of a prompt that was annotated elsewhere; the third form is open-instruct's oldest.
BUDGET_TAIL = r"\s*(?:Think for (up to |maximum )?(-?\d+) tokens\.|Use no more than (\d+) tokens\.)\s*$"
STEPS_TAIL = re.compile(rf"\s*{re.escape(STEPS)}(?: \(eg, [A-J, ]+\))? within \\boxed\{{\}}\.\s*$")


def split_turn(messages: list[dict], budget: int | None, mode: str | None) -> dict:
    """The last user turn -> problem, prompt, budget, mode; its text must name the budget of the metadata."""
    content = user_text(messages or [])
    if not isinstance(messages, list) or not isinstance(content, str):
        raise Skip("no user turn")
    match = re.search(BUDGET_TAIL, content)
    plain = {"problem": STEPS_TAIL.sub("", content[: match.start()] if match else content)}
    said = int(match[2] or match[3]) if match else None
    if said == -1:  # L1's "Think for -1 tokens." means no budget: such a prompt is not kept
        return plain
    if said is not None and budget is None:
        budget, mode = said, "max" if match[1] or match[3] else "exact"
    if said != budget:
        raise Skip("budget in text and metadata differ")
    return plain | {"prompt": content, "budget": budget, "mode": mode}


def user_text(prompt: str | list[dict]) -> str | None:
    """The text of the last user turn of a list of messages; anything else as it is."""
    if not isinstance(prompt, list):
        return prompt
    turns = [turn for turn in prompt if isinstance(turn, dict) and turn.get("role") == "user"]
    return turns[-1].get("content") if turns else None


def from_plain(row: dict) -> dict:
    """This project's files and most hub sets; for TRL the prompt is a list of messages."""
    return row | {"prompt": user_text(row.get("prompt"))}


def from_verl(row: dict) -> dict:
    """verl (L1, Eurus-2): L1 puts the budget in reward_model.num_tokens; its sign is the mode, -1 is none.

    Without num_tokens it is in extra_info, which stock verl gives to the scorer, or in the text alone.
    """
    if row.get("ability") not in (None, "math"):
        raise Skip("not mathematics")
    tokens, budget, mode = row["reward_model"].get("num_tokens"), None, None
    if tokens not in (None, -1):
        budget, mode = abs(int(tokens)), "exact" if tokens > 0 else "max"
    info = row.get("extra_info") or {}
    if tokens is None and info.get("budget") is not None:
        budget, mode = info["budget"], info.get("mode")
    golds = {"answers": row["reward_model"]["ground_truth"], "source": row.get("data_source")}
    # --export verl keeps the rest of a row there; L1 has the subject of MMLU.
    kept = {
        key: info[key] for key in ("id", "problem", "kind", "level", "subject", "choices") if info.get(key)
    }
    return split_turn(row["prompt"], budget, mode) | golds | kept


def from_messages(row: dict) -> dict:
    """open-instruct: ground_truth and dataset are strings or parallel lists; a length is one of them."""
    if isinstance(row.get("row"), str):
        return json.loads(row["row"])  # --export open-instruct keeps the whole row
    golds, names = row["ground_truth"], row.get("dataset")
    # The old encoding joins both in one string: "42<sep>1234" with dataset "MATH,max_length".
    if isinstance(golds, str) and "<sep>" in golds:
        golds, names = golds.split("<sep>"), str(names).split(",")
    golds = golds if isinstance(golds, list) else [golds]
    names = names if isinstance(names, list) else [names] * len(golds)
    lengths = {"max_length": "exact", "up_to_max_length": "max"}  # so named there; max_length asks for EXACT
    answers, budget, mode = [], None, None
    for gold, name in zip(golds, names, strict=False):
        if name in lengths:
            budget, mode = int(gold), lengths[name]
        else:
            answers.append(gold)
    return split_turn(row["messages"], budget, mode) | {"answers": answers}


# layout: (columns that must be there, function), in the order in which they are tried on a file or a hub id.
LAYOUTS = {
    "verl": (("prompt", "reward_model"), from_verl),
    "messages": (("messages", "ground_truth"), from_messages),
    # AGIEval: `query` already shows passage, question and options (A)-(E); `gold` is a list of indices.
    "lsat": (("query", "choices", "gold"),
             lambda r: {"problem": r["query"], "choices": r["choices"], "answers": r["gold"], "shown": True}),
    "gpqa": (("Question", "Correct Answer"), from_gpqa),
    "svamp": (("Body", "Question", "Answer"),
             lambda r: {"id": r.get("ID"), "problem": f"{r['Body']} {r['Question']}", "answer": r["Answer"]}),
    "olympiad": (("question", "final_answer"),
                 lambda r: r | {"answers": r["final_answer"], "subject": r.get("subfield")}),
    # Omni-MATH's `domain` is a list of paths like "Mathematics -> Algebra -> ...".
    "omni": (("problem", "difficulty", "domain", "answer"),
             lambda r: r | {"level": r.get("difficulty"), "subject": str((r.get("domain") or [""])[0])}),
    # problem | question, answer | answers: this project's files, most hub sets, and Row files.
    "plain": ((), from_plain),
    # MATH has no answer column: the answer is the last box of the solution. `type` is the subject.
    "math": (("problem", "solution"),
             lambda r: r | {"answer": last_box(str(r["solution"])), "subject": r.get("type")}),
}  # fmt: skip

TOPICS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
AI2 = "ai2-adapt-dev/"
# name: (hub id, configs, split, layout). `?` marks a layout that nobody has confirmed, `~` one whose columns
# and splits were only seen in other public code that loads the set; the others were seen on the hub or in the
# papers' code. A wrong guess ends in one line that names the columns.
PRESETS = {
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", (), "train", "plain"),
    "eurus2": ("PRIME-RL/Eurus-2-RL-Data", (), "train", "verl"),
    "eurus2_ai2": (AI2 + "eurus2_ground_truth", (), "train", "messages"),
    "eurus2_ai2_random": (AI2 + "eurus2_ground_truth_with_random_max_length", (), "train", "messages"),
    "eurus2_ai2_4096": (AI2 + "eurus2_ground_truth_max_length_4096", (), "train", "messages"),  # ?
    "eurus2_ai2_up_to": (AI2 + "eurus2_ground_truth_random_up_to_max_length", (), "train", "messages"),  # ?
    "eurus2_ai2_bucketed": (AI2 + "eurus2_ground_truth_random_bucketed_length", (), "train", "messages"),  # ?
    "deepscaler_ai2": (AI2 + "deepscaler-gt", (), "train", "messages"),
    "deepscaler_ai2_4k": (AI2 + "deepscaler_gt_with_random_max_length", (), "train", "messages"),
    "deepscaler_ai2_8k": (AI2 + "deepscaler_gt_with_random_max_length_8192", (), "train", "messages"),
    "math500": ("HuggingFaceH4/MATH-500", (), "test", "plain"),
    "math": ("EleutherAI/hendrycks_math", tuple(TOPICS.split()), "train", "math"),  # ~
    "aime2022_2024": ("AI-MO/aimo-validation-aime", (), "train", "plain"),
    "aime2024": ("HuggingFaceH4/aime_2024", (), "train", "plain"),  # ~
    "aime2025": ("opencompass/AIME2025", ("AIME2025-I", "AIME2025-II"), "test", "plain"),
    "amc": ("AI-MO/aimo-validation-amc", (), "train", "plain"),
    "amc23": ("math-ai/amc23", (), "test", "plain"),  # ~
    "olympiadbench": ("Hothan/OlympiadBench", ("OE_TO_maths_en_COMP",), "train", "olympiad"),
    "minerva": ("math-ai/minervamath", (), "test", "plain"),  # ~
    # Gated: accept its terms on the hub first.
    "gpqa": ("Idavidrein/gpqa", ("gpqa_diamond",), "train", "gpqa"),
    "lsat_ar": ("dmayhem93/agieval-lsat-ar", (), "test", "lsat"),
    "lsat_lr": ("dmayhem93/agieval-lsat-lr", (), "test", "lsat"),
    "lsat_rc": ("dmayhem93/agieval-lsat-rc", (), "test", "lsat"),
    "mmlu_1000": ("cais/mmlu", ("all",), "test", "plain"),  # L1's draw of 1,000
    "mmlu": ("cais/mmlu", ("all",), "test", "plain"),
    "gsm8k": ("openai/gsm8k", ("main",), "test", "plain"),
    "omni_math": ("KbsdJames/Omni-MATH", (), "test", "omni"),
    "svamp": ("ChilleD/SVAMP", (), "test", "svamp"),  # ~
    "gsm_plus": ("qintongli/GSM-Plus", (), "testmini", "plain"),  # ~
}


# ------------------------------------------------------------------------------------------------------------
# From a record to a problem


def clean_text(value: object) -> str | None:
    """A stripped, non-empty string, or None; JSON may carry half a surrogate pair, which no file can hold."""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        return None
    return value.strip() or None


def clean_answer(value: object) -> str | list[str] | None:
    """One gold answer or a list of which any may match; None where there is none."""
    if isinstance(value, (list, tuple)):
        answers = list(dict.fromkeys(a for a in map(clean_answer, value) if isinstance(a, str)))
        return answers[0] if len(answers) == 1 else answers or None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            return None
        # AMC stores 142.0 for 142.
        return str(int(value)) if value == int(value) else repr(value)
    text = clean_text(value)
    # GSM8K stores a rationale and "#### 42", GSM-Plus "None" where there is no answer.
    if text and "####" in text:
        text = text.rsplit("####", 1)[1].strip().replace(",", "")
    if text and re.fullmatch(r"-?\d+\.0", text):
        text = text[:-2]
    return None if text in (None, "", "None", "null", "nan", "NaN") else text


def answer_letter(value: object, choices: list[str] | None) -> str | None:
    """The letter of a gold that is a letter, an index from 0 (as in MMLU) or the whole text of an option."""
    letters = LETTERS[: len(choices)] if choices else LETTERS
    text = clean_answer(value)
    text = text if isinstance(text, str) else ""
    if match := re.fullmatch(r"\(?([A-J])\)?\.?", text):
        return match[1] if match[1] in letters else None
    is_index = re.fullmatch(r"\d+", text, re.ASCII) and int(text) < len(letters)
    readings = {letters[int(text)]} if is_index else set()
    # As text (CSV), "2" may be an index or the option that reads "2": it counts where only one can be meant.
    if isinstance(value, str) or not readings:
        readings |= {letters[i] for i, choice in enumerate(choices or []) if choice == text}
    return readings.pop() if len(readings) == 1 else None


def clean_choices(value: object) -> list[str]:
    """The option texts without their "(A)" or "A." labels, in order."""
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(LETTERS):
        raise Skip(f"choices are not a list of 2 to {len(LETTERS)}")
    choices = [clean_text(str(choice)) for choice in value]
    if None in choices:
        raise Skip("an empty choice")
    labels = [re.match(rf"\({x}\)\s*|{x}[.)]\s+", c) for x, c in zip(LETTERS, choices, strict=False)]
    return [c[m.end() :] for c, m in zip(choices, labels, strict=True)] if all(labels) else choices


def show_problem(row: dict, choices: list[str] | None) -> str | None:
    """The text with passage and options: LSAT style after a passage, else GPQA / MMLU style."""
    text, passage = clean_text(row.get("problem")), clean_text(row.get("passage"))
    if text is None and (text := clean_text(row.get("question"))) and passage:
        text = f"{passage}\n\n{text}"
    if text is None or not choices or row.get("shown"):
        return text
    dotted = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    round_ = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    # A Row's problem shows its options already: they must not be added again at every reading.
    if all(a in text or b in text for a, b in zip(dotted, round_, strict=True)):
        return text
    return "\n".join([text, *round_] if passage else [text, "", "Options:", *dotted])


def clean_level(value: object) -> int | float | str | None:
    """5, 5.0 and "Level 5" are one level."""
    text = str(value).strip().removeprefix("Level ")
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        return clean_text(value)
    return int(float(text)) if float(text).is_integer() else float(text)


def gold_answer(row: dict, kind: str, choices: list[str] | None) -> str | list[str]:
    """The cleaned `answers` or `answer`, letters for multiple choice; Skip where there is none."""
    answer = row["answers"] if row.get("answers") not in (None, [], "") else row.get("answer")
    if clean_answer(answer) is None:
        raise Skip("no answer")
    if kind == "math":
        return clean_answer(answer)
    letters = [answer_letter(one, choices) for one in (answer if isinstance(answer, list) else [answer])]
    if None in letters:
        raise Skip("answer names no option")
    return clean_answer(letters)


def normalise(row: dict, name: str, index: int, need_answer: bool = True) -> dict:
    """A plain record -> the problem fields of the Row contract; Skip where it has no text or no answer."""
    choices = None if row.get("choices") in (None, [], "") else clean_choices(row["choices"])
    kind = "choice" if choices or row.get("kind") == "choice" else "math"
    problem = show_problem(row, choices)
    if problem is None:
        raise Skip("no problem text")
    given = [str(row[key]) for key in ("id", "unique_id") if row.get(key) not in (None, "")]
    result = {"id": given[0] if given else f"{name}-{index:05d}", "problem": problem}
    result["answer"] = gold_answer(row, kind, choices) if need_answer else None
    result |= {"kind": kind, "source": clean_text(row.get("source")) or name}
    extras = {"level": clean_level(row.get("level")), "subject": clean_text(row.get("subject"))}
    result |= {key: value for key, value in (extras | {"choices": choices}).items() if value is not None}
    if clean_text(row.get("prompt")) is None:
        return result
    # A Row already: its budget (text in a CSV file) and mode come together or not at all.
    budget, mode = clean_answer(row.get("budget")), row.get("mode") or "none"
    if budget is None and mode == "none":
        return result | {"prompt": row["prompt"], "budget": None, "mode": None}
    if mode not in ("exact", "max") or not re.fullmatch(r"[1-9]\d{0,7}", budget or "", re.ASCII):
        raise Skip("budget and mode do not make sense")
    return result | {"prompt": row["prompt"], "budget": int(budget), "mode": mode}


# ------------------------------------------------------------------------------------------------------------
# Files and hub datasets

SUFFIX = r"\.(jsonl|json|csv|parquet)(\.gz)?$"


def first_line(error: Exception) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_file(path: str) -> list:
    """All records of a local file, as the file has them; BadInput names the line or the damage."""
    match = re.search(SUFFIX, path.lower())
    if match is None:
        raise BadInput(f"{path}: unknown suffix; use .jsonl, .json, .csv (each also .gz) or .parquet")
    kind, number, records = match[1], 0, []
    try:
        if kind == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        newline = "" if kind == "csv" else None  # the csv module wants line ends as they are
        with (gzip.open if match[2] else open)(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            if kind == "json":
                records = json.load(file)
            elif kind == "csv":
                csv.field_size_limit(2**31 - 1)  # a problem with its solution can pass the default of 128 KiB
                reader = csv.DictReader(file, strict=True)
                records = [row | json_lists(row) for row in reader]
            for line in file if kind == "jsonl" else []:
                number += 1
                if line.strip():
                    records.append(json.loads(line))
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {first_line(error)}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path} is a truncated or damaged gzip file: {first_line(error)}") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except csv.Error as error:
        raise BadInput(f"{path}: line {reader.line_num} is not valid CSV: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        wanted = "a readable Parquet file" if kind == "parquet" else "valid JSON"
        hint = " (one object a line belongs in a .jsonl file)" if "Extra data" in str(error) else ""
        where = f"{path}: line {number}" if number else path
        raise BadInput(f"{where} is not {wanted}: {first_line(error)}{hint}") from error
    if not isinstance(records, list):
        raise BadInput(f"{path} holds a JSON {type(records).__name__}: it must be a list of objects")
    return records


def json_lists(row: dict) -> dict:
    """Lists travel through CSV as JSON text. Not in `answer`: "[1, 2]" there is an interval."""
    lists = {}
    for key in ("choices", "answers", "gold", "final_answer"):
        if str(row.get(key)).startswith("["):
            with contextlib.suppress(ValueError):  # not JSON: it stays text, and is judged as text
                lists[key] = json.loads(row[key])
    return lists


def read_hub(hub_id: str, configs: tuple, split: str | None) -> tuple:
    """A dataset of the Hugging Face hub, or a local folder laid out like one: (rows, columns)."""
    import datasets

    parts = []
    saved = [os.path.join(hub_id, name) for name in ("state.json", "dataset_dict.json")]
    for config in configs or (None,):
        try:
            if any(map(os.path.exists, saved)):  # what save_to_disk wrote
                part = datasets.load_from_disk(hub_id)
                part = part if isinstance(part, dict) else {"train": part}
                if split and split not in part:
                    raise ValueError(f"it has no split {split}, only {', '.join(part)}")
                part = part[split] if split else part
            else:
                part = datasets.load_dataset(hub_id, config, split=split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            told = f"dataset {hub_id} (config {config}, split {split})"
            raise BadInput(f"{told} could not be loaded: {first_line(error)}") from error
        if split is None and "train" not in part and len(part) > 1:
            raise BadInput(f"dataset {hub_id} has the splits {', '.join(part)}: choose one with --split")
        # Without a wish: training data, or whatever there is when it is the only split.
        parts.append(part if split else part["train" if "train" in part else next(iter(part))])
    return (row for part in parts for row in part), parts[0].column_names


def open_source(name: str, split: str | None) -> tuple:
    """A file, preset, folder or hub id -> (records, columns, layout or None, short name)."""
    stem = re.sub(SUFFIX, "", os.path.basename(name.rstrip("/")))
    if os.path.isfile(name):
        if split is not None:
            raise BadInput(f"split {split!r} was asked of {name}: a local file has no splits")
        records = read_file(name)
        columns = list(dict.fromkeys(key for row in records if isinstance(row, dict) for key in row))
        return records, columns, None, stem
    if os.path.isdir(name):
        return *read_hub(name, (), split), None, stem
    # A preset goes by its name or by the hub id that it stands for.
    preset = {value[0]: key for key, value in PRESETS.items()}.get(name, name)
    if preset in PRESETS:
        hub_id, configs, default_split, layout = PRESETS[preset]
        # GSM8K by name is its test split: say what is read before anybody trains on it.
        print(f"data.py: {hub_id}, split {split or default_split}", file=sys.stderr)
        records, columns = read_hub(hub_id, configs, split or default_split)
        return draw_1000(records) if preset == "mmlu_1000" else records, columns, layout, preset
    if re.search(SUFFIX, name.lower()) or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise BadInput(f"{name}: no such file, and not one of the named sets ({', '.join(PRESETS)})")
    hub_id, _, config = name.partition(":")
    return *read_hub(hub_id, (config,) if config else (), split), None, stem


def draw_1000(records: Iterable) -> list:
    """The 1,000 rows that L1 drew: the first of numpy's old shuffle with seed 42."""
    records = list(records)
    order = np.arange(len(records))
    np.random.RandomState(42).shuffle(order)
    return [records[i] for i in order[:1000]]


def find_layout(columns: list[str], layout: str | None, name: str, need_answer: bool = True) -> Callable:
    """The function that reads these columns; BadInput with the columns found and those wanted."""
    has_text = "problem" in columns or "question" in columns
    is_plain = has_text and ("answer" in columns or "answers" in columns or not need_answer)
    for key in [layout] if layout else LAYOUTS:
        wanted, function = LAYOUTS[key]
        if set(wanted) <= set(columns) and (is_plain or key != "plain"):
            return function
    wanted = ", ".join(LAYOUTS[layout or "plain"][0]) or "problem or question, answer or answers"
    raise BadInput(f"{name} has the columns {', '.join(map(str, columns)) or '(none)'}; wanted: {wanted}")


def to_problems(
    records: Iterable, function: Callable, name: str, tally: Counter, need_answer: bool = True
) -> Iterator[dict]:
    """The records that are problems; `tally` counts all as "read" and the others by reason."""
    for index, record in enumerate(records):
        tally["read"] += 1
        try:
            if not isinstance(record, dict) or None in record:
                raise Skip("not an object with the file's columns")
            yield normalise(function(record), name, index, need_answer)
        except Skip as reason:
            tally[str(reason)] += 1
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
            # Published files hold nulls and numbers where text belongs: one such row must not end the run.
            tally["a value of the wrong type"] += 1


def reasons(counts: Counter) -> str:
    """ "3 no answer, 1 duplicate": why rows were left out."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason != "read")


def load_problems(
    name_or_path: str,
    split: str | None = None,
    limit: int | None = None,
    counts: Counter | None = None,
    need_answer: bool = True,
) -> list[dict]:
    """The first `limit` problems of a file, a preset, a hub id (owner/name[:config]) or a folder."""
    records, columns, layout, name = open_source(name_or_path, split)
    if records == []:
        raise BadInput(f"{name_or_path} is empty: it holds no rows")
    function, tally = find_layout(columns, layout, name_or_path, need_answer), Counter()
    problems = list(itertools.islice(to_problems(records, function, name, tally, need_answer), limit))
    if not problems:
        raise BadInput(f"{name_or_path}: none of its {tally['read']} rows can be used ({reasons(tally)})")
    # What was left out is never silent: it goes to the caller's counts ("read" counts all), else to stderr.
    if counts is not None:
        counts.update(tally)
    elif len(tally) > 1:
        told = f"left out {reasons(tally)} of {tally['read']} rows"
        print(f"data.py: note: {name_or_path}: {told}", file=sys.stderr)
    return problems


def write_rows(rows: list[dict], path: str) -> None:
    """Rows to .jsonl, .jsonl.gz or .parquet, whole or not at all; the same rows give the same bytes."""
    check_out(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            if path.endswith(".parquet"):
                write_parquet(rows, file)
            else:
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
                # mtime=0: the time of writing would make two equal files differ.
                file.write(gzip.compress(text, mtime=0) if path.endswith(".gz") else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_parquet(rows: list[dict], file) -> None:
    """Parquet wants one type a column: answers become lists where any is one, levels text where any is."""
    import pyarrow.parquet

    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(k for row in rows for k in row)}
    if any(isinstance(answer, list) for answer in columns.get("answer", [])):
        columns["answer"] = [a if isinstance(a, list) else [a] for a in columns["answer"]]
    if any(isinstance(level, str) for level in columns.get("level", [])):
        columns["level"] = [None if level is None else str(level) for level in columns["level"]]
    types = {"budget": pyarrow.int64(), "mode": pyarrow.string()}  # all null in an unbudgeted file
    arrays = {key: pyarrow.array(values, types.get(key)) for key, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), file)


def check_out(path: str) -> None:
    """Refuses an output path before any work is done for it."""
    if not path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise BadInput(f"--out {path}: unknown suffix; use .jsonl, .jsonl.gz or .parquet")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise BadInput(f"--out {path}: the folder {folder} does not exist: make it first (mkdir -p {folder})")


# ------------------------------------------------------------------------------------------------------------
# The command


def same_text(problem: dict) -> str:
    """Two problems are the same when their texts are, once every run of white space is one space."""
    return " ".join(problem["problem"].split())


def select(problems: list[dict], excluded: set[str], limit: int | None, counts: Counter) -> list[dict]:
    """Drops what is in `excluded` and repeats, counts both, makes ids unique, keeps the first `limit`."""
    kept, seen, ids = [], set(), Counter()
    for problem in problems:
        key = same_text(problem)
        if key in excluded or key in seen:
            counts["also in --exclude" if key in excluded else "duplicate"] += 1
        elif limit is not None and len(kept) >= limit:
            counts["beyond --limit"] += 1
        else:
            seen.add(key)
            first = identity = problem["id"]
            # Two input files may both number their rows from 0.
            while identity in ids:
                ids[first] += 1
                identity = f"{first}-{ids[first]}"
            ids[identity] = 1
            kept.append(problem | {"id": identity})
    return kept


def histogram(budgets: list[int], dist: dict, bins: int = 10, width: int = 40) -> str:
    """The budgets drawn as text: a line per value for buckets, else bins of equal (log: geometric) width."""
    if dist["name"] in ("uniform", "log"):
        space = np.geomspace if dist["name"] == "log" else np.linspace
        edges = sorted({int(round(edge)) for edge in space(dist["low"], dist["high"] + 1, bins + 1)})
        labels = [f"{a}-{b - 1}" for a, b in itertools.pairwise(edges)]
    else:
        labels = sorted(set(dist["values"]))
        edges = [*labels, MAX_BUDGET + 1]
    counts = np.histogram(budgets, bins=edges)[0]
    bars = ["#" * round(width * count / max(counts)) for count in counts]
    return "\n".join(f"  {a:>13} {b:7d} {c}" for a, b, c in zip(labels, counts, bars, strict=True))


def summary(rows: list[dict], counts: Counter, lengths: list[int], unit: str, dist: dict) -> str:
    """What was read, what was dropped and why, and what the rows ask for."""
    lines = [f"read {counts['read']} rows, wrote {len(rows)}"]
    lines += [f"  dropped {n}: {reason}" for reason, n in counts.most_common() if reason != "read"]
    for field in ("mode", "kind"):
        found = Counter(row[field] or "none" for row in rows)
        lines.append(f"{field}: " + ", ".join(f"{name} {n}" for name, n in sorted(found.items())))
    lines.append(f"prompt length: mean {np.mean(lengths):.1f}, longest {max(lengths)} {unit}")
    budgets = [row["budget"] for row in rows if row["budget"] is not None]
    if budgets:
        lines.append(f"budget (tokens): mean {np.mean(budgets):.1f}, from {min(budgets)} to {max(budgets)}")
        lines.append(histogram(budgets, dist))
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags as given; check_args fills in what depends on another flag."""
    about, presets = "Problems -> rows with a token budget in the prompt.", f"Presets: {', '.join(PRESETS)}."
    parser = argparse.ArgumentParser(prog="data.py", allow_abbrev=False, description=about, epilog=presets)
    add = parser.add_argument_group("what is read").add_argument
    add("input", help="files, presets, hub ids (owner/name[:config]) or folders, comma-separated")
    add("--split", help="split of a hub dataset (default: the preset's own, else train)")
    add("--limit", type=int, help="keep the first N problems")
    add("--exclude", help="drop the problems of these files (comma-separated; equal but for white space)")

    add = parser.add_argument_group("what is asked for").add_argument
    forms = "uniform:100:4000 (default; ends included), log:256:23170, bucket:100,1024, fixed:512, none"
    add("--budgets", help=f"distribution of the budgets in tokens: {forms}")
    add("--mode", choices=MODES, help="exact (default), max, both (a coin for each row) or none")
    add("--wording", choices=WORDINGS, default="l1", help="how the budget is asked for (default l1)")
    add("--copies", type=int, default=1, help="rows per problem, each with its own budget (default 1)")
    add("--seed", type=int, default=0, help="one seed, one file, byte for byte (default 0)")

    add = parser.add_argument_group("what is written").add_argument
    add("--out", required=True, help="file to write: .jsonl, .jsonl.gz or .parquet")
    add("--export", choices=EXPORTS, help="write the columns of another trainer (default: of this one)")
    add("--max-prompt-tokens", type=int, help="drop rows whose prompt, chat template included, is longer")
    add("--tokenizer", help="model folder or hub id whose tokenizer counts the prompt's tokens")
    return one_line_errors(parser).parse_args(argv)


def check_args(args: argparse.Namespace) -> dict:
    """Fills the defaults of --budgets and --mode, refuses what does not go together; the parsed budgets."""
    args.mode = args.mode or ("none" if args.budgets == "none" else "exact")
    if args.budgets is None:
        args.budgets = "none" if args.mode == "none" else "uniform:100:4000"
    dist = parse_budgets(args.budgets)
    if (args.mode == "none") != (dist["name"] == "none"):
        way_out = "drop --budgets" if args.mode == "none" else "use --mode none, or name a distribution"
        raise BadInput(f"--mode {args.mode} does not go with --budgets {args.budgets}: {way_out}")
    for flag, least in (("--copies", 1), ("--limit", 1), ("--max-prompt-tokens", 1), ("--seed", 0)):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and value < least:
            raise BadInput(f"{flag} ({value}) must be {least} or more")
    if args.max_prompt_tokens and not args.tokenizer:
        raise BadInput("--max-prompt-tokens needs --tokenizer: name the model whose tokens are counted")
    check_out(args.out)
    for source in ",".join(filter(None, (args.input, args.exclude))).split(","):
        if not source.strip():
            raise BadInput(f"an empty name in the list {args.input!r} or {args.exclude!r}")
        if os.path.exists(source) and os.path.realpath(source) == os.path.realpath(args.out):
            raise BadInput(f"--out {args.out} is also read: choose another name, the input would be lost")
    return dist


def build(args: argparse.Namespace, dist: dict) -> str:
    """Reads, selects, annotates, filters, writes; returns the summary."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    counts, problems, excluded = Counter(), [], set()
    for name in args.input.split(","):
        problems += load_problems(name.strip(), args.split, counts=counts)
    for name in args.exclude.split(",") if args.exclude else []:
        # Only the texts matter here, so a file of problems without answers will do.
        excluded |= {same_text(problem) for problem in load_problems(name.strip(), need_answer=False)}
    problems = select(problems, excluded, args.limit, counts)
    rows = annotate(problems, dist, args.mode, args.wording, args.copies, args.seed)
    lengths = [len(encode_prompt(tokenizer, row["prompt"]) if tokenizer else row["prompt"]) for row in rows]
    most = args.max_prompt_tokens or math.inf
    counts["prompt too long"] += sum(length > most for length in lengths)
    rows = [row for row, length in zip(rows, lengths, strict=True) if length <= most]
    if not rows:
        raise BadInput(f"nothing left of {counts['read']} rows ({reasons(+counts)}): nothing was written")
    written = rows
    if args.export:
        from integrations.hosts import export

        written = export(rows, args.export)
    write_rows(written, args.out)
    lengths = [length for length in lengths if length <= most]
    text = summary(rows, +counts, lengths, "tokens" if tokenizer else "characters", dist)
    if 1 <= count_distinct(dist) < args.copies:
        text += f"\nnote: {args.budgets} has fewer than {args.copies} budgets: copies of a problem share some"
    return f"{text}\nwritten to {args.out}"


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    try:
        args = parse_args(argv)
        print(build(args, check_args(args)))
    except BadInput as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
