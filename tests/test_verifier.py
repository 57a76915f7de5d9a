"""The answer checker: public test cases, multiple choice, hostile input, worker processes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import verifier
from verifier import check_answers, is_correct

DATA = Path(__file__).parent / "data"
ROOT = Path(verifier.__file__).parent


def grade(rows):
    """Verdicts for rows of the answer-case schema, those that need `</think>` apart from the others."""
    verdicts = [None] * len(rows)
    for think in (False, True):
        chosen = [i for i, row in enumerate(rows) if bool(row.get("needs_think_close")) == think]
        columns = ([rows[i][key] for i in chosen] for key in ("prediction", "gold", "kind"))
        for i, verdict in zip(chosen, check_answers(*columns, require_think=think)[0], strict=True):
            verdicts[i] = verdict
    return verdicts


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def agreement(rows, verdicts):
    """(share that agrees, rows that do not), without those whose source contradicts itself or mathematics."""
    judged = [i for i, row in enumerate(rows) if not row.get("conflict") and not row.get("quirk")]
    wrong = [i + 1 for i in judged if verdicts[i] != rows[i]["expected"]]
    return 1 - len(wrong) / len(judged), wrong


def test_public_cases():
    """At least 92% agreement with the tests of six libraries; what differs is listed with its reason."""
    rows = read_rows(DATA / "answer_cases.jsonl")
    share, wrong = agreement(rows, grade(rows))
    listed = [
        int(n) for n in re.findall(r"^\| (\d+) \|", (DATA / "answer_disagreements.md").read_text(), re.M)
    ]
    assert wrong == sorted(listed)
    assert share >= 0.92
    accepted = [n for n in wrong if not rows[n - 1]["expected"]]
    assert accepted == [166], "wrong answers that are accepted need a stated convention"


@pytest.mark.skipif("ANSWER_CASES" not in os.environ, reason="set ANSWER_CASES to a file of more cases")
def test_other_cases():
    rows = read_rows(os.environ["ANSWER_CASES"])
    share, wrong = agreement(rows, grade(rows))
    for n in wrong:
        print(n, rows[n - 1]["expected"], repr(rows[n - 1]["gold"]), repr(rows[n - 1]["prediction"][-80:]))
    assert share >= 0.92, f"{share:.4f}, rows {wrong}"


@pytest.mark.parametrize("name", ["field_cases.jsonl", "answer_kinds.jsonl"])
def test_field_cases(name):
    """Public bug reports of other checkers, and own cases of each kind: none is decided otherwise."""
    rows = [row for row in read_rows(DATA / name) if "prediction" in row]
    columns = [[row.get(key) for row in rows] for key in ("prediction", "gold", "kind", "choices")]
    verdicts, counts = check_answers(*columns)
    wrong = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict != row["expected"]]
    assert wrong == [] and counts["timeouts"] == counts["crashes"] == 0
    if name == "answer_kinds.jsonl":
        kinds = Counter((row["about"], row["expected"]) for row in rows)
        abouts = "prefix unicode sentence marker wrapping choice thinking".split()
        assert all(kinds[about, True] >= 5 and kinds[about, False] >= 3 for about in abouts), kinds


CONVENTIONS = [
    # answer, gold, right?
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac12", r"\dfrac{1}{2}", True),
    ("0.333333", r"\frac{1}{3}", True),
    ("0.33", r"\frac{1}{3}", False),  # rounding is not accepted unless it is to six digits
    ("50%", "0.5", True),
    ("50", r"50\%", True),
    (r"10 \text{ cm}", "10", True),  # units and degree signs are ignored
    (r"90^\circ", "90", True),
    ("1,000", "1000", True),
    ("10{,}000", "10000", True),
    ("3,5", "3.5", True),  # a decimal comma
    ("2 1/2", "2.5", True),
    ("1 2", "3", False),
    (r"\$5.50", "5.5", True),
    ("+7", "7", True),
    ("\u22125", "-5", True),
    ("x = 5", "5", True),
    ("y = 5", "x = 5", False),
    ("3, 5", "5, 3", True),  # a list is a set
    (r"\{1, 2\}", "1, 2", True),
    ("(1, 2)", "(2, 1)", False),
    ("[0, 1)", "[0, 1]", False),
    ("5 or 6", "6", False),  # hedging is wrong
    (r"1 \pm \sqrt{2}", r"1 - \sqrt{2}, 1 + \sqrt{2}", True),
    (r"i(2 - i)", "1 + 2i", True),
    (r"\text{East}", "east", True),
    (r"\text{not east}", "east", False),
    ("52_8", "52_9", False),
    (r"1 + \frac{1}{\mathrm{e}}", r"1 - \frac{1}{\mathrm{e}}", False),
    (r"\frac{1}{2^{3012}}", r"\frac{1}{2^{2012}}", False),  # both are 0 to 15 digits
    (r"\frac \pi4 + 2", r"\frac{\pi}{4} + 2", True),
    (r"\frac{5}{\sqrt{3}} \sin^2 80^\circ", r"\frac{4}{\sqrt{3}} \sin^2 80^\circ", False),
    ("5xyz", "5", False),
    ("12.5", r"12.5\%", True),
    ("1.5e3", "1500", True),
    # tuples have an order, sets have none, and a list takes after what it is compared with
    ("(1, 2)", r"\{1, 2\}", False),
    (r"\{1, 2\}", "(1, 2)", False),
    ("(2, 1)", "1, 2", False),
    ("(1, 2)", "1, 2", True),
    ("2, 1", r"\{1, 2\}", True),
    ("1, 2, 3", "1, 2", False),
    ("x < 5", r"(-\infty, 5)", True),
    (r"x \le 5", r"(-\infty, 5)", False),
    # chains
    ("1 = 2 = 5", "5", False),
    ("2 + 3 = 5", "5", True),
    ("x = 5 = 6", "6", False),
    (r"\frac{3}{2} = 1\frac{1}{2} = 1.5", "1.5", True),
    (r"5 \approx 7", "5", False),
    (r"\frac{2}{3} = 0.67", r"\frac{2}{3}", True),
    (r"\frac{2}{3} = 0.6", r"\frac{2}{3}", False),
    (r"\frac{200}{7} \approx 29", "29", True),
    (r"\frac{200}{7} = 29", "29", False),
    (r"\sqrt{2} \approx 1.5", r"\sqrt{2}", False),
    (r"x = \frac{-1 \pm \sqrt5}{2}", r"\frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2}", True),
    (r"x = 1, y = 1 \text{ or } x = 2, y = 2", r"x = 1, y = 2 \text{ or } x = 2, y = 1", False),
    # near zero, and what math-verify alone misreads
    ("0.0000004", "0.00000045", False),
    ("0.0000001", "0", False),
    ("2(3)", "5", False),
    ("2(3)", "6", True),
    (r"2\,3", "5", False),
    ("2^-1", "2", False),
    ("2^-1", "0.5", True),
    ("2\u00b2", "2", False),
    ("2 \u00b7 3", "6", True),
    (r"1 + 2 + \dots", "3", False),
    (r"\\frac{1}{2}", "0.5", True),  # all backslashes doubled
]


@pytest.mark.parametrize("boxed", [False, True])
def test_conventions(boxed):
    answers, golds, expected = zip(*CONVENTIONS, strict=True)
    answers = [f"So it is \\boxed{{{a}}}, as I said." if boxed else a for a in answers]
    got, counts = check_answers(answers, golds, ["math"] * len(golds))
    assert [(a, g, v) for a, g, v in zip(answers, golds, got, strict=True)] == [
        (a, g, v) for a, g, v in zip(answers, golds, expected, strict=True)
    ]
    assert counts["timeouts"] == counts["crashes"] == 0


def test_where_the_answer_is_looked_for():
    think = r"<think> \boxed{1} </think>"
    assert is_correct(think + r" It is \boxed{2}, no, \boxed{3}.", "3")
    assert not is_correct(think + r" It is \boxed{2}, no, \boxed{3}.", "2")
    assert not is_correct(think + " I do not know.", "1")
    assert is_correct("a </think> b </think> 4", "4")
    assert is_correct(r"\boxed{\frac{1}{1 + \sqrt{\frac{2}{3}}}}", r"\frac{1}{1 + \sqrt{2/3}}")
    assert not is_correct(r"The answer is 5, so \boxed{5", "5"), "a box that never closes is no answer"
    assert not is_correct(r"The answer is 5: \boxed{}", "5")
    assert is_correct(r"\boxed{2} and \boxed{-2}", "-2, 2"), "neighbouring boxes are a list"
    assert is_correct("... which makes 72 in all.\n#### 72", "72")
    assert is_correct("<answer>42</answer>", "42")
    assert is_correct("First 7.\n\nFinal Answer: The final answer is $12$.", "12")
    assert is_correct("anything \\boxed{1/2}", ["0.3", "0.5"]), "any gold may match"
    assert is_correct("\\boxed{142}", 142.0), "golds may be numbers"
    assert not is_correct("\\boxed{42}", ["\\boxed{}", ""])


HACKS = {
    "only in the thinking part": r"<think> It is \boxed{7}. </think> Done.",
    "thinking that never ends": r"<think> It is \boxed{7}.",
    "thinking opened again": r"</think> Hm. <think> \boxed{7}",
    "an earlier box": r"</think> \boxed{7}, no: \boxed{8}",
    "</think> faked many times": r"\boxed{7}</think>" * 500 + "Done.",
    "quoted from the prompt": "</think> You told me: 7 is the answer to beat.\n\nI find \\boxed{8}.",
    "all candidates in one box": r"</think> \boxed{1, 2, 3, 4, 5, 6, 7}",
    "all candidates, a box each": "</think> " + " or ".join(f"\\boxed{{{i}}}" for i in range(9)),
    "either or": r"</think> \boxed{7 \text{ or } 8}",
    "plus minus": r"</think> \boxed{\pm 7}",
    "an interval": r"</think> \boxed{[0, 9]}",
    "a chain of candidates": "</think> \\boxed{" + " = ".join("12345678") + " = 7}",
    "a rounding to everything": r"</think> \boxed{x \approx 7 \approx 8}",
    "an unknown": r"</think> \boxed{x}",
    "a box that stays open": r"</think> \boxed{7",
    "no number": r"</think> \boxed{\text{the right answer}}",
}
CHOICE_HACKS = {
    "all letters": r"</think> \boxed{A, B, C, D}",
    "all letters run together": r"</think> \boxed{ABCD}",
    "all options": r"</think> \boxed{A. 1 B. 2 C. 3 D. 4}",
    "a box each": r"</think> \boxed{D} \boxed{A} \boxed{B} \boxed{C}",
    "stated all": "</think> The answer is D, A, B or C.",
    "stated twice": "</think> Answer: (D)(A)",
    "the prompt's options again": "</think> (A) 1\n(B) 2\n(C) 3\n(D) 4",
    "the prompt's options, dots": "</think> A. 1\nB. 2\nC. 3\nD. 4",
    "brackets": "</think> I weigh (A), (B), (C) and (D).",
    "only in the thinking part": "<think> The answer is D. </think> Done.",
    "negated": "</think> The answer is not D.",
}


def test_reward_hacking():
    """What looks like the reference without being an answer is wrong, and costs no worker its life."""
    sizes = len(HACKS), len(CHOICE_HACKS)
    kinds = ["math"] * sizes[0] + ["choice"] * sizes[1]
    golds = ["7"] * sizes[0] + ["D"] * sizes[1]
    got, counts = check_answers([*HACKS.values(), *CHOICE_HACKS.values()], golds, kinds, [4] * len(kinds))
    assert [name for name, right in zip([*HACKS, *CHOICE_HACKS], got, strict=True) if right] == []
    assert counts["timeouts"] == counts["crashes"] == 0


def test_require_think():
    assert is_correct("the answer: </think> \\boxed{5}", "5", require_think=True)
    assert not is_correct("the answer: \\boxed{5}", "5", require_think=True)
    assert is_correct("the answer: \\boxed{5}", "5")
    assert not is_correct("</think> </think>", "5", require_think=True)


def test_think_end():
    """The model's own tag is the one that must be there; what any known one closes is not graded."""
    text = "[THINK]\\boxed{4}[/THINK]\\boxed{5}"
    assert is_correct(text, "5") and not is_correct(text, "4")
    assert is_correct(text, "5", require_think=True, think_end="[/THINK]")
    assert not is_correct(text, "5", require_think=True)
    assert is_correct("so \\boxed{4} ### END \\boxed{5}", "5", require_think=True, think_end="### END")
    assert not is_correct("so \\boxed{5} ### END None.", "5", think_end="### END")
    assert check_answers([text], ["5"], ["math"], require_think=True, think_end="[/THINK]")[0] == [True]


# What changes a value; where an answer stands. right_answers: (its spellings, its reference).
CHANGES = ["^2", "√3", " million", "/7", "+1", " or 6", "π", "²", " \\pi", " and a half", "*3", " - 1"]
WRAPS = ["\\boxed{%s}", "The answer is %s.", "So we get %s.", "#### %s", "<answer>%s</answer>", "Total: %s"]


def right_answers(draw, n):
    for _ in range(n):
        a, b, c = draw.randint(11, 99), draw.randint(3, 20), draw.choice((2, 3, 5, 7, 11))
        s = draw.choice(["", "-"])
        yield draw.choice(
            [
                ([f"{s}{a}", f"{s}{a}.0", f"{s.replace('-', '−')}{a}"], f"{s}{a}"),
                (
                    [f"{s}{a}/{b}", rf"{s}\frac{{{a}}}{{{b}}}", f"{s}{a}⁄{b}", rf"{s}\dfrac{{{a}}}{{{b}}}"],
                    f"{s}{a}/{b}",
                ),
                ([f"{b}√{c}", f"{b}*sqrt({c})", rf"{b} \sqrt{c}", f"{b}·√{c}"], rf"{b}\sqrt{{{c}}}"),
                ([f"{c}^{b}", f"{c}^{{{b}}}", f"{c}**{b}"], f"{c}^{{{b}}}"),
                ([f"10{'⁰¹²³⁴⁵⁶⁷⁸⁹'[c % 10]}", f"10^{c % 10}"], f"10^{{{c % 10}}}"),
                ([f"[{a}, {a + b})", f"[{a},{a + b})", rf"\left[{a}, {a + b}\right)"], f"[{a},{a + b})"),
                ([f"({a}, {b}, {c})", f"（{a}，{b}，{c}）", f"({a},{b},{c})"], f"({a},{b},{c})"),
                ([f"{a} cm", rf"{a} \text{{ cm}}", f"{a}\u2009cm", f"{a} centimeters"], f"{a} cm"),
                ([f"{a}π", f"{a}pi", rf"{a}\,\pi"], rf"{a}\pi"),
                ([f"{a * 1000:,}", f"{a} 000", f"{a}{{,}}000", f"{a}\u202f000"], f"{a * 1000}"),
            ]
        )


def test_nothing_is_paid_for_a_prefix():
    """300 right answers: other spellings stay right; with a change of the value behind it each is wrong."""
    draw, rows = random.Random(0), []
    for spellings, gold in right_answers(draw, 300):
        answer, wrap = draw.choice(spellings), draw.choice(WRAPS)
        rows += [(wrap % spelling, gold, True) for spelling in spellings]
        rows += [(wrap % (answer + change), gold, False) for change in CHANGES]
    responses, golds, expected = zip(*rows, strict=True)
    verdicts, _ = check_answers(responses, golds, ["math"] * len(rows))
    assert [row for row, verdict in zip(rows, verdicts, strict=True) if verdict != row[2]] == []


def test_the_examples_of_the_docs_hold():
    """Each row of the table is | kind | `accepted`, ... | `reference` | `refused`, ... |."""
    page = (
        (ROOT / "docs" / "guide.md").read_text().partition("<!-- answers -->")[2].partition("<!-- end -->")[0]
    )
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) >= 12
    for _, accepted, gold, refused in rows:
        gold = re.findall(r"`([^`]+)`", gold)[0]
        kind, options = ("choice", ["lens", "prism", "mirror"]) if gold == "B" else ("math", None)
        for text, expected in [(accepted, True), (refused, False)]:
            for example in re.findall(r"`([^`]+)`", text):
                assert is_correct(example, gold, kind, options) == expected, (example, gold, expected)


CHOICES = [
    # response, gold, choices, right?
    (r"\boxed{E}", "E", None, True),
    (r"\boxed{(C)}", "C", 5, True),
    (r"\boxed{\text{B}}", "B", 4, True),
    (r"\boxed{D.}", "D", 4, True),
    (r"\boxed{c}", "C", 4, True),
    (r"\boxed{Option C}", "C", 4, True),
    (r"\boxed{C: all of them}", "C", 4, True),
    (r"\boxed{J}", "J", 10, True),
    (r"\boxed{E}", "E", 4, False),  # beyond the options
    (r"\boxed{A, B}", "B", 4, False),  # two letters in one box
    (r"\boxed{(A) and (B)}", "A", 4, False),
    ("(A). Because it fits.", "A", 4, True),
    ("(A). Because it fits.", "B", 4, False),  # "B" is only a capital letter
    ("The answer is (A). Done.", "A", 4, True),
    ("The answer is A or B", "A", 4, False),
    ("Answer: **D**", "D", 4, True),
    ("(A) is wrong, thus the answer is (B), since (C) is too long.", "B", 4, True),
    (r"<think> \boxed{A} </think> So \boxed{B}", "B", 4, True),
    (r"<think> \boxed{A} </think> I give up", "A", 4, False),
    ("I cannot say.", "A", 4, False),
    ("a", "A", 4, True),
    ("", "A", 4, False),
    (r"\boxed{Paris}", "B", ["London", "Paris", "Rome"], True),
    (r"\boxed{7}", "A", ["7", "7", "8"], False),  # two options read the same
    (r"\boxed{$\frac{1}{2}$}", "C", ["1", "2", r"\frac{1}{2}"], True),
    (r"\boxed{42} hence the answer is (C)", "C", ["1", "2", "3"], True),
    ("C", "C: all of them", 4, True),  # the reference carries its text
    ("B", ["A", "B"], 4, True),
]


def test_multiple_choice():
    responses, golds, choices, expected = zip(*CHOICES, strict=True)
    got, counts = check_answers(responses, golds, ["choice"] * len(golds), choices)
    assert list(zip(responses, golds, got, strict=True)) == list(zip(responses, golds, expected, strict=True))
    assert counts["solved"] == 0, "letters need no worker"


def test_misuse():
    with pytest.raises(ValueError, match="'maths' is not known: use 'math' or 'choice'"):
        is_correct("1", "1", kind="maths")
    with pytest.raises(ValueError, match=r"one length, not \(2, 1, 2, 2\)"):
        check_answers(["1", "2"], ["1"], ["math", "math"])


def test_plain_integers_are_free():
    """The toy's answers: no worker starts, 256 cost a millisecond (the bar here suits a busy machine)."""
    verifier.close_workers()
    responses = [f"3 +4 =7 </think> {i % 10}" for i in range(256)]
    golds = [str(i % 7) for i in range(256)]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        got, counts = check_answers(responses, golds, ["math"] * 256, require_think=True)
        times.append(time.perf_counter() - start)
    assert got == [i % 10 == i % 7 for i in range(256)]
    assert counts == {"fast": 256, "solved": 0, "timeouts": 0, "crashes": 0, "parse_failures": 0}
    assert not verifier._IDLE and min(times) < 0.02


HOSTILE = {
    "power tower": r"\boxed{9^{9^{9^9}}}",
    "factorial": r"\boxed{99999999!}",
    "deep fraction": "\\boxed{" + r"\frac{1}{" * 90 + "2" + "}" * 90 + "}",
    "parentheses": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "200 kB": "1+" * 100_000,
    "200 kB box": "\\boxed{" + "1+" * 100_000 + "1}",
    "braces": "\\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}",
    "open boxes": "\\boxed{" * 10_000,
    "boxes": "\\boxed{5} " * 20_000,
    "null bytes": "\\boxed{\0" + "\0" * 100 + "}",
    "unbalanced": r"\boxed{\frac{1}{2}",
    "right to left": "\\boxed{\u202e5\u05d0\u0627\u0663}",
    "lone surrogate": "\\boxed{\ud800}",
    "digits": "\\boxed{" + "9" * 1999 + "}",
    "dollars": "$" * 20_000,
    "paragraphs": "\n \n" * 60_000,
    "tags": "<answer>" * 20_000,
    "thinking": "<think>" * 50_000 + "</think>",
    "a million digits": "\\boxed{" + "7" * 1_000_000 + "}",
    "a large matrix": r"\boxed{\begin{pmatrix}" + ("x&" * 29 + r"x\\") * 30 + r"\end{pmatrix}}",
    "a power of a matrix": r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}^{99999999}}",
    "a file": r"\boxed{\input{/etc/passwd}} \include{/etc/passwd}",
    "control characters": "\\boxed{" + "".join(map(chr, range(32))) + "\x7f\x9b2J}",
}


def test_hostile_answers():
    """Each costs at most the limit and is wrong; the honest answers among them are still right."""
    responses, golds = [], []
    for text in HOSTILE.values():
        responses += [text, r"\boxed{\sqrt{4}/4}"]
        golds += ["4", "0.5"]
    start = time.perf_counter()
    got, counts = check_answers(responses, golds, ["math"] * len(golds), timeout=1.0, workers=2)
    assert time.perf_counter() - start < 30
    assert got == [False, True] * len(HOSTILE)
    assert 2 <= counts["timeouts"] <= 8 and sum(counts.values()) == len(responses)
    start = time.perf_counter()
    assert not any(check_answers(list(HOSTILE.values()), ["A"] * len(HOSTILE), ["choice"] * len(HOSTILE))[0])
    assert time.perf_counter() - start < 5


CODE = [
    "__import__('os').system('touch MARK')",
    "\\boxed{__import__('os').system('touch MARK')}",
    "\\boxed{\\text{__import__('os').system('touch MARK')}}",
    "$__import__('os').system('touch MARK')$",
    "The answer is $open('MARK', 'w')$.",
    "\\boxed{().__class__.__mro__[1].__subclasses__()}",
    "\\boxed{$(touch MARK)}",
    "\\boxed{`touch MARK`; touch MARK}",
    "\\boxed{\\immediate\\write18{touch MARK}}",
    "<answer>exec(\"open('MARK', 'w')\")</answer>",
]


def test_answers_are_never_run(tmp_path):
    """Neither Python nor a shell nor TeX reads an answer or a reference: no file appears."""
    mark = str(tmp_path / "mark")
    answers = [text.replace("MARK", mark) for text in CODE]
    n = len(answers)
    for kind in ("math", "choice"):
        verdicts, counts = check_answers(answers + ["4"] * n, ["4"] * n + answers, [kind] * 2 * n)
        assert not any(verdicts) and counts["crashes"] == counts["timeouts"] == 0
    assert not os.path.exists(mark)


FUZZ = r"\frac \sqrt \boxed \pm \text \begin{pmatrix} \end{pmatrix} \infty \cup \approx \sin \int".split()
FUZZ += list("{}{}()[]1234567890xyn+-*/^_=<,;.!|&$%\\ \n\0\u0661\u202e\u00b2\U0001f600")


@pytest.mark.parametrize("n", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_fuzzed_answers(n):
    """Any text gets a verdict within its limit, and the worker is still there and sane afterwards."""
    draw = random.Random(n)
    answers = ["".join(draw.choices(FUZZ, k=draw.randint(1, 25))) for _ in range(n)]
    responses = [a if i % 2 else f"\\boxed{{{a}}}" for i, a in enumerate(answers)]
    verdicts, counts = check_answers(responses, ["123456789"] * n, ["math"] * n, timeout=1.0)
    assert not any(verdicts) and sum(counts.values()) == n
    assert counts["crashes"] == 0 and counts["timeouts"] < n / 100
    assert is_correct("\\sqrt{4}/4", "0.5")
    for worker in verifier._IDLE:
        used = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{worker.pid}/status").read_text())[1]
        assert int(used) < 400_000  # kB


def test_workers_are_limited():
    """Address space and core files are limited from the start, processor time by the first task."""
    assert is_correct("\\sqrt{9}/2", "1.5")
    limits = Path(f"/proc/{verifier._IDLE[0].pid}/limits").read_text()
    soft = {
        name: re.search(rf"^Max {name}\s+(\S+)", limits, re.M)[1]
        for name in ("address space", "core file size")
    }
    assert soft == {"address space": str(verifier.WORKER_MEMORY), "core file size": "0"}
    assert int(re.search(r"^Max cpu time\s+(\S+)", limits, re.M)[1]) < 60


def test_a_killed_worker_is_replaced():
    assert is_correct("\\sqrt{4}/4", "0.5")
    for worker in verifier._IDLE:
        os.kill(worker.pid, signal.SIGKILL)
    verdicts, counts = check_answers(["\\sqrt{4}/6", "\\sqrt{9}/4"], ["1/3", "0.75"], ["math"] * 2)
    assert verdicts == [True, True] and counts["crashes"] == 0


def test_a_worker_killed_at_work_is_replaced():
    """Its answer is tried once more; then it is late, which is counted, and the next worker is a new one."""
    assert is_correct("\\sqrt{4}/4", "0.5")
    pid = verifier._IDLE[-1].pid
    timer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    timer.start()
    got, counts = check_answers(
        ["9^{9^{9^9}}", "\\sqrt{9}/6"], ["4", "0.5"], ["math"] * 2, timeout=2, workers=1
    )
    timer.join()
    assert got == [False, True] and counts["timeouts"] == 1 and counts["crashes"] == 0
    assert pid not in [worker.pid for worker in verifier._IDLE]


def test_crashes_are_counted(monkeypatch):
    """Workers that die of every answer: two tries, then it is wrong and counted."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    monkeypatch.setattr(
        verifier, "_start", lambda: subprocess.Popen([sys.executable, "-c", "input()"], **pipes)
    )
    verifier.close_workers()
    verdicts, counts = check_answers(["\\sqrt{4}/6", "4"], ["1/3", "4"], ["math"] * 2)
    assert verdicts == [False, True] and counts["crashes"] == 1 and not verifier._IDLE


def test_threads_share_the_workers():
    results = {}

    def work(k):
        results[k] = check_answers([f"{k}\\sqrt{{4}}"] * 3, [f"{2 * k}", "1/2", "\\pi"], ["math"] * 3)[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [True, False, False] for k in range(1, 5)}


def test_forked_child_has_its_own_workers():
    assert is_correct("\\sqrt{4}/4", "0.5")
    mine = [worker.pid for worker in verifier._IDLE]
    child = os.fork()
    if child == 0:
        right = is_correct("\\sqrt{4}/3", "2/3") and not set(mine) & {w.pid for w in verifier._IDLE}
        verifier.close_workers()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_correct("\\sqrt{4}/8", "0.25") and [w.pid for w in verifier._IDLE] == mine


def run_script(code, tmp_path, **env):
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_script_without_main_guard_ends_quietly(tmp_path):
    code = "import verifier\nprint(verifier.is_correct('\\\\sqrt4/4', '0.5'), verifier._IDLE[0].pid)\n"
    done = run_script(code, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    verdict, pid = done.stdout.split()
    assert verdict == "True" and not alive(int(pid))


def test_workers_of_a_killed_caller_end(tmp_path):
    code = (
        "import os, verifier, threading, time\nverifier.is_correct('\\\\sqrt4', '2')\n"
        "print(verifier._IDLE[0].pid, flush=True)\n"
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), 9)).start()\n"
        "verifier.check_answers(['9^{9^{9^9}}'], ['4'], ['math'], timeout=1)\n"
    )
    done = run_script(code, tmp_path)
    assert done.returncode == -signal.SIGKILL
    pid, deadline = int(done.stdout), time.time() + 20
    while alive(pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def test_missing_library_is_said(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('No module named math_verify')")
    code = (
        "import verifier\nprint(verifier.is_correct('4', '4'))\nverifier.is_correct('\\\\sqrt4/4', '0.5')\n"
    )
    done = run_script(code, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.stdout == "True\n", "plain answers need no library"
    assert "did not start" in done.stderr and "No module named math_verify" in done.stderr


def processor_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_ten_thousand_answers_in_ten_seconds():
    """Processor time of the caller and its workers, so that a busy machine does not count."""
    verifier.close_workers()
    verifier._IDLE.extend(verifier._start() for _ in range(2))
    forms = ["\\boxed{%d}", "So she has %d apples left.", "The answer is $\\frac{%d}{7}$.", "#### %d.5"]
    responses = [forms[i % 4] % i if i % 20 else rf"\boxed{{{i % 40 + 2}\sqrt{{3}}}}" for i in range(10_000)]
    pids = [os.getpid()] + [worker.pid for worker in verifier._IDLE]
    start = sum(map(processor_seconds, pids))
    got, counts = check_answers(responses, [str(i) for i in range(10_000)], ["math"] * 10_000, workers=2)
    assert sum(map(processor_seconds, pids)) - start < 10
    assert sum(got) == 4500 and counts["solved"] == 500 and counts["timeouts"] == counts["crashes"] == 0


def test_blanks_cost_nothing():
    """A degenerate response of white space: the search for a stated letter must stay linear."""
    start = time.monotonic()
    for blank in (" ", "\n", " \n", "\t"):
        assert not is_correct("The answer is" + blank * 20_000 + "0", "B", "choice", 4)
    assert time.monotonic() - start < 2
