import csv
import gzip
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import BadInput, annotate, budget_prompt, draw_budgets, encode_prompt, load_problems, parse_budgets

ROOT = pathlib.Path(__file__).parent.parent
SAMPLES = ROOT / "tests" / "data"
TRAIN = str(SAMPLES / "math_train_small.jsonl.gz")
MATH500 = str(SAMPLES / "math500_small.jsonl")
LSAT = str(SAMPLES / "lsat_small.jsonl")
STEPS = "Let's think step by step and output the final answer within \\boxed{}."
CHOICE_STEPS = "Let's think step by step and output the final answer (eg, A, B, C, D) within \\boxed{}."


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt") as file:
        return [json.loads(line) for line in file]


def one(row):
    """Normalises one record through the layout that its columns select."""
    function = data.find_layout(list(row))
    return data.normalise(function({key.lower(): value for key, value in row.items()}), "test", 0)


def problems(n):
    return [
        {"id": str(i), "problem": f"Q{i}", "answer": "1", "kind": "math", "source": "s"} for i in range(n)
    ]


# ---------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "kind, wording, mode, expected",
    [
        ("math", "l1", "exact", f"P? {STEPS} Think for 512 tokens."),
        ("math", "l1", "max", f"P? {STEPS} Think for maximum 512 tokens."),
        ("choice", "l1", "exact", f"P?\n\n{CHOICE_STEPS} Think for 512 tokens."),
        ("choice", "l1", "max", f"P?\n\n{CHOICE_STEPS} Think for maximum 512 tokens."),
        ("math", "tulu", "exact", "P?\nThink for 512 tokens."),
        ("math", "tulu", "max", "P?\nThink for up to 512 tokens."),
        ("choice", "tulu", "exact", "P?\nThink for 512 tokens."),
        ("choice", "tulu", "max", "P?\nThink for up to 512 tokens."),
    ],
)
def test_wordings(kind, wording, mode, expected):
    assert budget_prompt("P?", 512, mode, kind, wording) == expected
    assert budget_prompt("P?", np.int64(512), mode, kind, wording) == expected


@pytest.mark.parametrize("mode", [None, "none", "exact", "max"])
def test_a_prompt_without_a_budget_has_no_budget_sentence(mode):
    assert budget_prompt("P?", None, mode) == f"P? {STEPS}"
    assert budget_prompt("P?", None, mode, "choice") == f"P?\n\n{CHOICE_STEPS}"
    assert budget_prompt("P?", None, mode, "math", "tulu") == "P?"


@pytest.mark.parametrize("budget", [-1, 0, 1.5, True, "512"])
def test_an_impossible_budget_is_refused(budget):
    with pytest.raises(BadInput, match="whole number of tokens"):
        budget_prompt("P?", budget, "exact")


def test_a_budget_needs_a_mode_and_a_known_wording():
    with pytest.raises(BadInput, match="mode exact or max"):
        budget_prompt("P?", 5, "none")
    with pytest.raises(BadInput, match="wording 'L1'"):
        budget_prompt("P?", 5, "exact", wording="L1")


def test_the_instruction_names_the_options_shown():
    lsat = load_problems(LSAT)[0]
    assert lsat["problem"].count("\n(E) ") == 1 and len(lsat["choices"]) == 5
    prompt = budget_prompt(lsat["problem"], 9, "exact", "choice")
    assert prompt.endswith("(eg, A, B, C, D, E) within \\boxed{}. Think for 9 tokens.")
    two = one({"question": "Is it?", "choices": ["yes", "no"], "answer": "A"})
    assert two["problem"] == "Is it?\n\nOptions:\nA. yes\nB. no"
    assert "(eg, A, B)" in budget_prompt(two["problem"], None, None, "choice")


# ---------------------------------------------------------------------------------------------- budgets


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 2**32), st.sampled_from(["uniform", "log"]))
@settings(max_examples=60, deadline=None)
def test_budgets_stay_in_range_and_follow_the_seed(low, width, seed, name):
    dist = parse_budgets(f"{name}:{low}:{low + width}")
    drawn = draw_budgets(dist, 50, np.random.default_rng(seed))
    assert all(type(budget) is int and low <= budget <= low + width for budget in drawn)
    assert drawn == draw_budgets(dist, 50, np.random.default_rng(seed))


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=8), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_buckets_give_only_their_values(values, seed):
    dist = parse_budgets("bucket:" + ",".join(map(str, values)))
    assert set(draw_budgets(dist, 60, np.random.default_rng(seed))) <= set(values)
    assert (dist["low"], dist["high"], dist["values"]) == (min(values), max(values), values)


def test_distributions_by_hand():
    rng = np.random.default_rng
    uniform = Counter(draw_budgets(parse_budgets("uniform:3:6"), 4000, rng(0)))
    assert set(uniform) == {3, 4, 5, 6}  # both ends included
    assert all(abs(n - 1000) < 150 for n in uniform.values())
    assert draw_budgets(parse_budgets("fixed:512"), 3, rng(0)) == [512, 512, 512]
    assert draw_budgets(parse_budgets("none"), 2, rng(0)) == [None, None]
    assert draw_budgets(parse_budgets("log:7:7"), 3, rng(0)) == [7, 7, 7]
    assert draw_budgets(parse_budgets("uniform:7:7"), 3, rng(0)) == [7, 7, 7]
    # L1's log form, int(2^U(8, 14.5)): half of the draws lie below the geometric middle.
    log = draw_budgets(parse_budgets("log:256:23170"), 4000, rng(0))
    assert abs(np.mean(np.asarray(log) < math.sqrt(256 * 23170)) - 0.5) < 0.03
    exponents = rng(0).uniform(math.log2(256), math.log2(23170), size=4000)
    assert log == [int(2**exponent) for exponent in exponents]


@pytest.mark.parametrize(
    "spec",
    ["", "uniform", "uniform:100", "uniform:1:2:3", "uniform:a:b", "uniform:1.5:3", "fixed:", "fixed:1:2"]
    + ["bucket:", "bucket:1,,2", "none:3", "normal:1:2", "fixed:1e3", "fixed:" + "9" * 5000, "uniform:²:5"],
)  # fmt: skip
def test_malformed_budgets(spec):
    with pytest.raises(BadInput, match="malformed"):
        parse_budgets(spec)


@pytest.mark.parametrize(
    "spec", ["uniform:0:5", "uniform:-5:5", "fixed:0", "bucket:5,-1", "fixed:99999999", "log:9:8"]
)
def test_budgets_out_of_range(spec):
    with pytest.raises(BadInput, match="tokens, 1 to 10000000, the smaller first, as in uniform:100:4000"):
        parse_budgets(spec)


@pytest.mark.parametrize("spec, distinct", [("uniform:1:4", 4), ("bucket:5,9,7,8", 4), ("log:100:900", 4)])
def test_copies_of_a_problem_have_different_budgets(spec, distinct):
    rows = annotate(problems(50), spec, "exact", copies=4, seed=1)
    for i in range(50):
        copies = rows[4 * i : 4 * i + 4]
        assert len({row["budget"] for row in copies}) == distinct
        assert {row["problem"] for row in copies} == {f"Q{i}"}
    assert len({row["id"] for row in rows}) == 200


def test_modes_do_not_change_the_budgets_of_a_seed():
    drawn = {mode: annotate(problems(400), "uniform:1:99", mode, seed=5) for mode in ("exact", "max", "both")}
    budgets = {mode: [row["budget"] for row in rows] for mode, rows in drawn.items()}
    assert budgets["exact"] == budgets["max"] == budgets["both"]
    modes = Counter(row["mode"] for row in drawn["both"])
    assert set(modes) == {"exact", "max"} and abs(modes["max"] - 200) < 50
    assert [row["budget"] for row in annotate(problems(400), "uniform:1:99", "exact", seed=6)] != budgets[
        "exact"
    ]


@given(
    st.sampled_from(["uniform:1:3000", "log:2:9000", "bucket:7,70,700", "fixed:12", "none"]),
    st.sampled_from(["exact", "max", "both"]),
    st.sampled_from(["l1", "tulu"]),
    st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_text_and_metadata_name_the_same_budget(spec, mode, wording, seed):
    for row in annotate(problems(8), spec, "none" if spec == "none" else mode, wording, 2, seed):
        said = re.findall(r"Think for (maximum |up to )?(-?\d+) tokens\.$", row["prompt"])
        if spec == "none":
            assert not said and row["budget"] is None and row["mode"] is None
            assert "Think for" not in row["prompt"]
        else:
            assert [(bool(words), int(number)) for words, number in said] == [
                (row["mode"] == "max", row["budget"])
            ]


# ---------------------------------------------------------------------------------------------- readers

RAW = [
    {"id": "a", "problem": "What is 1, plus\n\"1\"?", "answer": "2", "level": 3, "subject": "Sums"},
    {"id": "b", "problem": "Roots of $x^2=1$?", "answer": "1", "answers": ["1", "-1"], "source": "hand"},
    {"id": "c", "question": "Which is é?", "choices": ["one", "two", "[3"], "answer": "B"},
    {"id": "d", "passage": "It is so.", "question": "Is it?", "choices": ["yes", "no"], "answer": "A"},
]  # fmt: skip
CLEAN = [
    {"id": "a", "problem": RAW[0]["problem"], "answer": "2", "kind": "math", "source": "raw", "level": 3}
    | {"subject": "Sums"},
    {"id": "b", "problem": "Roots of $x^2=1$?", "answer": ["1", "-1"], "kind": "math", "source": "hand"},
    {"id": "c", "problem": "Which is é?\n\nOptions:\nA. one\nB. two\nC. [3", "answer": "B", "kind": "choice"}
    | {"source": "raw", "choices": ["one", "two", "[3"]},
    {"id": "d", "problem": "It is so.\n\nIs it?\n(A) yes\n(B) no", "answer": "A", "kind": "choice"}
    | {"source": "raw", "choices": ["yes", "no"]},
]


def write_raw(path):
    """RAW in the format that the suffix names; lists in CSV are JSON text."""
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RAW, columns(RAW)), path)
        return
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if ".jsonl" in name:
            file.write("\n".join(json.dumps(row) for row in RAW) + "\n\n")
        elif ".json" in name:
            json.dump(RAW, file)
        else:
            writer = csv.DictWriter(file, fieldnames=columns(RAW).names)
            writer.writeheader()
            for row in RAW:
                writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})


def columns(rows):
    import pyarrow

    kinds = {"level": pyarrow.int64(), "choices": pyarrow.list_(pyarrow.string())}
    kinds["answers"] = kinds["choices"]
    keys = dict.fromkeys(key for row in rows for key in row)
    return pyarrow.schema([(key, kinds.get(key, pyarrow.string())) for key in keys])


SUFFIXES = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_reads_alike(tmp_path, suffix, capsys):
    write_raw(tmp_path / f"raw.{suffix}")
    assert load_problems(str(tmp_path / f"raw.{suffix}")) == CLEAN
    assert load_problems(str(tmp_path / f"raw.{suffix}"), limit=2) == CLEAN[:2]
    assert capsys.readouterr().err == ""  # nothing was left out, so nothing is said


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("mode, spec", [("both", "uniform:5:900"), ("none", "none")])
def test_rows_round_trip(tmp_path, suffix, mode, spec):
    rows = annotate(CLEAN, spec, mode, copies=2, seed=3)
    assert all(list(row)[:8] == "id problem answer kind source prompt budget mode".split() for row in rows)
    data.write_rows(rows, str(tmp_path / f"rows.{suffix}"))
    assert load_problems(str(tmp_path / f"rows.{suffix}")) == rows
    assert [path.name for path in tmp_path.iterdir()] == [f"rows.{suffix}"]


def test_levels_of_two_types_fit_in_parquet(tmp_path):
    mixed = [problem | {"level": level} for problem, level in zip(CLEAN, [3, "hard", 2.5, 1], strict=True)]
    rows = annotate(mixed, "fixed:5", "max")
    data.write_rows(rows, str(tmp_path / "rows.parquet"))
    assert load_problems(str(tmp_path / "rows.parquet")) == rows


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    with pytest.raises(TypeError):
        data.write_rows([{"id": {1, 2}}], str(path))
    assert path.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 1


def test_real_samples():
    train, test, lsat = load_problems(TRAIN), load_problems(MATH500), load_problems(LSAT)
    assert (len(train), len(test), len(lsat)) == (200, 20, 5)
    assert all(
        row["kind"] == "math" and isinstance(row["answer"], str) and row["subject"] for row in train + test
    )
    assert [row["answer"] for row in lsat] == list("ABCDE")
    assert all(f"\n(E) {row['choices'][4]}" in row["problem"] for row in lsat)


# ---------------------------------------------------------------------------------------------- traps


@pytest.mark.parametrize(
    "value, expected",
    [
        (142.0, "142"), ("142.0", "142"), (0.5, "0.5"), (7, "7"), (-3.0, "-3"), ("3.50", "3.50"),
        (" x ", "x"),
        ("6*7=<<6*7=42>>42\n#### 1,042", "1042"), ("#### 42", "42"), (["1", " -1 "], ["1", "-1"]),
        ([5.0], "5"), (["2", "2"], "2"), (["None", "4"], "4"), ("[1, 2]", "[1, 2]"),
        ("None", None), ("", None), ("  ", None), (None, None), (float("nan"), None), (float("inf"), None),
        ([], None), ([None], None), (True, None), ({"a": 1}, None), ("\ud800", None), ("####", None),
    ],
)  # fmt: skip
def test_answers(value, expected):
    assert data.clean_answer(value) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [("B", "B"), ("(C)", "C"), ("A.", "A"), (0, "A"), (3.0, "D"), ([1], "B"), ([0, 2], ["A", "C"]),
     ("blue", "B"), ("2", "C"), ("1", None), ("E", None), (4, None), (-1, None), ("b", None),
     ("", None), (None, None)],
)  # fmt: skip
def test_choice_answers(answer, expected):
    # "1" may be option C, which reads 1, or index 1: it is left out rather than guessed.
    row = {"question": "Q", "choices": ["red", "blue", "1", "sky"], "answer": answer}
    if expected is None:
        with pytest.raises(data.Skip):
            one(row)
    else:
        assert one(row)["answer"] == expected


def test_option_labels_are_not_shown_twice():
    row = one({"question": "Q", "choices": ["(A) x", "(B)y"], "answer": "B"})
    assert row["choices"] == ["x", "y"] and row["problem"] == "Q\n\nOptions:\nA. x\nB. y"
    assert one(row)["problem"] == row["problem"]  # a loaded problem loads as itself
    assert one({"question": "Q", "choices": ["A cat", "B side"], "answer": "A"})["choices"] == [
        "A cat",
        "B side",
    ]


def user(text):
    return [{"role": "system", "content": "s"}, {"role": "user", "content": text}]


def chat(text, gold, verifiers):
    """A row of open-instruct; the assistant's turn is not part of the question."""
    turns = [*user(text), {"role": "assistant", "content": "done"}]
    return {"messages": turns, "ground_truth": gold, "dataset": verifiers}


@pytest.mark.parametrize(
    "row, expected",
    [
        # GSM8K, AMC, MMLU, Minerva, Omni-MATH, OlympiadBench, SVAMP, MATH, LSAT.
        ({"question": "Q", "answer": "r\n#### 42"}, {"problem": "Q", "answer": "42"}),
        ({"id": 3, "problem": "Q", "answer": 142.0, "url": "u"}, {"id": "3", "answer": "142"}),
        ({"question": "Q", "subject": "law", "choices": list("wxyz"), "answer": 3}, {"answer": "D"}),
        ({"question": "Q", "answer": ["1", "2"]}, {"answer": ["1", "2"]}),
        ({"problem": "Q", "difficulty": 4.5, "domain": ["Algebra"], "answer": "1"}, {"level": 4.5}),
        ({"question": "Q", "final_answer": ["$2$"], "subfield": "X"}, {"answer": "$2$", "subject": "X"}),
        ({"ID": "c", "Body": "Two cats.", "Question": "Legs?", "Answer": 8.0}, {"answer": "8"}),
        ({"problem": "Q", "solution": "\\boxed{1} \\boxed{\\frac{1}{2}}.", "level": "Level 5", "type": "X"},
         {"answer": "\\frac{1}{2}", "level": 5, "subject": "X"}),
        ({"query": "P Q: q (A)x (B)y", "choices": ["(A)x", "(B)y"], "gold": [1]},
         {"problem": "P Q: q (A)x (B)y", "answer": "B", "choices": ["x", "y"], "kind": "choice"}),
        # verl: L1's rows (the sign of num_tokens is the mode) and Eurus-2.
        ({"prompt": user(f"Q {STEPS} Think for 300 tokens."), "ability": "math",
          "reward_model": {"ground_truth": "4", "num_tokens": 300}},
         {"problem": "Q", "answer": "4", "budget": 300, "mode": "exact"}),
        ({"prompt": user(f"Q {STEPS} Think for maximum 300 tokens."),
          "reward_model": {"ground_truth": ["4", "5"], "num_tokens": -300}},
         {"problem": "Q", "answer": ["4", "5"], "budget": 300, "mode": "max"}),
        ({"prompt": user("Q"), "ability": "math", "data_source": "numina",
          "reward_model": {"ground_truth": "4"}},
         {"problem": "Q", "prompt": "Q", "budget": None, "mode": None, "source": "numina"}),
        # open-instruct: plain, parallel lists, the old encoding; its old sentence for an upper limit.
        (chat("Q", "4", "MATH") | {"extra": 1}, {"problem": "Q", "answer": "4"}),
        (chat("Q\nThink for 77 tokens.", ["4", "77"], ["math", "max_length"]),
         {"problem": "Q", "answer": "4", "budget": 77, "mode": "exact", "prompt": "Q\nThink for 77 tokens."}),
        (chat("Q\nThink for up to 77 tokens.", ["4", "77"], ["math", "up_to_max_length"]),
         {"problem": "Q", "answer": "4", "budget": 77, "mode": "max"}),
        (chat("Q\nThink for 77 tokens.", "4<sep>77", "MATH,max_length"),
         {"problem": "Q", "answer": "4", "budget": 77, "mode": "exact"}),
        (chat("Q\nUse no more than 9 tokens.", "4", "MATH"), {"problem": "Q", "budget": 9, "mode": "max"}),
    ],
)  # fmt: skip
def test_layouts(row, expected):
    found = one(row)
    assert {key: found[key] for key in expected} == expected


def test_l1s_minus_one_is_no_budget():
    row = one(
        {"prompt": user("Q Think for -1 tokens."), "reward_model": {"ground_truth": "A", "num_tokens": -1}}
    )
    assert row["problem"] == "Q" and "prompt" not in row


def test_gpqa_options_are_shuffled_the_same_way_every_time():
    row = {
        "Correct Answer": "right",
        "Incorrect Answer 1": "x",
        "Incorrect Answer 2": "y",
        "Incorrect Answer 3": "z",
    }
    found = [one(row | {"Question": f"Q{i}"}) for i in range(40)]
    assert {row["answer"] for row in found} == set("ABCD")
    assert all(row["choices"]["ABCD".index(row["answer"])] == "right" for row in found)
    assert found == [one(row | {"Question": f"Q{i}"}) for i in range(40)]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"problem": None, "answer": "1"}, "no problem text"),
        ({"problem": 5, "answer": "1"}, "no problem text"),
        ({"problem": "Q", "answer": None}, "no answer"),
        ({"problem": "Q", "answer": "None"}, "no answer"),
        ({"problem": "Q", "answer": {"x": 1}}, "no answer"),
        ({"problem": "Q", "answer": "A", "choices": "A or B"}, "choices are not a list"),
        ({"problem": "Q", "answer": "A", "choices": ["x", None, " "]}, "an empty choice"),
        ({"problem": "Q", "answer": "A", "choices": ["x"]}, "choices are not a list of 2 to 10"),
        ({"problem": "Q", "answer": "1", "prompt": "Q", "budget": -1, "mode": "exact"}, "budget and mode"),
        ({"problem": "Q", "answer": "1", "prompt": "Q", "budget": 5, "mode": None}, "budget and mode"),
        ({"problem": "Q", "answer": "1", "prompt": "Q", "budget": None, "mode": "max"}, "budget and mode"),
        ({"problem": "Q", "answer": "1", "prompt": "Q", "budget": [5, 6], "mode": "max"}, "wrong type"),
        ([1, 2], "not an object"),
        ("text", "not an object"),
        (None, "not an object"),
    ],
)  # fmt: skip
def test_an_unusable_row_is_counted_not_a_crash(tmp_path, row, reason):
    path = put(tmp_path / "x.jsonl", [{"problem": "Good", "answer": "1"}, row])
    counts = Counter()
    assert [problem["problem"] for problem in load_problems(path, counts=counts)] == ["Good"]
    assert counts.pop("read") == 2 and list(counts.values()) == [1]
    assert re.search(reason, next(iter(counts)))


@pytest.mark.parametrize(
    "row, reason",
    [
        (chat("Q\nThink for 5 tokens.", ["4", "6"], ["m", "max_length"]), "budget in text"),
        (chat("Q", ["4", "6"], ["m", "max_length"]), "budget in text and metadata differ"),
        (chat("Q", ["4", "x"], ["m", "max_length"]), "wrong type"),
        ({"messages": [], "ground_truth": "4", "dataset": "m"}, "no user turn"),
        ({"messages": "Q", "ground_truth": "4", "dataset": "m"}, "wrong type"),
    ],
)  # fmt: skip
def test_an_unusable_chat_row_is_counted(tmp_path, row, reason):
    good = {"messages": user("Q"), "ground_truth": "4", "dataset": "m"}
    counts = Counter()
    assert len(load_problems(put(tmp_path / "x.jsonl", [good, row]), counts=counts)) == 1
    assert any(reason in key for key in counts)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["A", "5", "#### 1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=4,
)
NAMES = sorted(
    {name for wanted, _ in data.LAYOUTS.values() for name in wanted} | {"id", "passage", "choices", "answers"}
)
NAMES += ["answer", "question", "level", "subject", "prompt", "budget", "mode", "kind", "source"]


@given(st.sampled_from(sorted(data.LAYOUTS)), st.dictionaries(st.sampled_from(NAMES), JSON_VALUES))
@settings(max_examples=300, deadline=None)
def test_no_row_whatever_ends_the_run(layout, row):
    """Any JSON under the known names is a problem of the Row contract or one counted row."""
    records = iter([row])
    found = list(data.to_problems(records, data.LAYOUTS[layout][1], "x", Counter()))
    for problem in found:
        assert isinstance(problem["problem"], str) and problem["problem"].strip()
        assert isinstance(problem["answer"], (str, list)) and problem["answer"]
        json.dumps(annotate([problem], "fixed:5", "max"), allow_nan=False).encode()


def test_a_csv_row_with_too_many_fields_is_counted(tmp_path):
    (tmp_path / "x.csv").write_text("problem,answer\nQ,1\nR,2,3\nS\n")
    counts = Counter()
    assert [problem["id"] for problem in load_problems(str(tmp_path / "x.csv"), counts=counts)] == ["x-00000"]
    assert counts == {"read": 3, "not an object with the file's columns": 1, "no answer": 1}


def test_code_rows_are_left_out(tmp_path, capsys):
    rows = [
        {"prompt": user("Q"), "ability": kind, "reward_model": {"ground_truth": "4"}}
        for kind in ("math", "code")
    ]
    assert len(load_problems(put(tmp_path / "eurus.jsonl", rows))) == 1
    assert "left out 1 not mathematics of 2 rows" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- own tables


def read(tmp_path, text, *flags, suffix="csv"):
    """Rows that the real command makes of a file with this text; the words of the refusal if it refuses."""
    (tmp_path / f"own.{suffix}").write_text(text, encoding="utf-8")
    out = tmp_path / "new" / "folder" / "rows.jsonl"  # made by --out
    done = run_script(tmp_path / f"own.{suffix}", "--budgets", "fixed:9", *flags, "--out", out)
    assert done.returncode in (0, 2) and (done.returncode == 0) == out.exists(), done.stderr
    return rows_of(out) if done.returncode == 0 else done.stderr


@pytest.mark.parametrize(
    "text, flags, answers",
    [
        ("question,solution\nQ,6*7\\n#### 42\nR,so \\boxed{\\frac{1}{2}}.\n", [], ["42", "\\frac{1}{2}"]),
        ("Question,Answer\nQ,4\nR,5\n", [], ["4", "5"]),
        ("Nr;Frage;Loesung\n1;Was, bitte?;4\n2;Und?;3,5\n", ["problem=frage", "answer=LOESUNG"],
         ["4", "3,5"]),
        ("text\tkey\nQ\t4\nR\t5\n", ["problem=text", "answer=KEY"], ["4", "5"]),
        ("prompt,ANSWER\nQ,4\nR,5\n", ["problem=prompt"], ["4", "5"]),
        ("question,answer,loesung\nQ,1,4\nR,1,5\n", ["answer=loesung"], ["4", "5"]),
        ("\ufeffproblem,expected_answer\nQ,4\nR,5\n", [], ["4", "5"]),
        ("problem,weg\nQ,also \\boxed{4}\nR,#### 5\n", ["solution=weg"], ["4", "5"]),
    ],
)  # fmt: skip
def test_own_tables_are_read(tmp_path, text, flags, answers):
    rows = read(tmp_path, text.replace("\\n", " "), *(["--columns", *flags] if flags else []))
    assert [row["answer"] for row in rows] == answers
    assert all(row["prompt"].startswith(row["problem"]) and row["budget"] == 9 for row in rows)


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("frage,loesung\nQ,4\n", [], "columns frage, loesung; wanted: .*--columns problem=COLUMN answer="),
        ("frage,loesung\nQ,4\n", ["problem=frag"], "--columns: no frag in .*own.csv, only frage, loesung"),
        ("frage,loesung\nQ,4\n", ["problm=frage"], "--columns problm=frage: write FIELD=COLUMN, .*problem"),
        ("frage,loesung\nQ,4\n", ["problem"], "--columns problem: write FIELD=COLUMN"),
        ("frage,loesung\nQ,4\n", ["problem=frage"], "wanted: problem or question, answer or solution"),
    ],
)  # fmt: skip
def test_own_tables_that_are_not_understood(tmp_path, text, flags, message):
    error = read(tmp_path, text, *(["--columns", *flags] if flags else []))
    assert re.search(message, error) and error.count("\n") == 1


def test_golds_that_are_no_answers_are_dropped_and_counted(tmp_path):
    golds = ["proof", "notfound", "N/A", "None", "", "4"]
    counts = Counter()
    path = put(tmp_path / "x.jsonl", [{"problem": f"Q{i}", "answer": gold} for i, gold in enumerate(golds)])
    assert [row["answer"] for row in load_problems(path, counts=counts)] == ["4"]
    assert counts == {"read": 6, "no answer": 5}


@pytest.mark.parametrize(
    "kind, read", [("MATH", 1), ("Math", 1), ("math", 1), ("voc", 1), ("", 1), ("code", 0)]
)
def test_kinds(kind, read):
    verl = {"prompt": user("Q"), "ability": kind, "reward_model": {"ground_truth": "4"}}
    for row in (verl, {"problem": "Q", "answer": "4", "kind": kind}):
        if read:
            assert one(row)["kind"] == "math"
        else:
            with pytest.raises(data.Skip, match="not mathematics"):
                one(row)


FOUR_WAYS = {"question": "Q", "option_a": "w", "option_b": "x", "option_c": "y", "option_d": "z"}


@pytest.mark.parametrize(
    "row, letter",
    [
        ({"question": "Q", "options": ["w", "x", "y", "z"], "answer": "C"}, "C"),
        ({"question": "Q", "options": ["w", "x", "y", "z"], "answer": 2}, "C"),
        ({"question": "Q", "options": ["A)w", "B)x", "C)y", "D)z"], "correct": "C"}, "C"),  # AQuA
        ({"question": "Q", "options": {"A": "w", "B": "x", "C": "y", "D": "z"}, "answer": "y"}, "C"),  # MedQA
        ({"question": "Q", "choices": {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]},
          "answerKey": "3"}, "C"),  # ARC
        (FOUR_WAYS | {"answer": "C"}, "C"),
        (FOUR_WAYS | {"answer": "y"}, "C"),
        ({"question": "Q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"}, "C"),
        ({"question": "Q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "answer": "c".upper()}, "C"),
        ({"question": "Q", "optionA": "w", "optionB": "x", "optionC": "y", "optionD": "z", "answer": 2}, "C"),
        ({"question": "Q", "option_a": "w", "option_b": "x", "option_c": "", "answer": "B"}, "B"),
    ],
)  # fmt: skip
def test_options_in_all_their_forms(row, letter):
    found = one(row)
    size = 2 if letter == "B" else 4
    assert (found["kind"], found["answer"], found["choices"]) == ("choice", letter, list("wxyz")[:size])
    assert found["problem"] == "Q\n\nOptions:\n" + "\n".join(
        f"{a}. {b}" for a, b in zip("ABCD", "wxyz"[:size], strict=False)
    )


ROUND = {"(A)": "w", "(B)": "x", "(C)": "y"}
SMALL = {"a": "w", "b": "x", "c": "y"}
NUMBERS = {"text": ["w", "x", "y", ".2"], "label": ["1", "2", "3", "4"]}


@pytest.mark.parametrize(
    "choices, gold, letter",
    [
        (ROUND, "(A)", "A"), (ROUND, "(B).", "B"), (ROUND, "C", "C"), (ROUND, "(D)", None),
        # The label counts before the letter as an index.
        ({"(B)": "w", "(A)": "x"}, "A", "B"), ({"B": "w", "A": "x"}, "(A)", "B"),
        (SMALL, "b", "B"), (SMALL, "(b)", "B"), (SMALL, "A", "A"), (SMALL, "(B)", "B"), (SMALL, "D", None),
        (NUMBERS, "3", "C"), (NUMBERS, "(3)", "C"), (NUMBERS, "B", "B"), (NUMBERS, "E", None),
        (NUMBERS, ".2", "D"),  # a text, not label 2
        ({"text": ["w", "x", "y"]}, "C", "C"), ({"text": ["w", "x", "y"]}, "D", None),  # no labels
        (["w", "E", "y"], "E", None),  # a letter is never a text
    ],
)  # fmt: skip
def test_a_gold_is_a_label_or_else_a_letter(choices, gold, letter):
    row = {"question": "Q", "choices": choices, "answer": gold}
    if letter is None:
        with pytest.raises(data.Skip, match="names no option"):
            one(row)
    else:
        assert one(row)["answer"] == letter


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"question": "Q", "option1": "w", "option2": "x", "answer": "1"}, "options that are not read"),
        ({"question": "Q", "options": "w or x", "answer": "A"}, "choices are not a list"),
        ({"question": "Q", "options": [{"k": "A"}, {"k": "B"}], "answer": "A"}, "an empty choice"),
        (FOUR_WAYS | {"answer": "E"}, "names no option"),
        (FOUR_WAYS | {"answer": "42"}, "names no option"),
    ],
)  # fmt: skip
def test_options_are_never_silently_mathematics(row, reason):
    with pytest.raises(data.Skip, match=reason):
        one(row)


def test_three_number_columns_are_no_options():
    assert one({"problem": "a + b?", "a": 1, "b": 2, "answer": 3})["kind"] == "math"


# ---------------------------------------------------------------------------------------------- chats

SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def ask(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, *EARLIER, ask("Q"), {"role": "assistant", "content": "so \\boxed{4}"}]},
        {"messages": [SYSTEM, *EARLIER, ask("Q")], "answer": "4"},
        {"messages": [SYSTEM, *EARLIER, ask("Q")], "ground_truth": ["4"], "dataset": ["math"]},
        {"messages": [SYSTEM, *EARLIER, ask("Q")], "solution": "#### 4"},
        {"prompt": [SYSTEM, *EARLIER, ask("Q")], "reward_model": {"ground_truth": "4"}, "ability": "MATH"},
        {"prompt": [SYSTEM, *EARLIER, ask("Q")], "problem": "Q", "answer": "4"},
    ],
)
def test_chats_keep_their_turns(tmp_path, row, tokenizer, capsys):
    path = put(tmp_path / "chat.jsonl", [row])
    (problem,) = load_problems(path)
    assert (problem["problem"], problem["answer"], problem["turns"]) == ("Q", "4", [SYSTEM, *EARLIER])
    (asked,) = annotate([problem], "fixed:9", "exact")
    assert asked["prompt"] == f"Q {STEPS} Think for 9 tokens." and asked["turns"] == [SYSTEM, *EARLIER]
    with pytest.raises(BadInput, match="need a tokenizer with a chat template"):
        encode_prompt(tokenizer, asked["prompt"], asked["turns"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    try:
        ids = encode_prompt(tokenizer, asked["prompt"], asked["turns"])
    finally:
        tokenizer.chat_template = None
    before = "[system]Be brief.[user]Hi[assistant]Hello"
    assert tokenizer.decode(ids) == f"{before}[user]Q {STEPS} Think for 9 tokens."
    for suffix in ("jsonl", "parquet"):  # written, told, read back
        out = str(tmp_path / f"rows.{suffix}")
        assert data.main([path, "--budgets", "fixed:9", "--out", out]) == 0
        assert "kept with a system prompt or earlier turns: 1" in capsys.readouterr().out
        (again,) = load_problems(out)
        assert again["turns"] == [SYSTEM, *EARLIER] and again["prompt"] == asked["prompt"]


@pytest.mark.parametrize("host", data.EXPORTS)
def test_exported_chats_keep_their_turns(tmp_path, host):
    path = put(tmp_path / "chat.jsonl", [{"messages": [SYSTEM, *EARLIER, ask("Q")], "answer": "4"}])
    out = str(tmp_path / "rows.parquet")
    assert data.main([path, "--budgets", "fixed:9", "--export", host, "--out", out]) == 0
    (row,) = data.read_file(out)
    chat = row["messages" if host == "open-instruct" else "prompt"]
    assert chat[:-1] == [SYSTEM, *EARLIER] and chat[-1]["content"].endswith("Think for 9 tokens.")
    (again,) = load_problems(out)
    assert again["turns"] == [SYSTEM, *EARLIER] and (again["budget"], again["mode"]) == (9, "exact")


@pytest.mark.parametrize(
    "messages, reason",
    [([SYSTEM], "no user turn"), ([{"role": "user", "content": [{"type": "text"}]}], "no user turn"),
     ([{"role": "user", "content": None}, ask("Q")], "no user turn"), ([None], "wrong type")],
)  # fmt: skip
def test_chats_that_are_refused(tmp_path, messages, reason):
    counts = Counter()
    good = {"messages": [ask("R")], "answer": "4"}
    path = put(tmp_path / "x.jsonl", [good, {"messages": messages, "answer": "4"}])
    assert len(load_problems(path, counts=counts)) == 1 and any(reason in key for key in counts)


# ---------------------------------------------------------------------------------------------- own sentences


def test_a_sentence_of_ones_own_is_a_wording(tmp_path):
    sentence = "Use at most {N} tokens."
    for mode in ("exact", "max"):
        assert budget_prompt("P?", 512, mode, wording=sentence) == f"P? {STEPS} Use at most 512 tokens."
    assert budget_prompt("P?", 5, "max", "choice", sentence).endswith(f"{CHOICE_STEPS} Use at most 5 tokens.")
    assert budget_prompt("P?", None, None, wording=sentence) == f"P? {STEPS}"
    rows = read(tmp_path, "problem,answer\nQ,4\n", "--mode", "max", "--sentence", "Nutze {N} Token {x}!")
    assert rows[0]["prompt"] == f"Q {STEPS} Nutze 9 Token {{x}}!"
    out = put(tmp_path / "again.jsonl", rows)
    assert load_problems(out) == rows  # a sentence that is not known is kept with its budget
    error = read(tmp_path / "new", "problem,answer\nQ,4\n", "--sentence", "Be brief.")
    assert re.search("wording 'Be brief.' is unknown: use l1, tulu, or a sentence with {N}", error)


@pytest.mark.parametrize(
    "prompt, budget",
    [("Q Think for 300 tokens.", 200), ("Q Think for up to 300 tokens.", 30), ("Q", 200), ("Q 2000", 200),
     ("Q Use at most 300 tokens.", 200)],
)  # fmt: skip
def test_a_prompt_that_asks_for_another_budget_is_refused(prompt, budget):
    row = {"problem": "Q", "answer": "4", "prompt": prompt, "budget": budget, "mode": "exact"}
    with pytest.raises(data.Skip, match="budget in text and metadata differ"):
        one(row)
    right = prompt.replace("300", str(budget)).replace("2000", str(budget)) + " 200" * (prompt == "Q")
    assert one(row | {"prompt": right})["budget"] == budget


def test_a_budget_that_only_the_text_has_counts():
    row = {"problem": "Q", "answer": "4", "prompt": "Q Think for maximum 300 tokens."}
    assert (one(row)["budget"], one(row)["mode"]) == (300, "max")
    row = {"problem": "It costs 5 tokens.", "answer": "4", "prompt": "It costs 5 tokens.", "budget": None}
    assert one(row)["budget"] is None


# ---------------------------------------------------------------------------------------------- end tokens


def small_tokenizer(eos, added):
    """A real tokenizer with tokens at the ids they have in the published models: {token: id}."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    top = max(added.values())
    vocabulary = {f"w{i}": i for i in range(top + 1) if i not in added.values()} | added
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w5"))
    inner.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)


LLAMA = {"<|end_of_text|>": 128001, "<|eom_id|>": 128008, "<|eot_id|>": 128009}
ENDS = [
    # name, tokenizer's end token, added tokens, eos_token_id of generation_config, expected
    ("gemma-3", "<eos>", {"<eos>": 1, "<end_of_turn>": 106}, [1, 106], [1, 106]),
    ("Phi-3.5", "<|endoftext|>", {"<|endoftext|>": 32000, "<|end|>": 32007}, [32007, 32001, 32000],
     [32000, 32001, 32007]),
    ("Llama-3", "<|eot_id|>", LLAMA, [128001, 128008, 128009], [128001, 128008, 128009]),
    ("Qwen2.5", "<|im_end|>", {"<|endoftext|>": 151643, "<|im_end|>": 151645}, [151645, 151643],
     [151643, 151645]),
    ("gpt-oss", "<|return|>", {"<|endoftext|>": 199, "<|return|>": 200, "<|end|>": 207, "<|call|>": 212},
     [200, 199, 212], [199, 200, 212]),
    ("one number", "<eos>", {"<eos>": 3}, 7, [3, 7]),
]  # fmt: skip


@pytest.mark.parametrize("name, eos, added, declared, expected", ENDS, ids=[case[0] for case in ENDS])
def test_stop_ids(name, eos, added, declared, expected):
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = small_tokenizer(eos, added)
    assert data.stop_ids(GenerationConfig(eos_token_id=declared), tokenizer) == expected
    config = Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, eos_token_id=None)  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = declared
    assert data.stop_ids(model, tokenizer) == expected
    # Without a model only what the tokenizer itself knows: enough for these chat formats.
    alone = data.stop_ids(None, tokenizer)
    assert set(alone) <= set(expected) and tokenizer.eos_token_id in alone
    known = {"gemma-3": [1, 106], "Phi-3.5": [32000, 32007], "Llama-3": expected, "gpt-oss": [200, 212]}
    assert alone == known.get(name, alone)


# ---------------------------------------------------------------------------------------------- hub


def test_hub_layout_folder_with_configs_and_splits(tmp_path, monkeypatch):
    """The real `datasets` library on a local folder laid out as on the hub stands in for the network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "hub"
    hub.mkdir()
    for name, answer in [("i-test", "#### 1"), ("ii-test", "#### 2"), ("i-train", "#### 3")]:
        put(hub / f"{name}.jsonl", [{"question": f"Q {name}", "answer": answer}])
    (hub / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: i\n  data_files:\n  - split: test\n    path: i-test.jsonl\n"
        "  - split: train\n    path: i-train.jsonl\n"
        "- config_name: ii\n  data_files:\n  - split: test\n    path: ii-test.jsonl\n---\n"
    )
    monkeypatch.setitem(data.PRESETS, "gsm8k", (str(hub), ("i", "ii"), "test"))
    assert [row["answer"] for row in load_problems("gsm8k")] == ["1", "2"]
    assert load_problems("gsm8k")[0]["source"] == "gsm8k"
    with pytest.raises(BadInput, match="has the splits test, train: choose one with --split"):
        load_problems("gsm8k", split="nosuch")
    with pytest.raises(BadInput, match="could not be loaded"):
        load_problems(str(hub))  # two configs: the library asks for one
    monkeypatch.setitem(data.PRESETS, "gsm8k", (str(hub), ("i",), "train"))
    assert [row["answer"] for row in load_problems("gsm8k")] == ["3"]
    assert [row["answer"] for row in load_problems("gsm8k", split="test")] == ["1"]


def test_presets_are_complete():
    for name, (hub_id, configs, split) in data.PRESETS.items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) and isinstance(configs, tuple), name
        assert split in ("train", "test", "testmini"), name


# ---------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<end>"], initial_alphabet=alphabet)
    model.train_from_iterator((row["problem"] for row in load_problems(TRAIN)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<end>")


def test_encode_prompt_with_and_without_a_chat_template(tokenizer):
    prompt = "Find $x$.\nThink for 9 tokens."
    plain = encode_prompt(tokenizer, prompt)
    assert plain == tokenizer(prompt)["input_ids"] and type(plain) is list and type(plain[0]) is int
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        ids = encode_prompt(tokenizer, prompt)
    finally:
        tokenizer.chat_template = None
    assert type(ids) is list and type(ids[0]) is int
    assert tokenizer.decode(ids) == f"[user]{prompt}<end>[assistant]"


def test_long_prompts_are_dropped_by_the_models_own_count(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "model")
    argv = [TRAIN, "--out", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tmp_path / "model")]
    assert data.main([*argv, "--max-prompt-tokens", "150"]) == 0
    text = capsys.readouterr().out
    kept = rows_of(tmp_path / "rows.jsonl")
    assert (
        0 < len(kept) < 200 and f"dropped {200 - len(kept)}: prompt too long" in text and " tokens\n" in text
    )
    lengths = [len(encode_prompt(tokenizer, row["prompt"])) for row in kept]
    assert max(lengths) <= 150 and f"mean {np.mean(lengths):.1f}, longest {max(lengths)} tokens" in text
    everything = annotate(load_problems(TRAIN), "uniform:100:4000", "exact")
    assert kept == [row for row in everything if len(encode_prompt(tokenizer, row["prompt"])) <= 150]


# ---------------------------------------------------------------------------------------------- command


def test_command_writes_rows_and_tells(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert (
        data.main([f"{TRAIN},{LSAT}", "--mode", "both", "--copies", "3", "--seed", "7", "--out", str(out)])
        == 0
    )
    rows, text = rows_of(out), capsys.readouterr().out
    assert len(rows) == 615 and "read 205 rows, wrote 615" in text
    modes = Counter(row["mode"] for row in rows)
    assert f"mode: exact {modes['exact']}, max {modes['max']}" in text and "kind: choice 15, math 600" in text
    budgets = [row["budget"] for row in rows]
    drawn = f"mean {np.mean(budgets):.1f}, from {min(budgets)} to {max(budgets)}"
    assert f"budget (tokens): {drawn}" in text
    assert all(100 <= row["budget"] <= 4000 for row in rows)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_one_seed_one_file(tmp_path, suffix):
    def run(name, *flags):
        out = tmp_path / f"{name}.{suffix}"
        assert data.main([TRAIN, "--mode", "both", "--copies", "2", *flags, "--out", str(out)]) == 0
        return out.read_bytes()

    assert run("a", "--seed", "3") == run("b", "--seed", "3") != run("c", "--seed", "4")


def test_duplicates_overlap_limit_and_missing_answers(tmp_path, capsys):
    rows = [{"id": "0", "problem": f"Q {i}", "answer": "1"} for i in range(6)]
    rows += [
        {"problem": " Q\n\t1 ", "answer": "1"},
        {"problem": "Q 9", "answer": None},
        {"problem": "", "answer": "1"},
    ]
    held_out = put(tmp_path / "test.jsonl", [{"problem": "Q   2"}, {"problem": "q 3"}])  # needs no answers
    argv = [put(tmp_path / "train.jsonl", rows), "--out", str(tmp_path / "o.jsonl"), "--exclude", held_out]
    assert data.main([*argv, "--limit", "4"]) == 0
    kept = rows_of(tmp_path / "o.jsonl")
    assert [row["problem"] for row in kept] == ["Q 0", "Q 1", "Q 3", "Q 4"]
    assert [row["id"] for row in kept] == ["0", "0-2", "0-3", "0-4"]  # ids in the file were all 0
    text = capsys.readouterr().out
    for told in [
        "read 9",
        "1: duplicate",
        "1: also in --exclude",
        "1: no answer",
        "1: no problem",
        "1: beyond --limit",
    ]:
        assert told in text
    assert data.main([argv[0], "--out", argv[2], "--exclude", argv[0]]) == 2
    assert "nothing left of 9 rows" in capsys.readouterr().err


def test_annotated_rows_can_be_annotated_again(tmp_path):
    first, second = str(tmp_path / "first.parquet"), str(tmp_path / "second.jsonl")
    assert data.main([LSAT, "--copies", "4", "--out", first]) == 0
    assert (
        data.main([first, "--budgets", "fixed:7", "--mode", "max", "--wording", "tulu", "--out", second]) == 0
    )
    again = rows_of(second)
    assert [row["problem"] for row in again] == [row["problem"] for row in load_problems(LSAT)]
    assert all(row["prompt"] == row["problem"] + "\nThink for up to 7 tokens." for row in again)


def test_unbudgeted_rows(tmp_path, capsys):
    for flags in (["--mode", "none"], ["--budgets", "none"], ["--mode", "none", "--budgets", "none"]):
        assert data.main([MATH500, *flags, "--out", str(tmp_path / "o.jsonl")]) == 0
        for row in rows_of(tmp_path / "o.jsonl"):
            assert (row["budget"], row["mode"]) == (None, None) and "Think for" not in row["prompt"]
    assert "budget (tokens)" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    put(folder / "good.jsonl", [{"problem": "Q", "answer": "1"}])
    put(folder / "columns.jsonl", [{"text": "Q", "label": "1"}])
    put(folder / "unanswered.jsonl", [{"problem": "Q", "answer": None}, {"problem": "R", "answer": "None"}])
    put(folder / "no_answer_column.jsonl", [{"problem": "Q"}])
    put(folder / "empty.jsonl", [])
    (folder / "empty.csv").write_text("problem,answer\n")
    (folder / "zero.json").write_text("")
    (folder / "broken.jsonl").write_text('{"problem": "Q", "answer": "1"}\n{"problem": "R", \n')
    (folder / "broken.json").write_text('[{"problem": "Q"]')
    (folder / "lines.json").write_text('{"problem": "Q"}\n{"problem": "R"}\n')
    (folder / "object.json").write_text('{"problem": "Q", "answer": "1"}')
    (folder / "quote.csv").write_text('problem,answer\n"Q,1\n')
    (folder / "latin.jsonl").write_bytes('{"problem": "é", "answer": "1"}'.encode("latin-1"))
    (folder / "whole.jsonl.gz").write_bytes(gzip.compress(b'{"problem": "Q", "answer": "1"}\n' * 50))
    (folder / "cut.jsonl.gz").write_bytes((folder / "whole.jsonl.gz").read_bytes()[:-9])
    (folder / "plain.jsonl.gz").write_text('{"problem": "Q", "answer": "1"}\n')
    (folder / "fake.parquet").write_text("not parquet")
    (folder / "rows.xlsx").write_text("x")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


GOOD, OUT = "@good.jsonl", "--out @o.jsonl"
CASES = [
    ("@missing.jsonl " + OUT, "missing.jsonl: no such file"),
    ("mathh500 " + OUT, "not one of the named sets.*math500"),
    ("@rows.xlsx " + OUT, "rows.xlsx: unknown suffix; use .jsonl, .json, .csv"),
    ("@columns.jsonl " + OUT, r"columns text, label; wanted: problem.*answer"),
    ("@no_answer_column.jsonl " + OUT, "columns problem; wanted"),
    ("@empty.jsonl " + OUT, "is empty"),
    ("@empty.csv " + OUT, "is empty"),
    ("@zero.json " + OUT, "not valid JSON"),
    ("@unanswered.jsonl " + OUT, r"none of its 2 rows can be used \(2 no answer\)"),
    ("@broken.jsonl " + OUT, "line 2 is not valid JSON"),
    ("@broken.json " + OUT, "not valid JSON.*line 1 column"),
    ("@lines.json " + OUT, r"belongs in a .jsonl file"),
    ("@object.json " + OUT, "holds a JSON dict"),
    ("@quote.csv " + OUT, "is not valid CSV: unexpected end of data"),
    ("@latin.jsonl " + OUT, "is not UTF-8"),
    ("@cut.jsonl.gz " + OUT, "end-of-stream marker"),
    ("@plain.jsonl.gz " + OUT, "Not a gzipped file"),
    ("@fake.parquet " + OUT, "not a readable Parquet"),
    (f"{GOOD} --budgets uniform:100 {OUT}", "'uniform:100' is malformed.*uniform:100:4000"),
    (f"{GOOD} --budgets uniform:400:100 {OUT}", "malformed.*the smaller first"),
    (f"{GOOD} --budgets fixed:0 {OUT}", "1 to 10000000"),
    (f"{GOOD} --budgets bucket:-5,9 {OUT}", "1 to 10000000"),
    (f"{GOOD} --budgets '' {OUT}", "malformed"),
    (
        f"{GOOD} --mode none --budgets fixed:5 {OUT}",
        "mode none does not go with budgets fixed: .*none goes with budgets none only",
    ),
    (f"{GOOD} --mode exact --budgets none {OUT}", "mode exact does not go with budgets none"),
    (f"{GOOD} --mode sometimes {OUT}", "invalid choice: 'sometimes'"),
    (f"{GOOD} --wording l2 {OUT}", "invalid choice: 'l2'"),
    (f"{GOOD} --export ray {OUT}", "invalid choice: 'ray'.*verl.*trl.*open-instruct"),
    (f"{GOOD} --copies 0 {OUT}", r"--copies \(0\) must be 1 or more"),
    (f"{GOOD} --copies two {OUT}", "invalid int value: 'two'"),
    (f"{GOOD} --limit 0 {OUT}", r"--limit \(0\)"),
    (f"{GOOD} --seed -1 {OUT}", r"--seed \(-1\)"),
    (f"{GOOD} --colour red {OUT}", "unrecognized arguments: --colour"),
    (f"{GOOD}", "required: --out"),
    (f"{GOOD} --out @good.jsonl/o.jsonl", "o.jsonl cannot be written: (Not a directory|File exists)"),
    (f"{GOOD} --out @o.txt", "unknown suffix; use .jsonl, .jsonl.gz or .parquet"),
    (f"{GOOD} --out @good.jsonl", "is also read"),
    (f"{GOOD} --exclude @good.jsonl --out @good.jsonl", "is also read"),
    (f"{GOOD} --exclude @missing.jsonl {OUT}", "missing.jsonl: no such file"),
    (f"{GOOD} --exclude @good.jsonl {OUT}", "nothing left of 1 rows"),
    (f"{GOOD}, {OUT}", "error: : no such file, and not one of the named sets"),
    (f"{GOOD} --split test {OUT}", "a local file has no splits"),
    (f"{GOOD} --max-prompt-tokens 5 {OUT}", "--max-prompt-tokens needs --tokenizer"),
    (f"{GOOD} --tokenizer @nowhere {OUT}", "tokenizer folder .* does not exist"),
    (f"{GOOD} --tokenizer @model {OUT}", "holds no tokenizer"),
]


@pytest.mark.parametrize("line, message", CASES, ids=[line for line, _ in CASES])
def test_bad_input_is_one_line_and_exit_code_2(bad, capsys, line, message):
    before = {path.name: path.read_bytes() for path in bad.iterdir() if path.is_file()}
    argv = [f"{bad}/{word[1:]}" if word.startswith("@") else word for word in shlex.split(line)]
    assert data.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("data.py: error: ") and error.count("\n") == 1 and re.search(message, error), (
        error
    )
    assert before == {path.name: path.read_bytes() for path in bad.iterdir() if path.is_file()}


def run_script(*argv):
    command = [sys.executable, str(ROOT / "data.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_script_from_another_process(bad, tmp_path):
    done = run_script(
        TRAIN, "--budgets", "uniform:100:4000", "--mode", "exact", "--out", tmp_path / "o.jsonl"
    )
    assert done.returncode == 0 and "wrote 200" in done.stdout and done.stderr == ""
    assert load_problems(str(tmp_path / "o.jsonl")) == annotate(
        load_problems(TRAIN), "uniform:100:4000", "exact"
    )
    for argv in (
        [bad / "cut.jsonl.gz", "--out", tmp_path / "p.jsonl"],
        [TRAIN, "--nonsense", "--out", "x.jsonl"],
    ):
        done = run_script(*argv)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "p.jsonl").exists()


def test_help_imports_nothing_heavy():
    heavy = "torch transformers datasets pyarrow pandas".split()
    code = f"import data, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
    assert "gsm8k" in run_script("--help").stdout


def test_the_data_commands_in_the_recipes_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    # The recipes that draw budgets; what all of them have in common is tested in test_recipes.py.
    for name in "l1_exact l1_max tulu_exact_4k tulu_exact_8k tulu_bucketed tulu_upto".split():
        recipe = ROOT / "recipes" / f"{name}.args"
        text = recipe.read_text()
        command = re.search(r"^# +python data\.py (.+)$", text, re.M)
        args = data.parse_args(shlex.split(command[1]))
        high = data.check_args(args)["high"]
        assert args.input in data.PRESETS and f"--data {args.out}" in text, recipe.name
        assert f"--mode {args.mode}" in text and f"--wording {args.wording}" in text, recipe.name
        assert high <= int(re.search(r"--max-tokens (\d+)", text)[1]), recipe.name  # a budget above the cap
