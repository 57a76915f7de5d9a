"""Problems in, budget-annotated training rows out.

    python data.py deepscaler --budgets uniform:100:4000 --mode exact --wording l1 --out l1_exact.jsonl
    python data.py own.csv --columns problem=frage answer=loesung --sentence "Use {N} tokens." --out own.jsonl

Reads JSON, JSONL, CSV and Parquet files, the named sets of PRESETS and any Hugging Face dataset; writes a
drawn token budget into the prompt and into `budget`. It can be copied alone (all but --export).
"""

import argparse
import contextlib
import csv
import difflib
import gzip
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import Counter

import numpy as np

LETTERS = "ABCDEFGHIJ"
MODES = ("exact", "max", "both", "none")
EXPORTS = ("verl", "trl", "open-instruct")
MAX_BUDGET = 10_000_000  # tokens; beyond any context, so a larger number is a typing error
SUFFIX = r"\.(jsonl|json|csv|parquet)(\.gz)?$"
EXTRAS = ("level", "subject", "choices", "turns")  # what a problem and a row may have besides
FIELDS = "problem answer solution choices passage kind level subject source id messages prompt budget mode"
# What ends a turn or a text in the chat formats in use.
END_TOKENS = "<end_of_turn> <|end|> <|eot_id|> <|eom_id|> <|end_of_text|> <|im_end|> <|return|> <|call|>"


class BadInput(ValueError):
    """A user's mistake, told in one line: the value, the rule, the reason and the way out."""


def first_line(error):
    """What an exception says, in one line; its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line_errors(parser):
    """The argparse parser with errors that are BadInput, one line in place of the usage."""

    def fail(message):
        said, _, choices = message.partition(" (choose from")
        known = re.findall(r"[\w-]+", choices) or parser._option_string_actions
        typed = re.search(r"(?:invalid choice|unrecognized arguments): '?([\w-]+)", said)
        near = difflib.get_close_matches(typed[1], known, 1, 0.7) if typed else ()
        message = f"{said}; did you mean {near[0]}?" if near else message
        raise BadInput(f"{message} (python {parser.prog} --help lists the flags)")

    parser.error = fail
    return parser


def exit_code(name):
    """Decorator of a command: it returns 0, or 2 after a user's mistake, which is told in one line."""

    def decorate(command):
        def main(argv=None):
            try:
                return command(argv) or 0
            except BadInput as error:
                print(f"{name}: error: {error}".replace("\n", " "), file=sys.stderr)
                return 2

        return main

    return decorate


def add_up(counts):
    """Counters as one, name by name, zeros kept."""
    return {key: sum(c.get(key, 0) for c in counts) for key in sorted({k for c in counts for k in c})}


# ---- Prompts, in the wordings of the published training data; any other sentence with {N} is a wording, too.

STEPS = "Let's think step by step and output the final answer"
SENTENCES = {
    "l1": {"exact": "Think for {N} tokens.", "max": "Think for maximum {N} tokens."},
    "tulu": {"exact": "Think for {N} tokens.", "max": "Think for up to {N} tokens."},
}
BLANK_LINE = ("aime2025",)  # sets of mathematics whose instruction L1's scripts set off by a blank line


def budget_prompt(problem, budget, mode, kind="math", wording="l1", apart=False):
    """The user turn: the problem and, where `budget` (tokens) is not None, the sentence that asks for it.
    `wording`: l1, tulu, or a sentence such as "Use at most {N} tokens.", which follows l1's instruction in
    both modes. `apart`: a blank line before that instruction, as L1 has it for the sets in BLANK_LINE."""
    if wording not in SENTENCES and "{N}" not in wording:
        raise BadInput(f"wording {wording!r} is unknown: use l1, tulu, or a sentence with {{N}} in it")
    # The options are those that the problem shows. L1 named A-D even where E was right, and set multiple
    # choice's instruction off by a blank line, mathematics' by a space.
    shown = [*itertools.takewhile(lambda x: re.search(rf"^{x}[.)] |\({x}\)", problem, re.M), LETTERS)]
    letters = ", ".join(shown if len(shown) > 1 else LETTERS[:4])
    options = f" (eg, {letters})" if kind == "choice" else ""
    gap = "\n\n" if apart or kind == "choice" else " "
    text = f"{problem}{gap}{STEPS}{options} within \\boxed{{}}."
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
    sentence = SENTENCES[wording][mode] if wording in SENTENCES else wording
    return text + separator + sentence.replace("{N}", str(int(budget)))


def encode_prompt(tokenizer, prompt, turns=None, **variables):
    """Token ids of a user turn, ready for generation: the one way in, for data, training and evaluation.
    `turns`: the chat before it, [{"role", "content"}, ...]; `variables`: more for the chat template."""
    if getattr(tokenizer, "chat_template", None):
        messages = [*(turns or ()), {"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **variables)
        # transformers 5 returns a BatchEncoding here, transformers 4 the bare list.
        return list(ids if isinstance(ids, list) else ids["input_ids"])
    if turns:
        raise BadInput("rows with system prompts or earlier turns need a tokenizer with a chat template")
    return list(tokenizer(prompt)["input_ids"])


def load_pretrained(name, kind, what):
    """transformers' class `kind` from a folder or hub id; BadInput where there is none."""
    import transformers

    if not os.path.isdir(name) and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise BadInput(f"{what} folder {name} does not exist")
    try:  # a folder that brings its own classes runs no code here
        return getattr(transformers, kind).from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{what} of {name!r} could not be loaded: {first_line(error)}") from error


def load_tokenizer(name):
    """The tokenizer of a model folder or hub id; BadInput where there is none."""
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    # transformers makes an EMPTY tokenizer from a folder that has only a config.json: look for the files.
    if os.path.isdir(name) and not any(os.path.exists(os.path.join(name, file)) for file in files):
        raise BadInput(f"{name} holds no tokenizer ({files[0]}): save the tokenizer beside the model")
    return load_pretrained(name, "AutoTokenizer", "tokenizer")


def load_config(path, tokenizer=None):
    """Configuration of a model folder or hub id; BadInput where it is missing or unfit for `tokenizer`."""
    config = load_pretrained(path, "AutoConfig", "config.json")
    size = getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer is not None and size and len(tokenizer) > size:
        told = f"the tokenizer of {path} has {len(tokenizer)} tokens, its model {size}"
        raise BadInput(f"{told}: they do not belong together; copy the model's own tokenizer there")
    return config


def stop_ids(model, tokenizer):
    """Ids that end a response, sorted, for training, evaluation and hosts alike. `model`: a model, its config
    or generation config, or None. The tokenizer's end token misses some of gemma-3, Phi-3.5 and Llama-3."""
    config = getattr(model, "generation_config", None) or getattr(model, "config", model)
    declared = np.ravel(getattr(config, "eos_token_id", None)).tolist()  # a number, a list or None
    known = tokenizer.get_added_vocab()
    if "<|return|>" in known:  # gpt-oss: there <|end|> ends the thinking only
        known = {token: i for token, i in known.items() if token != "<|end|>"}
    return sorted({tokenizer.eos_token_id, *declared, *map(known.get, END_TOKENS.split())} - {None})


# ---- Budgets
BUDGETS = r"(uniform|log):\d{1,8}:\d{1,8}|bucket:\d{1,8}(,\d{1,8})*|fixed:\d{1,8}|none"
EXAMPLES = "uniform:100:4000, log:256:23170, bucket:100,1024,4096, fixed:512 or none"


def parse_budgets(spec):
    """A distribution from its text: {"name", "low", "high", "values", "distinct"}; both ends included."""
    name = spec.strip().partition(":")[0]
    values = [int(number) for number in re.findall(r"\d{1,8}", spec, re.ASCII)]
    known = re.fullmatch(BUDGETS, spec.strip(), re.ASCII) and all(1 <= n <= MAX_BUDGET for n in values)
    if not known or (name in ("uniform", "log") and values[0] > values[1]):
        told = f"write whole numbers of tokens, 1 to {MAX_BUDGET}, the smaller first"
        raise BadInput(f"budgets {spec!r} is malformed: {told}, as in {EXAMPLES}")
    low, high = min(values, default=None), max(values, default=None)
    distinct = high - low + 1 if name in ("uniform", "log") else len(set(values))
    return {"name": name, "low": low, "high": high, "values": values, "distinct": distinct}


def draw_budgets(dist, n, rng):
    """n budgets in tokens from a parsed distribution; the same generator state gives the same budgets."""
    low, high = dist["low"], dist["high"]
    if dist["name"] == "none":
        return [None] * n
    if dist["name"] == "uniform":
        drawn = rng.integers(low, high, size=n, endpoint=True)
    elif dist["name"] == "log":
        # int(2^U(log2 a, log2 b)) as L1 draws its log-uniform set; the clip undoes rounding at the two ends.
        drawn = np.clip(2.0 ** rng.uniform(math.log2(low), math.log2(high), size=n), low, high)
    else:  # bucket, fixed
        drawn = np.asarray(dist["values"])[rng.integers(0, len(dist["values"]), size=n)]
    return [int(budget) for budget in drawn]


def annotate(problems, budgets, mode, wording="l1", copies=1, seed=0):
    """Problems -> Rows: `copies` rows a problem, each with its own budget; one seed, one result."""
    dist = parse_budgets(budgets) if isinstance(budgets, str) else budgets
    if mode not in MODES or (mode == "none") != (dist["name"] == "none"):
        told = f"modes are {', '.join(MODES)}, and none goes with budgets none only"
        raise BadInput(f"mode {mode} does not go with budgets {dist['name']}: {told}")
    rng = np.random.default_rng(seed)
    drawn = draw_budgets(dist, len(problems) * copies, rng)
    groups = [drawn[i : i + copies] for i in range(0, len(drawn), copies)]
    # The copies of a problem differ wherever the distribution has enough budgets for that.
    for group in groups if dist["distinct"] >= copies else []:
        while len(kept := dict.fromkeys(group)) < copies:
            group[:] = [*kept, *draw_budgets(dist, copies - len(kept), rng)]
    # The modes are drawn after all budgets, so that a seed means the same budgets whatever the mode.
    coins, rows = rng.random(len(drawn)) < 0.5, []
    for i, budget in enumerate(itertools.chain(*groups)):
        problem, asked = problems[i // copies], None if budget is None else mode
        asked = ("exact" if coins[i] else "max") if mode == "both" else asked
        row = {key: problem[key] for key in ("id", "problem", "answer", "kind", "source")}
        row["id"] += f"#{i % copies}" if copies > 1 else ""
        row["prompt"] = budget_prompt(problem["problem"], budget, asked, problem["kind"], wording)
        row |= {"budget": budget, "mode": asked}
        rows.append(row | {key: problem[key] for key in EXTRAS if key in problem})
    return rows


# ---- Layouts: what the columns of the published sets are called, in lower case. Each function turns a record
# into the plain form: problem (or passage + question), choices, answer (or answers, solution), id, level, ...


class Skip(Exception):
    """A record that cannot become a problem; the message is the reason under which it is counted."""


BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")  # braces in braces


def final_answer(solution):
    """What a written solution ends in: after its last "####", else in its last \\boxed{...}."""
    if "####" in str(solution):
        return str(solution).rsplit("####", 1)[1].strip().split("\n")[0]
    return (BOXED.findall(str(solution)) or [None])[-1]


def from_gpqa(row):
    """GPQA lists the right option first: the order shown is drawn from the question, so it never changes."""
    order = np.random.default_rng(zlib.crc32(row["question"].encode())).permutation(4)
    options = ("correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3")
    choices, answer = [row[options[i]] for i in order], LETTERS[int(np.argmin(order))]
    return row | {"id": row.get("record id"), "choices": choices, "answer": answer}


# What stands at the end of a prompt that was annotated elsewhere; the third form is open-instruct's oldest.
ASKED = re.compile(r"\s*(?:Think for (up to |maximum )?(-?\d+) tokens\.|Use no more than (\d+) tokens\.)\s*$")
STEPS_TAIL = re.compile(rf"\s*{re.escape(STEPS)}(?: \(eg, [A-J, ]+\))? within \\boxed\{{\}}\.\s*$")


def read_prompt(row):
    """{"prompt", "problem", "turns", "budget", "mode"} of a record whose prompt is a text or a chat, else {}.
    A budget in the text alone counts; Skip where text and metadata do not name the same."""
    prompt, turns = row.get("prompt"), row.get("turns")
    if isinstance(prompt, list):
        chat = [(turn.get("role"), turn.get("content")) for turn in prompt]
        at = max((i for i, (role, _) in enumerate(chat) if role == "user"), default=None)
        if at is None or not all(isinstance(text, str) for _, text in chat[: at + 1]):
            raise Skip("no user turn")
        prompt, turns = chat[at][1], [{"role": role, "content": text} for role, text in chat[:at] if text]
    if clean_text(prompt) is None:
        return {}
    asked, budget, mode = ASKED.search(prompt), clean_answer(row.get("budget")), row.get("mode") or "none"
    found = {"problem": row["problem"] or STEPS_TAIL.sub("", ASKED.sub("", prompt)), "turns": turns}
    if asked and asked[2] == "-1":  # L1's "Think for -1 tokens." means no budget: such a prompt is not kept
        return found
    if asked and budget is None:
        budget, mode = asked[2] or asked[3], "max" if asked[1] or asked[3] else "exact"
    if budget is None and mode == "none":
        return found | {"prompt": prompt, "budget": None, "mode": None}
    if mode not in ("exact", "max") or not re.fullmatch(r"[1-9]\d{0,7}", budget or "", re.ASCII):
        raise Skip("budget and mode do not make sense")
    said = asked or re.search(r"\d+ tokens\W*$", prompt)  # somebody's own sentence names the number, too
    if budget not in re.findall(r"\d+", said[0] if said else prompt):
        raise Skip("budget in text and metadata differ")
    return found | {"prompt": prompt, "budget": int(budget), "mode": mode}


def from_verl(row):
    """verl (L1, Eurus-2): L1 puts the budget in reward_model.num_tokens; its sign is the mode, -1 is none.
    Without num_tokens it is in extra_info, which stock verl gives to the scorer, or in the text alone."""
    tokens, info = row["reward_model"].get("num_tokens"), row.get("extra_info") or {}
    budget, mode = info.get("budget"), info.get("mode")
    if tokens is not None:
        budget, mode = (None, None) if tokens == -1 else (abs(int(tokens)), "exact" if tokens > 0 else "max")
    found = {"answers": row["reward_model"]["ground_truth"], "source": row.get("data_source")}
    found |= {"prompt": row["prompt"], "budget": budget, "mode": mode, "kind": row.get("ability")}
    # --export verl keeps the rest of a row there; L1 has the subject of MMLU.
    names = ("id", "problem", "kind", "level", "subject", "choices")
    return found | {key: info[key] for key in names if info.get(key)}


def from_messages(row):
    """A chat; the gold is ground_truth, answer, solution, or what the assistant's last turn ends in.
    open-instruct: ground_truth and dataset are strings or parallel lists; a length is one of them."""
    if isinstance(row.get("row"), str):
        return json.loads(row["row"])  # --export open-instruct keeps the whole row
    golds, names = row.get("ground_truth"), row.get("dataset")
    if golds is None:
        return {"solution": row["messages"][-1]["content"]} | row | {"prompt": list(row["messages"])}
    if isinstance(golds, str):  # the old encoding joins both: "42<sep>1234" with dataset "MATH,max_length"
        golds, names = golds.split("<sep>"), str(names).split(",")
    golds = golds if isinstance(golds, list) else [golds]
    names = names if isinstance(names, list) else [names] * len(golds)
    lengths = {"max_length": "exact", "up_to_max_length": "max"}  # so named there; max_length asks for EXACT
    pairs = list(zip(golds, names, strict=False))
    limits = [(int(gold), lengths[name]) for gold, name in pairs if name in lengths]
    answers = [gold for gold, name in pairs if name not in lengths]
    budget, mode = limits[-1] if limits else (None, None)
    return {"prompt": list(row["messages"]), "budget": budget, "mode": mode, "answers": answers}


# layout: (columns that must be there, function), in the order in which they are tried on a file or a hub id.
LAYOUTS = {
    "verl": (("prompt", "reward_model"), from_verl),
    "messages": (("messages",), from_messages),
    # AGIEval: `query` already shows passage, question and options (A)-(E); `gold` is a list of indices.
    "lsat": (("query", "choices", "gold"),
             lambda r: {"problem": r["query"], "choices": r["choices"], "answers": r["gold"], "shown": True}),
    "gpqa": (("question", "correct answer"), from_gpqa),
    "svamp": (("body", "question", "answer"), lambda r: r | {"problem": f"{r['body']} {r['question']}"}),
    "olympiad": (("question", "final_answer", "subfield"), lambda r: r | {"subject": r["subfield"]}),
    # problem | question, answer | solution: this project's files and most hub sets.
    "plain": ((), dict),
}  # fmt: skip

TOPICS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
# name: (hub id, configs, split). `~`: columns and splits only seen in public code that loads the set.
PRESETS = {
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", (), "train"),
    "eurus2": ("PRIME-RL/Eurus-2-RL-Data", (), "train"),
    "eurus2_ai2": ("ai2-adapt-dev/eurus2_ground_truth", (), "train"),
    "math500": ("HuggingFaceH4/MATH-500", (), "test"),
    "math": ("EleutherAI/hendrycks_math", tuple(TOPICS.split()), "train"),  # ~
    "aime2022_2024": ("AI-MO/aimo-validation-aime", (), "train"),
    "aime2024": ("HuggingFaceH4/aime_2024", (), "train"),  # ~
    "aime2025": ("opencompass/AIME2025", ("AIME2025-I", "AIME2025-II"), "test"),
    "amc": ("AI-MO/aimo-validation-amc", (), "train"),
    "amc23": ("math-ai/amc23", (), "test"),  # ~
    "olympiadbench": ("Hothan/OlympiadBench", ("OE_TO_maths_en_COMP",), "train"),
    "minerva": ("math-ai/minervamath", (), "test"),  # ~
    "gpqa": ("Idavidrein/gpqa", ("gpqa_diamond",), "train"),  # gated: accept its terms there first
    **{f"lsat_{x}": (f"dmayhem93/agieval-lsat-{x}", (), "test") for x in ("ar", "lr", "rc")},
    **dict.fromkeys(("mmlu_1000", "mmlu"), ("cais/mmlu", ("all",), "test")),  # 1000: L1's draw
    "gsm8k": ("openai/gsm8k", ("main",), "test"),
    "omni_math": ("KbsdJames/Omni-MATH", (), "test"),
    "svamp": ("ChilleD/SVAMP", (), "test"),  # ~
    "gsm_plus": ("qintongli/GSM-Plus", (), "testmini"),  # ~
}

# ---- From a record to a problem
NO_ANSWER = "|None|null|nan|NaN|N/A|n/a|proof|notfound".split("|")  # NuminaMath has the last two
ALIASES = {  # a field's other names, where a record has no value for it
    "problem": ("question",),
    "answer": ("final_answer", "expected_answer", "correct_answer", "answerkey", "answer_key", "correct"),
    "choices": ("options",),
    "id": ("unique_id",),
    "level": ("difficulty",),
    "subject": ("type", "domain"),  # Omni-MATH's domain is a list
}
# What columns with an option each are called; bare letters count from three columns on.
OPTION_COLUMNS = [[stem + x for x in LETTERS.lower()] for stem in ("option_", "option", "choice_", "op", "")]
KINDS = {"": "math", "math": "math", "voc": "math", "choice": "choice"}  # `kind`, or verl's `ability`


def clean_text(value):
    """A stripped, non-empty string, or None; JSON may carry half a surrogate pair, which no file can hold."""
    clean = isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
    return (value.strip() or None) if clean else None


def clean_answer(value):
    """One gold answer or a list of which any may match; None where there is none."""
    if isinstance(value, (list, tuple)):
        answers = list(dict.fromkeys(a for a in map(clean_answer, value) if isinstance(a, str)))
        return answers[0] if len(answers) == 1 else answers or None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # AMC stores 142.0 for 142.
        return (str(int(value)) if value == int(value) else repr(value)) if math.isfinite(value) else None
    text = clean_text(value) or ""
    if "####" in text:  # GSM8K stores a rationale and "#### 42"
        text = final_answer(text).replace(",", "")
    text = re.sub(r"^(-?\d+)\.0$", r"\1", text)
    return None if text in NO_ANSWER else text


def find_choices(row):
    """(option texts, their labels) of a record, no texts where it has none; Skip where they cannot be read.
    A list, {label: text}, ARC's {"text": [...], "label": [...]}, or columns option_a, option_b, ..."""
    value = row["choices"]
    for names in OPTION_COLUMNS:
        if value is None and names[0] in row:
            found = {x: row[n] for x, n in zip(LETTERS, names, strict=True) if row.get(n) not in (None, "")}
            value = found if len(found) >= (3 if names[0] == "a" else 2) else None
    if value is None:
        if any(re.match(r"(option|choice)s?[ _]?\w?$", key) and row[key] for key in row):
            raise Skip("options that are not read: name them choices, or option_a, option_b, ...")
        return [], [*LETTERS]
    texts, labels = value, [*LETTERS]
    if isinstance(value, dict):
        texts, labels = value.get("text", [*value.values()]), [str(x) for x in value.get("label", value)]
    if not isinstance(texts, (list, tuple)) or not 2 <= len(texts) <= len(LETTERS):
        raise Skip(f"choices are not a list of 2 to {len(LETTERS)}")
    texts = [None if isinstance(text, (dict, list)) else clean_text(str(text)) for text in texts]
    if None in texts:
        raise Skip("an empty choice")
    # Labels that stand in the texts, "(A)", "A)" or "A.", are taken off.
    marks = [re.match(rf"\(?{x}\)\s*|{x}\.\s+", text) for x, text in zip(LETTERS, texts, strict=False)]
    texts = [t[m.end() :] for t, m in zip(texts, marks, strict=True)] if all(marks) else texts
    return texts, labels[: len(texts)]


def answer_letter(value, choices, labels):
    """The letter of a gold: a letter, a label, an index from 0 (as in MMLU) or an option's whole text."""
    text, letters = clean_answer(value), LETTERS[: len(choices) or None]
    text = text if isinstance(text, str) else ""
    # A label as it stands, or but for its marks, as in "(C)" and "C."; else a letter, whatever labels are.
    bare, *plain = (x.lstrip("(").rstrip(").") for x in (text, *labels))
    for gold, names in ((text, labels), (bare, plain), (bare, [*LETTERS])):
        if gold in names:
            return dict(enumerate(letters)).get(names.index(gold))
    is_index = re.fullmatch(r"\d+", text, re.ASCII) and int(text) < len(letters)
    readings = {letters[int(text)]} if is_index else set()
    # As text (CSV), "2" may be an index or the option that reads "2": it counts where only one can be meant.
    if isinstance(value, str) or not readings:
        readings |= {letters[i] for i, choice in enumerate(choices) if choice == text}
    return readings.pop() if len(readings) == 1 else None


def show_problem(row, choices):
    """The text with passage and options: LSAT style after a passage, else GPQA / MMLU style."""
    text, passage = clean_text(row["problem"]), clean_text(row.get("passage"))
    if text and passage and row["problem"] == row.get("question"):
        text = f"{passage}\n\n{text}"
    if text is None or not choices or row.get("shown"):
        return text
    pairs = list(zip(LETTERS, choices, strict=False))
    dotted, round_ = [f"{x}. {c}" for x, c in pairs], [f"({x}) {c}" for x, c in pairs]
    # A Row's problem shows its options already: they must not be added again at every reading.
    if all(a in text or b in text for a, b in zip(dotted, round_, strict=True)):
        return text
    return "\n".join([text, *round_] if passage else [text, "", "Options:", *dotted])


def clean_level(value):
    """5, 5.0 and "Level 5" are one level."""
    text = str(value).strip().removeprefix("Level ")
    number = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
    return clean_text(value) if number is None else int(number) if number.is_integer() else number


def gold_answer(row, kind, choices, labels):
    """The cleaned gold, letters for multiple choice; Skip where there is none."""
    golds = (row.get("answers"), row["answer"], final_answer(row.get("solution")))
    answer = next((gold for gold in golds if clean_answer(gold) is not None), None)
    if answer is None:
        raise Skip("no answer")
    if kind == "math":
        return clean_answer(answer)
    golds = answer if isinstance(answer, list) else [answer]
    letters = [answer_letter(gold, choices, labels) for gold in golds]
    if None in letters:
        raise Skip("answer names no option")
    return clean_answer(letters)


def normalise(row, name, index, need_answer=True):
    """A plain record -> the problem fields of the Row contract; Skip where it has no text or no answer."""
    for field, others in ALIASES.items():
        values = (row.get(key) for key in (field, *others))
        row = row | {field: next((value for value in values if value not in (None, "", [], {})), None)}
    kind = KINDS.get(str(row.get("kind") or "").lower())
    if kind is None:
        raise Skip("not mathematics")
    row |= (prompt := read_prompt(row))
    choices, labels = find_choices(row)
    kind, problem = "choice" if choices else kind, show_problem(row, choices)
    if problem is None:
        raise Skip("no problem text")
    identity = f"{name}-{index:05d}" if row["id"] is None else str(row["id"])
    answer = gold_answer(row, kind, choices, labels) if need_answer else None
    source = clean_text(row.get("source")) or name
    result = {"id": identity, "problem": problem, "answer": answer, "kind": kind, "source": source}
    subject = row["subject"][0] if isinstance(row["subject"], list) else row["subject"]
    extras = {"level": clean_level(row["level"]), "subject": clean_text(subject)}
    extras |= {"choices": choices or None, "turns": row.get("turns") or None}
    result |= {key: value for key, value in extras.items() if value is not None}
    return result | {key: prompt[key] for key in ("prompt", "budget", "mode") if "prompt" in prompt}


# ---- Files and hub datasets


def read_file(path):
    """All records of a local file, as the file has them; BadInput names the line or the damage."""
    match = re.search(SUFFIX, path.lower())
    if match is None:
        raise BadInput(f"{path}: unknown suffix; use .jsonl, .json, .csv (each also .gz) or .parquet")
    kind, number, records = match[1], 0, []
    try:
        if kind == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with (gzip.open if match[2] else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == "json":
                records = json.load(file)
            elif kind == "csv":
                csv.field_size_limit(2**31 - 1)  # a problem with its solution can pass the default of 128 KiB
                header = file.readline()
                file.seek(0)
                reader = csv.DictReader(file, strict=True, delimiter=max(",;\t", key=header.count))
                for record in reader:
                    # Lists travel through CSV as JSON text. Not in `answer`: "[1, 2]" there is an interval.
                    for key in ("choices", "options", "answers", "gold", "final_answer", "turns", "messages"):
                        if str(record.get(key)).startswith(("[", "{")):
                            with contextlib.suppress(ValueError):  # it stays text, and is judged as text
                                record[key] = json.loads(record[key])
                    records.append(record)
            for line in file if kind == "jsonl" else []:
                number += 1
                records += [json.loads(line)] if line.strip() else []
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, RecursionError) as error:
        wanted = {"parquet": "a readable Parquet file", "csv": "valid CSV"}.get(kind, "valid JSON")
        wanted = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else wanted
        hint = " (one object a line belongs in a .jsonl file)" if "Extra data" in str(error) else ""
        where = f"{path}: line {number}" if number else path
        raise BadInput(f"{where} is not {wanted}: {first_line(error)}{hint}") from error
    if not isinstance(records, list):
        raise BadInput(f"{path} holds a JSON {type(records).__name__}: it must be a list of objects")
    return records


def read_hub(hub_id, configs, split):
    """A dataset of the Hugging Face hub, or a local folder laid out like one: (rows, columns)."""
    import datasets

    parts, names = [], ("state.json", "dataset_dict.json")
    saved = any(os.path.exists(os.path.join(hub_id, name)) for name in names)  # by save_to_disk
    for config in configs or (None,):
        try:
            found = datasets.load_from_disk(hub_id) if saved else datasets.load_dataset(hub_id, config)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise BadInput(f"dataset {hub_id} could not be loaded: {first_line(error)}") from error
        splits = found if isinstance(found, dict) else {"train": found}
        wanted = split or (next(iter(splits)) if len(splits) == 1 else "train")  # without a wish
        if wanted not in splits:
            raise BadInput(f"dataset {hub_id} has the splits {', '.join(splits)}: choose one with --split")
        parts.append(splits[wanted])
    return (row for part in parts for row in part), parts[0].column_names


def open_source(name, split):
    """A file, preset, folder or hub id -> (records, columns, short name)."""
    stem = re.sub(SUFFIX, "", os.path.basename(name.rstrip("/")))
    if os.path.isfile(name):
        if split is not None:
            raise BadInput(f"split {split!r} was asked of {name}: a local file has no splits")
        records = read_file(name)
        return records, dict.fromkeys(key for row in records if isinstance(row, dict) for key in row), stem
    # A preset goes by its name or by the hub id that it stands for.
    preset = {value[0]: key for key, value in PRESETS.items()}.get(name, name)
    if preset in PRESETS and not os.path.isdir(name):
        hub_id, configs, default_split = PRESETS[preset]
        # GSM8K by name is its test split: say what is read before anybody trains on it.
        print(f"data.py: {hub_id}, split {split or default_split}", file=sys.stderr)
        records, columns = read_hub(hub_id, configs, split or default_split)
        if preset == "mmlu_1000":  # what L1 drew: the first 1,000 of numpy's old shuffle with seed 42
            records = list(records)
            records = [records[i] for i in np.random.RandomState(42).permutation(len(records))[:1000]]
        return records, columns, preset
    hub = re.fullmatch(r"[\w-][^/]*/[^/]+", name) and not re.search(SUFFIX, name.lower())
    if not hub and not os.path.isdir(name):
        raise BadInput(f"{name}: no such file, and not one of the named sets ({', '.join(PRESETS)})")
    hub_id, _, config = name.partition(":")
    return *read_hub(hub_id, (config,) if config else (), split), stem


def find_layout(columns):
    """The function of LAYOUTS that reads these columns; the plain one where no other does."""
    lower = {str(column).lower() for column in columns}
    return next(function for wanted, function in LAYOUTS.values() if lower.issuperset(wanted))


def to_problems(records, function, name, tally, need_answer=True, renamed=()):
    """The records that are problems; `tally` counts all as "read" and the others by reason."""
    for index, record in enumerate(records):
        tally["read"] += 1
        try:
            if not isinstance(record, dict) or None in record:
                raise Skip("not an object with the file's columns")
            # Columns count in lower case; where "Answer" and "answer" are both there, the latter.
            record = {key.lower(): record[key] for key in sorted(record, key=str.islower)}
            record |= {field: record.pop(column, None) for field, column in dict(renamed).items()}
            yield normalise(function(record), name, index, need_answer)
        except Skip as reason:
            tally[str(reason)] += 1
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError):  # null for text, ...
            tally["a value of the wrong type"] += 1


def reasons(counts):
    """ "3 no answer, 1 duplicate": why rows were left out."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason != "read")


def load_problems(name_or_path, split=None, limit=None, counts=None, need_answer=True, columns=()):
    """The first `limit` problems of a file, a preset, a hub id (owner/name[:config]) or a folder.
    `columns`: {field: column} of tables that call them otherwise, {"problem": "frage"}."""
    records, found, name = open_source(name_or_path, split)
    renamed = {field: column.lower() for field, column in dict(columns).items()}
    if missing := sorted(set(renamed.values()) - {str(column).lower() for column in found}):
        raise BadInput(f"--columns: no {missing[0]} in {name_or_path}, only {', '.join(map(str, found))}")
    tally = Counter()
    usable = to_problems(records, find_layout([*found, *renamed]), name, tally, need_answer, renamed)
    problems = list(itertools.islice(usable, limit))
    if not problems:
        why, columns = reasons(tally) or "it is empty", ", ".join(map(str, found))
        told = f"{name_or_path}: none of its {tally['read']} rows can be used ({why}): it has the columns "
        told += f"{columns}; wanted: problem or question, answer or solution"
        raise BadInput(f"{told} (say which are which: --columns problem=COLUMN answer=COLUMN)")
    # What was left out is never silent: it goes to the caller's counts ("read" counts all), else to stderr.
    (Counter() if counts is None else counts).update(tally)
    if counts is None and len(tally) > 1:
        print(f"data.py: {name_or_path}: left out {reasons(tally)} of {tally['read']} rows", file=sys.stderr)
    return problems


def write_rows(rows, path):
    """Rows to .jsonl, .jsonl.gz or .parquet, whole or not at all; the same rows give the same bytes."""
    check_out(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            if path.endswith(".parquet"):
                import pyarrow.parquet

                rows = same_types(rows)
                types = {"budget": pyarrow.int64(), "mode": pyarrow.string()}  # or null in all rows
                table = {key: pyarrow.array([row[key] for row in rows], types.get(key)) for key in rows[0]}
                pyarrow.parquet.write_table(pyarrow.table(table), file)
            else:
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
                file.write(gzip.compress(text, mtime=0) if path.endswith(".gz") else text)  # no time in it
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"--out {path} cannot be written: {error.strerror}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def same_types(rows):
    """Rows with equal keys and one type a column, as Parquet and `datasets` want it: answers become lists
    where any is one, levels text where any is."""
    keys = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key) for key in keys} for row in rows]
    lists = any(isinstance(row.get("answer"), list) for row in rows)
    texts = any(isinstance(row.get("level"), str) for row in rows)
    for row in rows:
        if lists and not isinstance(row["answer"], list):
            row["answer"] = [row["answer"]]
        if texts and row["level"] is not None:
            row["level"] = str(row["level"])
    return rows


def check_out(path):
    """Refuses an output path before any work is done for it."""
    if not path.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise BadInput(f"--out {path}: unknown suffix; use .jsonl, .jsonl.gz or .parquet")


# ---- The command


def select(problems, excluded, limit, counts):
    """Drops and counts repeats and what is in `excluded`, white space aside; unique ids; `limit` at most."""
    excluded = {" ".join(problem["problem"].split()) for problem in excluded}
    kept, seen, ids = [], set(), Counter()
    for problem in problems:
        key = " ".join(problem["problem"].split())
        if key in excluded or key in seen:
            counts["also in --exclude" if key in excluded else "duplicate"] += 1
        elif limit is not None and len(kept) >= limit:
            counts["beyond --limit"] += 1
        else:
            seen.add(key)
            ids[problem["id"]] += 1  # two input files may both number their rows from 0
            n = ids[problem["id"]]
            kept.append(problem | {"id": f"{problem['id']}-{n}" if n > 1 else problem["id"]})
    return kept


def parse_args(argv):
    """The flags as given; check_args fills in what depends on another flag."""
    parser = argparse.ArgumentParser("data.py", epilog=f"Presets: {', '.join(PRESETS)}.", allow_abbrev=False)
    parser.description = __doc__.split("\n")[0]
    add = parser.add_argument_group("what is read").add_argument
    add("input", help="files, presets, hub ids (owner/name[:config]) or folders, comma-separated")
    add("--split", help="split of a hub dataset (default: the preset's own, else train)")
    add("--columns", nargs="+", default=[], metavar="FIELD=COLUMN", help="as problem=frage answer=loesung")
    add("--limit", type=int, help="keep the first N problems")
    add("--exclude", help="drop the problems of these files (comma-separated; equal but for white space)")
    add = parser.add_argument_group("what is asked for").add_argument
    add("--budgets", help=f"how they are drawn, in tokens: {EXAMPLES} (default: the first; ends included)")
    add("--mode", choices=MODES, help="exact (default), max, both (a coin for each row) or none")
    add("--wording", choices=SENTENCES, default="l1", help="how the budget is asked for (default l1)")
    add("--sentence", dest="wording", help='another wording: "Use at most {N} tokens."')
    add("--copies", type=int, default=1, help="rows per problem, each with its own budget (default 1)")
    add("--seed", type=int, default=0, help="one seed, one file, byte for byte (default 0)")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", required=True, help="file to write: .jsonl, .jsonl.gz or .parquet")
    add("--export", choices=EXPORTS, help="write the columns of another trainer (default: of this one)")
    add("--max-prompt-tokens", type=int, help="drop rows whose prompt, chat template included, is longer")
    add("--tokenizer", help="model folder or hub id whose tokenizer counts the prompt's tokens")
    return one_line_errors(parser).parse_args(argv)


def check_args(args):
    """Fills the defaults of --budgets and --mode, refuses what does not go together; the parsed budgets."""
    args.mode = args.mode or ("none" if args.budgets == "none" else "exact")
    if args.budgets is None:
        args.budgets = "none" if args.mode == "none" else "uniform:100:4000"
    dist = parse_budgets(args.budgets)
    annotate([], dist, args.mode)
    budget_prompt("", 1, "exact", wording=args.wording)
    for name, least in {"copies": 1, "limit": 1, "max_prompt_tokens": 1, "seed": 0}.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise BadInput(f"--{name.replace('_', '-')} ({value}) must be {least} or more")
    for word in args.columns:
        if word.partition("=")[0] not in FIELDS.split() or not word.partition("=")[2]:
            raise BadInput(f"--columns {word}: write FIELD=COLUMN, the field being one of {FIELDS}")
    if args.max_prompt_tokens and not args.tokenizer:
        raise BadInput("--max-prompt-tokens needs --tokenizer: name the model whose tokens are counted")
    check_out(args.out)
    for source in ",".join(filter(None, (args.input, args.exclude))).split(","):
        if os.path.exists(source) and os.path.realpath(source) == os.path.realpath(args.out):
            raise BadInput(f"--out {args.out} is also read: choose another name, the input would be lost")
    return dist


@exit_code("data.py")
def main(argv=None):
    """Reads, selects, annotates, filters, writes; prints the summary."""
    args = parse_args(argv)
    dist = check_args(args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    counts, columns = Counter(), dict(word.split("=", 1) for word in args.columns)
    problems, excluded = [], []
    for name in args.input.split(","):
        problems += load_problems(name.strip(), args.split, counts=counts, columns=columns)
    for name in args.exclude.split(",") if args.exclude else []:
        excluded += load_problems(name.strip(), need_answer=False)  # only the texts matter here
    problems = select(problems, excluded, args.limit, counts)
    rows = annotate(problems, dist, args.mode, args.wording, args.copies, args.seed)
    ids = [encode_prompt(tokenizer, r["prompt"], r.get("turns")) if tokenizer else r["prompt"] for r in rows]
    most = args.max_prompt_tokens or math.inf
    kept = [(row, len(i)) for row, i in zip(rows, ids, strict=True) if len(i) <= most]
    counts["prompt too long"] += len(rows) - len(kept)
    if not kept:
        raise BadInput(f"nothing left of {counts['read']} rows ({reasons(+counts)}): nothing was written")
    rows, lengths = zip(*kept, strict=True)
    if args.export:
        from integrations.hosts import export

    write_rows(export(rows, args.export) if args.export else rows, args.out)
    dropped = (f"  dropped {n}: {reason}" for reason, n in (+counts).most_common() if reason != "read")
    print(f"read {counts['read']} rows, wrote {len(rows)}", *dropped, sep="\n")
    if chats := sum("turns" in row for row in rows):
        print(f"  kept with a system prompt or earlier turns: {chats}")
    for field in ("mode", "kind"):
        found = Counter(row[field] or "none" for row in rows)
        print(f"{field}:", ", ".join(f"{name} {n}" for name, n in sorted(found.items())))
    longest = f"{max(lengths)} {'tokens' if tokenizer else 'characters'}"
    print(f"prompt length: mean {np.mean(lengths):.1f}, longest {longest}")
    if asked := [row["budget"] for row in rows if row["budget"] is not None]:
        print(f"budget (tokens): mean {np.mean(asked):.1f}, from {min(asked)} to {max(asked)}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(main())
