"""Rewards and advantages: numbers worked by hand, and properties on random batches."""

import inspect
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import rewards
from rewards import ADVANTAGES, REWARDS

BATCH_RANKED = {"grpo_lambda"}  # its top groups depend on the other prompts
TOTALS = sorted(set(REWARDS) - {"dot_threshold"})
PER_ROLLOUT = (
    ("correct", "truncated", "length", "well_formed", "repetitive", "no_think", "long_mode", "labels")
    + ("conciseness", "subgroup_budget", "think_length")
)  # fmt: skip


def property_of(**strategies):
    """hypothesis' given with this file's settings: the same examples each time."""
    return lambda test: settings(max_examples=25, deadline=None, derandomize=True)(given(**strategies)(test))


def one_prompt(correct, length, **fields):
    """A batch of one prompt: lists of G rollouts; other fields as given, scalars per prompt wrapped."""
    batch = {"correct": [correct], "length": [length], "truncated": [[0] * len(correct)]}
    return batch | {k: v if k == "step" else [v] for k, v in fields.items()}


@st.composite
def batches(draw, max_prompts=4, max_group=6):
    """A batch with every field that any reward reads; G = 1, zero lengths and no budget occur."""
    shape = (draw(st.integers(1, max_prompts)), draw(st.integers(1, max_group)))
    bits = arrays(np.int64, shape, elements=st.integers(0, 1))
    per_prompt = lambda values: st.lists(values, min_size=shape[0], max_size=shape[0])  # noqa: E731
    tokens = st.one_of(st.none(), st.integers(1, 6000))
    batch = {k: draw(bits) for k in ("correct", "well_formed", "repetitive", "no_think", "long_mode")}
    batch["length"] = draw(arrays(np.int64, shape, elements=st.integers(0, 20000)))
    batch["truncated"] = draw(st.one_of(st.just(np.zeros(shape, np.int64)), bits))
    batch["labels"] = draw(arrays(np.int64, shape, elements=st.integers(0, 40)))
    batch["conciseness"] = draw(arrays(np.float64, shape, elements=st.floats(0.1, 1)))
    batch["subgroup_budget"] = draw(arrays(np.int64, shape, elements=st.sampled_from([512, 1024, 2560])))
    for name in ("budget", "history", "target"):
        batch[name] = draw(per_prompt(tokens))
    batch["think_length"] = batch["length"] * draw(st.integers(0, 4)) // 4
    batch["token_cost"] = draw(per_prompt(st.sampled_from([0.0, 1e-5, 3e-4])))
    for name in ("difficulty", "ref_accuracy"):
        batch[name] = draw(per_prompt(st.floats(0, 1)))
    batch["ref_length"] = draw(per_prompt(st.floats(1, 5000)))
    batch["level"] = draw(per_prompt(st.sampled_from(["short", "medium", "long"])))
    batch["mode"] = draw(per_prompt(st.sampled_from(["exact", "max", None])))
    batch["range"] = [sorted(pair) for pair in draw(per_prompt(st.tuples(*[st.integers(0, 14000)] * 2)))]
    return batch | {"step": draw(st.integers(0, 1000)), "max_length": 20000}


# ---------------------------------------------------------------------------------------------------------
# Numbers worked by hand


BY_HAND = [
    # name, hyper-parameters, batch, expected
    ("lcpo_exact", {}, one_prompt([1, 0, 1], [1200, 1200, 1000], budget=1000), [0.94, -0.06, 1]),
    ("lcpo_max", {}, one_prompt([1] * 3 + [0], [500, 1000, 3000, 500], budget=1000), [0.65, 0.5, 0, 0]),
    ("lcpo_max", {"alpha": 1e-3}, one_prompt([1] * 3, [500, 750, 1500], budget=1000), [1, 0.75, 0]),
    ("lcpo_max", {"additive": True}, one_prompt([1, 0, 0], [500, 500, 3000], budget=1000), [1.65, 0.65, 0]),
    ("tulu_exact", {}, one_prompt([0], [3000], budget=1000), [0.755859]),
    ("tulu_upto", {}, one_prompt([0, 0], [3000, 900], budget=1000), [0.755859, 1]),
    ("peaked_exact", {}, one_prompt([1, 0, 1], [32, 38, 26], budget=32), [2, np.exp(-1), 1 + np.exp(-1)]),
    ("peaked_capped", {}, one_prompt([1, 1, 1], [32, 38, 26], budget=32), [2, np.exp(-1), 1 + np.exp(-1)]),
    ("longwriter_range", {}, one_prompt([0] * 3, [800, 1500, 5000], range=[1000, 2000]), [0.8, 1, 0.75]),
    ("gdpo_conditioned", {}, one_prompt([1, 1, 0, 0], [10, 5000, 10, 10]), [1, 0, 0, 0]),
    ("efficient_reasoning", {}, one_prompt([1] * 3, [100, 200, 300]), [0.97729, 0.95, 0.92271]),
    ("grpo_lambda", {}, one_prompt([1] * 3, [100, 200, 300]), [0.86374, 0.7, 0.53626]),
    ("grpo_lambda", {"ddof": 1}, one_prompt([1] * 3, [100, 200, 300]), [0.83864, 0.7, 0.56136]),
    ("grpo_lead", {"ddof": 0}, one_prompt([1, 1, 1, 0], [100, 200, 300, 9]), [1.06315, 1, 0.94060, -1]),
    # the authors' code: sample deviation 1000, so z = -1, 0, 1; three short responses lift the length term
    ("grpo_lead", {"easy_length": 4000}, one_prompt([1] * 3, [5000, 6000, 7000]), [1.051271, 1, 0.951229]),
    ("grpo_lead", {"easy_length": 4000}, one_prompt([1, 1, 0, 1], [3000, 4000, 5000, 9000]), [1, 1, -1, 1]),
    ("truncation", {}, one_prompt([1, 1, 0], [4000, 4001, 9]), [1, 0, 0]),
    ("truncation_adaptive", {}, one_prompt([1, 1, 0, 0], [2000, 2001, 9, 9]), [1, 0, 0, 0]),
    ("truncation_adaptive", {}, one_prompt([1, 0, 0], [4000, 9, 9]), [1, 0, 0]),
    ("palu", {}, one_prompt([1, 1, 0], [900, 901, 9], target=900), [1, 0, 0]),
    # lam 0.5: half are right, so the budget holds; one of three is too few; other steps have no budget
    ("toggle", {}, one_prompt([1, 1, 0, 0], [900, 901, 9, 9], target=900), [1, 0, 0, 0]),
    ("toggle", {}, one_prompt([1, 0, 0], [901, 9, 9], target=900), [1, 0, 0]),
    ("toggle", {}, one_prompt([1, 1], [900, 9999], target=None), [1, 1]),
    ("toggle", {"lam": 0.3}, one_prompt([1, 0, 0], [901, 9, 9], target=900), [0, 0, 0]),
    ("crf", {}, one_prompt([1, 0], [9, 9], conciseness=[0.8, 0.8], difficulty=0.3), [1.128, 0]),
    ("hbpo", {}, one_prompt([1, 1], [1000, 300], subgroup_budget=[512, 512]), [3.5903, 3.9231]),
    ("hbpo", {}, one_prompt([1, 0], [2600, 2600], subgroup_budget=[2560, 2560]), [2.1612, 0]),
    ("hapo_cosine", {}, one_prompt([1] * 4, [0, 500, 1500, 2500], history=1000), [2, 1.7071, 0.3, 0.3]),
    ("hapo_cosine", {}, one_prompt([0] * 4, [500, 1000, 1500, 2500], history=1000), [0, 0, -0.7071, -1]),
    ("hapo_linear", {}, one_prompt([1] * 4, [500, 1050, 1500, 2500], history=1000), [1.5, 1, 0.6, 0.3]),
    ("hapo_linear", {}, one_prompt([0] * 4, [500, 1050, 1500, 2500], history=1000), [0, 0, -0.4, -1]),
    (
        "curriculum_triangular",
        {"lam_l": 1, "b0": 200},
        one_prompt([0] * 4, [100, 200, 300, 500], well_formed=[0] * 4, step=0),
        [0.5, 1, 0.5, 0],
    ),
    (
        "surrogate_format_length",
        {},
        one_prompt([0] * 4, [1536, 3072, 768, 3072], well_formed=[1, 1, 0, 0]),
        [2, 0, 0, -1],
    ),
    ("dapo_overlong", {}, one_prompt([1, 1, 0, 1], [16384, 18432, 20480, 20481]), [1, 0.5, -2, 0]),
    ("kimi", {}, one_prompt([1, 0, 1], [100, 200, 300]), [1.5, 0, 0.5]),
    ("shorter_better", {}, one_prompt([1, 1, 0], [500, 900, 400]), [2, 1.6, -0.1]),
    ("laser", {}, one_prompt([1, 1, 0, 1], [2000, 3000, 1, 1], well_formed=[1, 1, 1, 0]), [1.5, 1, -0.5, -1]),
    ("alp", {"beta": 1, "normaliser": 1e4}, one_prompt([1, 1, 1, 0], [2000] * 4), [0.85] * 3 + [-0.15]),
    ("cosine", {}, one_prompt([1, 1, 0, 0], [0, 7168, 0, 7168]), [2, 1.5, -10, -5]),
    ("cosine", {"margin": 16}, one_prompt([1, 1], [14319, 14320]), [1.0000034, -10]),  # the authors' margin
    ("adaptthink", {}, one_prompt([1, 0], [1, 1], ref_accuracy=0.75, no_think=[1, 0]), [0.3, -0.75]),
    ("prime_linear", {}, one_prompt([1, 1, 1], [10, 20, 30]), [0.916667, 0.833333, 0.75]),
    ("o1_pruner", {}, one_prompt([1, 0], [1000, 2000], ref_length=1400, ref_accuracy=0.75), [1.65, -4.05]),
    ("tldr", {}, one_prompt([1, 0], [4096, 4096], level="short"), [0.75, 0]),
    ("adaptive_deep", {}, one_prompt([1, 1, 0], [8192, 1, 1], long_mode=[1, 1, 0]), [0.2, 1.2, -0.2]),
    ("affectgpt", {}, one_prompt([0] * 3, [1] * 3, labels=[6, 10, 20]), [0, -0.25, -1]),
    ("effort", {}, one_prompt([1, 0, 1], [1000, 1000, 3000], token_cost=1e-4), [0.9, -0.1, 0.7]),
    ("gr3", {"alpha": 1}, one_prompt([1, 1, 0], [100, 300, 200]), [1 / 1.5, 1 / 2.5, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hyper", "batch", "expected"), BY_HAND)
def test_by_hand(name, hyper, batch, expected):
    np.testing.assert_allclose(REWARDS[name](batch, **hyper)[0], expected, rtol=0, atol=1e-4)


def test_dual_takes_each_prompt_by_its_mode():
    """With the paper's alpha, and with the two of the authors' first commit: 200 / 3000, 0.5 - 200 / 1000."""
    two = {"correct": [[1, 0]] * 3, "truncated": [[0, 0]] * 3, "length": [[1200, 1200]] * 3}
    two |= {"budget": [1000, 1000, np.nan], "mode": ["exact", "max", None]}
    expected = [[0.94, -0.06], [0.44, 0], [1, 0]]
    np.testing.assert_allclose(
        REWARDS["lcpo_dual"](two, alpha_exact=3e-4, alpha_max=3e-4), expected, atol=1e-12
    )
    expected = [[1 - 1 / 15, -1 / 15], [0.3, 0], [1, 0]]
    np.testing.assert_allclose(REWARDS["lcpo_dual"](two), expected, atol=1e-12)


def test_grlc():
    """Thinking 100, 300, 200, 300: w = 1, 0, .5, 0, centred .625, -.375, .125, -.375. Answers 20, 10, 10, 30:
    w = .5, 1, 1, 0, centred -.125, .375, .375, -.625. Half of each. The 80th percentile of c = 1, 1, 0, 1 is
    1: the first earns the bonus for its thinking, the second for its answer, and the wrong third none."""
    batch = one_prompt([1, 1, 0, 1], [120, 310, 210, 330], think_length=[100, 300, 200, 300])
    got = REWARDS["grlc"](batch, parts=True)
    np.testing.assert_allclose(got["think"], [[0.8125, -0.1875, 0.0625, -0.1875]])
    np.testing.assert_allclose(got["answer"], [[-0.0625, 0.6875, 0.1875, -0.3125]])
    np.testing.assert_allclose(REWARDS["grlc"](batch), [[1.75, 1.5, 0.25, 0.5]])
    # one right of six: the percentile is 0, and the shortest earns its bonus although it is wrong
    few = one_prompt([1, 0, 0, 0, 0, 0], [20, 10, 20, 20, 20, 20], think_length=[10, 5, 10, 10, 10, 10])
    assert REWARDS["grlc"](few, weight=0).tolist() == [[1, 1, 0, 0, 0, 0]]
    # all alike: no centred weight, and the bonus for all that are right
    alike = one_prompt([1, 0], [20, 20], think_length=[10, 10])
    assert REWARDS["grlc"](alike).tolist() == [[2, 0]]


def test_gr3_rule_of_alpha():
    """r_max / (1 + alpha) >= the group's mean: 1/1.3 = .7692 against (1/1.15 + 1/1.45 + 0) / 3 = .5197 with
    a wrong answer among three; of three right ones (1/1.15 + 1/1.3 + 1/1.45) / 3 = .7761: never."""
    for right, mean, holds in (([1, 0, 1], 0.5197, True), ([1, 1, 1], 0.7761, False)):
        got = REWARDS["gr3"](one_prompt(right, [100, 200, 300])).mean()
        assert got == pytest.approx(mean, abs=1e-4) and (got <= 1 / 1.3) == holds


def test_dot_threshold():
    lengths = [1000] * 30 + [1100, 9000]
    assert REWARDS["dot_threshold"](one_prompt([1] * 32, lengths)).tolist() == [5494]
    assert np.isnan(REWARDS["dot_threshold"](one_prompt([1, 0], [5, 6])))


def test_laser_classes():
    batch = {"correct": [[1, 1, 0], [1, 0, 0], [0, 0, 0]], "well_formed": [[1, 1, 1]] * 3}
    assert rewards.laser_target(batch).ravel().tolist() == [1024, 2048, 4096]


def test_missing_field_is_named():
    with pytest.raises(KeyError, match="needs the field history; the batch has correct, length"):
        REWARDS["hapo_cosine"](one_prompt([1], [10]))
    with pytest.raises(KeyError, match="needs the field well_formed or text"):
        REWARDS["laser"](one_prompt([1], [10]))
    with pytest.raises(ValueError, match="mode has 0 entries for 1 prompts"):
        REWARDS["lcpo_dual"](one_prompt([1], [10], budget=5))


WRONG_SHAPES = [
    (
        "lcpo_exact",
        {"correct": [1, 0], "length": [9, 9], "budget": 1000},
        r"budget .* \[\], the answers \[2\]",
    ),
    ("lcpo_exact", one_prompt([1, 0], [9, 9]) | {"budget": [5, 6]}, r"budget .* \[2\], the answers \[1, 2\]"),
    ("lcpo_exact", one_prompt([1, 0], [9, 9]) | {"budget": 5}, r"budget has the shape \[\].*one a prompt"),
    ("correct", {"correct": [1, 0]}, r"correct .* \[2\].*\[P prompts, G rollouts\] as \[\[1, 0\]\]"),
    (
        "truncation",
        one_prompt([1, 0], [9, 9]) | {"length": [[9]]},
        r"length .* \[1, 1\], the answers \[1, 2\]",
    ),
    ("correct", {"correct": [[1], [0]], "truncated": [0, 0]}, r"truncated has the shape \[2\]"),
    (
        "laser",
        one_prompt([1, 0], [9, 9]) | {"text": ["8", "9"]},
        r"text has the shape \[2, 1\], the answers \[1, 2\]",
    ),
    ("tldr", one_prompt([1], [9]) | {"level": ["long", "long"]}, "level has 2 entries for 1 prompts"),
]


@pytest.mark.parametrize(("name", "batch", "message"), WRONG_SHAPES)
def test_wrong_shapes_are_told(name, batch, message):
    with pytest.raises(ValueError, match=message):
        REWARDS[name](batch)


def test_advantages_want_groups():
    for name, rewards_of in (("grpo", [1, 0]), ("rloo", 1.0), ("gdpo", [[1, 0]])):
        with pytest.raises(ValueError, match=r"rewards have the shape \[.*\[P prompts, G responses\]"):
            ADVANTAGES[name](rewards_of)
    with pytest.raises(ValueError, match=r"length has the shape \[1, 3\], the answers \[1, 2\]"):
        ADVANTAGES["gfpo"]([[1, 0]], one_prompt([1, 0], [9, 9]) | {"length": [[1, 2, 3]]})


def test_a_typo_gets_the_nearest_name():
    with pytest.raises(KeyError, match="'lcpo_exat' is not known: did you mean 'lcpo_exact'"):
        REWARDS["lcpo_exat"]
    with pytest.raises(KeyError, match="'rlo' is not known: did you mean 'rloo'"):
        ADVANTAGES["rlo"]
    with pytest.raises(KeyError, match="'zzz' is not known: use one of grpo, dr_grpo"):
        ADVANTAGES["zzz"]
    with pytest.raises(TypeError, match="lcpo_exact has no constant 'alhpa': did you mean 'alpha'"):
        REWARDS["lcpo_exact"](one_prompt([1], [9], budget=9), alhpa=1)
    with pytest.raises(TypeError, match=r"correct has no constant 'alpha': use one of \(none\)"):
        REWARDS["correct"](one_prompt([1], [9]), alpha=1)
    with pytest.raises(TypeError, match="gfpo has no constant 'metrik': did you mean 'metric'"):
        ADVANTAGES["gfpo"]([[1, 0]], one_prompt([1, 0], [9, 9]), metrik="shortest")


class Recorder(dict):
    """A batch that notes which of its fields were looked at."""

    def __init__(self, batch):
        super().__init__(batch)
        self.seen = set()

    def __getitem__(self, name):
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        return self[name] if name in self else default


@pytest.mark.parametrize("name", [*REWARDS, *(f"advantage {key}" for key in ADVANTAGES)])
@property_of(batch=batches())
def test_needs_are_what_is_read(name, batch):
    """Nothing undeclared is read; a reward without a declared field says so (budget stands in for range)."""
    function = REWARDS[name] if name in REWARDS else ADVANTAGES[name.split()[1]]
    values = np.array([batch["correct"]] * 2) if name.endswith("gdpo") else batch["correct"]
    recorder = Recorder(batch)
    arrays = (recorder,) if name in REWARDS else (values, recorder)
    function(*arrays)
    always = {"correct", "truncated", "length", "require_think"}
    assert recorder.seen <= always | set(function.needs)
    for field in set(function.needs) - {"range", "difficulty"}:
        smaller = {key: value for key, value in batch.items() if key not in (field, "range")}
        with pytest.raises((KeyError, ValueError), match=field):
            function(*(smaller if array is recorder else array for array in arrays))


def random_batch(rng, longest):
    """3 prompts, 4 responses each, with every field that any reward asks for."""
    shape, few = (3, 4), ["short", "medium", "long"]
    batch = {name: rng.integers(0, 2, shape) for name in ("correct", "well_formed", "no_think", "long_mode")}
    batch |= {"truncated": np.zeros(shape, int), "repetitive": rng.integers(0, 2, shape)}
    batch |= {name: rng.integers(1, longest, shape) for name in ("length", "subgroup_budget")}
    batch |= {name: rng.integers(1, longest, 3) for name in ("budget", "history", "target", "ref_length")}
    batch |= {name: rng.random(3) for name in ("difficulty", "ref_accuracy")}
    batch |= {"think_length": batch["length"] // rng.integers(1, 5, shape), "token_cost": rng.random(3)}
    batch |= {"conciseness": rng.random(shape), "labels": rng.integers(1, 12, shape), "range": [[3, 9]] * 3}
    return batch | {"mode": ["exact", "max", None], "level": few, "step": 3}


def alone(batch, i, j):
    """Response j to prompt i as a batch of its own."""
    both = {k: v[i : i + 1, j : j + 1] for k, v in batch.items() if np.shape(v) == (3, 4)}
    return {k: v if k == "step" else v[i : i + 1] for k, v in batch.items() if k not in both} | both


def test_the_rewards_that_compare_are_those_that_change_with_the_group():
    rng, found = np.random.default_rng(0), set()
    for longest in [30, 5000] * 10:
        batch = random_batch(rng, longest)
        for name, reward in REWARDS.items():
            whole = np.broadcast_to(np.reshape(reward(batch), (3, -1)), (3, 4))
            for i, j in np.ndindex(3, 4):
                if not np.isclose(whole[i, j], np.ravel(reward(alone(batch, i, j)))[0], equal_nan=True):
                    found.add(name)
    assert found == {name for name, reward in REWARDS.items() if reward.compares_group}


TEXTS = [
    ("so 6 </think> 6", 1), ("6", 1), ("a b </think> it is \\boxed{ 6 }", 1), ("x</think>\\fbox 5", 1),
    ("</think></think> 6", 0), ("so it is 6", 0), ("</think> \\boxed{}", 0), ("</think> \\boxed{ ", 0),
    ("</think>", 0), ("", 0),
]  # fmt: skip


def test_form_labels_and_repetition_come_from_the_text():
    texts, formed = [[text for text, _ in TEXTS]], [[ok for _, ok in TEXTS]]
    size = len(TEXTS)
    batch = one_prompt([0] * size, [10] * size) | {"text": texts, "step": 0}
    assert rewards._get(batch, "well_formed").tolist() == formed
    assert REWARDS["laser"](batch).tolist() == [[-0.5 if ok else -1 for ok in formed[0]]]
    np.testing.assert_array_equal(REWARDS["laser"](batch | {"well_formed": formed}), REWARDS["laser"](batch))
    strict = rewards._get(batch | {"require_think": True}, "well_formed")[0]
    assert strict[:2].tolist() == [1, 0], "without </think> it is malformed where thinking is required"
    cut = rewards._get(batch | {"truncated": [[1] * size]}, "well_formed")
    assert not cut.any(), "what was cut off is not well formed"
    labels = {"text": [["</think> joy, fear,, ", "a,b </think> joy", "</think>"]]}
    assert rewards._get(one_prompt([0] * 3, [9] * 3) | labels, "labels").tolist() == [[2, 1, 0]]
    ten = " ".join("abcdefghij")
    again = {"text": [[" ".join([ten] * 4), " ".join([ten] * 3), " ".join(map(str, range(99)))]]}
    assert rewards._get(one_prompt([0] * 3, [9] * 3) | again, "repetitive").tolist() == [[1, 0, 0]]
    # wrong, well formed, above the target of 4096 (nobody is right): explored, unless repetitive
    long = one_prompt([0] * 2, [5000] * 2) | {"text": [["</think> 6", " ".join([ten] * 4) + " </think> 6"]]}
    assert REWARDS["laser_de"](long).tolist() == [[0.0, 0.0]]
    long["text"] = [["</think> 6", "x </think> " + "\\boxed{6} " + " ".join([ten] * 4)]]
    assert REWARDS["laser_de"](long).tolist() == [[0.0, -0.5]]


def test_ranges_come_from_the_budget():
    batch = one_prompt([0] * 3, [450, 1050, 2000], budget=1000)
    # [900, 1100]: 450 / 900, inside, (14000 - 2000) / (14000 - 1100)
    np.testing.assert_allclose(REWARDS["longwriter_range"](batch), [[0.5, 1, 12000 / 12900]])
    np.testing.assert_allclose(REWARDS["longwriter_range"](batch, width=0.5), [[0.9, 1, 12000 / 12500]])
    assert REWARDS["longwriter_range"](batch | {"range": [[450, 2000]]}).tolist() == [[1, 1, 1]]


def test_a_reward_of_ones_own_is_known_by_its_name():
    table = rewards.Table()

    @rewards.register(table, "budget")
    def own(rollouts, alpha=2.0):
        """Half."""
        return alpha * rewards._c(rollouts)

    assert table["own"] is own and own.needs == ("budget",) and not own.compares_group
    assert own(one_prompt([1, 0], [1, 1])).tolist() == [[2, 0]] and own.__doc__ == "Half."
    with pytest.raises(TypeError, match="own has no constant 'alpa': did you mean 'alpha'"):
        own(one_prompt([1], [1]), alpa=1)


# ---------------------------------------------------------------------------------------------------------
# Properties of rewards


@pytest.mark.parametrize("name", TOTALS)
@property_of(batch=batches())
def test_finite_float64_and_inputs_untouched(name, batch):
    before = {k: np.array(v, dtype=object) for k, v in batch.items()}
    total = REWARDS[name](batch)
    assert total.shape == batch["length"].shape and total.dtype == np.float64 and np.isfinite(total).all()
    assert all((np.array(batch[k], dtype=object) == before[k]).all() for k in batch)
    if "parts" in inspect.signature(REWARDS[name]).parameters:
        parts = REWARDS[name](batch, parts=True)
        assert all(p.shape == total.shape and p.dtype == np.float64 for p in parts.values())
        if name != "gdpo_conditioned":  # there the parts are GDPO's two rewards
            np.testing.assert_allclose(sum(parts.values()), total, atol=1e-12)


CORNERS = {
    "all wrong": {"correct": 0},
    "all right": {"correct": 1, "truncated": 0, "well_formed": 1},
    "all truncated": {"truncated": 1},
    "zero lengths": {"length": 0},
    "all alike": {"correct": 1, "truncated": 0, "length": 7, "subgroup_budget": 512, "long_mode": 1},
    "one response": {},
}


@pytest.mark.parametrize("corner", CORNERS)
@property_of(batch=batches())
def test_corners_are_finite(corner, batch):
    """The batches on which a mean, a spread or a minimum has nothing to be taken of."""
    shape = batch["length"].shape
    batch = batch | {key: np.full(shape, value) for key, value in CORNERS[corner].items()}
    if corner == "one response":
        batch = batch | {key: batch[key][:, :1] for key in PER_ROLLOUT}
    for name in TOTALS:
        total = REWARDS[name](batch)
        assert np.isfinite(total).all(), name
        for method, result in advantages_of(total, batch):
            assert np.isfinite(result).all(), (name, method)
    assert np.isfinite(rewards.drpo_weights(batch)).all()
    cut = np.isfinite(REWARDS["dot_threshold"](batch))  # null unless the whole group is right
    assert (cut == (batch["correct"] * (1 - batch["truncated"])).all(1)).all()


@pytest.mark.parametrize("name", TOTALS)
@property_of(batch=batches(), data=st.data())
def test_order_of_rollouts_does_not_matter(name, batch, data):
    order = data.draw(st.permutations(range(batch["length"].shape[1])))
    shuffled = batch | {k: batch[k][:, order] for k in PER_ROLLOUT}
    np.testing.assert_allclose(REWARDS[name](shuffled), REWARDS[name](batch)[:, order], atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(TOTALS) - BATCH_RANKED))
@property_of(batch=batches())
def test_other_prompts_do_not_matter(name, batch):
    first = {k: v if k in ("step", "max_length") else v[:1] for k, v in batch.items()}
    np.testing.assert_array_equal(REWARDS[name](first), REWARDS[name](batch)[:1])


BOUNDS = {
    "correct": (0, 1), "lcpo_exact": (-np.inf, 1), "lcpo_max": (0, 1), "lcpo_dual": (-np.inf, 1),
    "tulu_exact": (-np.inf, 2), "tulu_upto": (-np.inf, 2), "peaked_exact": (0, 2), "peaked_capped": (0, 2),
    "longwriter_range": (-np.inf, 1),
    "gdpo_conditioned": (0, 1), "curriculum_triangular": (0, 1), "curriculum_band": (0, 1), "hbpo": (-1, 4),
    "truncation": (0, 1), "truncation_adaptive": (0, 1), "efficient_reasoning": (0, 1), "grpo_lambda": (0, 1),
    "crf": (0, 1.3), "hapo_cosine": (-1, 2), "hapo_linear": (-1, 2), "surrogate_format_length": (-np.inf, 2),
    "palu": (0, 1), "dapo_overlong": (-2, 1), "kimi": (-0.5, 1.5), "shorter_better": (-np.inf, 2),
    "laser": (-1, 1.5), "laser_d": (-1, 1.5), "laser_de": (-1, 1.5), "alp": (-np.inf, 1), "cosine": (-10, 2),
    "adaptthink": (-1, 1.05), "prime_linear": (-0.25, 1), "adaptive_deep": (-1.2, 1.2), "affectgpt": (-1, 1),
    "toggle": (0, 1), "grlc": (-1, 3), "effort": (-np.inf, 1),
    "tldr": (-np.inf, 1), "gr3": (0, 1), "grpo_lead": (-1, 1.12), "o1_pruner": (-6, np.inf),
}  # fmt: skip


@pytest.mark.parametrize("name", TOTALS)
@property_of(batch=batches())
def test_bounds(name, batch):
    """grpo_lead: exp(0.05 sqrt(G - 1)), since no score of G values lies further from their mean."""
    low, high = BOUNDS[name]
    total = REWARDS[name](batch)
    assert total.min() >= low - 1e-9 and total.max() <= high + 1e-9


def test_clipped_pruner_is_bounded_as_in_the_code():
    batch = one_prompt([1, 0], [1, 9000], ref_length=5000, ref_accuracy=0.5)
    assert REWARDS["o1_pruner"](batch, clip=[-2, 4]).tolist() == [[4, -2]]


@pytest.mark.parametrize("name", ["lcpo_exact", "tulu_exact", "peaked_exact"])
@property_of(lengths=st.lists(st.integers(0, 9000), min_size=2, max_size=8), right=st.integers(0, 1))
def test_best_at_the_budget_and_worse_away_from_it(name, lengths, right):
    lengths = sorted(lengths + [1000], key=lambda n: abs(n - 1000))
    total = REWARDS[name](one_prompt([right] * len(lengths), lengths, budget=1000))[0]
    assert total[0] == total.max() and (np.diff(total) <= 0).all()


def by_length(batch, right):
    """The batch as responses that differ in nothing but their length, shortest first."""
    shape = batch["length"].shape
    same = {"correct": np.full(shape, right), "truncated": np.zeros(shape), "well_formed": np.ones(shape)}
    same |= {"length": np.sort(batch["length"]), "subgroup_budget": np.full(shape, 512)}
    same |= {"think_length": np.sort(batch["length"]) // 2}
    same |= {"conciseness": np.ones(shape), "labels": np.zeros(shape), "long_mode": np.zeros(shape)}
    return batch | same | {"no_think": np.zeros(shape), "repetitive": np.zeros(shape)}


FALLING = """
    lcpo_max tulu_upto gdpo_conditioned curriculum_band hbpo truncation truncation_adaptive
    efficient_reasoning grpo_lambda hapo_cosine hapo_linear palu dapo_overlong kimi shorter_better laser
    laser_d laser_de alp cosine grpo_lead prime_linear o1_pruner tldr gr3 adaptive_deep toggle grlc effort
""".split()


@pytest.mark.parametrize("name", FALLING)
@property_of(batch=batches(max_prompts=1, max_group=8))
def test_longer_right_answers_never_earn_more(name, batch):
    if name == "hbpo":  # just below l_max its value is a little under the 0 above it
        batch = batch | {"length": np.minimum(batch["length"], 4096)}
    assert (np.diff(REWARDS[name](by_length(batch, 1))) <= 1e-9).all()


# What a wrong answer's length is worth: "Who gets what when wrong" differs between papers more than anything.
WRONG = {
    "constant": """correct lcpo_max gdpo_conditioned hbpo truncation truncation_adaptive efficient_reasoning
        grpo_lambda crf palu toggle laser laser_d adaptthink grpo_lead tldr gr3 affectgpt""".split(),
    "falling": """tulu_upto curriculum_band hapo_cosine hapo_linear dapo_overlong kimi alp prime_linear
        o1_pruner adaptive_deep grlc effort""".split(),
    "rising": ["laser_de", "cosine"],  # a long wrong answer explored; a short one did not even try
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in WRONG.items() for n in names])
@property_of(batch=batches(max_prompts=1, max_group=8))
def test_length_of_a_wrong_answer(kind, name, batch):
    if name == "cosine":  # at l_max it jumps down to the penalty
        batch = batch | {"length": np.minimum(batch["length"], 14335)}
    steps = np.diff(REWARDS[name](by_length(batch, 0)))
    assert kind == "rising" or (steps <= 1e-9).all()
    assert kind == "falling" or (steps >= -1e-9).all()


@pytest.mark.parametrize(
    ("name", "peak"),
    [("longwriter_range", 2000), ("curriculum_triangular", 256), ("surrogate_format_length", 1536)],
)
@property_of(batch=batches(max_prompts=1, max_group=8), right=st.integers(0, 1))
def test_rises_to_its_peak_and_falls_beyond_it(name, peak, batch, right):
    batch = by_length(batch, right) | {"range": [[2000, 2000]], "step": 0}
    length, steps = batch["length"][0], np.diff(REWARDS[name](batch)[0])
    assert (steps[length[1:] <= peak] >= -1e-9).all() and (steps[length[:-1] >= peak] <= 1e-9).all()


@property_of(batch=batches(max_prompts=1))
def test_longer_lists_never_earn_more(batch):
    batch = by_length(batch, 1) | {"labels": np.sort(batch["labels"])}
    assert (np.diff(REWARDS["affectgpt"](batch)) <= 0).all()


@pytest.mark.parametrize(
    "name",
    ["lcpo_exact", "lcpo_max", "lcpo_dual", "tulu_exact", "tulu_upto", "peaked_exact", "peaked_capped"],
)
@property_of(batch=batches())
def test_without_a_budget_only_correctness_counts(name, batch):
    batch = batch | {"budget": [None] * len(batch["budget"])}
    np.testing.assert_array_equal(REWARDS[name](batch), REWARDS["correct"](batch))


@property_of(batch=batches())
def test_truncated_is_wrong(batch):
    cut = batch | {"truncated": np.ones_like(batch["length"])}
    wrong = cut | {"correct": np.zeros_like(batch["length"])}
    for name in TOTALS:
        np.testing.assert_array_equal(REWARDS[name](cut), REWARDS[name](wrong), err_msg=name)


@property_of(steps=st.lists(st.integers(0, 10_000), min_size=1), gamma=st.floats(0.1, 0.99))
def test_curriculum_budget_falls_to_one(steps, gamma):
    budget = rewards.curriculum_budget(sorted(steps), gamma=gamma)
    assert (np.diff(budget) <= 0).all() and budget.min() >= 1 and budget.max() <= 256


# ---------------------------------------------------------------------------------------------------------
# Advantages


def advantages_of(values, batch):
    """Every advantage of one reward matrix; gdpo gets it twice, as two rewards."""
    twice = {"gdpo": np.stack([values, values[:, ::-1]])}
    for name, function in ADVANTAGES.items():
        yield name, function(twice.get(name, values), batch)


@property_of(batch=batches())
def test_advantages_are_finite(batch):
    for values in (REWARDS["lcpo_exact"](batch), batch["correct"] * 1.0, np.full(batch["length"].shape, 0.1)):
        for name, result in advantages_of(values, batch):
            assert (
                result.shape == values.shape and result.dtype == np.float64 and np.isfinite(result).all()
            ), name


@property_of(batch=batches(), value=st.floats(-10, 10))
def test_equal_rewards_give_exactly_nothing(batch, value):
    for name, result in advantages_of(np.full(batch["length"].shape, value), batch):
        if name not in ("raw", "hbpo"):  # hbpo compares a subgroup with its ideal as well
            assert (result == 0).all(), name
    assert (
        ADVANTAGES["batch_norm"](np.full((2, 3), value), {"length": [[1, 2, 3]] * 2}, weighting="token") == 0
    ).all()


@property_of(batch=batches(), shift=st.floats(-5, 5))
def test_group_advantages_have_no_mean_and_ignore_a_shift(batch, shift):
    values = REWARDS["lcpo_exact"](batch)
    for name in ("grpo", "dr_grpo", "rloo"):
        result = ADVANTAGES[name](values)
        np.testing.assert_allclose(result.sum(1), 0, atol=1e-9)
        if name != "grpo":  # where a spread is mere rounding, grpo's division shows it
            np.testing.assert_allclose(ADVANTAGES[name](values + shift), result, atol=1e-9)


@property_of(batch=batches(), data=st.data())
def test_advantages_follow_the_order_of_rollouts(batch, data):
    order = data.draw(st.permutations(range(batch["length"].shape[1])))
    batch["length"] = np.cumsum(batch["length"] + 1, axis=1)  # gfpo breaks ties by index
    shuffled = batch | {k: batch[k][:, order] for k in PER_ROLLOUT}
    values = REWARDS["tulu_exact"](batch).round(3)
    for name in ADVANTAGES:
        v = np.stack([values, batch["correct"]]) if name == "gdpo" else values
        result, permuted = ADVANTAGES[name](v, batch), ADVANTAGES[name](v[..., order], shuffled)
        np.testing.assert_allclose(permuted, result[:, order], atol=1e-6, err_msg=name)


@property_of(batch=batches())
def test_advantages_of_a_group_ignore_other_prompts(batch):
    """All but the two that standardise over the batch; gdpo too, once its last step is left out."""
    first = {k: v if k in ("step", "max_length") else v[:1] for k, v in batch.items()}
    values = REWARDS["tulu_exact"](batch)
    for name in sorted(set(ADVANTAGES) - {"batch_norm", "gdpo"}):
        alone, among = ADVANTAGES[name](values[:1], first), ADVANTAGES[name](values, batch)[:1]
        np.testing.assert_array_equal(alone, among, err_msg=name)
    both = np.stack([values, batch["correct"]])
    alone, among = (ADVANTAGES["gdpo"](v, whiten=False) for v in (both[:, :1], both))
    np.testing.assert_array_equal(alone, among[:1])


def test_advantages_by_hand():
    np.testing.assert_allclose(
        ADVANTAGES["grpo"]([[1, 0, 0, 1]]), [[0.866024, -0.866024, -0.866024, 0.866024]], atol=1e-6
    )
    np.testing.assert_allclose(ADVANTAGES["rloo"]([[1, 0.5, 0]]), [[0.75, 0, -0.75]])
    two = [[[1, 1, 0, 0]], [[1, 0, 0, 0]]]
    np.testing.assert_allclose(ADVANTAGES["gdpo"](two), [[1.3321, 0.2061, -0.7691, -0.7691]], atol=1e-3)
    np.testing.assert_allclose(
        ADVANTAGES["gdpo"](two, whiten=False), [[2.366, 0.366, -1.366, -1.366]], atol=1e-3
    )
    kept = ADVANTAGES["gfpo"]([[1, 1, 0, 1]], {"length": [[10, 40, 20, 30]]}, k=2)
    np.testing.assert_allclose(kept, [[0.7071, 0, -0.7071, 0]], atol=1e-4)
    subgroup = {"subgroup_budget": [[512] * 4]}
    gap = ADVANTAGES["hbpo"]([[3.9231, 3.9231, 3.5903, 0]], subgroup) - ADVANTAGES["grpo"](
        [[3.9231, 3.9231, 3.5903, 0]]
    )
    np.testing.assert_allclose(gap, -1.0640, atol=1e-3)


def test_batch_norm_by_tokens():
    """Tokens [1, 3] of one group [1, 0]: centred +-.5, token mean -.25, variance (.5625 + 3 .0625) / 4."""
    got = ADVANTAGES["batch_norm"]([[1, 0]], {"length": [[1, 3]]}, eps=0, ddof=0, weighting="token")
    np.testing.assert_allclose(got, [[0.75 / np.sqrt(0.1875), -0.25 / np.sqrt(0.1875)]])


def test_batch_norm_is_arora_and_zanettes_whitening():
    """RLOO, then whitened over the tokens of the batch, as their code does; their numbers."""
    batch = {"correct": [[1, 1], [1, 0]], "truncated": [[0, 0]] * 2, "length": [[10, 30], [20, 20]]}
    values = REWARDS["efficient_reasoning"](batch, alpha=0.1)
    got = ADVANTAGES["batch_norm"](values, batch, weighting="token", ddof=0)
    np.testing.assert_allclose(got, [[0.0859, -0.0515], [1.4299, -1.3956]], atol=5e-5)
    # The same from its definition: RLOO, every response counted once a token.
    rloo, tokens = ADVANTAGES["rloo"](values).ravel(), np.array([10, 30, 20, 20])
    flat = np.repeat(rloo, tokens)
    np.testing.assert_allclose(got.ravel(), (rloo - flat.mean()) / flat.std(), atol=1e-6)


def test_grpo_lead_weighs_by_difficulty():
    """Rewards [1, -1, -1, -1]: mean -.5, sample deviation 1, so A = [1.5, -.5, -.5, -.5]; rho = 1/4."""
    batch = one_prompt([1, 0, 0, 0], [9] * 4)
    hard, easy = (0.4 + 1.1 / (1 + np.exp(10 * (x - 0.75))) for x in (0.25, 0.75))
    assert (round(hard, 4), round(easy, 4)) == (1.4926, 0.95)
    got = ADVANTAGES["grpo_lead"]([[1, -1, -1, -1]], batch)
    np.testing.assert_allclose(got, [[1.5 * hard, -0.5 * easy, -0.5 * easy, -0.5 * easy]], atol=1e-5)


def test_gfpo_metric_is_checked():
    with pytest.raises(ValueError, match="'longest' is not known: use 'shortest' or 'token_efficiency'"):
        ADVANTAGES["gfpo"]([[1, 0]], {"length": [[1, 2]]}, metric="longest")


@property_of(batch=batches())
def test_drpo_weights_sum_to_one_over_the_right_answers(batch):
    weights, right = rewards.drpo_weights(batch), rewards._c(batch) > 0
    np.testing.assert_allclose(weights.sum(1), right.any(1) * 1.0)
    assert (weights[~right] == 0).all()


# ---------------------------------------------------------------------------------------------------------
# The file on its own


def test_file_runs_alone(tmp_path):
    """Copied into an empty folder the docstring's example works, and the caller loads numpy only."""
    shutil.copy(rewards.__file__, tmp_path / "rewards.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = dict(cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    done = subprocess.run([sys.executable, "-m", "doctest", "rewards.py"], **run)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
    heavy = {"torch", "sympy", "math_verify", "data", "verifier"}
    code = f"import sys, rewards; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.stdout == "[]\n", done.stdout + done.stderr
