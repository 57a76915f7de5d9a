"""(correct, length, budget) -> reward -> advantage: every published length reward, one pure function each.

One file to copy; it needs numpy only. Arrays are [P prompts, G rollouts]. Lengths and budgets are tokens of
the whole response, end token included. Numbers like 2503.04697 are arXiv ids of the formulas' papers.

>>> batch = {"correct": [[1, 0]], "truncated": [[0, 0]], "length": [[1200, 1200]], "budget": [1000]}
>>> REWARDS["lcpo_exact"](batch, alpha=3e-4).round(2).tolist()
[[0.94, -0.06]]
>>> ADVANTAGES["dr_grpo"](REWARDS["correct"](batch), batch).tolist()
[[0.5, -0.5]]
"""

import difflib
import functools
import inspect
import re

import numpy as np

# ---- 1. The tables. What is written below `@reward(...)` is in REWARDS by its name; `needs` are the fields
#    that it reads besides correct, truncated and length; `compares_group`: does it depend on the whole group?


def did_you_mean(word, known):
    """The end of a message about an unknown word: the nearest known one, else all of them."""
    near = difflib.get_close_matches(str(word), known, 1)
    return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known) or '(none)'}"


class Table(dict):
    """Functions by name; a KeyError says which name was probably meant."""

    def __missing__(self, name):
        raise KeyError(f"{name!r} is not known: {did_you_mean(name, self)}")


def register(table, *needs, compares_group=False, name=None):
    """A decorator that puts a function into a table; the function then refuses constants it does not have."""

    def decorate(function):
        known = list(inspect.signature(function).parameters)[1:]

        @functools.wraps(function)
        def checked(arrays, *args, **constants):
            for word in constants.keys() - set(known):
                raise TypeError(f"{function.__name__} has no constant {word!r}: {did_you_mean(word, known)}")
            return function(arrays, *args, **constants)

        checked.needs, checked.compares_group = needs, compares_group
        table[name or function.__name__] = checked
        return checked

    return decorate


REWARDS, ADVANTAGES = Table(), Table()
reward, advantage = functools.partial(register, REWARDS), functools.partial(register, ADVANTAGES)

# ---- 2. The batch, a dict `rollouts`: numbers [P, G], or [P] for one a prompt (None is nan), words [P],
#    texts [P][G], and the single values `step` and `require_think`.


def _get(rollouts, name):
    """A field as float64 [P, G], or [P, 1] for one number a prompt; see DERIVED for one that is missing."""
    if name not in rollouts:
        source, derive = DERIVED.get(name, (name, None))
        if source not in rollouts:
            wanted = " or ".join(dict.fromkeys((name, source)))
            raise KeyError(f"this method needs the field {wanted}; the batch has {', '.join(rollouts)}")
        rollouts = rollouts | {name: derive(rollouts)}
    field = np.array(rollouts[name], np.float64)
    groups = np.shape(next(rollouts[key] for key in ("correct", "length", name) if key in rollouts))
    whole = name in ("correct", "truncated", "length")  # never one number a prompt
    if len(groups) != 2 or field.shape not in (groups, groups if whole else groups[:1]):
        told = f"{name} has the shape {list(field.shape)}, the answers {list(groups)}"
        raise ValueError(f"{told}: a field is [P prompts, G rollouts] as [[1, 0]], or one a prompt as [1000]")
    return field.reshape(len(field), -1)


def _column(rollouts, name, values):
    """One value a prompt as [P, 1]: those of `values` for the words of a field, None being ""."""
    words = [word or "" for word in rollouts.get(name, ())]
    if len(words) != len(rollouts["correct"]):
        raise ValueError(f"{name} has {len(words)} entries for {len(rollouts['correct'])} prompts")
    return np.array([[values(word)] for word in words])


def is_well_formed(text, require_think=False):
    r"""One </think> (none is fine unless required), then \boxed{...} or nothing but a bare word (the toy)."""
    ends, answer = text.count("</think>"), text.rsplit("</think>", 1)[-1].strip()
    closed = ends == 1 or (ends == 0 and not require_think)
    box = re.compile(r"\\(?:boxed|fbox)\s*(?:\{\s*[^\s}].*\}|[^\s{])", re.S)
    box = box.match(answer, max(answer.rfind("\\boxed"), answer.rfind("\\fbox"), 0))  # the last one
    return closed and bool(box or re.fullmatch(r"[-+\w./,%$]+", answer))


def _each_text(rollouts, function):
    """function(text) of every response, [P, G]."""
    values = [[function(text) for text in group] for group in rollouts["text"]]
    return _get(rollouts | {"text": values}, "text")  # which tells a wrong shape


# Fields that a batch need not bring: (the field they are worked out from, how). require_think is a scalar.
DERIVED = {
    "well_formed": ("text", lambda rollouts: _finished(rollouts) * _each_text(
        rollouts, lambda text: is_well_formed(text, rollouts.get("require_think", False)))),
    "repetitive": ("text", lambda rollouts: _each_text(  # last ten words four times (LASER-DE's own differs)
        rollouts, lambda text: len(w := text.split()) >= 40 and " ".join(w).count(" ".join(w[-10:])) >= 4)),
    "labels": ("text", lambda rollouts: _each_text(  # with commas between, after </think>
        rollouts, lambda text: sum(map(bool, map(str.strip, text.rsplit("</think>", 1)[-1].split(",")))))),
    "difficulty": ("correct", lambda rollouts: _c(rollouts).mean(1)),
}  # fmt: skip
LASER_TARGETS = {"easy": 1024, "medium": 2048, "hard": 4096}


def _finished(rollouts):
    return 1 - _get(rollouts, "truncated") if "truncated" in rollouts else 1.0


def _c(rollouts):
    """Effective correctness [P, G]: 0 for a truncated answer, whatever the checker found in it."""
    return _get(rollouts, "correct") * _finished(rollouts)


def _sum(parts, as_parts):
    return parts if as_parts else sum(parts.values())


def _z_correct(rollouts, eps, ddof):
    """(L - mean_c) / (std_c + eps) against the correct rollouts of the group; 0 where their spread is 0."""
    c, length = _c(rollouts), _get(rollouts, "length")
    n = c.sum(1, keepdims=True)
    gap = np.where(n > 0, length - (c * length).sum(1, keepdims=True) / np.maximum(n, 1), 0)
    std = np.sqrt((c * gap**2).sum(1, keepdims=True) / np.maximum(n - ddof, 1))
    return np.where(std > 0, gap / (std + eps), 0.0)


# ---- 3. Rewards: (rollouts, constants with the paper's values) -> float64 [P, G]. Sums give their
#    terms by name with parts=True. In the formulas L is the length, c the effective correctness, mean_c the
#    mean over the correct responses of a group. A truncated answer is everywhere a wrong one.

# --- a target length in the prompt -------------------------------------------------------------------------


@reward()
def correct(rollouts):
    """c: 1 right, 0 wrong or truncated. Elastic Reasoning and ThinkPrune use it with their own limits."""
    return _c(rollouts)


@reward("budget")
def lcpo_exact(rollouts, alpha=3e-4, parts=False):
    """c - alpha |budget - L|, alpha per token; wrong answers pay for length too. L1, 2503.04697 Eq. 1.
    No budget: c. The authors' first commit has alpha = 1/3000."""
    error = np.abs(_get(rollouts, "budget") - _get(rollouts, "length"))
    return _sum({"correct": _c(rollouts), "length": np.nan_to_num(-alpha * error)}, parts)


@reward("budget")
def lcpo_max(rollouts, alpha=3e-4, delta=0.5, additive=False):
    """c clip(alpha (budget - L) + delta, 0, 1); wrong 0. L1-Max, 2503.04697 Eq. 2.
    No budget: c. The paper states no alpha for this one (3e-4 is Eq. 1's); the first commit has 1e-3.
    additive: c + clip(...), right or wrong, the paper's ablation that collapses to very short answers."""
    budget = _get(rollouts, "budget")
    factor = np.clip(alpha * (budget - _get(rollouts, "length")) + delta, 0, 1)
    factor = np.where(np.isnan(budget), 0.0 if additive else 1.0, factor)
    return _c(rollouts) + factor if additive else _c(rollouts) * factor


@reward("budget", "mode")
def lcpo_dual(rollouts, alpha_exact=1 / 3000, alpha_max=1e-3, delta=0.5):
    """lcpo_exact where the prompt's mode is "exact", lcpo_max where it is "max", else c. 2503.04697 (L1-Max),
    alphas of the first commit. Their later code has one multiplier for both modes: exact prompts earn 0."""
    mode = _column(rollouts, "mode", str)
    rest = np.where(mode == "max", lcpo_max(rollouts, alpha_max, delta), _c(rollouts))
    return np.where(mode == "exact", lcpo_exact(rollouts, alpha_exact), rest)


@reward("budget")
def tulu_exact(rollouts, scale=8192, parts=False):
    """c + 1 - |L - budget| / scale tokens, not clamped; wrong answers keep the length term. No budget: c.
    AI2 blog "Results Replicating L1 for Tulu". open-instruct: scale 32768, everything times 10."""
    term = 1 - np.abs(_get(rollouts, "length") - _get(rollouts, "budget")) / scale
    return _sum({"correct": _c(rollouts), "length": np.nan_to_num(term)}, parts)


@reward("budget")
def tulu_upto(rollouts, scale=8192, parts=False):
    """c + 1 - max(L - budget, 0) / scale tokens; wrong answers keep the length term. No budget: c. AI2 blog.
    The blog reports that it collapses to short answers: nothing pays for using the budget."""
    term = 1 - np.maximum(_get(rollouts, "length") - _get(rollouts, "budget"), 0) / scale
    return _sum({"correct": _c(rollouts), "length": np.nan_to_num(term)}, parts)


@reward("budget")
def peaked_exact(rollouts, tau=6.0, parts=False):
    """c + exp(-|L - budget| / tau), tau in tokens; wrong answers keep the length term. No budget: c. Ours.
    Steep near the target, where the linear rewards are flat; nearly 0 far away: tau must suit the budgets."""
    error = np.abs(_get(rollouts, "length") - _get(rollouts, "budget"))
    return _sum({"correct": _c(rollouts), "length": np.nan_to_num(np.exp(-error / tau))}, parts)


@reward("budget")
def peaked_capped(rollouts, tau=6.0, parts=False):
    """peaked_exact; an answer above the budget is not right. No budget: c. Ours.
    Without the cap a model that is asked for less than a problem needs would rather be right than short."""
    terms, over = peaked_exact(rollouts, tau, parts=True), _get(rollouts, "length") > _get(rollouts, "budget")
    return _sum(terms | {"correct": terms["correct"] * ~over}, parts)


@reward("budget", "range")
def longwriter_range(rollouts, l_max=14000, width=0.1):
    """Length part only: 1 in range [lo, hi], L/lo below, (l_max - L)/(l_max - hi) above. 2506.18841.
    `range` [P][lo, hi], or budget -+ `width` of it. The paper: probably words; other rewards from models."""
    length = _get(rollouts, "length")
    if "range" in rollouts:
        low, high = np.array(rollouts["range"], np.float64).reshape(len(length), 2, 1).swapaxes(0, 1)
    else:
        low, high = (_get(rollouts, "budget") * share for share in (1 - width, 1 + width))
    above = (l_max - length) / np.where(l_max > high, l_max - high, 1)
    return np.where(length < low, length / np.maximum(low, 1), np.where(length > high, above, 1.0))


@reward()
def gdpo_conditioned(rollouts, limit=4000, threshold=1.0, parts=False):
    """1 if L <= limit and c >= threshold: GDPO's conditioned LENGTH reward, 2601.05242 Eq. 8. Wrong 0.
    `parts` adds correctness, its companion under ADVANTAGES["gdpo"]."""
    c = _c(rollouts)
    term = (c >= threshold) * (_get(rollouts, "length") <= limit) * 1.0
    return {"correct": c, "length": term} if parts else term


def curriculum_budget(step, b0=256, gamma=0.7, period=150):
    """max(1, b0 gamma^floor(step / period)) tokens, not rounded. Train Long, Think Short, 2508.08940."""
    return np.maximum(1.0, b0 * gamma ** np.floor(np.asarray(step, dtype=np.float64) / period))


@reward("step", "well_formed")
def curriculum_triangular(rollouts, lam_c=0.6, lam_l=0.3, lam_f=0.1, r_cor=1.0, r_max=1.0, r_fmt=1.0, b0=256,
                          gamma=0.7, period=150, parts=False, band=False):  # fmt: skip
    """lam_c r_cor c + lam_l R_len + lam_f r_fmt well_formed; R_len = r_max L/B to B, then down to 0 at 2B.
    B = curriculum_budget(step). Wrong answers keep R_len. 2508.08940; length-heavy weights are 0.3 / 0.6."""
    x = _get(rollouts, "length") / curriculum_budget(rollouts["step"], b0, gamma, period)
    term = r_max * np.where(x <= 1, 1.0 if band else x, np.clip(2 - x, 0, 1))
    form = lam_f * r_fmt * _get(rollouts, "well_formed")
    return _sum({"correct": lam_c * r_cor * _c(rollouts), "length": lam_l * term, "format": form}, parts)


@reward("step", "well_formed")
def curriculum_band(rollouts, lam_c=0.6, lam_l=0.3, lam_f=0.1, r_cor=1.0, r_max=1.0, r_fmt=1.0, b0=256,
                    gamma=0.7, period=150, parts=False):  # fmt: skip
    """As curriculum_triangular, but R_len = r_max for every L <= B. 2508.08940: shorter, less right."""
    weights = (lam_c, lam_l, lam_f, r_cor, r_max, r_fmt, b0, gamma, period)
    return curriculum_triangular(rollouts, *weights, parts, band=True)


@reward("subgroup_budget")
def hbpo(rollouts, alpha=1 / 4096, beta=4.0, l_max=4096):
    """Right and L <= l_max: beta cos(pi max(L, b) / (2 l_max)) - alpha max(L - b, 0); else 0. 2507.15844.
    b: `subgroup_budget`. The paper's form; the code's min(f1, f2) is lower far below b, and malformed -1."""
    length, b = _get(rollouts, "length"), _get(rollouts, "subgroup_budget")
    value = beta * np.cos(np.pi * np.maximum(length, b) / (2 * l_max)) - alpha * np.maximum(length - b, 0)
    return _c(rollouts) * np.where(length <= l_max, value, 0)


# --- short is better ---------------------------------------------------------------------------------------


@reward()
def truncation(rollouts, limit=4000):
    """c if L <= limit tokens, else 0. DLER, 2510.15110; there generation simply ends at the limit.
    Their code pays 0.1 for a right answer that was cut off; here it is wrong, as everywhere."""
    return _c(rollouts) * (_get(rollouts, "length") <= limit)


@reward(compares_group=True)
def truncation_adaptive(rollouts, threshold=0.5, limit_short=2000, limit_long=4000):
    """truncation at limit_short where the group's mean c >= threshold, else at limit_long. DA-DLER."""
    easy = _c(rollouts).mean(1, keepdims=True) >= threshold
    return truncation(rollouts, np.where(easy, limit_short, limit_long))


@reward(compares_group=True)
def efficient_reasoning(rollouts, alpha=0.1, eps=1e-7, ddof=0):
    """c (1 - alpha sigmoid((L - mean_c) / (std_c + eps))); wrong 0. Arora and Zanette, 2502.04463."""
    z = _z_correct(rollouts, eps, ddof)
    return _c(rollouts) * (1 - alpha * 0.5 * (1 + np.tanh(z / 2)))  # a sigmoid that does not overflow


@reward(compares_group=True)
def grpo_lambda(rollouts, lam=0.2, alpha=0.6, ddof=0):
    """efficient_reasoning for the best ceil(lam P) groups by correct ratio (at least one), c for the rest.
    2505.18086, formula second-hand. Ties go to the lower prompt; the ranking sees the whole batch."""
    c = _c(rollouts)
    count = max(1, int(np.ceil(lam * len(c) - 1e-9)))
    rank = np.argsort(np.argsort(-c.mean(1), kind="stable"))
    return np.where(rank[:, None] < count, efficient_reasoning(rollouts, alpha, ddof=ddof), c)


@reward("conciseness", "difficulty")
def crf(rollouts, alpha=0.2, s=0.5):
    """c (1 + alpha conciseness (s + difficulty)); wrong 0. CRF, 2511.09158; alpha, s and d were not found.
    `conciseness` [P, G] of a model; `difficulty` [P], else the share of right answers; there s anneals."""
    return _c(rollouts) * (1 + alpha * _get(rollouts, "conciseness") * (s + _get(rollouts, "difficulty")))


@reward("history")
def hapo_cosine(rollouts, w=1.0, clip=-0.7, parts=False):
    """c + w r; f = cos(pi L / 2h) below 2h, then -1; right: r = max(clip, f), wrong: r = min(0, f).
    HAPO, 2505.11225. h = `history` [P]: the prompt's shortest correct length so far; None: r = 0."""
    c, x = _c(rollouts), _get(rollouts, "length") / np.maximum(_get(rollouts, "history"), 1)
    f = np.where(x < 2, np.cos(np.pi / 2 * np.minimum(x, 2)), -1)
    term = np.where(np.isnan(x), 0, np.where(c > 0, np.maximum(clip, f), np.minimum(0, f)))
    return _sum({"correct": c, "length": w * term}, parts)


@reward("history")
def hapo_linear(rollouts, w=1.0, clip=-0.7, parts=False):
    """c + w r; right: r = 1 - L/h below h, 0 to 1.1h, then max(clip, 1.1 - L/h).
    Wrong: 0 to 1.1h, then max(-1, 1.1 - L/h). HAPO's linear variant, 2505.11225; h as in hapo_cosine."""
    c, x = _c(rollouts), _get(rollouts, "length") / np.maximum(_get(rollouts, "history"), 1)
    falling = np.minimum(1.1 - x, 0)
    term = np.where(c > 0, np.where(x < 1, 1 - x, np.maximum(clip, falling)), np.maximum(-1, falling))
    term = np.where(np.isnan(x), 0, term)
    return _sum({"correct": c, "length": w * term}, parts)


@reward("well_formed")
def surrogate_format_length(rollouts, p=0.5, l_max=3072, parts=False):
    """Well formed: 1 + R, else min(0, R). x = L/l_max; R = 1 - (1-x/p)^2 to p, then 1 - 2((x-p)/(1-p))^2.
    2505.19439; label-free: correctness is not used. The code's format reward also has steps of 0.5."""
    x, form = _get(rollouts, "length") / l_max, _get(rollouts, "well_formed")
    term = np.where(x <= p, 1 - (1 - x / p) ** 2, 1 - 2 * ((x - p) / (1 - p)) ** 2)
    return _sum({"format": form, "length": np.where(form > 0, term, np.minimum(0, term))}, parts)


@reward("target")
def palu(rollouts, l_max=4096):
    """c if L <= `target` [P] (None: l_max), else 0. PALU, 2510.10168, second-hand; targets move by epoch."""
    target = _get(rollouts, "target")
    return _c(rollouts) * (_get(rollouts, "length") <= np.where(np.isnan(target), l_max, target))


@reward("target", compares_group=True)
def toggle(rollouts, lam=0.5):
    """Where the group's mean c is lam or more: palu without l_max; else c. Toggle, Kimi K2.5, 2602.02276. The
    method sets `target` and lifts it every other m steps; lam, m and the percentile are not published."""
    c = _c(rollouts)
    return np.where(c.mean(1, keepdims=True) < lam, c, palu(rollouts, np.inf))


@reward()
def dapo_overlong(rollouts, l_max=20480, l_cache=4096, reward_correct=1.0, reward_wrong=-1.0, parts=False):
    """reward_correct or reward_wrong, and 0 to -1 over the last l_cache tokens before l_max, right or wrong.
    DAPO's soft overlong punishment, 2503.14476 Eq. 13: flat -1 above l_max (verl's code keeps falling)."""
    term = np.clip((l_max - l_cache - _get(rollouts, "length")) / l_cache, -1, 0)
    return _sum({"correct": np.where(_c(rollouts) > 0, reward_correct, reward_wrong), "length": term}, parts)


@reward(compares_group=True)
def kimi(rollouts, weight=1.0, parts=False):
    """c + weight r; lam = 0.5 - (L - min)/(max - min) over the group; right: r = lam, wrong: min(0, lam).
    Kimi k1.5, 2501.12599; one length in the whole group: r = 0. The weight is not given in the paper."""
    c, length = _c(rollouts), _get(rollouts, "length")
    low, high = length.min(1, keepdims=True), length.max(1, keepdims=True)
    lam = np.where(high > low, 0.5 - (length - low) / np.maximum(high - low, 1), 0)
    return _sum({"correct": c, "length": weight * np.where(c > 0, lam, np.minimum(0, lam))}, parts)


@reward(compares_group=True)
def shorter_better(rollouts, alpha=2.0, beta=1e-3, parts=False):
    """alpha c - beta |L - SOL|; SOL: shortest correct length of the group, or mean of all. 2504.21370."""
    c, length = _c(rollouts), _get(rollouts, "length")
    shortest = np.where(c > 0, length, np.inf).min(1, keepdims=True)
    sol = np.where(np.isinf(shortest), length.mean(1, keepdims=True), shortest)
    return _sum({"correct": alpha * c, "length": -beta * np.abs(length - sol)}, parts)


@reward("well_formed")
def laser(rollouts, target=2048, bonus=0.5, reward_correct=1.0, reward_wrong=-0.5, reward_malformed=-1.0,
          parts=False):  # fmt: skip
    """1 right, -0.5 wrong, -1 malformed or truncated; + bonus if right and L <= target tokens. 2505.15612.
    Needs `well_formed` [P, G], which overrides correctness."""
    ok = _get(rollouts, "well_formed") * _finished(rollouts) > 0
    right = ok & (_c(rollouts) > 0)
    base = np.where(ok, np.where(right, reward_correct, reward_wrong), reward_malformed)
    return _sum({"correct": base, "length": bonus * (right & (_get(rollouts, "length") <= target))}, parts)


def laser_target(rollouts, targets=LASER_TARGETS):
    """Target [P, 1]: easy if 2/3 of the group or more are right and well formed, medium from 1/3, or hard."""
    right = _c(rollouts) * _get(rollouts, "well_formed")
    thirds, size = 3 * right.sum(1, keepdims=True), right.shape[1]
    easier = np.where(thirds >= size, targets["medium"], targets["hard"])
    return np.where(thirds >= 2 * size, targets["easy"], easier)


@reward("well_formed", compares_group=True)
def laser_d(rollouts, targets=LASER_TARGETS, bonus=0.5, reward_correct=1.0, reward_wrong=-0.5,
            reward_malformed=-1.0, parts=False):  # fmt: skip
    """laser at the target of the prompt's class. 2505.15612, where a monitor set moves the targets."""
    target = laser_target(rollouts, targets)
    return laser(rollouts, target, bonus, reward_correct, reward_wrong, reward_malformed, parts)


@reward("well_formed", "repetitive", compares_group=True)
def laser_de(rollouts, targets=LASER_TARGETS, bonus=0.5, reward_correct=1.0, reward_wrong=-0.5,
             reward_malformed=-1.0, parts=False):  # fmt: skip
    """laser_d; bonus also for a wrong, well-formed answer above the target, unless `repetitive` [P, G]."""
    terms = laser_d(rollouts, targets, bonus, reward_correct, reward_wrong, reward_malformed, parts=True)
    wrong = _get(rollouts, "well_formed") * _finished(rollouts) * (1 - _c(rollouts)) > 0
    long = _get(rollouts, "length") > laser_target(rollouts, targets)
    return _sum({**terms, "exploration": bonus * (wrong & long & (_get(rollouts, "repetitive") == 0))}, parts)


@reward(compares_group=True)
def alp(rollouts, beta=1e-7, normaliser=1.0, parts=False):
    """c - beta/normaliser max(mean_G c, 1/G) L: easy prompts pay more; wrong answers pay. 2506.05256 Eq. 2.
    Second-hand; both defaults are unverified (the normaliser may be the maximum length)."""
    c = _c(rollouts)
    rate = np.maximum(c.mean(1, keepdims=True), 1 / c.shape[1])
    return _sum({"correct": c, "length": -beta / normaliser * rate * _get(rollouts, "length")}, parts)


@reward()
def cosine(rollouts, l_max=14336, correct_range=(2.0, 1.0), wrong_range=(-10.0, 0.0), exceed=-10.0, margin=0):
    """Half a cosine from a value at L = 0 to one at l_max, one range for right, one for wrong. 2502.03373.
    Short wrong answers are the worst. L + margin >= l_max: exceed, right or wrong. No n-gram penalty here."""
    length, right = _get(rollouts, "length"), _c(rollouts) > 0
    start, end = (np.where(right, correct_range[k], wrong_range[k]) for k in (0, 1))
    curve = end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.minimum(length / l_max, 1)))
    return np.where(length + margin >= l_max, exceed, curve)


@reward("no_think", "ref_accuracy")
def adaptthink(rollouts, delta=0.05, parts=False):
    """c - ref_accuracy + delta no_think. 2505.13417; the paper uses it as the advantage itself ("raw").
    Needs `ref_accuracy` [P] of the reference model and `no_think` [P, G] (1: forced to start so)."""
    gain = _c(rollouts) - _get(rollouts, "ref_accuracy")
    return _sum({"correct": gain, "no_think": delta * _get(rollouts, "no_think")}, parts)


@reward(compares_group=True)
def grpo_lead(rollouts, alpha=0.05, eps=1e-6, ddof=1, wrong_reward=-1.0, easy_length=0):
    """exp(-alpha (L - mean_c)/(std_c + eps)) if right, else wrong_reward. 2504.09696, constants of its code.
    There easy_length is 4000: where a group's three shortest average no more, every right answer earns 1."""
    easy = np.sort(_get(rollouts, "length"), 1)[:, :3].mean(1, keepdims=True) <= easy_length
    right = np.where(easy, 1.0, np.exp(-alpha * _z_correct(rollouts, eps, ddof)))
    return np.where(_c(rollouts) > 0, right, wrong_reward)


@reward(compares_group=True)
def prime_linear(rollouts, w_out=0.25, parts=False):
    """c - mean_G c w_out L / max_G L; wrong answers pay too. prime-rl's penalty, less inputs and turns."""
    c, length = _c(rollouts), _get(rollouts, "length")
    share = length / np.maximum(length.max(1, keepdims=True), 1)
    return _sum({"correct": c, "length": -c.mean(1, keepdims=True) * w_out * share}, parts)


@reward(compares_group=True)
def gr3(rollouts, alpha=0.3):
    """c / (1 + alpha L / mean_G L); wrong 0. GR3, 2603.10535. alpha: the largest with r_max / (1 + alpha) >=
    the group's mean of the result in nearly all groups; 0.3 in a replication (QGLAS, 2026)."""
    length = _get(rollouts, "length")
    return _c(rollouts) / (1 + alpha * length / np.maximum(length.mean(1, keepdims=True), 1))


@reward("think_length", compares_group=True)
def grlc(rollouts, weight=0.5, bonus=0.5, percentile=80, parts=False):
    """c + weight (w - mean_G w) for thinking and answer, w = 1 - (l - min)/(max - min) in the group; + bonus
    for the shortest, if its c >= the group's percentile. Nemotron 3 Nano, 2512.20848 Eq. 4-6; there a model
    scores c: of verdicts, where few are right, the percentile is 0, and the shortest has it though wrong."""
    c, think = _c(rollouts), _get(rollouts, "think_length")
    terms, top = {"correct": c}, c >= np.percentile(c, percentile, axis=1, keepdims=True)
    for name, length in {"think": think, "answer": _get(rollouts, "length") - think}.items():
        low, high = length.min(1, keepdims=True), length.max(1, keepdims=True)
        w = (high - length) / np.maximum(high - low, 1)
        terms[name] = weight * (w - w.mean(1, keepdims=True)) + bonus * (top & (length == low))
    return _sum(terms, parts)


@reward("token_cost")
def effort(rollouts, parts=False):
    """c - lambda(e) L, right or wrong; lambda(e) = `token_cost` [P] of the effort that the prompt asks for.
    Inkling (Thinking Machines, 2026), second-hand: it varies a token's cost; lambda is not published."""
    cost = _get(rollouts, "token_cost") * _get(rollouts, "length")
    return _sum({"correct": _c(rollouts), "length": -cost}, parts)


@reward("ref_accuracy", "ref_length")
def o1_pruner(rollouts, lam=5.0, clip=None):
    """ref_length / L - 1 + lam (c - ref_accuracy), both [P], of the reference model. 2501.12570, paper form.
    The official code clips to [-2, 4], standardises over the data set and weights supervised rows with it."""
    gain = _get(rollouts, "ref_length") / np.maximum(_get(rollouts, "length"), 1) - 1
    value = gain + lam * (_c(rollouts) - _get(rollouts, "ref_accuracy"))
    return value if clip is None else np.clip(value, *clip)


@reward(compares_group=True)
def dot_threshold(rollouts, a=3.0):
    """Not a reward: the cut length [P] floor(mean + a std) of groups that are all right, nan for others. DOT.
    2601.03969, sample std; answers at least 32 tokens longer are cut there and verified again."""
    c, length = _c(rollouts), _get(rollouts, "length")
    std = length.std(1, ddof=1) if length.shape[1] > 1 else np.zeros(len(length))
    return np.where(c.all(1), np.floor(length.mean(1) + a * std), np.nan)


# --- reconstructions: the mechanism is published, the formula was not found; every constant is a guess ----


@reward("level")
def tldr(rollouts, short=0.5, medium=0.2, long=0.05, l_max=8192):
    """RECONSTRUCTION of TLDR, 2505.07961: c (1 - alpha L / l_max), alpha by the prompt's `level`; wrong 0.
    `level` [P]: "short", "medium" or "long", asked for in the prompt; all three are trained together."""
    alpha = _column(rollouts, "level", {"short": short, "medium": medium, "long": long}.__getitem__)
    return _c(rollouts) * (1 - alpha * _get(rollouts, "length") / l_max)


@reward("long_mode", compares_group=True)
def adaptive_deep(rollouts, d=0.2, l_max=8192, l_cache=2048, parts=False):
    """RECONSTRUCTION of Adaptive Deep Reasoning, 2505.20101: c +- d for the mode, + DAPO's overlong term.
    `long_mode` [P, G] 0/1. Short is favoured (+d) in a group where it is at least as accurate, else long."""
    c, mode = _c(rollouts), _get(rollouts, "long_mode")
    rate = [(c * m).sum(1, keepdims=True) / np.maximum(m.sum(1, keepdims=True), 1) for m in (1 - mode, mode)]
    favoured = mode == (rate[1] > rate[0])
    overlong = np.clip((l_max - l_cache - _get(rollouts, "length")) / l_cache, -1, 0)
    return _sum({"correct": c, "mode": np.where(favoured, d, -d), "length": overlong}, parts)


@reward("labels")
def affectgpt(rollouts, k_max=8, weight=1.0, parts=False):
    """RECONSTRUCTION of AffectGPT-R1's list penalty, 2508.01318: c - weight clip((k - k_max) / k_max, 0, 1).
    k = `labels` [P, G], the number of emotion words given, not tokens; wrong answers pay too."""
    excess = np.clip((_get(rollouts, "labels") - k_max) / k_max, 0, 1)
    return _sum({"correct": _c(rollouts), "length": -weight * excess}, parts)


# ---- 4. Advantages: (rewards [P, G], rollouts, **hyper-parameters) -> [P, G], one number for all tokens of a
#    rollout. Equal rewards, or a rollout alone, give exactly 0: noise over a tiny std would be a gradient.


def _standard(x, axis, eps, ddof, std=True):
    """(x - mean) / (std + eps) along axis (None: over everything); 0 where all are equal."""
    centred = x - x.mean(axis=axis, keepdims=True)
    centred = np.where(np.ptp(x, axis=axis, keepdims=True) > 0, centred, 0.0)
    if not std:
        return centred
    count = x.size if axis is None else x.shape[axis]
    return centred / (np.sqrt((centred**2).sum(axis=axis, keepdims=True) / max(count - ddof, 1)) + eps)


@advantage()
def grpo(rewards, rollouts=None, eps=1e-6, std=True, ddof=1):
    """(r - mean_G) / (std_G + eps). 2402.03300; eps 1e-6 as verl, TRL has 1e-4."""
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2:
        raise ValueError(f"rewards have the shape {list(rewards.shape)}: [P prompts, G responses] is needed")
    return _standard(rewards, 1, eps, ddof, std)


@advantage()
def dr_grpo(rewards, rollouts=None):
    """r - mean_G: without the division, a small spread stays small. Dr. GRPO, 2503.20783."""
    return grpo(rewards, std=False)


@advantage()
def rloo(rewards, rollouts=None):
    """r - mean of the OTHER rollouts of the group = G/(G-1) (r - mean_G). 2402.14740."""
    centred = grpo(rewards, std=False)
    return centred * centred.shape[1] / max(centred.shape[1] - 1, 1)


@advantage()
def raw(rewards, rollouts=None):
    """The reward itself, for rewards that bring their baseline (AdaptThink, 2505.13417)."""
    return np.array(rewards, dtype=np.float64)


@advantage()
def batch_norm(rewards, rollouts=None, eps=1e-8, ddof=1, weighting="rollout"):
    """A = r - mean_G, then (A - mean) / (std + eps) over the batch. REINFORCE++-baseline, DLER 2510.15110.
    weighting "token": every response counts `length` times in mean and std, as in verl's masked_whiten.
    With it and ddof 0 this is what the code of Arora and Zanette (2502.04463) makes of RLOO."""
    centred = grpo(rewards, std=False)
    if weighting == "rollout":
        return _standard(centred, None, eps, ddof)
    tokens = _get(rollouts, "length")
    mean = (tokens * centred).sum() / max(tokens.sum(), 1)
    variance = (tokens * (centred - mean) ** 2).sum() / max(tokens.sum() - ddof, 1)
    return (centred - mean) / (np.sqrt(variance) + eps) if np.ptp(centred) > 0 else np.zeros_like(centred)


@advantage()
def gdpo(rewards, rollouts=None, weights=None, eps=1e-4, ddof=1, whiten=True):
    """rewards [K, P, G], each standardised in its groups; weighted sum; standardised over the batch.
    2601.05242. Rollouts weigh alike (TRL); verl weighs tokens. LongWriter-Zero: weights 1/K, whiten False."""
    each = [grpo(r, eps=eps, ddof=ddof) for r in np.asarray(rewards, dtype=np.float64)]
    total = np.tensordot(np.ones(len(each)) if weights is None else np.asarray(weights, float), each, 1)
    return _standard(total, None, eps, ddof) if whiten else total


@advantage("subgroup_budget", name="hbpo")
def hbpo_advantage(rewards, rollouts, beta=4.0, l_max=4096, eps=1e-6, ddof=1):
    """grpo + (mean reward of the rollout's subgroup - beta cos(pi b / (2 l_max))). 2507.15844.
    The authors' code adds the second term twice; the paper once."""
    rewards, b = np.asarray(rewards, dtype=np.float64), _get(rollouts, "subgroup_budget")
    same = b[:, :, None] == b[:, None, :]
    mean = (same * rewards[:, None, :]).sum(2) / same.sum(2)
    return grpo(rewards, eps=eps, ddof=ddof) + mean - beta * np.cos(np.pi * b / (2 * l_max))


@advantage()
def gfpo(rewards, rollouts, k=8, metric="shortest", eps=1e-6, ddof=1):
    """grpo among the k kept rollouts of each group (shortest, or highest reward / length), 0 for the others.
    2508.09726 (details second-hand, k unverified); ties keep the lower index."""
    if metric not in ("shortest", "token_efficiency"):
        raise ValueError(f"metric {metric!r} is not known: use 'shortest' or 'token_efficiency'")
    rewards, length = np.asarray(rewards, dtype=np.float64), _get(rollouts, "length")
    cost = length if metric == "shortest" else -rewards / np.maximum(length, 1)
    kept = np.argsort(cost, axis=1, kind="stable")[:, :k]
    result = np.zeros_like(rewards)
    np.put_along_axis(result, kept, grpo(np.take_along_axis(rewards, kept, 1), eps=eps, ddof=ddof), 1)
    return result


@advantage(name="grpo_lead")
def lead_advantage(rewards, rollouts, low=0.4, high=1.5, middle=0.75, steep=10.0, eps=1e-6, ddof=1):
    """grpo times w(rho) where it is above 0, else times w(1 - rho); rho: the group's share of right answers.
    w(x) = low + (high - low) / (1 + exp(steep (x - middle))). GRPO-LEAD, 2504.09696, as in its code."""
    plain, rho = grpo(rewards, eps=eps, ddof=ddof), _c(rollouts).mean(1, keepdims=True)
    x = np.where(plain > 0, rho, 1 - rho)
    return plain * (low + (high - low) / (1 + np.exp(steep * (x - middle))))


def drpo_weights(rollouts, lam=0.1, l_max=8192):
    """DRPO's weights [P, G]: softmax of (1 - L/l_max)/lam over the correct rollouts. 2510.04474 Eq. 7.
    Wrong: 0; they weigh the log-probs of DRPO's objective, not a reward."""
    c, length = _c(rollouts), _get(rollouts, "length")
    shortest = np.where(c > 0, length, np.inf).min(1, keepdims=True)
    gap = np.where(c > 0, length - shortest, 0)  # softmax does not change when all lengths shift
    weight = c * np.exp(-gap / (lam * l_max))
    return weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)
