r"""Is the answer right? A response and a reference -> True or False, for mathematics and multiple choice.

One file to copy; it needs math-verify only. Three passes:
1. Extraction, from what follows the tag that closes the thinking part, of the first that is there: the last
   \boxed (boxes side by side are also tried as one list), the last <answer> tag, the line of the last ####,
   what follows the last "answer is" or "Answer:", the last number or formula of the last sentence with one.
2. Normalisation. Unicode to LaTeX, LaTeX to one spelling (RULES), then words are told from mathematics. Units
   and nouns go. Words that change a value are read ("5 million"), or nothing is ("not 5", "5 and a half"):
   an answer counts only if ALL of it was understood; else it is a parse failure, never its first number.
3. Comparison. Numbers as fractions, words as words, the rest by math-verify's latex2sympy, which reads to the
   end or not at all, and its verify: in processes that can be killed, for sympy may never end (9^{9^{9^9}}).

>>> responses = [r"... </think> So \boxed{\frac{1}{2}}.", "The answer is (C)."]
>>> check_answers(responses, ["0.5", "C"], ["math", "choice"])[0]
[True, True]
"""

import atexit
import json
import os
import re
import resource
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from multiprocessing.connection import wait
from subprocess import DEVNULL, PIPE, Popen

MAX_ANSWER = 2000  # characters of an answer that are parsed; a longer box is a parse failure
WORKER_MEMORY = 2 << 30  # bytes of address space that a worker may take
LETTERS = "ABCDEFGHIJ"

# ---- 1. Extraction: from a response to the text of its answer.
# Tags of thinking parts: R1 and Qwen, Magistral, Kimi, gpt-oss with its special tokens and without.
THINK = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad)"
CLOSE = rf"(?i:</{THINK}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|assistantfinal|<\|channel\|>final)"
OPEN = rf"(?i:<{THINK}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>(?:analysis|commentary))"
OPEN += r"|\Aanalysis(?=[A-Z])|<\|(?!begin_of|message|constrain)[\w ]{2,30}\|>|</s>|<end_of_turn>|<eos>"
# Between two boxes of one answer: "\boxed{2} and y = \boxed{-2}".
JOINT = r"(?:[\s$,;]|\\q?quad|\\[(),\[\]]|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|[A-Za-z](?:_\w)?\s*=)*"
MARKED = r"(?im)####(?!\s*(?:step|part|case)\b|.*(?:answer|result)\W*$)[ \t*]*([^\n#]*[^\s#*:][^\n#]*)"
# "The final answer to it is: 5", "**Answer**\n5"; the word for it in other languages.
ANSWER = r"(?:\banswer|\bantwort|\bréponse|\brespuesta|\brisposta|\bresposta|答案|答)"
IS = r"(?:[:：=]|[是为]|\b(?:is|are|(?:would|must|should|will) be|comes? (?:out )?to|est|ist|es|è)(?![a-z']))"
STATED = rf"(?i){ANSWER}s?\b[*_]*(?:\s+(?:to|of|for|in)\s[^.:\n]{{1,80}}?)??\s*{IS}(?:[\s:：*_#$]|\\[\[(])*"
STATED += rf"(?=\S)|{ANSWER}[\s*_]*(?=[\d$\\(-])"
# A sentence ends at a full stop before a space, not in 1.5 or "a. b"; semicolons may part steps.
SENTENCE = r"(?<=[^\W_][.!?])\s+(?=[^a-z])|(?<=[)\]}$*%\"'][.!?])\s+|[。；]|\n+|;\s+(?=[^;]*=)"


def answer_part(response: str, require_think: bool = False, think_end: str = "</think>") -> str | None:
    """What follows the last tag that ends a thinking part; None if `think_end` is required and not there."""
    if require_think and think_end not in response:
        return None
    text = re.split(f"{re.escape(think_end)}|{CLOSE}" if think_end else CLOSE, response)[-1]
    return re.split(OPEN, text.removeprefix("<|message|>"))[0]  # nor what is thought again


def boxed_answers(text: str) -> list[str]:
    """The content of the last box; then, if boxes directly before it belong to it, all of them as a list."""
    boxes, braces = [], []  # [start, end, content] of each box; what is open, a box or another brace
    for m in re.finditer(r"\\+(?:boxed|fbox)\s*(\{?)|\\.|[{}]", text, re.S):
        if m[1] is not None:
            boxes.append([m.start(), len(text), ""])  # one that is never closed is no answer
        if m[1] or m[0] == "{":
            braces.append((boxes[-1], m.end()) if m[1] else None)
        elif m[1] is not None:
            boxes[-1][1:] = m.end() + 1, text[m.end() : m.end() + 1]  # LaTeX takes one token: \boxed 5
        elif m[0] == "}" and braces and (box := braces.pop()):
            box[0][1:] = m.end(), text[box[1] : m.start()].strip()
    run = boxes[-1:]
    for before in reversed(boxes[-12:-1]):
        if not re.fullmatch(JOINT, text[before[1] : run[0][0]]):
            break
        run.insert(0, before)
    contents = [content for _, _, content in run]
    return contents[-1:] + ([", ".join(contents)] if len(contents) > 1 else [])


def _stated(text: str) -> tuple[str, bool]:
    """(text, does it begin with the answer?) where it is stated, else the last sentence that may hold it."""
    text = text[-MAX_ANSWER:].strip()
    if found := re.findall(r"(?is)<answer>(.*?)</answer>", text) or re.findall(MARKED, text):
        return found[-1].strip(), True
    text = text.rstrip("!")  # "It is 42!"
    if stated := list(re.finditer(STATED, text)):
        return re.split(SENTENCE, text[stated[-1].end() :])[0], True
    for sentence in reversed([s for s in re.split(SENTENCE, text)[-4:] if s.strip()]):
        if re.search(r"\d|\\[A-Za-z]|\$|[^\x00-\x7f]", sentence) or re.search(HEDGE, sentence):
            return sentence, False
    return text, False


# ---- 2. Normalisation: one spelling for one answer, and all of it or none.
# What unicodedata does not say; it knows digits, fractions, super- and subscripts, full width, Greek letters.
CHARACTERS = {
    "-": "\u2010\u2011\u2012\u2013\u2212\u2796\ufe63\uff0d", " - ": "\u2014\u2015", "/": "∕⁄", ".": "٫",
    r"\cdot ": "·⋅•∙∗＊‧", r"\times ": "×✕✖⨯", r"\div ": "÷➗", "+": "➕", r"\pm ": "±", r"\mp ": "∓",
    r"\sqrt ": "√", r"\sqrt[3] ": "∛", r"\sqrt[4] ": "∜", r"\infty ": "∞", r"\emptyset ": "∅", r"\ne ": "≠",
    r"\le ": "≤⩽≦", r"\ge ": "≥⩾≧", r"\approx ": "≈≃≅", r"\in ": "∈", r"\cup ": "∪", r"\cap ": "∩", ":": "∶",
    r"\mathbb{R}": "ℝ", r"\mathbb{Z}": "ℤ", r"\mathbb{N}": "ℕ", r"\mathbb{Q}": "ℚ", ",": "،",
    r"^\circ ": "°º˚", r"\lfloor ": "⌊", r"\rfloor ": "⌋", r"\ldots ": "…⋯", "'": "’‘", '"': "“”", "": "€£✅",
}  # fmt: skip
CHARACTERS = str.maketrans({c: latex for latex, many in CHARACTERS.items() for c in many})


def _ascii(text: str) -> str:
    r"""Unicode as LaTeX: 10⁻³ is 10^{-3}, 3¾ is 3\frac{3}{4}, x₁₂ is x_{12}, ６ and ૬ are 6, θ is \theta."""
    text = re.sub("((?:[0-9][\u0304\u0305])+)", lambda m: rf"\overline{{{m[0][::2]}}}", text)  # 0.3̅
    parts, last = [], ""
    for c in text.translate(CHARACTERS):
        kind, _, rest = unicodedata.decomposition(c).partition("> ")
        kind, plain = kind[1:] if rest else "", unicodedata.normalize("NFKC", c).translate(CHARACTERS)
        if kind in ("super", "sub"):  # a run shares its braces
            start = parts.pop()[:-1] if last == kind else "^{" if kind == "super" else "_{"
            parts.append(start + plain + "}")
        elif kind == "fraction" and plain[-1] != "/":
            parts.append(r"\frac{" + plain.replace("/", "}{") + "}")
        elif unicodedata.decimal(c, None) is not None:
            parts.append(str(unicodedata.decimal(c)))
        elif c.isalpha() and (name := unicodedata.name(c, "")).startswith("GREEK"):
            name = name.split(" WITH ")[0].split()[-1].replace("LAMDA", "LAMBDA").capitalize()
            parts.append("\\" + (name.lower() if c.islower() else name) + " ")
        elif unicodedata.category(c) not in ("Cf", "Mn", "So"):  # nothing without width, no pictures
            parts.append(" " if c.isspace() and c != "\n" else plain)
        last = kind
    return "".join(parts)


FONT = r"\\(?:text(?:bf|it|rm|normal|up)?|[mh]box|operatorname\*?|math(?:rm|it|bf|sf|normal))\s*\{([^{}]*)\}"
RATE = r"@?(?:[mgsLlhNJWVAKHCF]|km|cm|mm|kg|ft|mi|mol|min|hr|sec)(\s*\^\s*\{?-?[0-9]\}?)?"
BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"  # four deep
ROOT = r"\\sqrt\s*(?:\[[^\[\]]*\])?"
ATOM = rf"(?:[0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\(?:frac|binom)\s*(?:{BRACES}){{2}}|\\sqrt\s*{BRACES}|\\[A-Za-z]+)"
DOTS = r"\\dot\s*\{?([0-9]+)\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?"
RULES = [(re.compile(pattern), new) for pattern, new in [  # applied in this order
    (r"(?<=[0-9)])\*\*(?=[\w(\\-])|(?<=(?<!\w)[a-z])\*\*(?=[\w(\\-])", "^"),  # x**2
    (r"(?<![A-Za-z\\@])sqrt\s*(?=[({0-9\\])", r"\\sqrt "), (r"(?<![A-Za-z\\])cbrt\s*(?=\()", r"\\sqrt[3]"),
    (r"(?<![\w)}\]])\^\{([0-9])\}\s*\\sqrt", r"\\sqrt[\1]"),  # ³√8
    (r"(?<=[,+*-])\s*\.{3,}|(?<=[0-9]\.[0-9])([0-9]*)\.{3,}", r"\1\\ldots "),  # 1, 2, ... and 0.33...
    (r"\*\*|`|(?m:^\s*(?:#+\s|[-*>→⇒∴•]+\s+(?=[A-Za-z]{3})|[-=]>|[→⇒∴]))|\\?\$", ""),  # **5**, - 5, $5$, \$5
    (r"(,?)(?<!\\)\\(?:!\s*|[()\[\]]|(?:m?left|m?right|[bB]igg?[lr]?|displaystyle)(?![a-z])\.?)", r"\1"),
    (r"(?<!\\)\\(?:[,;:> ]|thinspace)|[~\s]+", " "), (r"\s*\\q?quad(?![a-z])\s*", ", "),  # 5\,cm
    (r"\{\\rm\s+", r"\\text{"), (r"\\(?:text|mathrm)\s*\{([ei])\}|\\math(?:rm|bf|it)\{(\w)\}", r"{\1\2}"),
    (FONT, lambda m: re.sub(r"(?<![\\\w@])(?=[^\W\d_])", "@", f" {m[1]} ")),  # \text{ cm} is @cm, a word
    (r"_\{\s*@(\w+)\s*\}", r"_{\1}"), (r"\s*\{\s*,\s*\}\s*", ","),  # x_{\text{max}}, 1{,}000
    (r"\\%|%|\s*(?<![A-Za-z])@?(?:per\s*@?cent(?:age)?|pct)\b(?!\s*@?points)", r"\\% "),  # 5 percent
    (r"<=|=<|\\leq(?:slant)?(?![a-z])", r"\\le "), (r">=|\\geq(?:slant)?(?![a-z])", r"\\ge "),  # x <= 5
    (r"!=|\\neq(?![a-z])", r"\\ne "), (r"~=|\\(?:simeq|thickapprox)(?![a-z])", r"\\approx "),  # x != 5
    (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"), (r"\\varnothing", r"\\emptyset"),
    (r"\\ast(?![a-z])", "*"), (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\+/?-(?=\s*[\w\\(])", r"\\pm "),
    (DOTS, r"\\overline{\1\2\3}"), (r"(\.[0-9]*)\(([0-9]+)\)(?![\w(])", r"\1\\overline{\2}"),  # 0.(3)
    (r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{?([0-9]+)\}?", lambda m:  # 0.9\overline{6} is 87/90
     rf"\frac{{{int(m[1] + m[2] + m[3]) - int(m[1] + m[2] or 0)}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}}"),
    (r"(?<![0-9.,([{])[0-9]{1,3}([, ])[0-9]{3}(?:\1[0-9]{3})*(?![0-9,])", lambda m: m[0].replace(m[1], "")),
    (r"(?<=[0-9])[eE]([+-]?[0-9]+)(?!\w)", r"\\cdot 10^{\1}"),  # 1.5e3
    (r"(?<![0-9./])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9])", r"\1\\frac{\2}{\3}"),  # 2 2/3
    (r"(?<=[0-9)}])\s*\((?=[0-9.]+\))", r"\\cdot ("), (r"\)\s*(?=[0-9(])", r")\\cdot "),  # 2(3), (2)(3)
    (r"\^\s*\{?@?\s*\\?circ(?![a-z])\s*\}?|\\degree|(?<![A-Za-z@])@?deg(?:rees?)?\b", ""),  # 30^\circ
    (r"(?:(?<=[0-9])|(?<=\bn))\s*\^?\{?\s*@?(?:st|nd|rd|th)\b\s*\}?", ""), (r"^\s*f\(x\)\s*=", "y ="),
    (r"^\s*\\?[A-Za-z]+\s+@?(?:is|equals|are)\s+(?=[-+0-9\\(])", ""),  # x is 4
    (r"(?:\b|@)(?:negative|minus)\s+(?=[0-9\\])", "-"),  # minus 5
    (rf"(?<=[0-9}}])\s*{RATE}\s*(?:/|@?per\b|\\cdot)\s*{RATE}(?![A-Za-z0-9])", r" @unit\2 "),  # 5 m/s
    (r"\\frac\s*([0-9A-Za-z]|\\[a-z]+)(?=\s*[0-9A-Za-z{\\])", r"\\frac{\1}"),  # \frac12, \frac1{2}
    (rf"(\\frac\s*{BRACES})\s*([0-9A-Za-z]|\\pi)", r"\1{\2}"), (r"(?<=[0-9)}])(and|or)(?=[\w(\\])", r" \1 "),
    (rf"((?<!\\)\^|{ROOT})\s*(-?{ATOM})", r"\1{\2}"),  # 2^10, \sqrt 12, x^\frac12
    (rf"(\^|{ROOT})\s*\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)", r"\1{\2}"),  # x^(1/2)
]]  # fmt: skip


@lru_cache(maxsize=4000)  # a group's answers share their reference
def _normal(text: str) -> str:
    r"""The text in ASCII LaTeX, one spelling for what has many; words of \text begin with @."""
    text = text if text.isascii() else _ascii(text)
    if re.search(r"\\\\[a-z]{2}", text) and not re.search(r"(?<!\\)(?:\\\\)*\\(?!\\)", text):
        text = text.replace("\\\\", "\\")  # every backslash is doubled
    elif "\\begin" not in text:
        text = re.sub(r"\\\\(?=[a-z])", r"\\", text)
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    return text.strip()


# Words that are mathematics; those that multiply; short ones that are no products of variables.
NAMES = "sin cos tan cot sec csc arcsin arccos arctan log ln exp gcd pi alpha beta gamma theta lambda phi"
NAMES = {x: f"\\{x} " for x in NAMES.split()} | {"plus": "+", "minus": "-", "times": r"\times "}
NAMES |= {"infinity": r"\infty ", "inf": r"\infty ", "lcm": r"\operatorname{lcm}"}
SCALES = dict(dozen=12, hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
SMALL = "the is it so we get are was be as at by to in on an my his her its has had have that this then thus"
SMALL += " ans you two for of if mm cm dm km ft mi yd kg mg lb oz ml hr min sec ms mph mol rad usd day men"
LENGTH = r"(?:[kcmd]?m|in|ft|yd|mi|inch|inches|feet|foot|yards?|miles?|units?|\w*met(?:er|re)s?)"
# Words that change the number before them ("5 of", "5 and a half", "5 lakh") or after them ("at least 5").
CHANGE = r"not|nor|than|half|hal[vf]e[sd]?|thirds?|quarters?|\w*(?:four|fif|six|seven|eigh|nin|ten|d)ths"
CHANGE += r"|factorial|mod|modulo|power|squared|cubed|except|maybe|perhaps"
AFTER = rf"(?:and|over|of|choose|point|base|divided|if|unless)\b|(?:\S+ ){{0,3}}(?:{CHANGE}|or|hundreds?|mil"
AFTER += r"|thousands?|(?:m|b|tr)illions?|dozens?|lakhs?|crores?|repeating|recurring)\b|[万亿千百半不或]"
BEFORE = rf"(?:^|.*\s)(?:{CHANGE}|least|most|between|under|above|below|over|almost|nearly|twice|thrice|double"
BEFORE += r"|no|triple|times|root|without|square|cube|reciprocal|inverse|multiple)(?: of)?(?: the| a| about)?"
BETWEEN = rf"(?:.* )?(?:and|or)|(?:out )?of(?: the)?|to|in|(?:divided )?by|through|{LENGTH}|hours?|dollars?"
HEDGE = r"(?i)\b(?:not|never|n?either|nor|maybe|perhaps|unsure|guess(?:ing)?|cannot|\w+n't|or)\b"
TOKEN = r"\\(?:begin|end)\{\w+\}(?:\{[clr|]*\})?|\\(?:mathbb|overline|operatorname|vec|hat|bar)\s*\{[^{}]*\}"
TOKEN += r"|_\{\w+\}|\\(?:[A-Za-z]+|.)|(@?)([^\W\d_]+)(?:'[a-z]{1,2}\b)?|[0-9][0-9.,]*(?<![.,])|\s+|.|\n"
POWER = re.compile(r"\s*\^\s*\{?(-?[0-9])\}?|\s*/\s*(?:@\w+|(?:hr?|s|hour|min|sec|second)\b)")  # of a unit
SEP = "\x01"  # "and" or "or" between two answers
# What may be cut off behind a formula: a condition; and, where the answer comes first, an explanation.
CONDITION = r"[a-z]\s*(?:\\(?:in|ge|le|ne)(?![a-z])|[<>]).*"
KINDS = r"@?(?:all|any|every|each|some|integers?|real|positive|natural|constants?|non)\b"
QUALIFIER = rf"(?s)(?<=[\w)}}\]!])[\s,;(]+(?:@?where(?:ver)?\b|@?for\s+(?:{KINDS}|[a-z]\s*=|(?={CONDITION}))"
QUALIFIER += rf"|@?with\s+(?={CONDITION})).*|(?<=[\w)}}\]!])[\s,]*\(\s*{CONDITION}\)$"
COMMA = r"(?s)([^<>]*(?<![A-Za-z\\])([a-z])(?![A-Za-z])[^<>]*?),\s*\2\s*(?:\\(?:in|ge|ne)(?![a-z])|>).*"
CLAUSE = r"(?s)(?<=[\w)}\]!%,])(?<!\bor)(?<!\band)[\s,;(]+@?(?:because|since|as|so|which|not|and we)\s.*"


def _is_word(word: str, before: str, after: str, prose: bool) -> bool:
    """Whether letters without a mark are a word, or a product of variables like xyz and 2ab."""
    if len(word) == 1 and word.isascii():
        return bool(prose and re.match(r"[aAI]\s+[A-Za-z]{2}", word + after)) and before[-1:] in " ,"
    if len(word) > 3 or not word.isascii() or word.lower() in SMALL.split():
        return True
    joined = re.search(r"[0-9^_+*/=<>{}\\(]$" if prose else r"[0-9^_+*/=<>{}(]\s*$", before)
    if not joined and not re.match(r"\s*[_^=+*/<>]|-", after):
        return prose
    return bool(re.search(r"[0-9}]\s+$", before) and re.search("[aeiou]", word) and not after.strip(" ."))


def _pieces(text: str, prose: bool) -> list[tuple[str, str]]:
    """[(kind, text)] of normal text: "math" from end to end, or one "word"."""
    pieces, math, i = [], "", 0
    while i <= len(text):
        m = re.compile(TOKEN).match(text, i)
        name = m[0].lstrip("@").lower() if m and m[2] else ""
        i = m.end() if m else i + 1
        if name in NAMES and (name not in ("times", "plus", "minus") or re.match(r"\s*[\d(\\]", text[i:])):
            math += NAMES[name]
        elif name in SCALES and re.search(r"[0-9}]\s*$", math):
            math += rf"\cdot {SCALES[name]} "
        elif name in ("and", "or") and math.strip():
            math += SEP
        elif m and not (name and (m[1] or _is_word(m[2], text[: m.start()], text[i:], prose))):
            math += m[0]
        else:  # a word, or the end
            joined = [("word", "and")] * bool(name and math.rstrip(" ,").endswith(SEP))
            math = re.sub(rf"^(?:[\s,;:={SEP})]|\.(?![0-9]))+|[\s,;:.?({SEP}]+$", "", math)
            if re.search("[A-Za-z0-9]", math):
                pieces += [("math", math), *joined]
            power = POWER.match(text, i) if re.fullmatch(LENGTH, name) else None  # cm^2
            math, i = "", power.end() if power else i
            pieces += [("word", name + ((power and power[1]) or ""))] * bool(name)
    return pieces


def _read(text: str, prose: bool = False, first: bool = False) -> tuple[str, str] | None:
    """(LaTeX, power of its unit) of a text with one answer, in prose at the end; None if not all is clear."""
    text = re.sub(QUALIFIER, "", _normal(text))
    text = m[1] if (m := re.fullmatch(COMMA, text)) else text
    if first and (not prose or re.match(r"[^A-Za-z@]", text)):
        text = re.sub(CLAUSE, "", text)
    pieces = _pieces(text, prose)
    math = [i for i, (kind, _) in enumerate(pieces) if kind == "math"]
    if not math or len(math) > 1 and (not prose or first and math[0] == 0):
        return None
    at, core = math[-1], pieces[math[-1]][1]
    before, after = (" ".join(w for k, w in part if k == "word") for part in (pieces[:at], pieces[at + 1 :]))
    between = " ".join(w for _, w in pieces[math[-2] + 1 : at]) if len(math) > 1 else ""
    operator = re.match(r"[+*/^_!]|\\(?:cdot|times|div)(?![a-z])|-\s", core)
    if between and re.fullmatch(BETWEEN, between) or at and operator:
        return None  # what stood before it is lost: 5 cm + 3 cm, 5 apples and 3 pears, 20% of 50
    if re.match(AFTER, after) or re.fullmatch(BEFORE, before) or prose and re.search(HEDGE, before):
        return None
    power = re.search(r"\b(?:(square|sq)|(cubic)|[a-z]+(-?[0-9]))\b", after)
    parts = core.split(SEP)
    several = len(parts) > 1 and all("," in part and part.count("=") > 1 for part in parts)
    core = re.sub(r"[\s,]*([,;])[\s,]*", r"\1 ", (";" if several else ",").join(parts))
    return core.strip(), ("2" if power[1] else "3" if power[2] else power[3]) if power else "1" * bool(after)


# ---- 3. Comparison: what needs no mathematics here, the rest in worker processes.
FRACTION = r"([+-]?)\s*([0-9]+(?=\s*\\))?\s*(?:\\frac\s*(?=\{\w+\}\s*\{))?\{?([0-9]+(?:\.[0-9]+)?|\.[0-9]+"
FRACTION += r"|[0-9]+(?:\}\s*\{|\s*/\s*)0*[1-9][0-9]*)\.?\}?\s*(\\%)?"  # 7, 0.5, 7/3, 2\frac{1}{3}, 5\%
BASED = r"([0-9A-Z.]+)_\s*\{?(-?[0-9]+)\}?"  # 52_8: latex2sympy drops the base
UNREADABLE = r"(?<![_0-9])[0-9]+\s+[0-9.]|[0-9]\.[0-9]*\.|[?'#@`\"]|\\[lc]?dots|(?:[-+=]|\\pm)\s*$"  # 1 2, f'
CHAINED = r"(?:[\d\s.,+*/^!|(){}\[\]-]|\\[,;!%]|\\(?:frac|sqrt|pi|cdot|times)(?![a-z]|\s*\())*"


def _same_number(answer: str, gold: str) -> bool | None:
    """Whether two numbers are equal: decimals to 6 places and 5 digits, 10% is 10 and 0.1. Else None."""
    a, g = (re.fullmatch(FRACTION, core) for core in (answer, gold))
    if not a or not g:
        return None
    x, y = (int(m[1] + "1") * (int(m[2] or 0) + Fraction(re.sub(r"[{}\s/]+", "/", m[3]))) for m in (a, g))
    pairs = [(x, y)] if a[4] == g[4] else [(x, y), (x / 100, y) if a[4] else (x, y / 100)]
    close = [round(x, 6) == round(y, 6) and abs(x - y) * 10**5 <= abs(y) for x, y in pairs]
    return any(x == y for x, y in pairs) or "." in a[3] + g[3] and any(close)


def _plain(text: str) -> str:
    """What counts where texts are compared: neither case nor spaces; of words alone, only their letters."""
    text = _normal(text).replace("@", "").casefold()
    if re.search(r"[^\W\d_]{3}", text) and not re.search(r"[\\^_=<>+*/|{}\[\]0-9-]", text):
        return re.sub(r"^(?:the )?answer (?:is )?", "", " ".join(re.findall(r"\w+", text)))
    return "".join(text.split()).strip(".(){}*")


def _quick(answer: str, gold: str, prose: bool, first: bool):
    """True or False, None for an answer that cannot be read, or a pair of formulas for a worker."""
    if answer.isascii() and answer.isdigit() and gold.isascii() and gold.isdigit():
        return int(answer) == int(gold)
    if _plain(answer) and _plain(answer) == _plain(gold):
        return True
    found, wanted = _read(answer, prose, first), _read(gold) or _read(gold, True)
    if not found:
        return None
    if not wanted or wanted[1] and found[1] not in ("", "1", wanted[1]):
        return False  # 10 cm^2 is not 10 cm
    a, g = found[0], wanted[0]
    if not re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", g):
        a = re.sub(r"(?<=[0-9}])(\s+[mgsLlhNJWVAKHCF]|\s*[kcm]?m\^\{?[23]\}?)$", "", a)  # 5 m, 5 m^2
    if a.replace(" ", "") == g.replace(" ", ""):
        return True
    if (same := _same_number(a, g)) is not None:
        return same
    if re.search(r"[0-9}]_(?!\{?10\b)", a):  # a base that only one of the two has
        return re.sub(BASED, r"\1_\2", a) == re.sub(BASED, r"\1_\2", g)
    # A decimal comma is one where the reference has a decimal point.
    return bool(re.fullmatch(r"[+-]?[0-9]+, [0-9]+", a) and a.replace(", ", ".") == g) or (a, g)


def _sympy(text: str):
    """latex2sympy's reading of all of a formula; None if there is none."""
    from latex2sympy2_extended.latex2sympy2 import latex2sympy
    from sympy import Expr, I, Symbol

    try:
        x = latex2sympy(text, is_real=True, normalization_config=None)
    except Exception as error:  # its parser raises plain Exception, and sympy anything
        if isinstance(error, MemoryError):
            raise
        return None
    return x.subs(Symbol("i", real=True), I) if isinstance(x, Expr) else x


@lru_cache(maxsize=1000)  # a group's answers share their reference
def _parse(text: str, trusted: bool = False) -> list:
    """The readings of a formula, [] if none. Only a reference is trusted with a chain that differs, 1 = 2."""
    from math_verify import verify

    chain = [part.strip() for part in re.split(r"(?<![<>!:\\])=|\\approx(?![a-z])", text)]
    rounded, listed = "\\approx" in text, re.search(r"[,;]", re.sub(r"\([^()]*\)|\{[^{}]*\}", "", text))
    members = chain if len(chain) > 1 and not listed else []
    attempts = [text] * (not rounded) + members[-1:]  # I_{\max} = 3: it may not read the left side
    if "\\pm" in text:
        attempts.append(", ".join(chain[-1].replace("\\pm", a).replace("\\mp", b) for a, b in ("+-", "-+")))
    attempts = [x for x in attempts if x and not re.search(UNREADABLE, x)]
    found = [x for x in map(_sympy, attempts) if x is not None][:1]
    numbers = [x for x in members if re.fullmatch(CHAINED, x) and x.count("{") == x.count("}")]
    numbers = [(x, value) for x in numbers if (value := _sympy(x)) is not None]
    for (s, a), (t, b) in combinations([] if trusted else numbers, 2):
        # 2/3 = 0.67 is rounded, 2/3 = 0.6 is wrong, and so is 5 \approx 7.
        shown = [re.fullmatch(r"[+-]?\d*(\.?)(\d*)", x) for x in (s, t)]
        digits = [len(m[2]) for m in shown if m and (m[1] or rounded)]
        near = digits and abs((a - b).evalf()) <= 0.5001 * 10.0 ** -min(digits)
        if not near and not verify(a, b, timeout_seconds=None):
            return []
    return found + [x for _, x in numbers if len(numbers) > 1]  # a rounding may be what is asked for


def _equal(pair: tuple, texts: str) -> bool:
    """math-verify's verdict, made stricter for tuples against sets and for numbers near zero."""
    from math_verify import verify
    from sympy import Expr, FiniteSet, Float, Interval, Tuple, UnevaluatedExpr

    pair = found, wanted = [x.args[0] if isinstance(x, FiniteSet) and len(x) == 1 else x for x in pair]
    if {isinstance(x, FiniteSet) for x in pair} == {isinstance(x, (Tuple, Interval)) for x in pair} == {0, 1}:
        if "\\{" in texts:
            return False  # one is ordered, the other a set in braces
        found, wanted = sorted(pair, key=lambda x: isinstance(x, FiniteSet))[::-1]  # a list is ordered, then
    # math-verify takes 2^-2013 and 3^-2013 both for 0, and 2e-7 and 4e-7 too; UnevaluatedExpr: a percentage.
    numbers = all(isinstance(x, Expr) and x.is_number and not x.has(UnevaluatedExpr) for x in pair)
    if numbers and found != wanted:
        gap = (found - wanted).doit()
        tolerance = 0 if gap.is_Rational else 1e-5 if any(x.has(Float) for x in pair) else 1e-12
        if not abs(gap.evalf(15)) <= tolerance * abs(wanted.evalf(15)):
            return False
    return verify(wanted, found, timeout_seconds=None, allow_set_relation_comp=True)


# ---- 4. Multiple choice: letters and the options' own texts; no worker is needed.
# "The answer is (C)", "I would pick B", "option B is correct", "it's B." at the end; no "A or B" or "(A)(B)".
LETTER = r"[\s$*\"']*(?:option\s|choice\s)?(?:\\text(?:bf)?\{|\(|\[|\*)*\s*([A-J])(?![A-Za-z'])"
LETTER += r"(?!\)?\s*(?:or|and|,|/)\s*\(?(?-i:[A-HJ])\b|\)\s*\(|\W{0,3}\s?is\s(?:not|wrong|inc))"
CHOSEN = rf"(?<!not )(?<!n't )\b(?:pick|say|choose|select|go(?:ing)? (?:with|for)|option|choice)\s*{IS}?"
STATED_LETTER = rf"(?i){ANSWER}[*_]*\s*{IS}\s*[:：]?{LETTER}|{CHOSEN}{LETTER}"
STATED_LETTER += r"|(?-i:\b([A-J])\)?\**) is (?:the )?(?:correct|right|best|answer)"
STATED_LETTER += r"|\bit(?:'s| is| (?:must|should|has to) be)\s+\(?([A-J])\)?[.!\s]*$"
LABEL = r"(?s)\(?([A-Za-z])(?:\s*[).:]|(?<=[A-Z])(?:\s*[,;]|\s(?=\(|because|since))|\s[-–—]+\s)\s*(\S.*)"


def _letter(text: str, options: list[str], allowed: str) -> str | None:
    r"""The option named by "c", "(C)", \text{C}., "C - its text", its text; "" for two, None for none."""
    text = re.sub(r"\\(?:text|textbf|mathbf|mathrm|bf)(?![a-z])|[{}$*]", " ", text).strip()
    lead = r"(?:the )?answer(?: is)?:?|ans|final|option|choice|therefore|thus|hence|so|definitely"
    bare = re.sub(rf"^(?:{lead})\W+", "", text.strip(' \n\t.:()[]\\"'), flags=re.I)
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return bare.upper() if bare.upper() in allowed else ""
    plain = [_plain(option) for option in options]
    if plain.count(_plain(text)) == 1:
        return LETTERS[plain.index(_plain(text))]
    several = re.sub(r"\b(?:and|or)\b|[\s,;&/().:\u2013\u2014-]", "", bare)
    if several and set(several) <= set(allowed):
        return several[0] if len(set(several)) == 1 else ""
    listed = re.match(r"\(?[A-J]\)?(?:\s*,|\s(?:and|or))\s*\(?[A-J]\b", bare)
    if listed or all(re.search(rf"\b{x}\s*[).:]", bare) for x in allowed):
        return ""  # a list of options
    if not (label := re.match(LABEL, bare)):
        return None
    letter, rest = label[1].upper(), _plain(label[2])
    other = plain.count(rest) == 1 and LETTERS[plain.index(rest)] != letter
    return letter if letter in allowed and not other else ""  # "B: the text of A" is two answers


def _choice(text: str, golds: list[str], options) -> bool | None:
    """The last box, else the last "answer is (X)", else a label or an option's text; None: none is found."""
    texts = [] if options is None or isinstance(options, int) else [str(o) for o in options[: len(LETTERS)]]
    allowed = LETTERS[: min(len(texts) or options or len(LETTERS), len(LETTERS))]
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text[-100_000:])).strip()  # blanks cost time
    boxes = boxed_answers(text)
    letter = _letter(boxes[0], texts, allowed) if boxes and len(boxes[0]) <= MAX_ANSWER else None
    if letter is None:
        # A small letter counts at the end of its line: "the answer is a wheel" does not state A.
        stated = [(max(m.groups(""), key=len), text[m.end() :]) for m in re.finditer(STATED_LETTER, text)]
        stated = [x.upper() for x, rest in stated if x.isupper() or re.match(r"[)\].*!\s]*(?:\n|$)", rest)]
        phrase, tail = _stated(text)[0], text[-400:]
        named = [x for x, option in zip(LETTERS, texts, strict=False) if _plain(option) == _plain(phrase)]
        # Without a statement a letter must stand alone: no list of the options, no "(A) is wrong, so (B)".
        labels = {a or b for a, b in re.findall(r"\(([A-Z])\)|^([A-Z])[.):]", tail, re.M)}
        if len(named) == 1 or stated:
            letter = named[0] if len(named) == 1 else stated[-1] if stated[-1] in allowed else None
        elif tail and len(labels) < 2:
            lines = [phrase, *tail.splitlines()[::-1]]
            found = [_letter(x, texts, allowed) for x in (*lines[:2], lines[-1])]
            letter = next((x for x in [*found, *(labels & set(allowed))] if x is not None), None)
    # A reference may carry its option's text after the letter.
    lead = [re.match(r"\s*\(?([A-J])\b", g) for g in golds]
    right = {_letter(g, texts, allowed) or (m[1] if m else "") for g, m in zip(golds, lead, strict=True)}
    return None if letter is None else letter in right - {""}


# ---- 5. The workers: one JSON line in, one out, under limits of memory and time.
_IDLE: list[Popen] = []  # workers, started when the first hard answer comes, then kept
os.register_at_fork(after_in_child=_IDLE.clear)  # a child neither uses nor kills its parent's


def _serve() -> None:
    """A worker process, until standard input closes."""

    def limit(what: int, value: int) -> None:
        hard = resource.getrlimit(what)[1]  # the administrator's: it cannot be raised
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing that a library prints may reach the pipe
    limit(resource.RLIMIT_AS, WORKER_MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        task = json.loads(line)
        # A caller ended by kill -9 ends no worker: the processor-time limit ends one lost in a computation.
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + task["seconds"]) + 2)
        try:
            readings = [(_parse(a), _parse(g, trusted=True), a + g) for a, g in task["pairs"]]
            right = any(_equal((x, w), t) for found, wanted, t in readings for w in wanted for x in found)
            reply = [right, any(found and wanted for found, wanted, _ in readings), ""]
        except MemoryError:
            return  # its state is unknown: the caller counts a crash and starts a fresh worker
        except Exception as error:  # sympy raises anything on odd input: counted as a parse failure
            reply = [False, False, repr(error)]
        print(json.dumps(reply), file=out)


@atexit.register
def close_workers(*workers: Popen) -> None:
    """Ends these worker processes, by default all idle ones; the next hard answer starts new ones."""
    for worker in workers or [_IDLE.pop() for _ in _IDLE[:]]:
        worker.kill()
        worker.communicate()


def _ask(worker: Popen, task: str, timeout: float) -> list | None:
    """A worker's reply, [] if it has died, None if it is late."""
    try:
        worker.stdin.write(task.encode() + b"\n")
        worker.stdin.flush()
    except OSError:
        pass  # it has died: its output has ended too
    if not wait([worker.stdout], timeout):
        return None
    reply = worker.stdout.readline()
    return json.loads(reply) if reply.endswith(b"\n") else []


def _start() -> Popen:
    """A worker that has imported sympy, before any clock; RuntimeError with its reason if it cannot."""
    # -P keeps this folder off its path: no data.py shadows a library's module. Ctrl-C is for the caller.
    command = [sys.executable, "-P", os.path.abspath(__file__), "--worker"]
    worker = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True)
    reply = _ask(worker, json.dumps({"pairs": [["\\frac{x}{2}", "0.5x"]], "seconds": 120}), 120)
    if not reply or not reply[0]:
        close_workers(worker)
        reason = reply[2] if reply else "no sign of it"
        raise RuntimeError(f"the answer-checking process did not start: {reason}")
    return worker


def _solve(task: str, timeout: float) -> tuple[bool, str]:
    """(right?, how it ended) for one hard answer; a worker that is late or has died is replaced."""
    for fresh in (False, True):
        try:
            worker = _start() if fresh else _IDLE.pop()
        except IndexError:
            continue  # none is idle
        reply = _ask(worker, task, timeout)
        if reply:
            _IDLE.append(worker)
            return reply[0], "solved" if reply[1] else "parse_failures"
        close_workers(worker)
        if reply is None:
            return False, "timeouts"
    return False, "crashes"  # twice: the first worker may have died of something else


def _references(gold) -> list[str]:
    """The accepted answers of a gold: one, a list, or a list as text (['1,234']); of a solution its boxes."""
    if isinstance(gold, str) and re.fullmatch(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", gold, re.S):
        gold = [item for _, item in re.findall(r"""(['"])(.*?)\1\s*(?=,\s*['"]|\]\s*$)""", gold, re.S)]
        doubled = all("\\" not in item.replace("\\\\", "") for item in gold)
        gold = [item.replace("\\\\", "\\") for item in gold] if doubled else gold
    golds = [str(g) for g in (gold if isinstance(gold, (list, tuple)) else [gold])]
    return [((boxed_answers(g) or [g])[-1] or g)[-MAX_ANSWER:] for g in golds]


def check_answers(responses, golds, kinds, choices=None, require_think=False, timeout=5.0, workers=None,
                  think_end="</think>") -> tuple[list[bool], dict]:  # fmt: skip
    """Grades many responses -> (verdicts, counts); `timeout` is wall-clock seconds an answer. Thread-safe.

    A gold is a string or a list of which any may match; a kind is "math" or "choice"; `choices` has for each
    response its option texts, their number, or None (A-J). `think_end` ends the model's thinking part, and is
    demanded if `require_think`. Counts: fast, solved (by a worker), timeouts, crashes, parse_failures.
    """
    choices = [None] * len(responses) if choices is None else choices
    sizes = (len(responses), len(golds), len(kinds), len(choices))
    if len(set(sizes)) > 1:
        raise ValueError(f"responses, golds, kinds and choices must have one length, not {sizes}")
    if unknown := set(kinds) - {"math", "choice"}:
        raise ValueError(f"kind {unknown.pop()!r} is not known: use 'math' or 'choice'")
    counts = dict.fromkeys(("fast", "solved", "timeouts", "crashes", "parse_failures"), 0)
    verdicts, hard = [False] * len(responses), {}
    for i, (response, gold, kind, options) in enumerate(zip(responses, golds, kinds, choices, strict=True)):
        text, references = answer_part(response, require_think, think_end), _references(gold)
        if text is None or kind == "choice":
            verdict = text is not None and _choice(text, references, options)
        else:
            boxes = boxed_answers(text)
            stated, first = _stated(text) if not boxes else ("", True)
            found = [a for a in boxes or [stated] if a and len(a) <= MAX_ANSWER]
            found = [_quick(a, g, not boxes, first) for a in found for g in references]
            pairs = [x for x in found if isinstance(x, tuple)]
            verdict = True if True in found else pairs or (False if False in found else None)
        if isinstance(verdict, list):  # one answer to one problem is checked once
            hard.setdefault(json.dumps({"pairs": verdict, "seconds": timeout}), []).append(i)
        else:
            verdicts[i] = bool(verdict)
            counts["parse_failures" if verdict is None else "fast"] += 1
    workers = min(workers or min(8, os.cpu_count() or 1), 1 + len(hard) // 8)
    with ThreadPoolExecutor(workers) as threads:  # each waits for one worker process
        results = list(threads.map(lambda task: _solve(task, timeout), hard))
    for places, (right, outcome) in zip(hard.values(), results, strict=True):
        counts[outcome] += len(places)
        for i in places:
            verdicts[i] = right
    return verdicts, counts


def is_correct(response, gold, kind="math", choices=None, require_think=False, think_end="</think>") -> bool:
    """Whether one response, a whole completion or a bare answer, is right: check_answers for one."""
    return check_answers([response], [gold], [kind], [choices], require_think, think_end=think_end)[0][0]


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
