r"""Answers -> correct? and (correct, length, budget) -> reward -> advantage: every published length reward, in numpy.

One file to copy: it needs numpy and math-verify only. Arrays are [P prompts, G rollouts]; lengths and budgets are tokens of the
whole response, the end token included.

>>> ok, counts = check_answers([r"... </think> So \boxed{\frac{1}{2}}.", "The answer is (C)."], ["0.5", "C"], ["math", "choice"])
>>> ok
[True, True]
>>> batch = {"correct": [[1, 0]], "truncated": [[0, 0]], "length": [[1200, 1200]], "budget": [1000], "mode": ["exact"]}
>>> REWARDS["lcpo_exact"](batch, alpha=3e-4).round(2).tolist()
[[0.94, -0.06]]
>>> ADVANTAGES["dr_grpo"](REWARDS["correct"](batch), batch).tolist()
[[0.5, -0.5]]
"""

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from multiprocessing.connection import wait

import numpy as np

# --------------------------------------------------------------------------------------------------------
# 1. Is the answer right? String rules decide the plain cases; the mathematics (math-verify) runs in processes
#    that can be killed, because sympy can spin for ever in one C call that no signal interrupts: 9^{9^{9^9}}.

MAX_ANSWER = 2000  # characters of an answer that are parsed; a longer box is a parse failure
WORKER_MEMORY = 2 << 30  # bytes of address space that a worker may take
LETTERS = "ABCDEFGHIJ"
INTEGER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.0*)?")
MATHS_MARK = re.compile(r"\$|\\boxed|\\\(|\\\[")
# Between two boxes of one answer: "\boxed{2} and \boxed{-2}".
BOX_JOINT = re.compile(
    r"(?:[\s$,;]|\\quad|\\qquad|\\[(),\[\]]|\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b)*"
)
UNIT_WORDS = re.compile(
    r"(?<=[0-9}])\s*(?:square |cubic )?(?:weeks?|dollars?|cents?|people|times|units?)\.?$"
)


def answer_part(response: str, require_think: bool = False) -> str | None:
    """The graded text: after the last `</think>`; without one the whole text, or None if it is required."""
    at = response.rfind("</think>")
    if at < 0:
        return None if require_think else response
    return response[at + len("</think>") :]


def _box(text: str, end: int) -> tuple[int, int, str] | None:
    r"""(start, end, content) of the last \boxed{...} or \fbox{...} that starts before `end`; braces balanced."""
    start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
    if start < 0:
        return None
    i = brace = re.compile(r"\\f?box(?:ed)?\s*").match(text, start).end()
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
    """The content of the last box; then, where boxes directly before it belong to it, all of them as a list."""
    box = _box(text, len(text))
    if box is None:
        return []
    run = [box]
    while (before := _box(text, run[0][0])) and BOX_JOINT.fullmatch(text, before[1], run[0][0]):
        run.insert(0, before)
    contents = [content.strip() for _, _, content in run]
    return contents[-1:] + ([", ".join(contents)] if len(contents) > 1 else [])


def _stated(text: str) -> str:
    """The part of an answer without a box that is searched: what it calls its answer, else its last paragraph."""
    tags = re.findall(r"<answer>(.*?)</answer>", text[-MAX_ANSWER:], re.S)
    if tags:
        return tags[-1].strip()
    text = text.rsplit("####", 1)[-1][-MAX_ANSWER:].strip()
    return text if "answer" in text.lower() else re.split(r"\n\s*\n", text)[-1][-400:]


def _plain(text: str) -> str:
    """White space, dollar signs and a closing full stop taken away: equal plain texts are equal answers."""
    text = " ".join(text.replace("\\!", "").replace("\\,", " ").replace("\\$", "").split())
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", re.sub(r"\\(?:left|right)(?![a-z])", "", text))
    return text.strip("$ ").rstrip(".").strip("$ ")


def _words(text: str) -> str:
    r"""Casefolded words of an answer in words (\text{East} -> "east"); "" when it holds any mathematics."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|textnormal)\s*\{([^{}]*)\}", r" \1 ", text)
    if re.search(r"[\\^_=<>+*/|{}\[\]0-9]", text) or not re.search(r"[^\W\d_]{3}", text):
        return ""
    return " ".join(re.findall(r"\w+", text)).casefold()


def _quick(answer: str, gold: str) -> bool | None:
    """Right, wrong, or None: left to math-verify. Two integers are decided here, equal texts too."""
    a, g = _plain(answer), _plain(gold)
    if not a or not g:
        return False
    if a == g or (_words(a) and _words(a) == _words(g)):
        return True
    if INTEGER.fullmatch(a) and INTEGER.fullmatch(g):
        return int(a.replace(",", "").split(".")[0]) == int(g.replace(",", "").split(".")[0])
    if re.fullmatch(r"[+-]?[0-9]+,[0-9]+", a) and a.replace(",", ".") == g:
        return True  # a decimal comma, where the reference has a decimal point
    return None


STATED = re.compile(
    r"(?:answer|option|choice)\s*(?:is|:)\s*:?[\s$*]*(?:\\text(?:bf)?\{|\(|\[)*\s*([A-Z])(?![A-Za-z'])"
    r"|\bit(?:'s| is)\s+\(?([A-Z])\)?[.!\s]*$",
    re.I,
)


def _letter(text: str, options: list[str], count: int) -> str | None:
    r"""The option that a short answer names: "c", "(C)", \text{C}., "Option C", "C: its text", or its whole text.

    "" when it names two different options or one that does not exist; None when it names nothing.
    """
    allowed = LETTERS[:count]
    text = re.sub(r"\\(?:text|textbf|mathbf|mathrm|bf)(?![a-z])", " ", text)
    bare = text.strip(" \n\t${}*.:()[]\\")
    bare = re.sub(r"^(?:(?:the )?answer(?: is)?:?|option|choice)\W+", "", bare, flags=re.I).strip()
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return bare.upper() if bare.upper() in allowed else ""
    same = [LETTERS[k] for k, option in enumerate(options) if _plain(option) == _plain(text.strip(" {}"))]
    if len(same) == 1:
        return same[0]
    several = re.sub(r"\b(?:and|or)\b|[\s,;&/().:${}]", "", bare)
    if several and set(several) <= set(allowed):
        return several[0] if len(set(several)) == 1 else ""
    label = re.match(r"([A-Z])\s*[).:]\s*\S", bare)
    return None if not label else label[1] if label[1] in allowed else ""


def _choice(text: str, golds: list[str], options) -> bool | None:
    """Multiple choice: the last box, else the last "answer is (X)", else the last "(X)". None: none found."""
    texts = [] if options is None or isinstance(options, int) else [str(option) for option in options]
    count = len(texts) or options or len(LETTERS)
    short = (boxed_answers(text) or _stated(text).splitlines()[-1:] or [""])[0]
    letter = _letter(short, texts, count) if len(short) <= MAX_ANSWER else None
    if letter is None:
        stated = [a or b for a, b in STATED.findall(text) if (a or b).isupper()]
        stated = stated or re.findall(r"\(([A-Z])\)", text)
        letter = stated[-1] if stated and stated[-1] in LETTERS[:count] else None
    # A reference may carry its option's text after the letter.
    lead = [re.match(r"\s*\(?([A-J])\b", g) for g in golds]
    right = {_letter(g, texts, count) or (m[1] if m else "") for g, m in zip(golds, lead, strict=True)}
    return None if letter is None else letter in right - {""}


def _decide(response: str, golds: list[str], kind: str, options, require_think: bool):
    """(verdict, None) where string rules suffice (None: no answer found); (None, task for a worker) where not."""
    if kind not in ("math", "choice"):
        raise ValueError(f"kind {kind!r} is not known: use 'math' or 'choice'")
    text = answer_part(response, require_think)
    if text is None:
        return False, None
    if kind == "choice":
        return _choice(text, golds, options), None
    boxes = boxed_answers(text)
    answers = [a for a in boxes or [_stated(text)] if a and len(a) <= MAX_ANSWER]
    if not answers:
        return None, None
    quick = {(a, g): _quick(a, g) for a in answers for g in golds}
    if any(quick.values()) or all(verdict is False for verdict in quick.values()):
        return any(quick.values()), None
    # Prose is searched for mathematics; a bare answer is read as mathematics from end to end.
    prose = re.search(r"[A-Za-z]{3}.*\s[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", answers[0]))
    bare = bool(boxes) or len(answers[0]) < 200 and not prose
    pairs = [(a, g[:MAX_ANSWER]) for (a, g), verdict in quick.items() if verdict is None]
    return None, {"pairs": pairs, "bare": bare}


def _tidy(text: str) -> str:
    """Spellings that math-verify misreads: \\$5, 2i, +7, 2 1/2 (it adds: 3/2), 12 345 (it adds too), 1 2 3."""
    text = re.sub(r"(?<=[0-9])i\b", " i", text.replace("\\$", ""))
    text = re.sub(r"((?:^|\bis|:|=)\s*)\+(?=[0-9])", r"\1", text)
    text = re.sub(r"(?<![0-9./])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<=[0-9])(?:\\[,;! ]|\{,\}|[ ~])(?=[0-9]{3}(?![0-9]))", "", text)
    return UNIT_WORDS.sub("", re.sub(r"(?<=[0-9])[ \t]+(?=[0-9])", ", ", text))


def _parse(text: str, bare: bool) -> list:
    """math-verify's reading of an answer, [] if none: a bare answer as LaTeX, prose searched for an answer."""
    from math_verify import parse
    from sympy import Expr, I

    text = _tidy(text)
    attempts = [f"${text}$", text] if bare and not MATHS_MARK.search(text) else [text]
    if bare and text.count("=") == 1:
        attempts.append(
            f"${text.strip('$').split('=')[1]}$"
        )  # "I_{\\max} = 3": a left side that it cannot read
    found = []
    for attempt in attempts:
        found = parse(attempt, parsing_timeout=None) or found
        if any(not isinstance(x, str) for x in found):
            break
    # math-verify leaves i a symbol, and i(2 - i) would not be 1 + 2i.
    return [
        x.subs({v: I for v in x.free_symbols if v.name == "i"}) if isinstance(x, Expr) else x for x in found
    ]


def _mathematics(pairs: list, bare: bool) -> tuple[bool, bool]:
    """(right?, readable?) for (answer, gold) pairs of which any may match. Runs in a worker: it may never end."""
    from math_verify import verify

    readable = False
    for answer, gold in pairs:
        found = _parse(answer, bare)
        readable |= any(not isinstance(x, str) for x in found)
        if found and verify(_parse(gold, True), found, timeout_seconds=None):
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
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _mathematics([("\\frac{1}{2}", "0.5")], True)  # imports sympy, builds the grammar: before any clock
    except Exception as error:
        print(json.dumps({"error": repr(error)}), file=out)
        return
    print("{}", file=out)
    for line in sys.stdin:
        task = json.loads(line)
        # A caller killed by -9 kills no worker: the processor-time limit ends one that is lost in a computation.
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime + task["seconds"]) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            right, parsed = _mathematics(task["pairs"], task["bare"])
        except MemoryError:
            return  # state unknown: the caller counts a crash and starts a fresh worker
        except Exception:
            right, parsed = (
                False,
                False,
            )  # sympy and antlr raise anything on odd input; it is counted as a parse failure
        print(json.dumps({"right": right, "parsed": parsed}), file=out)


class _Worker:
    """One killable process; `task` is the index that it works on (None: idle), `deadline` when it is killed."""

    def __init__(self):
        command = [sys.executable, "-P", os.path.abspath(__file__), "--worker"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
        )
        self.ready, self.task, self.deadline = False, None, time.monotonic() + 120

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


_POOL: list[_Worker] = []  # started when the first hard answer comes, kept for the life of the process
_POOL_LOCK = threading.RLock()  # callers on several threads take turns
_POOL_OWNER = [0]  # process id: a forked child must not talk to, or kill, its parent's workers


def close_workers() -> None:
    """Ends the worker processes; the next hard answer starts new ones. Called at exit."""
    with _POOL_LOCK:
        if _POOL_OWNER[0] == os.getpid():
            for worker in _POOL:
                worker.kill()
        _POOL.clear()


atexit.register(close_workers)


def _assign(tasks: list[dict], waiting: deque, timeout: float, workers: int) -> None:
    """Starts workers as far as they are worth it and gives every idle one its next answer and its deadline."""
    while waiting and len(_POOL) < min(
        workers, 1 + len(waiting) // 8
    ):  # a start costs a second: one for eight answers
        _POOL.append(_Worker())
    for worker in _POOL[:workers]:
        if worker.ready and worker.task is None and waiting:
            worker.task, worker.deadline = waiting.popleft(), time.monotonic() + timeout
            line = json.dumps({**tasks[worker.task], "seconds": timeout}).encode() + b"\n"
            try:
                worker.process.stdin.write(line)
                worker.process.stdin.flush()
            except OSError:
                pass  # it has died: its output ends too, which _collect reads as a crash


def _collect() -> list[tuple[int, dict]]:
    """Waits for the next replies or deadline; returns (task, result). A silent worker is killed at its deadline."""
    active = [w for w in _POOL if w.task is not None or not w.ready]
    patience = min(w.deadline for w in active) - time.monotonic()
    talking = wait([w.process.stdout for w in active], max(0.0, patience))
    results = []
    for worker in active:
        late = time.monotonic() >= worker.deadline
        if worker.process.stdout not in talking and not late:
            continue
        line = worker.process.stdout.readline() if worker.process.stdout in talking else b""
        reply = json.loads(line) if line.endswith(b"\n") else {"failed": "timeouts" if late else "crashes"}
        if not worker.ready and reply:
            raise RuntimeError(f"the answer-checking process did not start: {reply.get('error', 'it died')}")
        if worker.task is not None:
            results.append((worker.task, reply))
        worker.ready, worker.task = True, None
        if "failed" in reply:
            worker.kill()
            _POOL.remove(worker)
    return results


def _run_tasks(tasks: list[dict], timeout: float, workers: int, counts: Counter) -> list[bool]:
    """Spreads the hard answers over the pool, one at a time per worker. Timed out, crashed or unreadable: wrong."""
    right, waiting = [False] * len(tasks), deque(range(len(tasks)))
    with _POOL_LOCK:
        if _POOL_OWNER[0] != os.getpid():
            _POOL.clear()
            _POOL_OWNER[0] = os.getpid()
        try:
            while waiting or any(w.task is not None for w in _POOL):
                _assign(tasks, waiting, timeout, workers)
                for index, reply in _collect():
                    right[index] = reply.get("right", False)
                    counts[reply.get("failed", "solved" if reply.get("parsed") else "parse_failures")] += 1
        except BaseException:
            close_workers()  # an interrupted worker would answer the next call with this call's results
            raise
    return right


def check_answers(
    responses: list[str],
    golds: list,
    kinds: list[str],
    choices: list | None = None,
    require_think: bool = False,
    timeout: float = 5.0,
    workers: int | None = None,
) -> tuple[list[bool], dict]:
    """Grades many responses; `timeout` is wall-clock seconds an answer. Safe on any thread.

    A gold is a string or a list of which any may match; a kind is "math" or "choice"; `choices` holds per response the option
    texts, their number, or None (A-J). The counts: fast (decided without mathematics), solved, timeouts, crashes, parse_failures
    (no answer found, or not readable as mathematics); the last three are wrong answers.
    """
    choices = [None] * len(responses) if choices is None else choices
    if not len(responses) == len(golds) == len(kinds) == len(choices):
        sizes = (len(responses), len(golds), len(kinds), len(choices))
        raise ValueError(f"responses, golds, kinds and choices must have one length, not {sizes}")
    counts = Counter(dict.fromkeys(("fast", "solved", "timeouts", "crashes", "parse_failures"), 0))
    verdicts, hard = [False] * len(responses), {}
    for i, (response, gold, kind, options) in enumerate(zip(responses, golds, kinds, choices, strict=True)):
        accepted = [str(g) for g in (gold if isinstance(gold, (list, tuple)) else [gold])]
        # A reference solution counts by its box; math-verify reads one that has several.
        accepted = [g if g.count("\\boxed") > 1 else (boxed_answers(g) or [""])[0] or g for g in accepted]
        verdict, task = _decide(response, accepted, kind, options, require_think)
        if task is not None:
            hard.setdefault(json.dumps(task), []).append(
                i
            )  # the same answer to the same problem is checked once
        else:
            verdicts[i] = bool(verdict)
            counts["parse_failures" if verdict is None else "fast"] += 1
    if hard:
        workers = workers or min(8, os.cpu_count() or 1)
        tasks = [json.loads(key) for key in hard]
        for places, right in zip(hard.values(), _run_tasks(tasks, timeout, workers, counts), strict=True):
            for i in places:
                verdicts[i] = right
    return verdicts, dict(counts)


def is_correct(
    response: str, gold: str | list[str], kind: str = "math", choices=None, require_think: bool = False
) -> bool:
    """Whether one response (a whole completion or a bare answer) is right: check_answers for one, with its time limit."""
    return check_answers([response], [gold], [kind], [choices], require_think)[0][0]


def response_length(ids: list[int], count: str = "response", think_end: tuple[int, ...] = ()) -> int:
    """Length in tokens: of the whole response, end token included, or ("thinking") up to the end of the last `</think>`.

    `think_end` is the id sequence of `</think>`; a response that never closes its thinking counts whole.
    """
    if count not in ("response", "thinking"):
        raise ValueError(f"count {count!r} is not known: use 'response' or 'thinking'")
    if count == "thinking":
        if not think_end:
            raise ValueError("count 'thinking' needs think_end, the token ids of </think>")
        ids, mark = list(ids), list(think_end)
        for end in range(len(ids), len(mark) - 1, -1):
            if ids[end - len(mark) : end] == mark:
                return end
    return len(ids)


# ----------------------------------------------------------------------------------------------------------------
# 2. Rewards: rollouts -> float64 [P, G]. Those with `parts` are sums and can return their terms.


def _c(rollouts: dict) -> np.ndarray:
    """Effective correctness [P, G]: a truncated answer is a wrong answer, whatever the checker found in it."""
    correct = np.asarray(rollouts["correct"], dtype=np.float64)
    return correct * (1 - np.asarray(rollouts["truncated"], dtype=np.float64))


def _length(rollouts: dict) -> np.ndarray:
    return np.asarray(rollouts["length"], dtype=np.float64)


def _column(rollouts: dict, name: str) -> np.ndarray:
    """A per-prompt quantity as [P, 1], to stand beside [P, G]; None becomes nan."""
    return np.array(rollouts[name], dtype=np.float64)[:, None]


def _sum(parts: dict, want_parts: bool):
    return parts if want_parts else sum(parts.values())


def correct(rollouts: dict) -> np.ndarray:
    """c: 1 right, 0 wrong or truncated."""
    return _c(rollouts)


def lcpo_exact(rollouts: dict, alpha: float = 3e-4, parts: bool = False):
    """c - alpha |budget - L|, alpha per token; wrong and truncated answers pay for length too. L1, arXiv 2503.04697 Eq. 1.

    The authors' first commit has alpha = 1/3000; no budget: c.
    """
    error = np.abs(_column(rollouts, "budget") - _length(rollouts))
    return _sum({"correct": _c(rollouts), "length": np.nan_to_num(-alpha * error)}, parts)


def lcpo_max(rollouts: dict, alpha: float = 3e-4, delta: float = 0.5) -> np.ndarray:
    """c clip(alpha (budget - L) + delta, 0, 1); wrong and truncated 0; no budget: c. L1, arXiv 2503.04697 Eq. 2.

    The paper does not state alpha for this reward; the first commit has 1e-3.
    """
    budget = _column(rollouts, "budget")
    factor = np.clip(alpha * (budget - _length(rollouts)) + delta, 0, 1)
    return _c(rollouts) * np.where(np.isnan(budget), 1.0, factor)


def lcpo_dual(
    rollouts: dict, alpha_exact: float = 3e-4, alpha_max: float = 3e-4, delta: float = 0.5
) -> np.ndarray:
    """lcpo_exact for prompts of mode "exact", lcpo_max for "max", c for the others. L1-Max training, arXiv 2503.04697.

    The authors' later code shares one multiplier flag between both modes, which makes exact prompts earn 0: not copied.
    """
    mode = np.array([m or "" for m in rollouts["mode"]])[:, None]
    maximum = np.where(mode == "max", lcpo_max(rollouts, alpha_max, delta), _c(rollouts))
    return np.where(mode == "exact", lcpo_exact(rollouts, alpha_exact), maximum)


def tulu_exact(rollouts: dict, scale: float = 8192, parts: bool = False):
    """c + 1 - |L - budget| / scale, scale in tokens, not clamped; wrong and truncated keep the length term; no budget: c.

    AI2 blog "Results Replicating L1 for Tulu"; the open-instruct code multiplies every verifier by 10 and defaults to 32768.
    """
    term = 1 - np.abs(_length(rollouts) - _column(rollouts, "budget")) / scale
    return _sum({"correct": _c(rollouts), "length": np.nan_to_num(term)}, parts)


def tulu_upto(rollouts: dict, scale: float = 8192, parts: bool = False):
    """c + 1 - max(L - budget, 0) / scale; wrong and truncated keep the length term; no budget: c. AI2 blog, as tulu_exact.

    The blog reports that it collapses to short answers: nothing pays for using the budget.
    """
    term = 1 - np.maximum(_length(rollouts) - _column(rollouts, "budget"), 0) / scale
    return _sum({"correct": _c(rollouts), "length": np.nan_to_num(term)}, parts)


def peaked_exact(rollouts: dict, tau: float = 6.0, parts: bool = False):
    """c + exp(-|L - budget| / tau), tau in tokens; wrong and truncated keep the length term; no budget: c. Ours.

    Near the target its slope is 1/tau, far above the linear rewards'; far away it is flat, so tau must suit the budgets.
    """
    term = np.exp(-np.abs(_length(rollouts) - _column(rollouts, "budget")) / tau)
    return _sum({"correct": _c(rollouts), "length": np.nan_to_num(term)}, parts)


REWARDS = {
    f.__name__: f for f in (correct, lcpo_exact, lcpo_max, lcpo_dual, tulu_exact, tulu_upto, peaked_exact)
}

# ----------------------------------------------------------------------------------------------------------------
# 3. Advantages: rewards [P, G] -> [P, G], one number for every token of a rollout. Equal rewards give 0, never noise.


def _standard(x: np.ndarray, axis, eps: float, ddof: int, std: bool = True) -> np.ndarray:
    """x minus its mean over axis, divided by (std + eps); exactly 0 where all are equal or alone."""
    centred = x - x.mean(axis=axis, keepdims=True)
    centred = np.where(x.max(axis=axis, keepdims=True) == x.min(axis=axis, keepdims=True), 0.0, centred)
    if not std:
        return centred
    count = x.size if axis is None else x.shape[axis]
    spread = np.sqrt((centred**2).sum(axis=axis, keepdims=True) / max(count - ddof, 1))
    return centred / (spread + eps)


def grpo(rewards, rollouts=None, eps: float = 1e-6, std: bool = True, ddof: int = 1) -> np.ndarray:
    """(r - mean) / (std + eps) within each group. arXiv 2402.03300; eps 1e-6 as verl, 1e-4 in TRL."""
    return _standard(np.asarray(rewards, dtype=np.float64), 1, eps, ddof, std)


def dr_grpo(rewards, rollouts=None) -> np.ndarray:
    """r - mean within each group: no division, so a small spread stays small. Dr. GRPO, arXiv 2503.20783."""
    return grpo(rewards, std=False)


def rloo(rewards, rollouts=None) -> np.ndarray:
    """r minus the mean of the OTHER rollouts of the group = G/(G-1) (r - mean); 0 for a group of one. arXiv 2402.14740."""
    group = np.shape(rewards)[1]
    return grpo(rewards, std=False) * group / max(group - 1, 1)


def gdpo(rewards, rollouts=None, weights=None, eps: float = 1e-4, ddof: int = 1) -> np.ndarray:
    """rewards [K, P, G]: each standardised in its groups, weighted, summed, standardised over the batch. arXiv 2601.05242.

    Here the batch is weighted by rollouts (TRL); the authors' verl code weights it by tokens.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    weights = np.ones(len(rewards)) if weights is None else np.asarray(weights, dtype=np.float64)
    total = (weights[:, None, None] * np.stack([grpo(r, eps=eps, ddof=ddof) for r in rewards])).sum(axis=0)
    return _standard(total, None, eps, ddof)


ADVANTAGES = {f.__name__: f for f in (grpo, dr_grpo, rloo, gdpo)}

if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
