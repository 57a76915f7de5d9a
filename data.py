"""Problems in, budget-annotated training rows out.

    python data.py deepscaler --budgets uniform:100:4000 --mode exact --wording l1 --out l1_exact.jsonl

Reads local JSON / JSONL / CSV / Parquet files, the named sets of PRESETS, or any Hugging Face dataset id;
draws a token budget for every problem; writes the budget sentence into the prompt and the same number into
`budget`. Imports nothing else of this project, so that it can be copied alone.
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

import numpy as np

LETTERS = "ABCDEFGHIJ"
MODES = ("exact", "max", "both", "none")
WORDINGS = ("l1", "tulu")
MAX_BUDGET = 10_000_000  # tokens; beyond any context, so a larger number is a typing error


class BadInput(ValueError):
    """A user's mistake, told in one line: the value, the rule, the reason and the way out."""


def one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let argparse complain through BadInput: one line, instead of the whole usage."""

    def fail(message: str):
        raise BadInput(f"{message} (python {parser.prog} --help lists the flags)")

    parser.error = fail
    return parser


# ------------------------------------------------------------------------------------------------------------
# Prompts: what the model is asked. The wordings are those of the published training data.

MATH_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
CHOICE_INSTRUCTION = (
    "Let's think step by step and output the final answer (eg, {letters}) within \\boxed{{}}."
)
SENTENCES = {
    ("l1", "exact"): "Think for {} tokens.",
    ("l1", "max"): "Think for maximum {} tokens.",
    ("tulu", "exact"): "Think for {} tokens.",
    ("tulu", "max"): "Think for up to {} tokens.",
}


def option_letters(problem: str) -> str:
    """Letters of the options that a problem shows: "A, B, C, D, E". L1 named A-D even where E was right."""
    shown = 0
    while shown < len(LETTERS) and re.search(rf"^{LETTERS[shown]}[.)] |\({LETTERS[shown]}\)", problem, re.M):
        shown += 1
    return ", ".join(LETTERS[: shown if shown > 1 else 4])


def budget_prompt(
    problem: str, budget: int | None, mode: str | None, kind: str = "math", wording: str = "l1"
) -> str:
    """The user turn: the problem and, where `budget` (tokens) is not None, the sentence that asks for it."""
    if wording not in WORDINGS:
        raise BadInput(f"wording {wording!r} is unknown: use one of {', '.join(WORDINGS)}")
    if wording == "tulu":
        # The AI2 blog's form: the sentence on a line of its own, and no other instruction.
        text, separator = problem, "\n"
    elif kind == "choice":
        # L1 sets its multiple-choice instruction off by a blank line, its mathematics one by a space.
        text, separator = f"{problem}\n\n{CHOICE_INSTRUCTION.format(letters=option_letters(problem))}", " "
    else:
        text, separator = f"{problem} {MATH_INSTRUCTION}", " "
    if budget is None:
        return text
    # L1's generators wrote "Think for -1 tokens." where they meant no budget: here that is an error.
    if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
        raise BadInput(f"budget {budget!r} must be a whole number of tokens, 1 or more (None: no budget)")
    if mode not in ("exact", "max"):
        raise BadInput(f"a budget of {budget} tokens needs mode exact or max, not {mode!r}")
    return text + separator + SENTENCES[wording, mode].format(int(budget))


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of one user turn, ready for generation: the one way in, for data, training and evaluation."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        # transformers 5 returns a BatchEncoding here, transformers 4 the bare list.
        return list(ids if isinstance(ids, list) else ids["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def load_tokenizer(name: str):
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
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise BadInput(f"tokenizer {name!r} could not be loaded: {first_line(error)}") from error


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
    """A distribution from its text: {"name", "low", "high", "values"}.

    `low` and `high` are tokens, both included; None for "none". BadInput says what is wrong.
    """
    spec = spec.replace(" ", "")
    name, _, rest = spec.partition(":")
    if name not in BUDGET_FORMS or not re.fullmatch(BUDGET_FORMS[name][1], rest, re.ASCII):
        forms = ", ".join(example for example, _ in BUDGET_FORMS.values())
        raise BadInput(f"budgets {spec!r} is malformed: write whole numbers of tokens as in {forms}")
    values = [int(number) for number in re.findall(NUMBER, rest)]
    if not values:
        return {"name": name, "low": None, "high": None, "values": []}
    if min(values) < 1 or max(values) > MAX_BUDGET:
        raise BadInput(f"budgets {spec!r}: a budget must be from 1 to {MAX_BUDGET} tokens")
    if name in ("uniform", "log") and values[0] > values[1]:
        swapped = f"{name}:{values[1]}:{values[0]}"
        raise BadInput(f"budgets {spec!r}: {values[0]} is above {values[1]}, smallest first: {swapped}")
    return {"name": name, "low": min(values), "high": max(values), "values": values}


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
    if dist["name"] in ("uniform", "log"):
        return dist["high"] - dist["low"] + 1
    return len(set(dist["values"]))


def draw_copies(dist: dict, n: int, copies: int, rng: np.random.Generator) -> list[list[int | None]]:
    """`copies` budgets for each of n problems, different within a problem where the distribution allows."""
    drawn = draw_budgets(dist, n * copies, rng)
    groups = [drawn[i * copies : (i + 1) * copies] for i in range(n)]
    wanted = min(copies, count_distinct(dist))
    if copies == 1 or wanted < copies:
        return groups
    for group in groups:
        seen: set = set()
        for k, budget in enumerate(group):
            while budget in seen:
                budget = draw_budgets(dist, 1, rng)[0]
            seen.add(budget)
            group[k] = budget
    return groups


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
    groups = draw_copies(dist, len(problems), copies, rng)
    # The modes are drawn after all budgets, so that a seed means the same budgets whatever the mode.
    coins = rng.random(len(problems) * copies) < 0.5
    rows = []
    for i, problem in enumerate(problems):
        for k, budget in enumerate(groups[i]):
            row_mode = ("exact" if coins[i * copies + k] else "max") if mode == "both" else mode
            row_mode = None if budget is None else row_mode
            row = {
                "id": problem["id"] if copies == 1 else f"{problem['id']}#{k}",
                **{key: problem[key] for key in ("problem", "answer", "kind", "source")},
                "prompt": budget_prompt(problem["problem"], budget, row_mode, problem["kind"], wording),
                "budget": budget,
                "mode": row_mode,
            }
            row |= {key: problem[key] for key in ("level", "subject", "choices") if key in problem}
            rows.append(row)
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


def from_plain(row: dict) -> dict:
    """problem | question, answer | answers: the data files of this project, most hub sets, and Row files."""
    return row


def from_math(row: dict) -> dict:
    """MATH has no answer column: the answer is the last box of the solution. `type` is the subject."""
    return row | {"answer": last_box(str(row["solution"])), "subject": row.get("type")}


def from_olympiad(row: dict) -> dict:
    return row | {"answers": row["final_answer"], "subject": row.get("subfield")}


def from_omni(row: dict) -> dict:
    # Omni-MATH's `domain` is a list of paths like "Mathematics -> Algebra -> ...".
    return row | {"level": row.get("difficulty"), "subject": str((row.get("domain") or [""])[0])}


def from_svamp(row: dict) -> dict:
    return {"id": row.get("ID"), "problem": f"{row['Body']} {row['Question']}", "answer": row["Answer"]}


GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def from_gpqa(row: dict) -> dict:
    """GPQA lists the right option first: the order shown is drawn from the question, so it never changes."""
    order = np.random.default_rng(zlib.crc32(row["Question"].encode())).permutation(4)
    choices = [row[GPQA_OPTIONS[i]] for i in order]
    answer = LETTERS[int(np.argmin(order))]
    return {"id": row.get("Record ID"), "question": row["Question"], "choices": choices, "answer": answer}


def from_lsat(row: dict) -> dict:
    """AGIEval: `query` already shows passage, question and options (A)-(E); `gold` is a list of indices."""
    return {"problem": row["query"], "choices": row["choices"], "answers": row["gold"], "shown": True}


THINK = r"Think for (up to |maximum )?(-?\d+) tokens\.|Use no more than (\d+) tokens\."
BUDGET_TAIL = re.compile(rf"\s*(?:{THINK})\s*$")
STEPS = r"Let's think step by step and output the final answer(?: \(eg, [A-J, ]+\))? within \\boxed\{\}\."
INSTRUCTION_TAIL = re.compile(rf"\s*{STEPS}\s*$")


def last_user_turn(messages) -> str:
    turns = [turn for turn in messages or [] if isinstance(turn, dict) and turn.get("role") == "user"]
    if not turns or not isinstance(turns[-1].get("content"), str):
        raise Skip("no user turn")
    return turns[-1]["content"]


def split_prompt(content: str, budget: int | None, mode: str | None) -> dict:
    """A finished user turn -> problem, prompt, budget, mode; both must name one budget."""
    match = BUDGET_TAIL.search(content)
    bare = content[: match.start()] if match else content
    plain = {"problem": INSTRUCTION_TAIL.sub("", bare)}
    said = int(match[2] or match[3]) if match else None
    if said == -1:  # L1's "Think for -1 tokens." means no budget: such a prompt is not kept
        return plain
    if said is not None and budget is None:
        budget, mode = said, "max" if match[1] or match[3] else "exact"
    if said != budget:
        raise Skip("budget in text and metadata differ")
    return plain | {"prompt": content, "budget": budget, "mode": mode}


def from_verl(row: dict) -> dict:
    """verl (L1, Eurus-2): L1 puts the budget in reward_model.num_tokens; its sign is the mode, -1 is none."""
    if row.get("ability") not in (None, "math"):
        raise Skip("not mathematics")
    tokens = row["reward_model"].get("num_tokens")
    budget, mode = None, None
    if tokens not in (None, -1):
        budget, mode = abs(int(tokens)), "exact" if tokens > 0 else "max"
    plain = split_prompt(last_user_turn(row["prompt"]), budget, mode)
    return plain | {"answers": row["reward_model"]["ground_truth"], "source": row.get("data_source")}


def from_messages(row: dict) -> dict:
    """open-instruct: ground_truth and dataset are strings or parallel lists; a length is one of them.

    The old encoding joins both in one string: "42<sep>1234" with dataset "MATH,max_length".
    """
    golds, names = row["ground_truth"], row.get("dataset")
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
    return split_prompt(last_user_turn(row["messages"]), budget, mode) | {"answers": answers}


# layout: (columns that must be there, function), in the order in which they are tried on a file or a hub id.
LAYOUTS = {
    "verl": (("prompt", "reward_model"), from_verl),
    "messages": (("messages", "ground_truth"), from_messages),
    "lsat": (("query", "choices", "gold"), from_lsat),
    "gpqa": (("Question", "Correct Answer"), from_gpqa),
    "svamp": (("Body", "Question", "Answer"), from_svamp),
    "olympiad": (("question", "final_answer"), from_olympiad),
    "omni": (("problem", "difficulty", "domain", "answer"), from_omni),
    "plain": ((), from_plain),
    "math": (("problem", "solution"), from_math),
}

MATH_SUBJECTS = (
    "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
)
AI2 = "ai2-adapt-dev/"
# name: (hub id, configs, split, layout). `?` marks a layout taken from a dataset card or from memory:
# nobody has confirmed it by loading the set. A wrong guess ends in one line that names the columns.
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
    "math": ("EleutherAI/hendrycks_math", tuple(MATH_SUBJECTS.split()), "train", "math"),  # ?
    "aime2022_2024": ("AI-MO/aimo-validation-aime", (), "train", "plain"),
    "aime2024": ("HuggingFaceH4/aime_2024", (), "train", "plain"),  # ?
    "aime2025": ("opencompass/AIME2025", ("AIME2025-I", "AIME2025-II"), "test", "plain"),
    "amc": ("AI-MO/aimo-validation-amc", (), "train", "plain"),
    "amc23": ("math-ai/amc23", (), "test", "plain"),  # ?
    "olympiadbench": ("Hothan/OlympiadBench", ("OE_TO_maths_en_COMP",), "train", "olympiad"),
    "minerva": ("math-ai/minervamath", (), "test", "plain"),  # ?
    "gpqa": (
        "Idavidrein/gpqa",
        ("gpqa_diamond",),
        "train",
        "gpqa",
    ),  # gated: accept its terms on the hub first
    "lsat_ar": ("dmayhem93/agieval-lsat-ar", (), "test", "lsat"),
    "lsat_lr": ("dmayhem93/agieval-lsat-lr", (), "test", "lsat"),
    "lsat_rc": ("dmayhem93/agieval-lsat-rc", (), "test", "lsat"),
    "mmlu": ("cais/mmlu", ("all",), "test", "plain"),
    "gsm8k": ("openai/gsm8k", ("main",), "test", "plain"),
    "omni_math": ("KbsdJames/Omni-MATH", (), "test", "omni"),
    "svamp": ("ChilleD/SVAMP", (), "test", "svamp"),  # ?
    "gsm_plus": ("qintongli/GSM-Plus", (), "testmini", "plain"),  # ?
}


# ------------------------------------------------------------------------------------------------------------
# From a record to a problem


def clean_text(value) -> str | None:
    """A stripped, non-empty string, or None; JSON may carry half a surrogate pair, which no file can hold."""
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value.strip()


def clean_answer(value) -> str | list[str] | None:
    """One gold answer or a list of which any may match; None where there is none.

    AMC stores 142.0 for 142, GSM8K a rationale and "#### 42", GSM-Plus "None" where there is no answer.
    """
    if isinstance(value, (list, tuple)):
        answers = list(dict.fromkeys(a for a in map(clean_answer, value) if isinstance(a, str)))
        return answers[0] if len(answers) == 1 else answers or None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value == int(value) else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = clean_text(value)
    if text and "####" in text:
        text = text.rsplit("####", 1)[1].strip().replace(",", "")
    if text and re.fullmatch(r"-?\d+\.0", text):
        text = text[:-2]
    return None if text in (None, "", "None", "null", "nan", "NaN") else text


def answer_letter(value, choices: list[str] | None) -> str | None:
    """The letter of a gold that is a letter, an index from 0 (as in MMLU) or the whole text of an option."""
    letters = LETTERS[: len(choices)] if choices else LETTERS
    text = clean_answer(value)
    if not isinstance(text, str):
        return None
    match = re.fullmatch(r"\(?([A-J])\)?\.?", text)
    if match:
        return match[1] if match[1] in letters else None
    number = int(text) if re.fullmatch(r"\d+", text, re.ASCII) and int(text) < len(letters) else None
    if number is not None and not isinstance(value, str):
        return letters[number]
    # As text (CSV), "2" may be an index or the option that reads "2": it counts where only one can be meant.
    readings = {letters[i] for i, choice in enumerate(choices or []) if choice == text}
    readings |= {letters[number]} if number is not None else set()
    return readings.pop() if len(readings) == 1 else None


def clean_choices(value) -> list[str]:
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
    pairs = list(zip(LETTERS, choices, strict=False))
    # A Row's problem shows its options already: they must not be added again at every reading.
    if all(f"{letter}. {choice}" in text or f"({letter}) {choice}" in text for letter, choice in pairs):
        return text
    if passage:
        return "\n".join([text, *(f"({letter}) {choice}" for letter, choice in pairs)])
    return "\n".join([text, "", "Options:", *(f"{letter}. {choice}" for letter, choice in pairs)])


def clean_level(value) -> int | float | str | None:
    """5, 5.0 and "Level 5" are one level."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    match = re.fullmatch(r"(?:Level )?(\d+(?:\.\d+)?)", str(value).strip())
    if not match:
        return clean_text(value)
    return int(float(match[1])) if float(match[1]).is_integer() else float(match[1])


def kept_prompt(row: dict) -> dict:
    """`prompt`, `budget`, `mode` of a record that is a Row already; budget and mode come together."""
    budget, mode = clean_answer(row.get("budget")), row.get("mode") or "none"
    if budget is None and mode == "none":
        return {"prompt": row["prompt"], "budget": None, "mode": None}
    if mode not in ("exact", "max") or not re.fullmatch(r"[1-9]\d{0,7}", budget or "", re.ASCII):
        raise Skip("budget and mode do not make sense")
    return {"prompt": row["prompt"], "budget": int(budget), "mode": mode}


def gold_answer(row: dict, kind: str, choices: list[str] | None, need_answer: bool):
    """The cleaned `answers` or `answer`, letters for multiple choice; Skip where it is needed and missing."""
    answer = row["answers"] if row.get("answers") not in (None, [], "") else row.get("answer")
    if clean_answer(answer) is None or not need_answer:
        if need_answer:
            raise Skip("no answer")
        return clean_answer(answer)
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
    result = {
        "id": given[0] if given else f"{name}-{index:05d}",
        "problem": problem,
        "answer": gold_answer(row, kind, choices, need_answer),
        "kind": kind,
        "source": clean_text(row.get("source")) or name,
        "level": clean_level(row.get("level")),
        "subject": clean_text(row.get("subject")),
        "choices": choices,
    }
    result = {key: value for key, value in result.items() if value is not None or key == "answer"}
    return result | kept_prompt(row) if clean_text(row.get("prompt")) else result


# ------------------------------------------------------------------------------------------------------------
# Files and hub datasets


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def file_format(path: str) -> str | None:
    """ "jsonl" for "a/b.jsonl.gz", and so on; None for a suffix that is not read."""
    match = re.search(r"\.(?:(jsonl|json|csv)(?:\.gz)?|(parquet))$", path.lower())
    return match and (match[1] or match[2])


def read_jsonl(file: Iterable[str], path: str) -> Iterator:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}: line {number} is not valid JSON: {first_line(error)}") from error


def read_json(file, path: str) -> list:
    text = file.read()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = " (one object a line belongs in a .jsonl file)" if "Extra data" in str(error) else ""
        raise BadInput(f"{path} is not valid JSON: {first_line(error)}{hint}") from error
    if not isinstance(rows, list):
        raise BadInput(f"{path} holds a JSON {type(rows).__name__}: a .json file must be a list of objects")
    return rows


def read_csv(file, path: str) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # a problem with its solution can pass the default of 128 KiB
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            # Lists travel through CSV as JSON text. Not in `answer`: "[1, 2]" there is an interval.
            for key in ("choices", "answers", "gold", "final_answer"):
                if str(row.get(key)).startswith("["):
                    with contextlib.suppress(ValueError):  # not JSON: it stays text, and is judged as text
                        row[key] = json.loads(row[key])
            yield row
    except csv.Error as error:
        raise BadInput(f"{path}: line {reader.line_num} is not valid CSV: {first_line(error)}") from error


def read_parquet(path: str) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def read_file(path: str) -> list:
    """All records of a local file, as the file has them; BadInput names the line or the damage."""
    kind = file_format(path)
    if kind is None:
        raise BadInput(f"{path}: unknown suffix; use .jsonl, .json, .csv (each also .gz) or .parquet")
    try:
        if kind == "parquet":
            return read_parquet(path)
        opener = gzip.open if path.lower().endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig", newline="" if kind == "csv" else None) as file:
            return list({"jsonl": read_jsonl, "json": read_json, "csv": read_csv}[kind](file, path))
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {first_line(error)}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"{path} is a truncated or damaged gzip file: {first_line(error)}") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or first_line(error)}") from error


def read_hub(hub_id: str, configs: tuple, split: str | None):
    """A dataset of the Hugging Face hub, or a local folder laid out like one: (rows, columns)."""
    import datasets

    parts = []
    for config in configs or (None,):
        try:
            part = datasets.load_dataset(hub_id, config, split=split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            told = f"dataset {hub_id} (config {config}, split {split})"
            raise BadInput(f"{told} could not be loaded: {first_line(error)}") from error
        if split is None:
            # Without a wish: training data, or whatever there is when it is the only split.
            chosen = "train" if "train" in part else next(iter(part)) if len(part) == 1 else None
            if chosen is None:
                raise BadInput(f"dataset {hub_id} has the splits {', '.join(part)}: choose one with --split")
            part = part[chosen]
        parts.append(part)
    return (row for part in parts for row in part), parts[0].column_names


def open_source(name: str, split: str | None):
    """A file, preset, folder or hub id -> (records, columns, layout or None, short name)."""
    stem = re.sub(r"\.(jsonl|json|csv|parquet)(\.gz)?$", "", os.path.basename(name.rstrip("/")))
    if os.path.isfile(name):
        if split is not None:
            raise BadInput(f"split {split!r} was asked of {name}: a local file has no splits")
        records = read_file(name)
        columns = list(dict.fromkeys(key for row in records if isinstance(row, dict) for key in row))
        return records, columns, None, stem
    if os.path.isdir(name):
        return *read_hub(name, (), split), None, stem
    preset = {value[0]: key for key, value in PRESETS.items()}.get(name, name)
    if preset in PRESETS:
        hub_id, configs, default_split, layout = PRESETS[preset]
        # GSM8K by name is its test split: say what is read before anybody trains on it.
        print(f"data.py: {hub_id}, split {split or default_split}", file=sys.stderr)
        return *read_hub(hub_id, configs, split or default_split), layout, preset
    if file_format(name) or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise BadInput(f"{name}: no such file, and not one of the named sets ({', '.join(PRESETS)})")
    hub_id, _, config = name.partition(":")
    return *read_hub(hub_id, (config,) if config else (), split), None, stem


def find_layout(columns: list[str], layout: str | None, name: str, need_answer: bool = True):
    """The function that reads these columns; BadInput with the columns found and those wanted."""
    has_text = "problem" in columns or "question" in columns
    is_plain = has_text and ("answer" in columns or "answers" in columns or not need_answer)
    for key in [layout] if layout else LAYOUTS:
        wanted, function = LAYOUTS[key]
        if set(wanted) <= set(columns) and (is_plain or key != "plain"):
            return function
    wanted = ", ".join(LAYOUTS[layout or "plain"][0])
    wanted = wanted or "problem (or question, with choices and passage) and answer (or answers)"
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


def load_problems(
    name_or_path: str,
    split: str | None = None,
    limit: int | None = None,
    counts: Counter | None = None,
    need_answer: bool = True,
) -> list[dict]:
    """The first `limit` problems of a file, a preset, a hub id (owner/name or owner/name:config) or a folder.

    Unusable records are left out and counted by reason in `counts` ("read" counts all), else told on stderr.
    """
    records, columns, layout, name = open_source(name_or_path, split)
    if records == []:
        raise BadInput(f"{name_or_path} is empty: it holds no rows")
    tally: Counter = Counter()
    found = to_problems(
        records, find_layout(columns, layout, name_or_path, need_answer), name, tally, need_answer
    )
    problems = list(itertools.islice(found, limit))
    dropped = {reason: n for reason, n in tally.items() if reason != "read"}
    told = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
    if not problems:
        raise BadInput(f"{name_or_path}: none of its {tally['read']} rows can be used ({told})")
    if counts is not None:
        counts.update(tally)
    elif dropped:
        print(f"data.py: note: {name_or_path}: left out {told} of {tally['read']} rows", file=sys.stderr)
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
    import pyarrow
    import pyarrow.parquet

    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys}
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
    if os.path.isdir(path):
        raise BadInput(f"--out {path} is a folder: name a file in it")


# ------------------------------------------------------------------------------------------------------------
# The command


def problem_key(problem: str) -> str:
    """Two problems are the same when their texts are, once every run of white space is one space."""
    return " ".join(problem.split())


def select(problems: list[dict], excluded: set[str], limit: int | None, counts: Counter) -> list[dict]:
    """Drops what is in `excluded` and repeats, counts both, makes ids unique, keeps the first `limit`."""
    kept, seen, ids, again = [], set(), set(), Counter()
    for problem in problems:
        key = problem_key(problem["problem"])
        if key in excluded or key in seen:
            counts["also in --exclude" if key in excluded else "duplicate"] += 1
            continue
        if limit is not None and len(kept) >= limit:
            counts["beyond --limit"] += 1
            continue
        seen.add(key)
        # Two input files may both number their rows from 0.
        identity = problem["id"]
        while identity in ids:
            again[problem["id"]] += 1
            identity = f"{problem['id']}-{again[problem['id']] + 1}"
        ids.add(identity)
        kept.append(problem | {"id": identity})
    return kept


def histogram(budgets: list[int], dist: dict, bins: int = 10, width: int = 40) -> str:
    """The budgets drawn as text: a line per value for buckets, else bins of equal (log: geometric) width."""
    if dist["name"] in ("uniform", "log"):
        space = np.geomspace if dist["name"] == "log" else np.linspace
        edges = sorted({int(round(edge)) for edge in space(dist["low"], dist["high"] + 1, bins + 1)})
        counts = np.histogram(budgets, bins=edges)[0]
        labels = [f"{a}-{b - 1}" for a, b in zip(edges, edges[1:], strict=False)]
    else:
        values = sorted(set(dist["values"]))
        counts = [budgets.count(value) for value in values]
        labels = [str(value) for value in values]
    most = max(max(counts), 1)
    bars = ["#" * round(width * count / most) for count in counts]
    return "\n".join(f"  {a:>13} {b:7d} {c}" for a, b, c in zip(labels, counts, bars, strict=True))


def summary(rows: list[dict], counts: Counter, lengths: list[int], unit: str, dist: dict) -> str:
    """What was read, what was dropped and why, and what the rows ask for."""
    lines = [f"read {counts['read']} rows, wrote {len(rows)}"]
    lines += [f"  dropped {n}: {reason}" for reason, n in counts.most_common() if reason != "read"]
    modes = Counter(row["mode"] or "none" for row in rows)
    kinds = Counter(row["kind"] for row in rows)
    lines.append("mode: " + ", ".join(f"{name} {n}" for name, n in sorted(modes.items())))
    lines.append("kind: " + ", ".join(f"{name} {n}" for name, n in sorted(kinds.items())))
    lines.append(f"prompt length: mean {np.mean(lengths):.1f}, longest {max(lengths)} {unit}")
    budgets = [row["budget"] for row in rows if row["budget"] is not None]
    if budgets:
        lines.append(f"budget (tokens): mean {np.mean(budgets):.1f}, from {min(budgets)} to {max(budgets)}")
        lines.append(histogram(budgets, dist))
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data.py",
        allow_abbrev=False,
        description="Problems -> rows with a token budget in the prompt.",
        epilog=f"Presets: {', '.join(PRESETS)}.",
    )
    add = parser.add_argument
    add("input", help="files, presets, hub ids (owner/name[:config]) or folders, comma-separated")
    forms = "uniform:100:4000 (default; ends included), log:256:23170, bucket:100,1024, fixed:512, none"
    add("--budgets", help=f"distribution of the budgets in tokens: {forms}")
    add("--mode", choices=MODES, help="exact (default), max, both (a coin for each row) or none")
    add("--wording", choices=WORDINGS, default="l1", help="how the budget is asked for (default l1)")
    add("--copies", type=int, default=1, help="rows per problem, each with its own budget (default 1)")
    add("--seed", type=int, default=0, help="one seed, one file, byte for byte (default 0)")
    add("--out", required=True, help="file to write: .jsonl, .jsonl.gz or .parquet")
    add("--split", help="split of a hub dataset (default: the preset's own, else train)")
    add("--limit", type=int, help="keep the first N problems")
    add("--exclude", help="drop the problems of these files (comma-separated; equal but for white space)")
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
    for flag in ("copies", "limit", "max_prompt_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise BadInput(f"--{flag.replace('_', '-')} ({value}) must be 1 or more")
    if args.seed < 0:
        raise BadInput(f"--seed ({args.seed}) must be 0 or more")
    if args.max_prompt_tokens and not args.tokenizer:
        raise BadInput("--max-prompt-tokens needs --tokenizer: name the model whose tokens are counted")
    check_out(args.out)
    sources = args.input.split(",") + (args.exclude.split(",") if args.exclude else [])
    for source in sources:
        if not source.strip():
            raise BadInput(f"an empty name in the list {args.input!r} or {args.exclude!r}")
        if os.path.exists(source) and os.path.realpath(source) == os.path.realpath(args.out):
            raise BadInput(f"--out {args.out} is also read: choose another name, the input would be lost")
    return dist


def build(args: argparse.Namespace, dist: dict) -> str:
    """Reads, selects, annotates, filters, writes; returns the summary."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    counts: Counter = Counter()
    problems: list[dict] = []
    for name in args.input.split(","):
        problems += load_problems(name.strip(), args.split, counts=counts)
    excluded: set[str] = set()
    for name in args.exclude.split(",") if args.exclude else []:
        # Only the texts matter here, so a file of problems without answers will do.
        excluded |= {problem_key(p["problem"]) for p in load_problems(name.strip(), need_answer=False)}
    problems = select(problems, excluded, args.limit, counts)
    rows = annotate(problems, dist, args.mode, args.wording, args.copies, args.seed)
    lengths = [len(encode_prompt(tokenizer, row["prompt"]) if tokenizer else row["prompt"]) for row in rows]
    if args.max_prompt_tokens:
        fits = [length <= args.max_prompt_tokens for length in lengths]
        counts["prompt too long"] += fits.count(False)
        rows = [row for row, ok in zip(rows, fits, strict=True) if ok]
        lengths = [length for length, ok in zip(lengths, fits, strict=True) if ok]
    if not rows:
        told = ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason != "read")
        raise BadInput(f"nothing left of {counts['read']} rows ({told}): nothing was written")
    write_rows(rows, args.out)
    text = summary(rows, +counts, lengths, "tokens" if tokenizer else "characters", dist)
    if 1 <= count_distinct(dist) < args.copies:
        text += f"\nnote: {args.budgets} has fewer than {args.copies} budgets: copies of a problem share some"
    return f"{text}\nwritten to {args.out}"


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        print(build(args, check_args(args)))
    except BadInput as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
