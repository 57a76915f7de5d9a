r"""Is the answer right? A response and a reference -> True or False, for mathematics and multiple choice.

One file to copy; it needs math-verify only. The order of extraction: ...

>>> responses = [r"Two halves ... </think> So \boxed{\frac{1}{2}}.", "The answer is (C)."]
>>> check_answers(responses, ["0.5", "C"], ["math", "choice"])[0]
[True, True]
"""

import atexit
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import combinations
from multiprocessing.connection import wait

# ----------------------------------------------------------------------------------------------------------
# String rules decide the plain cases; the mathematics (math-verify) runs in processes
#    that can be killed, because sympy can spin for ever in one C call that no signal interrupts: 9^{9^{9^9}}.
#    The conventions are in the docstring of check_answers.

MAX_ANSWER = 2000  # characters of an answer that are parsed; a longer box is a parse failure
MAX_BOXES = 12  # boxes that can make up one answer
WORKER_MEMORY = 2 << 30  # bytes of address space that a worker may take
LETTERS = "ABCDEFGHIJ"
INTEGER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.0*)?")
BASED = re.compile(r"([0-9]+)_\{?([0-9]+)\}?")  # 52_8: math-verify drops the base
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
# Between two boxes of one answer: "\boxed{2} and y = \boxed{-2}".
BOX_JOINT = re.compile(
    r"(?:[\s$,;]|\\q?quad|\\[(),\[\]]|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b"
    r"|[A-Za-z](?:_\{?[0-9]\}?)?\s*=)*"
)
STATED_LETTER = re.compile(
    r"(?:answer|option|choice)\s*(?:is|:)\s*:?[\s$*]*(?:\\text(?:bf)?\{|\(|\[)*\s*([A-Z])(?![A-Za-z'])"
    r"(?!\)?\s*(?:or|and|,|/)\s*\(?(?-i:[A-HJ])\b|\)\s*\()"  # "A or B" and "(A)(B)" state nothing
    r"|\bit(?:'s| is)\s+\(?([A-Z])\)?[.!\s]*$",
    re.I,
)
# "The answer is $5$." at the end: what the dollars hold is the answer, from end to end.
STATED = re.compile(r"answer(?: is|:)[\s:*]*(?:\$+|\\[(\[])([^$]+?)(?:\$+|\\[)\]])[\s.*]*$", re.I)
# "x = 1, y = 2 or x = 2, y = 1": here "or" parts more than the comma does.
AND = re.compile(r"(?:\\q?quad|[\s,])*(?:\\text\s*\{)?\s*\b(?:and|or)\b\s*\}?")
# What stands between the members of a chain, 2/3 = 4/6 \approx 0.67; and a member that is a number.
RELATION = re.compile(r"(?<![<>!:\\])=|\\(?:approx|simeq|thickapprox)(?![a-z])|\u2248")
NUMBER = re.compile(r"(?:[\d\s.,+*/^!|(){}\[\]-]|\\[,;!%]|\\(?:frac|sqrt|pi|cdot|times)(?![a-z]|\s*\())*")
SYMBOLS = {"\u2212": "-", "\u00b2": "^2", "\u00b3": "^3", "\u00b7": "\\cdot ", "\u22c5": "\\cdot "}
SYMBOLS = str.maketrans(SYMBOLS | {"\u00bd": "\\frac{1}{2}", "\u221e": "\\infty "})
UNIT_WORDS = re.compile(
    r"(?<=[0-9}])\s*(?:(?:square |cubic )?units?|weeks?|dollars?|cents?|people|times)\.?$"
)


# How a thinking part is opened and closed: R1 and Qwen, Magistral, others, gpt-oss.
THINK_OPEN = re.compile(r"<(?:think|thinking|reasoning)>|\[THINK\]|<\|channel\|>analysis")
THINK_CLOSE = r"</(?:think|thinking|reasoning)>|\[/THINK\]|<\|channel\|>final(?:<\|message\|>)?"


def answer_part(response: str, require_think: bool = False, think_end: str = "</think>") -> str | None:
    """The graded text: all after the last tag that closes a thinking part, `think_end` or a known one.

    Without one: None if `think_end` is required, else what comes before a thinking part.
    """
    closed = re.split(f"{THINK_CLOSE}|{re.escape(think_end)}" if think_end else THINK_CLOSE, response)
    if require_think and think_end not in response:
        return None
    return THINK_OPEN.split(closed[-1])[0]  # not what is thought again


def _box(text: str, end: int) -> tuple[int, int, str] | None:
    r"""(start, end, content) of the last \boxed{...} or \fbox{...} before `end`, braces balanced."""
    start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
    if start < 0:
        return None
    i = brace = BOX.match(text, start).end()
    if text[brace : brace + 1] != "{":
        return start, brace + 1, text[brace : brace + 1]  # LaTeX takes one token: \boxed 5
    depth = 0
    while i < len(text):
        if text[i] == "\\":
            i += 1  # an escaped brace, \{ or \}, does not nest
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return start, i + 1, text[brace + 1 : i]
        i += 1
    return start, len(text), ""  # never closed: no answer


def boxed_answers(text: str) -> list[str]:
    """The content of the last box; then, if boxes directly before it belong to it, all of them as a list."""
    box = _box(text, len(text))
    if box is None:
        return []
    run = [box]
    while len(run) < MAX_BOXES and (before := _box(text, run[0][0])):
        if not BOX_JOINT.fullmatch(text, before[1], run[0][0]):
            break
        run.insert(0, before)
    contents = [content.strip() for _, _, content in run]
    return contents[-1:] + ([", ".join(contents)] if len(contents) > 1 else [])


def _stated(text: str) -> str:
    """What is searched in a text without a box: all if it speaks of an answer, else its last paragraph."""
    text = text[-MAX_ANSWER:]
    if tagged := re.findall(r"<answer>(.*?)</answer>", text, re.S):
        return tagged[-1].strip()
    text = text.rsplit("####", 1)[-1].strip()  # GSM8K's mark
    return text if "answer" in text.lower() else re.split(r"\n\s*\n", text)[-1][-400:]


def _plain(text: str) -> str:
    """White space, dollar signs and a closing full stop taken away: equal plain texts are equal answers."""
    text = text.replace("\\!", "").replace("\\,", " ").replace("\\$", "").replace("\u2212", "-")
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", re.sub(r"\\(?:left|right)(?![a-z])", "", text))
    return " ".join(text.split()).strip("$ ").rstrip(".").strip("$ ")


def _words(text: str) -> str:
    r"""Casefolded words of an answer in words (\text{East} -> "east"); "" when it holds any mathematics."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|textnormal)\s*\{([^{}]*)\}", r" \1 ", text)
    if re.search(r"[\\^_=<>+*/|{}\[\]0-9]", text) or not re.search(r"[^\W\d_]{3}", text):
        return ""
    return " ".join(re.findall(r"\w+", text)).casefold()


def _quick(answer: str, gold: str) -> bool | None:
    """Right, wrong, or None: left to math-verify. Two integers are decided here, and equal texts."""
    if answer.isascii() and answer.isdigit() and gold.isascii() and gold.isdigit():
        return int(answer) == int(gold)
    a, g = _plain(answer), _plain(gold)
    if not a or not g:
        return False
    if a.rstrip("\\% ") == g.rstrip("\\% ") or (_words(a) and _words(a) == _words(g)):
        return True
    if INTEGER.fullmatch(a) and INTEGER.fullmatch(g):
        return int(a.replace(",", "").split(".")[0]) == int(g.replace(",", "").split(".")[0])
    if BASED.fullmatch(a) and BASED.fullmatch(g):
        return BASED.sub(r"\1_\2", a) == BASED.sub(r"\1_\2", g)
    if re.fullmatch(r"[+-]?[0-9]+,[0-9]+", a) and a.replace(",", ".") == g:
        return True  # a decimal comma, where the reference has a decimal point
    return None


def _letter(text: str, options: list[str], count: int) -> str | None:
    r"""The option a short answer names: "c", "(C)", \text{C}., "Option C", "C: its text", or its whole text.

    "" when it names two different options or one that does not exist; None when it names nothing.
    """
    allowed = LETTERS[:count]
    text = re.sub(r"\\(?:text|textbf|mathbf|mathrm|bf)(?![a-z])", " ", text).strip(" {}")
    bare = text.strip(" \n\t${}*.:()[]\\")
    bare = re.sub(r"^(?:(?:the )?answer(?: is)?:?|option|choice)\W+", "", bare, flags=re.I).strip()
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return bare.upper() if bare.upper() in allowed else ""
    plain = [_plain(option) for option in options]
    if plain.count(_plain(text)) == 1:
        return LETTERS[plain.index(_plain(text))]
    several = re.sub(r"\b(?:and|or)\b|[\s,;&/().:${}]", "", bare)
    if several and set(several) <= set(allowed):
        return several[0] if len(set(several)) == 1 else ""
    if all(re.search(rf"\b{x}\s*[).:]", bare) for x in allowed):
        return ""  # a list of all options
    label = re.match(r"([A-Z])\s*[).:]\s*\S", bare)
    return None if not label else label[1] if label[1] in allowed else ""


def _choice(text: str, golds: list[str], options) -> bool | None:
    """Multiple choice: the last box, else the last "answer is (X)", else the last "(X)". None: none found."""
    texts = [] if options is None or isinstance(options, int) else [str(o) for o in options[: len(LETTERS)]]
    count = min(len(texts) or options or len(LETTERS), len(LETTERS))
    text = re.sub(r"[^\S\n]+", " ", text[-100_000:])  # long runs of blanks would make the search below cubic
    text = re.sub(r"\s*\n\s*", "\n", text)
    boxes = boxed_answers(text)
    letter = _letter(boxes[0], texts, count) if boxes and len(boxes[0]) <= MAX_ANSWER else None
    if letter is None:
        stated = [a or b for a, b in STATED_LETTER.findall(text) if (a or b).isupper()][-1:]
        tail = _stated(text)
        # Without a statement a letter must stand alone: no list of the options, no "(A) is wrong, so (B)".
        labels = stated or {a or b for a, b in re.findall(r"\(([A-Z])\)|^([A-Z])[.):]", tail, re.M)}
        if not stated and tail and len(labels) < 2:
            letter = _letter(tail.splitlines()[-1], texts, count)
        if letter is None and len(labels) == 1:
            letter = max(labels) if max(labels) in LETTERS[:count] else None
    # A reference may carry its option's text after the letter.
    lead = [re.match(r"\s*\(?([A-J])\b", g) for g in golds]
    right = {_letter(g, texts, count) or (m[1] if m else "") for g, m in zip(golds, lead, strict=True)}
    return None if letter is None else letter in right - {""}


def _decide(response: str, golds: list[str], kind: str, options, require_think: bool, think_end: str):
    """(verdict, None) if string rules suffice (None: no answer found), else (None, task for a worker)."""
    if kind not in ("math", "choice"):
        raise ValueError(f"kind {kind!r} is not known: use 'math' or 'choice'")
    text = answer_part(response, require_think, think_end)
    if text is None:
        return False, None
    if kind == "choice":
        return _choice(text, golds, options), None
    boxes = boxed_answers(text) or STATED.findall(text[-MAX_ANSWER:])
    answers = [a for a in boxes or [_stated(text)] if a and len(a) <= MAX_ANSWER]
    if not answers:
        return None, None
    quick = {(a, g): _quick(a, g) for a in answers for g in golds}
    if any(quick.values()) or all(verdict is False for verdict in quick.values()):
        return any(quick.values()), None
    # Prose is searched for mathematics; a bare answer is read as mathematics from end to end.
    prose = re.search(r"[A-Za-z]{3}.*\s[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", answers[0]))
    bare = bool(boxes) or len(answers[0]) < 200 and not prose
    return None, {"pairs": [pair for pair, verdict in quick.items() if verdict is None], "bare": bare}


def _tidy(text: str) -> str:
    r"""Mends what math-verify misreads: \mathrm{e}, \frac \pi4, 2^-1; 2 1/2, 1 234 and 2(3) it adds up."""
    text = text.replace("\\$", "").translate(SYMBOLS)
    if re.search(r"\\\\[a-z]{2}", text) and not re.search(r"(?<!\\)(?:\\\\)*\\(?!\\)", text):
        text = text.replace("\\\\", "\\")  # every backslash is doubled
    text = re.sub(r"\\(?:mathrm|text)\s*\{\s*([ei])\s*\}", r"{\1}", text)
    text = re.sub(r"(frac(?:\s*\w|\{[^{}]*\})?)\s*\\pi(?![a-z])", r"\1{\\pi}", text)
    text = re.sub(r"\^\s*(-[0-9a-z]+|\\[dt]?frac\s*(?:\{[^{}]*\}|\w){2})", r"^{\1}", text)
    text = re.sub(r"^\s*f\(x\)\s*=", "y =", text)
    text = re.sub(r"(?<=[0-9)])\s*(?:\\left)?\(([0-9.]+)(?:\\right)?\)", r" \\cdot \1", text)
    text = re.sub(r"(?<=[0-9])[eE]([+-]?[0-9]+)(?!\w)", r" \\times 10^{\1}", text)
    systems = AND.split(text)
    if all("," in part and part.count("=") > 1 for part in systems):
        text = ";".join(systems)
    text = re.sub(r"((?:^|\bis|:|=)\s*)\+(?=[0-9])", r"\1", text)
    text = re.sub(r"(?<![0-9./])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<=[0-9])(?:\\[,;! ]|\{,\}|[ ~])(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<![\^_0-9])([0-9]+)(?:[ \t~]|\\[,;:! ]|\\q?quad)+(?=[0-9])", r"\1, ", text)
    return UNIT_WORDS.sub("", text)


def _contradictory(numbers: list[tuple[str, list]], rounded: bool) -> bool:
    r"""Whether numbers of a chain differ: 2/3 = 0.67 is rounded, 2/3 = 0.6 is wrong, so is 5 \approx 7."""
    from math_verify import verify

    for (s, a), (t, b) in combinations(numbers, 2):
        shown = [re.fullmatch(r"[+-]?\d*(\.?)(\d*)", text) for text in (s, t)]
        digits = [len(m[2]) for m in shown if m and (m[1] or rounded)]
        if not verify(a, b, timeout_seconds=None):
            if not digits or not abs((a[0] - b[0]).evalf()) <= 0.5001 * 10.0 ** -min(digits):
                return True
    return False


@lru_cache(maxsize=1000)  # a group's answers share their reference
def _parse(text: str, bare: bool, trusted: bool = False) -> list:
    """math-verify's readings of an answer, [] if none; a bare answer is LaTeX, prose is searched for one.

    A chain of numbers that differ, 1 = 2, is no answer; only a reference is trusted with one.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from sympy import Expr, I

    text = _tidy(text)
    marked = re.search(r"\$|\\boxed|\\\(|\\\[", text)
    if bare and re.search(r"(?:[-+=]|\\[lc]?dots)[\s$?]*$", text):
        return []  # 5 + ...: it would read the beginning
    attempts = [f"${text}$", text] if bare and not marked else [text]
    chain = [part.strip("$ ") for part in RELATION.split(text)] if bare else []
    rounded = bool(re.search(r"approx|simeq|\u2248", text))
    if len(chain) > 1:  # "I_{\max} = 3": the left side may be what it cannot read; it stops at \approx
        attempts = ([] if rounded else attempts) + [f"${chain[-1]}$"]
    if "\\pm" in text and bare:
        both = (chain[-1].replace("\\pm", a).replace("\\mp", b) for a, b in ("+-", "-+"))
        attempts.append(f"${', '.join(both)}$")
    # Numbers are searched for in plain text only: in LaTeX that it cannot read they may be exponents.
    plain = not (bare and re.search(r"[\\{^]", text))
    searches = [LatexExtractionConfig(), *[ExprExtractionConfig()] * plain]
    read = partial(parse, extraction_config=searches, fallback_mode="no_fallback", parsing_timeout=None)
    found = next(filter(None, map(read, attempts)), [])
    if len(chain) > 1 and not re.search(r"[,;]", re.sub(r"\([^()]*\)|\{[^{}]*\}", "", text)):
        numbers = [x for x in chain if NUMBER.fullmatch(x) and x.count("{") == x.count("}")]
        numbers = [(x, value) for x in numbers if (value := read(f"${x}$"))]
        if not trusted and _contradictory(numbers, rounded):
            return []
        if len(numbers) > 1:  # a number and its rounding: either may be what is asked for
            found = found + [x for _, value in numbers for x in value]
    imaginary = [{s: I for s in getattr(x, "free_symbols", ()) if s.name == "i"} for x in found]
    return [x.subs(i) if i and isinstance(x, Expr) else x for x, i in zip(found, imaginary, strict=True)]


def _equal(found, wanted, texts: str) -> bool:
    """math-verify's verdict, made stricter for tuples against sets and for numbers near zero."""
    from math_verify import verify
    from sympy import Expr, FiniteSet, Float, Interval, Tuple, UnevaluatedExpr

    pair = (found, wanted)
    if {isinstance(x, FiniteSet) for x in pair} == {isinstance(x, (Tuple, Interval)) for x in pair} == {0, 1}:
        if "\\{" in texts:
            return False  # one is ordered, the other a set in braces
        if isinstance(wanted, FiniteSet):
            found, wanted = wanted, found  # against a tuple a list is ordered too
    if not verify(wanted, found, timeout_seconds=None, allow_set_relation_comp=True):
        return False
    numbers = all(isinstance(x, Expr) and x.is_number and not x.has(UnevaluatedExpr) for x in pair)
    if found == wanted or not numbers:  # UnevaluatedExpr: a percentage
        return True
    # math-verify takes 2^-2013 and 3^-2013 both for 0, and 2e-7 and 4e-7 too.
    gap = (found - wanted).doit()
    tolerance = 0 if gap.is_Rational else 1e-5 if any(x.has(Float) for x in pair) else 1e-12
    return bool(abs(gap.evalf(15)) <= tolerance * abs(wanted.evalf(15)))


def _mathematics(pairs: list, bare: bool) -> tuple[bool, bool]:
    """(right?, readable?) for (answer, gold) pairs of which any may match. May never end: for workers."""
    readable = False
    for answer, gold in pairs:
        found, wanted = _parse(answer, bare), _parse(gold, True, trusted=True)
        readable |= bool(found and wanted)
        if any(_equal(x, want, answer + gold) for want in wanted for x in found):
            return True, readable
    return False, readable


def _serve() -> None:
    """The worker process: one JSON line in, one JSON line out, until standard input closes."""
    import logging
    import resource
    import warnings

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing that a library prints may reach the pipe
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    def limit(what: int, value: int) -> None:
        hard = resource.getrlimit(what)[1]  # the administrator's: it cannot be raised
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

    limit(resource.RLIMIT_AS, WORKER_MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    try:
        _mathematics([("\\frac{1}{2}", "0.5")], True)  # imports sympy, builds the grammar: before any clock
    except Exception as error:
        print(json.dumps({"error": repr(error)}), file=out)
        return
    print("{}", file=out)
    for line in sys.stdin:
        task = json.loads(line)
        # A caller ended by kill -9 ends no worker: the processor-time limit ends one lost in a computation.
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + task["seconds"]) + 2)
        try:
            right, parsed = _mathematics(task["pairs"], task["bare"])
        except MemoryError:
            return  # its state is unknown: the caller counts a crash and starts a fresh worker
        except Exception:
            right, parsed = False, False  # sympy raises anything on odd input: counted as a parse failure
        print(json.dumps({"right": bool(right), "parsed": parsed}), file=out)


_IDLE: list[subprocess.Popen] = []  # workers, started when the first hard answer comes, then kept
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_IDLE.clear)  # a child neither uses nor kills its parent's


@atexit.register
def close_workers() -> None:
    """Ends the idle worker processes; the next hard answer starts new ones. Called at exit."""
    while _IDLE:
        _end(_IDLE.pop())


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.communicate()


def _start() -> subprocess.Popen:
    """A worker that is ready; RuntimeError with its reason if it cannot start."""
    worker = subprocess.Popen(
        # -P keeps this folder off the worker's path: no data.py or the like shadows a library's module.
        [sys.executable, "-P", os.path.abspath(__file__), "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is the caller's to handle
    )
    line = worker.stdout.readline() if wait([worker.stdout], 120) else b""
    if line != b"{}\n":
        _end(worker)
        reason = json.loads(line)["error"] if line.endswith(b"\n") else "no sign of it"
        raise RuntimeError(f"the answer-checking process did not start: {reason}")
    return worker


def start_workers(n: int) -> None:
    """Starts workers until n are idle, say before CUDA is in use; else they start when they are needed."""
    while len(_IDLE) < n:
        _IDLE.append(_start())


def _solve(task: str, timeout: float) -> tuple[bool, str]:
    """(right?, how it ended) for one hard answer; a worker that is late or has died is replaced."""
    for fresh in (False, True):
        try:
            worker = _start() if fresh else _IDLE.pop()
        except IndexError:
            continue  # none is idle
        try:
            worker.stdin.write(task.encode() + b"\n")
            worker.stdin.flush()
        except OSError:
            pass  # it has died: its output has ended too
        late = not wait([worker.stdout], timeout)
        reply = b"" if late else worker.stdout.readline()
        if reply.endswith(b"\n"):
            _IDLE.append(worker)
            reply = json.loads(reply)
            return reply["right"], "solved" if reply["parsed"] else "parse_failures"
        _end(worker)
        if late:
            return False, "timeouts"
    return False, "crashes"  # twice: the first worker may have died of something else


def check_answers(
    responses: list[str],
    golds: list,
    kinds: list[str],
    choices: list | None = None,
    require_think: bool = False,
    timeout: float = 5.0,
    workers: int | None = None,
    think_end: str = "</think>",
) -> tuple[list[bool], dict]:
    r"""Grades many responses; `timeout` is wall-clock seconds an answer. Safe on any thread.

    A gold is a string or a list of which any may match; a kind is "math" or "choice"; `choices` has for each
    response its option texts, their number, or None (A-J). Counts: fast (no mathematics needed), solved, and
    three sorts of wrong answers: timeouts, crashes, parse_failures (no answer found, or not readable).

    Conventions. Only what follows `</think>` is read: the last box (boxes side by side are also tried as a
    list), else a stated answer, else the end of the text. Ignored: units, even wrong ones, and words after a
    number; degree signs; a missing base (52 is 52_8); what stands before "="; upper case in words.
    Equal: 10% and 10, 10% and 0.1; decimals that agree to 6 places and 5 digits; lists and sets in any order,
    repeats counted once; a list and a tuple in the same order; x < 5 and (-\infty, 5). Different: a tuple and
    a set in braces; open and closed ends; other roundings. A chain counts by its last member, and by any
    number in it if they agree: 2/3 = 4/6 = 0.67 does; 1 = 2 and 5 \approx 7 are wrong. A choice needs a
    letter alone in the box, or its option's text, or "the answer is (C)" without a box; two are wrong.
    """
    choices = [None] * len(responses) if choices is None else choices
    sizes = (len(responses), len(golds), len(kinds), len(choices))
    if len(set(sizes)) > 1:
        raise ValueError(f"responses, golds, kinds and choices must have one length, not {sizes}")
    counts = Counter(dict.fromkeys(("fast", "solved", "timeouts", "crashes", "parse_failures"), 0))
    verdicts, hard = [False] * len(responses), {}
    for i, (response, gold, kind, options) in enumerate(zip(responses, golds, kinds, choices, strict=True)):
        accepted = [str(g) for g in (gold if isinstance(gold, (list, tuple)) else [gold])]
        # A reference solution counts by its box, several in a row by all of them.
        accepted = [((boxed_answers(g) or [g])[-1] or g)[-MAX_ANSWER:] for g in accepted]
        verdict, task = _decide(response, accepted, kind, options, require_think, think_end)
        if task is not None:
            # One answer to one problem is checked once.
            hard.setdefault(json.dumps({**task, "seconds": timeout}), []).append(i)
        else:
            verdicts[i] = bool(verdict)
            counts["parse_failures" if verdict is None else "fast"] += 1
    if hard:
        workers = min(workers or min(8, os.cpu_count() or 1), 1 + len(hard) // 8)
        with ThreadPoolExecutor(workers) as threads:  # each waits for one worker process
            results = list(threads.map(partial(_solve, timeout=timeout), hard))
        for places, (right, outcome) in zip(hard.values(), results, strict=True):
            counts[outcome] += len(places)
            for i in places:
                verdicts[i] = right
    return verdicts, dict(counts)


def is_correct(
    response: str,
    gold: str | list[str],
    kind: str = "math",
    choices: list[str] | int | None = None,
    require_think: bool = False,
    think_end: str = "</think>",
) -> bool:
    """Whether one response, a whole completion or a bare answer, is right: check_answers for one."""
    return check_answers([response], [gold], [kind], [choices], require_think, think_end=think_end)[0][0]


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
