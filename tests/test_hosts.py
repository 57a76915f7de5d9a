"""hosts.py inside the trainers it is made for: the real TRL, and the real verl in its own environment.

verl wants other versions than this project: its tests need `--runhosts` and requirements-hosts.txt.
open-instruct is not published as a package: its tests are fixtures of the row format, the verifier's call
and the formula that it documents, not the real thing.
"""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import data
from integrations import hosts
from toy import prepare
from toy import task as toy

RIGHT, WRONG = "3 +6 =9 </think> 9 <eos>", "3 +6 =9 wait =9 </think> 8 <eos>"  # 6 and 8 tokens
ROW = {
    "id": "x",
    "problem": "add 3 6",
    "answer": "9",
    "kind": "math",
    "source": "toy",
    "budget": 16,
    "mode": "exact",
}
ROW["prompt"] = data.budget_prompt(ROW["problem"], 16, "exact", wording="tulu")


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def toy_rows(n, budgets="bucket:8,16", mode="both"):
    return data.annotate(toy.problems("toy", "train", n), budgets, mode, "tulu", seed=1)


# What all hosts share -------------------------------------------------------------------------


def test_score_by_hand(tokenizer):
    ids = [tokenizer.encode(text) for text in (RIGHT, WRONG)]
    ids.append(ids[0][:-1])  # the same right answer without its end token: cut off, so wrong
    assert [len(x) for x in ids] == [6, 8, 5]
    got, table = hosts.score("lcpo_exact", [ROW] * 3, ids, tokenizer, alpha=0.02)
    np.testing.assert_allclose(got, [1 - 0.02 * 10, -0.02 * 8, -0.02 * 11], atol=1e-12)
    assert table["correct"].tolist() == [[1], [0], [0]]
    assert table["truncated"].tolist() == [[0], [0], [1]] and table["length"].tolist() == [[6], [8], [5]]
    max_row = ROW | {"mode": "max", "budget": 7}
    got, _ = hosts.score("lcpo_max", [max_row] * 2, ids[:2], tokenizer, alpha=0.1)
    assert got == [pytest.approx(0.5 + 0.1), 0]
    free = ROW | {"mode": None, "budget": None}
    assert hosts.score("lcpo_dual", [free, max_row], ids[:2], tokenizer)[0] == [1, 0]
    # SOL is the shortest right length, 6: 2 c - 0.001 |L - 6|
    got, _ = hosts.score("shorter_better", [ROW] * 2, ids[:2], tokenizer, group_size=2)
    np.testing.assert_allclose(got, [2, -0.002], atol=1e-12)


def test_groups_that_are_not_whole_are_refused(tokenizer):
    ids = [tokenizer.encode(RIGHT)] * 4
    with pytest.raises(ValueError, match="kimi compares the responses to a prompt.*needs group_size"):
        hosts.score("kimi", [ROW] * 4, ids, tokenizer)
    with pytest.raises(ValueError, match="4 responses are not whole groups of 3"):
        hosts.score("kimi", [ROW] * 4, ids, tokenizer, group_size=3)
    with pytest.raises(ValueError, match="4 responses are not whole groups of 2"):
        hosts.score("kimi", [ROW, ROW | {"problem": "add 1"}] * 2, ids, tokenizer, group_size=2)
    with pytest.raises(KeyError, match="'lcpo' is not known: did you mean 'lcpo_"):
        hosts.score("lcpo", [ROW], ids[:1], tokenizer)
    with pytest.raises(
        ValueError, match="lcpo_max needs a column budget"
    ):  # or it would be plain correctness
        hosts.score("lcpo_max", [{"answer": "9"}], ids[:1], tokenizer)
    with pytest.raises(KeyError, match="needs the field history"):
        hosts.score("hapo_cosine", [ROW], ids[:1], tokenizer)


# Rows -------------------------------------------------------------------------


PROBLEMS = [
    {"id": "a", "problem": "What is $1+1$?", "answer": "2", "level": 3, "subject": "Sums"},
    {"id": "b", "problem": "Roots of $x^2=1$?", "answer": ["1", "-1"], "source": "hand", "level": "hard"},
    {"id": "c", "question": "Which is é?", "choices": ["one", "two", "[3"], "answer": "B"},
    {"id": "d", "passage": "It is so.", "question": "Is it?", "choices": ["yes", "no"], "answer": "A"},
]


@pytest.mark.parametrize("host", data.EXPORTS)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(
    "words", [["--mode", "both", "--copies", "3"], ["--mode", "none"], ["--wording", "tulu"]]
)
def test_exported_rows_read_back_as_they_were(tmp_path, host, suffix, words):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    plain, exported = tmp_path / "rows.jsonl", tmp_path / f"exported.{suffix}"
    for out, more in ((plain, []), (exported, ["--export", host])):
        assert data.main([str(tmp_path / "in.jsonl"), *words, *more, "--out", str(out)]) == 0
    rows = data.load_problems(str(plain))
    assert len(rows) >= 4 and data.load_problems(str(exported)) == rows
    again = str(tmp_path / "again.jsonl")  # and can be annotated anew
    assert data.main([str(exported), "--budgets", "fixed:9", "--out", again]) == 0
    assert {row["budget"] for row in data.load_problems(again)} == {9}


@pytest.mark.parametrize("host", data.EXPORTS)
def test_the_datasets_library_reads_every_export(tmp_path, host, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = data.annotate(
        [data.normalise(data.find_layout(list(p))(p), "t", i) for i, p in enumerate(PROBLEMS)],
        "fixed:9",
        "both",
    )
    written = hosts.export(rows, host)
    for suffix, kind in (("jsonl", "json"), ("parquet", "parquet")):
        path = str(tmp_path / f"rows.{suffix}")
        data.write_rows(written, path)
        found = datasets.load_dataset(kind, data_files=path, split="train")
        assert found.column_names == list(written[0]) and len(found) == 4
        found.save_to_disk(str(tmp_path / suffix))
        assert data.load_problems(str(tmp_path / suffix)) == rows


def test_exported_rows_by_hand():
    rows = [ROW, ROW | {"mode": "max", "answer": "7"}, ROW | {"mode": None, "budget": None}]
    verl = hosts.export(rows, "verl")
    assert [row["reward_model"]["num_tokens"] for row in verl] == [16, -16, -1]
    assert verl[1]["prompt"] == [{"role": "user", "content": ROW["prompt"]}]
    assert verl[1]["extra_info"]["budget"] == 16 and verl[1]["extra_info"]["mode"] == "max"
    assert [row["extra_info"]["index"] for row in verl] == [0, 1, 2]
    found = hosts.export(rows, "open-instruct")
    assert [row["dataset"] for row in found] == [
        ["math", "max_length"],
        ["math", "up_to_max_length"],
        ["math"],
    ]
    assert [row["ground_truth"] for row in found] == [["9", "16"], ["7", "16"], ["9"]]
    assert hosts.export(rows, "trl")[1]["solution"] == "\\boxed{7}"


# TRL -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory, tokenizer):
    """A toy model that has learned to end: some of its answers are right, some are cut off."""
    import torch

    model = prepare.make_model(tokenizer, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [(row["prompt"], row["answer"]) for row in toy_rows(64)]
    turns = [(f"<user> {prompt} <think>", f"=9 </think> {answer} <eos>") for prompt, answer in rows]
    pairs = [[tokenizer.encode(text) for text in turn] for turn in turns]
    for _ in range(25):
        ids, labels = prepare.pad(pairs, tokenizer.pad_token_id)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = str(tmp_path_factory.mktemp("toy") / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def our_rewards(name, rows, responses, tokenizer, **options):
    """What the training loop here makes of the same responses."""
    import methods
    import train_grpo

    args = train_grpo.build_parser().parse_args(["--reward", name])
    args.reward_args, args.advantage_args = options, {}
    group = [{"ids": np.array(ids), "truncated": int(ids[-1] != tokenizer.eos_token_id)} for ids in responses]
    groups = [group[i : i + 4] for i in range(0, len(group), 4)]
    train_grpo.check(groups, rows[::4], tokenizer, args)
    plain = methods.Method(args, tokenizer)
    table, total, _, _ = train_grpo.reward_and_advantage(groups, rows[::4], plain, args, 0)
    return total.reshape(-1), table


def test_two_grpo_steps_in_trl(tmp_path, toy_model, monkeypatch):
    """TRL's own trainer, generation and logging; rewards as our loop gives them for the same tokens."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data.write_rows(hosts.export(toy_rows(16), "trl"), str(tmp_path / "rows.parquet"))
    tokenizer = data.load_tokenizer(toy_model)
    options = {"lcpo_dual": {"alpha_exact": 0.02, "alpha_max": 0.02}, "kimi": {}}
    functions = [hosts.trl_reward(name, tokenizer, 4, **some) for name, some in options.items()]
    seen = []

    def watch(function):
        def wrapped(**arguments):
            rewards = function(**arguments)
            seen.append((function.__name__, arguments, rewards))
            return rewards

        wrapped.__name__ = function.__name__
        return wrapped

    trainer = GRPOTrainer(
        model=toy_model,
        processing_class=tokenizer,
        reward_funcs=[watch(function) for function in functions],
        train_dataset=datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet")),
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=16, num_generations=4,
            max_completion_length=12, logging_steps=1, report_to="none", use_cpu=True, bf16=False, seed=0,
        ),
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any((a != b).any() for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert [name for name, _, _ in seen] == ["lcpo_dual", "kimi"] * 2
    history = [line for line in trainer.state.log_history if "reward" in line]
    for step, (name, given, rewards) in enumerate(seen):
        rows = [{key: given[key][i] for key in ("answer", "kind", "budget", "mode")} for i in range(16)]
        expected, table = our_rewards(name, rows, given["completion_ids"], tokenizer, **options[name])
        np.testing.assert_allclose(rewards, expected, atol=1e-12)
        assert history[step // 2][f"rewards/{name}/mean"] == pytest.approx(np.mean(expected), abs=1e-5)
        # The batch holds right and wrong answers, ended and cut off, or this would show nothing.
        assert 0 < table["correct"].sum() < 16 and len(set(np.ravel(table["length"]))) > 1, table


def test_trls_own_accuracy_reward_reads_our_solutions():
    from trl.rewards import accuracy_reward

    solutions = [row["solution"] for row in hosts.export([ROW, ROW | {"answer": "\\frac{1}{2}"}], "trl")]
    texts = [[{"role": "assistant", "content": f"So \\boxed{{{x}}}"}] for x in ("9", "0.5")]
    assert accuracy_reward(texts, solutions) == [1, 1]
    assert accuracy_reward(texts[::-1], solutions) == [0, 0]


# verl -------------------------------------------------------------------------


def verl_batch(rows, texts, tokenizer):
    """Rollouts as verl's agent loop hands them over: right-padded responses and the data set's columns."""
    import torch
    from verl import DataProto

    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    responses = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    prompts = torch.ones(len(ids), 3, dtype=torch.long)
    tensors = {"prompts": prompts, "responses": responses, "attention_mask": torch.cat([prompts, mask], 1)}
    names = ("data_source", "reward_model", "extra_info")
    others = {name: np.array([row[name] for row in rows], dtype=object) for name in names}
    return DataProto.from_dict(tensors=tensors, non_tensors=others)


def verl_config(words):
    """verl's own configuration with command-line overrides, as main_ppo composes it."""
    import verl
    from hydra import compose, initialize_config_dir

    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(config_dir=folder, version_base=None):
        return compose("ppo_trainer", overrides=words)


def run_manager(manager, batch):
    import asyncio

    manager.loop = asyncio.new_event_loop()
    return [manager.loop.run_until_complete(manager.run_single(batch[i : i + 1])) for i in range(len(batch))]


@pytest.fixture(scope="module")
def verl_rows(tmp_path_factory, tokenizer):
    """(folder with rows.parquet and a tokenizer, the rows)."""
    folder = tmp_path_factory.mktemp("verl")
    rows = [ROW, ROW | {"budget": 8, "mode": "max"}, ROW | {"budget": None, "mode": None}]
    rows = [row | {"prompt": data.budget_prompt(row["problem"], row["budget"], row["mode"])} for row in rows]
    data.write_rows(hosts.export(rows, "verl"), str(folder / "rows.parquet"))
    tokenizer.save_pretrained(folder / "model")
    return folder, rows


HOSTS_PY = os.path.join(ROOT, "integrations", "hosts.py")
CUSTOM = [f"reward.custom_reward_function.path={HOSTS_PY}"]
OPTIONS = "+reward.custom_reward_function.reward_kwargs."
OURS = ["reward.reward_manager.source=importlib", "reward.reward_manager.name=VerlRewardManager"]
OURS += [f"reward.reward_manager.module.path={HOSTS_PY}"]


@pytest.mark.hosts
def test_verls_dataset_reads_our_parquet(verl_rows, tokenizer):
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    folder, rows = verl_rows
    words = [
        f"data.train_files={folder / 'rows.parquet'}",
        "data.filter_overlong_prompts=True",
        f"+data.cache_dir={folder}",
    ]
    found = RLHFDataset(str(folder / "rows.parquet"), tokenizer, verl_config(words).data)
    assert len(found) == 3
    for item, row in zip(found, rows, strict=True):
        assert item["raw_prompt"] == [{"role": "user", "content": row["prompt"]}]
        assert item["reward_model"]["ground_truth"] == "9" and item["data_source"] == "toy"
        assert {key: item["extra_info"][key] for key in ("budget", "mode")} == {
            key: row[key] for key in ("budget", "mode")
        }
    batch = collate_fn([found[i] for i in range(3)])
    assert [info["budget"] for info in batch["extra_info"]] == [16, 8, None] and list(batch["index"]) == [
        0,
        1,
        2,
    ]


@pytest.mark.hosts
@pytest.mark.parametrize("words", [[], OURS], ids=["stock manager", "ours"])
def test_verls_reward_manager_returns_our_scores(verl_rows, tokenizer, words):
    from verl.trainer.ppo.reward import load_reward_manager

    folder, rows = verl_rows
    options = [OPTIONS + "reward=lcpo_dual", OPTIONS + "alpha_exact=0.02", OPTIONS + "alpha_max=0.1"]
    options += [] if words else [OPTIONS + f"tokenizer={folder / 'model'}"]
    manager = load_reward_manager(verl_config([*CUSTOM, *options, *words]), tokenizer)
    assert type(manager).__name__ == ("VerlRewardManager" if words else "NaiveRewardManager")
    texts = [RIGHT, RIGHT, RIGHT, WRONG, RIGHT.removesuffix(" <eos>")]
    batch = [hosts.export(rows, "verl")[i] for i in (0, 1, 2, 0, 0)]
    got = run_manager(manager, verl_batch(batch, texts, tokenizer))
    # exact 16: 1 - 0.02 * 10; max 8: 0.5 + 0.1 * 2; no budget: 1; exact and wrong, 8 tokens: -0.02 * 8
    expected, lengths = [0.8, 0.7, 1, -0.16, -0.02 * 11], [6, 6, 6, 8, 5]
    if not words:
        # A stock manager hands over text alone: the answer that was cut off looks complete.
        expected[4], lengths[4] = 0.8, 6
    np.testing.assert_allclose([one["reward_score"] for one in got], expected, atol=1e-6)
    assert [one["reward_extra_info"]["length"] for one in got] == lengths
    scores = type(manager).assemble_rm_scores(
        verl_batch(batch, texts, tokenizer), [one["reward_score"] for one in got]
    )
    np.testing.assert_allclose(scores.sum(1), expected, atol=1e-6)


@pytest.mark.hosts
def test_verls_reward_workers_in_ray(verl_rows, tokenizer, tmp_path, monkeypatch):
    """The real thing short of a GPU: Ray starts a reward worker, which loads hosts.py by its path alone."""
    import ray
    from verl.experimental.reward_loop import RewardLoopManager

    folder, rows = verl_rows
    monkeypatch.chdir(tmp_path)
    words = [
        *CUSTOM,
        *OURS,
        OPTIONS + "reward=lcpo_dual",
        OPTIONS + "alpha_exact=0.02",
        OPTIONS + "alpha_max=0.1",
    ]
    words += [f"actor_rollout_ref.model.path={folder / 'model'}", "reward.num_workers=1"]
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        batch = [hosts.export(rows, "verl")[i] for i in (0, 1, 2, 0)]
        found = RewardLoopManager(verl_config(words)).compute_rm_score(
            verl_batch(batch, [RIGHT, RIGHT, RIGHT, RIGHT.removesuffix(" <eos>")], tokenizer)
        )
    finally:
        ray.shutdown()
    scores = found.batch["rm_scores"]
    np.testing.assert_allclose(scores.sum(1), [0.8, 0.7, 1, -0.02 * 11], atol=1e-6)
    assert (scores != 0).sum(1).tolist() == [1] * 4  # on the last token of each
    assert found.non_tensor_batch["acc"].tolist() == [1, 1, 1, 0]


@pytest.mark.hosts
def test_group_rewards_in_verl(verl_rows, tokenizer):
    """verl scores one response at a time: an error that says so."""
    from verl.trainer.ppo.reward import load_reward_manager

    rows = hosts.export(verl_rows[1], "verl")
    batch = verl_batch([rows[0], rows[1], rows[0], rows[1]], [RIGHT, RIGHT, WRONG, RIGHT], tokenizer)
    manager = load_reward_manager(verl_config([*CUSTOM, OPTIONS + "reward=kimi", *OURS]), tokenizer)
    with pytest.raises(ValueError, match="kimi compares the responses"):
        run_manager(manager, batch)


@pytest.mark.hosts
def test_the_verl_recipe_is_a_configuration_of_verl(verl_rows, tokenizer):
    """verl takes every flag of integrations/verl_l1_exact.sh, and its reward is L1's. Nothing is launched."""
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.utils.config import validate_config

    with open(os.path.join(ROOT, "integrations", "verl_l1_exact.sh")) as f:
        text = f.read().replace("\\\n", " ")
    for name, value in {"HERE": ROOT, "MODEL": "m", "NODES": "2", "GPUS": "8"}.items():
        text = text.replace(f"${name}", value)
    command = next(line for line in text.splitlines() if line.startswith("python -m verl.trainer.main_ppo"))
    with open(os.path.join(ROOT, "docs", "scaling.md")) as f:
        larger = re.search(r"For a model of 14B.*?```sh\n(.*?)\n```", f.read(), re.S)[1]
    config = verl_config([*command.split()[3:], *larger.split()])
    validate_config(config, use_reference_policy=True, use_critic=False)
    assert not [key for key in OmegaConf.missing_keys(config) if key.startswith("actor_rollout_ref.rollout")]
    manager = load_reward_manager(config, tokenizer)
    batch = verl_batch(hosts.export(verl_rows[1], "verl")[:1], [RIGHT], tokenizer)
    assert run_manager(manager, batch)[0]["reward_score"] == pytest.approx(1 - 3e-4 * 10)
    assert config.data.max_response_length == 4096 and config.actor_rollout_ref.rollout.n == 16


# open-instruct -------------------------------------------------------------------------


def test_open_instruct_stock_verifiers_sum_to_our_tulu_rewards(tokenizer):
    """Its documented formula on our rows: weights 1, verifiers added, times 10; |L - target| / 8192."""
    rows = [ROW, ROW | {"mode": "max", "budget": 4}]
    for row, reward in zip(hosts.export(rows, "open-instruct"), ("tulu_exact", "tulu_upto"), strict=True):
        length, target = 6, float(row["ground_truth"][1])
        gap = abs(length - target) if row["dataset"][1] == "max_length" else max(length - target, 0)
        stock = 10 * (1 + 1 - gap / 8192)
        ours = hosts.open_instruct_score(tokenizer.encode(RIGHT), row["row"], tokenizer, reward)
        assert 10 * ours == pytest.approx(stock)


def test_open_instruct_label_must_be_a_row(tokenizer):
    for label in ("16", '{"budget": 16}'):
        with pytest.raises(ValueError, match="is not a row: take the column `row`"):
            hosts.open_instruct_score([1], label, tokenizer)


# The blocks of docs/hosts.md -------------------------------------------------------------------------


def block(name):
    """The code that docs/hosts.md offers under `<!-- use it: NAME -->`."""
    with open(os.path.join(ROOT, "docs", "hosts.md"), encoding="utf-8") as f:
        return re.search(rf"<!-- use it: {name} -->\n```\w+\n(.*?)```", f.read(), re.S)[1]


def swap(text, pairs):
    for old, new in pairs.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def test_page_plain_python():
    names = {}
    exec(block("python"), names)
    np.testing.assert_allclose(names["rewards"], [[0.97, -0.03]], atol=1e-12)
    np.testing.assert_allclose(names["advantages"], [[np.sqrt(0.5), -np.sqrt(0.5)]], atol=1e-5)


def test_page_trl(tmp_path, toy_model, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(os.path.join(ROOT, "integrations"))  # the page's reader has copied hosts.py
    data.write_rows(hosts.export(toy_rows(8), "trl"), "rows.parquet")
    small = 'max_completion_length=12, max_steps=1, use_cpu=True, bf16=False, report_to="none"'
    model = "agentica-org/DeepScaleR-1.5B-Preview"
    names = {}
    exec(swap(block("trl"), {model: toy_model, "max_completion_length=4096": small}), names)
    assert np.isfinite(names["trainer"].state.log_history[-1]["train_loss"])


def test_page_open_instruct(tmp_path, tokenizer, monkeypatch):
    """VerifierFunction and VerificationResult stand in for open-instruct's: their documented fields only."""
    monkeypatch.syspath_prepend(os.path.join(ROOT, "integrations"))  # the page's reader has copied hosts.py

    class VerifierFunction:
        def __init__(self, name, weight=1.0, verifier_config=None):
            self.name, self.weight = name, weight

    tokenizer.save_pretrained(tmp_path)
    names = {"VerifierFunction": VerifierFunction, "VerificationResult": SimpleNamespace}
    exec(swap(block("open-instruct"), {"agentica-org/DeepScaleR-1.5B-Preview": str(tmp_path)}), names)
    (found,) = VerifierFunction.__subclasses__()
    verifier, row = found(None), hosts.export([ROW], "open-instruct")[0]
    mapped = eval(re.search(r"rows.map\((.+)\)\n", block("open-instruct"))[1])(row)
    assert mapped["dataset"] == [verifier.name]
    result = verifier(tokenizer.encode(RIGHT), RIGHT, mapped["ground_truth"][0], query="add 3 6")
    assert result.score == pytest.approx(1 - 3e-4 * 10)


@pytest.mark.hosts
def test_page_verl(tmp_path, tokenizer, monkeypatch):
    """The rows of its first command in verl's data set, the flags of its second in verl's reward loop."""
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.utils.dataset.rl_dataset import RLHFDataset

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(json.dumps({"problem": "add 3 6", "answer": "9"}) + "\n")
    rows, train = block("verl").replace("\\\n", " ").splitlines()
    assert data.main(swap(rows, {"python data.py ": "", "deepscaler": "in.jsonl"}).split()) == 0
    config = verl_config(
        swap(train, {"python -m verl.trainer.main_ppo": "", "=hosts.py": f"={HOSTS_PY}"}).split()
    )
    (item,) = RLHFDataset(config.data.train_files, tokenizer, config.data)
    got = run_manager(load_reward_manager(config, tokenizer), verl_batch([item], [RIGHT], tokenizer))
    assert got[0]["reward_score"] == pytest.approx(1 - 3e-4 * (item["extra_info"]["budget"] - 6))


# Several nodes -------------------------------------------------------------------------------


def test_two_nodes(tiny, tmp_path):
    """The launch of docs/scaling.md, with two launchers on this machine as the two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows = os.path.join(ROOT, "tests", "data", "math_train_small.jsonl.gz")
    launch = (
        f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {port}"
    )
    flags = "--budgets bucket:8,16 --max-tokens 24 --prompts-per-step 4 --group-size 4 --sampler hf --steps 2"
    flags += f" --model {tiny} --data {rows} --out {tmp_path / 'out'}"
    command = f"{launch} --node_rank RANK train_grpo.py {flags}"
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [
        subprocess.Popen([sys.executable, *command.replace("RANK", str(rank)).split()], **options)
        for rank in (0, 1)
    ]
    told = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "2 x cpu" in told[0] and "2 x cpu" not in told[1]
    with open(tmp_path / "out" / "metrics.jsonl") as f:
        assert len(list(f)) == 2
