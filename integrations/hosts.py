"""The rows and rewards of this project inside other trainers: TRL, verl, open-instruct.

Copy this file with data.py, rewards.py and verifier.py, used as they are. Rewards are those of REWARDS,
lengths are counted from token ids with their end token, and a response without an end token is truncated and
wrong, all as in the training loop here. Fields that a reward needs beyond row and text (history, ref_length,
...) are not there: it says which one it misses. docs/hosts.md has the lines to copy.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

# verl loads this file by its path, in Ray workers that do not know its folder.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import load_tokenizer, same_types, stop_ids  # noqa: E402
from rewards import REWARDS  # noqa: E402
from verifier import check_answers  # noqa: E402

load_once = lru_cache(load_tokenizer)
FIELDS = ("id", "problem", "prompt", "answer", "kind", "budget", "mode", "choices")  # what makes a row


def score(reward, rows, responses, tokenizer, group_size=1, step=0, require_think=False, timeout=5.0,
          **options) -> tuple[list[float], dict]:  # fmt: skip
    """Rewards of responses (token ids) to `rows`, one a response; and the rollouts they were made from.

    Rows are those of data.py: answer, budget, mode, kind, choices. The responses to one prompt stand side by
    side, `group_size` of them; ValueError where a reward that compares them does not get them so.
    """
    function = REWARDS[reward]
    if function.compares_group and group_size < 2:
        told = "TRL needs group_size; verl and open-instruct score one at a time"
        raise ValueError(f"{reward} compares the responses to a prompt, and sees one here: {told}")
    if "budget" in function.needs and not all("budget" in row for row in rows):
        raise ValueError(f"{reward} needs a column budget (null: none is asked for): use data.py --export")
    rows = [{key: row.get(key) for key in FIELDS} for row in rows]
    firsts = rows[::group_size]
    if len(rows) % group_size or any(row != firsts[i // group_size] for i, row in enumerate(rows)):
        raise ValueError(f"{len(rows)} responses are not whole groups of {group_size} to one prompt each")
    ends = stop_ids(None, tokenizer)
    responses = [[int(token) for token in ids] for ids in responses]
    stopped = [bool(ids) and ids[-1] in ends for ids in responses]
    # Special tokens stay: </think> is one in many models, and parts thinking from answer.
    cut = [ids[:-1] if end else ids for ids, end in zip(responses, stopped, strict=True)]
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in cut]
    kinds = [row["kind"] or "math" for row in rows]
    answers, choices = [row["answer"] for row in rows], [row["choices"] for row in rows]
    correct, _ = check_answers(texts, answers, kinds, choices, require_think, timeout)
    table = {"correct": np.logical_and(correct, stopped), "truncated": np.logical_not(stopped)}
    table["length"] = [len(ids) for ids in responses]
    table = {key: np.array(values, dtype=np.int64).reshape(-1, group_size) for key, values in table.items()}
    table["budget"] = np.array([row["budget"] or np.nan for row in firsts], dtype=np.float64)
    table["text"] = [texts[i : i + group_size] for i in range(0, len(texts), group_size)]
    table |= {"mode": [row["mode"] for row in firsts], "step": step, "require_think": require_think}
    return function(table, **options).reshape(-1).tolist(), table


def trl_reward(reward: str, tokenizer, group_size: int = 1, **options) -> Callable:
    """A reward function for TRL's GRPOTrainer; the columns of its data set are those of --export trl.

    `group_size`: its num_generations, for rewards that compare; each process must then hold whole groups.
    """

    def function(prompts, completions, completion_ids, trainer_state=None, **columns):
        columns = {key: columns[key] for key in FIELDS if key in columns} | {"prompt": prompts}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        step = trainer_state.global_step if trainer_state else 0
        return score(reward, rows, completion_ids, tokenizer, group_size, step, **options)[0]

    function.__name__ = reward  # the name of its column in the log
    return function


def compute_score(data_source, solution_str, ground_truth, extra_info=None, reward="lcpo_exact",
                  tokenizer=None, ids=None, **options) -> dict:  # fmt: skip
    """verl's custom_reward_function, one response a call: {"score", "acc", "length"}; extra_info has the row.

    Stock managers pass text without special tokens: it is encoded again by `tokenizer` (a name or path, from
    reward_kwargs) and taken for complete. VerlRewardManager passes the ids themselves.
    """
    if tokenizer is None:
        raise ValueError("the length needs a tokenizer: reward_kwargs.tokenizer, or VerlRewardManager")
    tokenizer = load_once(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if ids is None:
        ids = [*tokenizer.encode(solution_str, add_special_tokens=False), tokenizer.eos_token_id]
    row = {**(extra_info or {}), "answer": ground_truth}
    total, table = score(reward, [row], [ids], tokenizer, **options)
    return {"score": total[0], "acc": float(table["correct"][0, 0]), "length": int(table["length"][0, 0])}


@lru_cache
def __getattr__(name: str) -> type:
    """VerlRewardManager: compute_score with the ids that were generated.

    It is made when verl asks for it by its name: nobody else needs verl to import this file.
    """
    if name != "VerlRewardManager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

    class VerlRewardManager(RewardManagerBase):
        def __init__(self, config, tokenizer, compute_score, **_):
            super().__init__(config, tokenizer, compute_score)

        async def run_single(self, data):
            item = data[-1:][0]  # as the stock managers: the last sequence of a rollout
            ids, row = item.batch["responses"], item.non_tensor_batch
            ids = ids[: int(item.batch["attention_mask"][-len(ids) :].sum())].tolist()
            gold, info = row["reward_model"]["ground_truth"], row["extra_info"]
            known = {"tokenizer": self.tokenizer, "ids": ids}
            call = partial(self.compute_score, row["data_source"], None, gold, info, **known)
            result = await self.loop.run_in_executor(None, call)  # the check may wait for a worker process
            return {"reward_score": result["score"], "reward_extra_info": result}

    return VerlRewardManager


def open_instruct_score(ids: list, label: str, tokenizer, reward: str = "lcpo_exact", **options) -> float:
    """The score of an open-instruct verifier; `label` is the column `row` of --export open-instruct.

    open-instruct multiplies it by the verifier's weight and by --verification_reward (10). It hands over one
    response at a time, so rewards that compare a group raise ValueError.
    """
    row = json.loads(label)
    if not isinstance(row, dict) or "answer" not in row:
        raise ValueError(f"{label[:40]!r} is not a row: take the column `row` of --export open-instruct")
    return score(reward, [row], [ids], tokenizer, **options)[0][0]


# ---- Rows: what data.py --export writes. data.py reads all of them back.


def user_turn(row: dict) -> list[dict]:
    """The prompt as a chat: the turns before it, if the row has any, and the user's."""
    return [*(row.get("turns") or ()), {"role": "user", "content": row["prompt"]}]


def to_verl(row: dict, index: int) -> dict:
    """verl's columns, L1's num_tokens (negative: a maximum, -1: none); the rest of the row in extra_info."""
    tokens = -1 if row["budget"] is None else row["budget"] * (1 if row["mode"] == "exact" else -1)
    keys = ("id", "problem", "kind", "budget", "mode", "level", "subject", "choices")
    info = {"split": "train", "index": index} | {key: row.get(key) for key in keys}
    reward = {"style": "rule", "ground_truth": row["answer"], "num_tokens": tokens}
    found = {"data_source": row["source"], "prompt": user_turn(row), "ability": "math"}
    return found | {"reward_model": reward, "extra_info": info}


def to_trl(row: dict, index: int) -> dict:
    """The row with a conversational prompt; TRL's own accuracy_reward reads `solution`."""
    first = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
    return row | {"prompt": user_turn(row), "solution": f"\\boxed{{{first}}}"}


def to_open_instruct(row: dict, index: int) -> dict:
    """messages, and parallel lists of ground truths and verifiers for the stock ones (of several answers the
    first); `row` is the label of open_instruct_score."""
    first = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
    lengths = {"exact": ["max_length"], "max": ["up_to_max_length"], None: []}  # max_length asks for EXACT
    golds = [first] + [str(row["budget"])] * (row["budget"] is not None)
    names = ["math", *lengths[row["mode"]]]
    text = json.dumps(row, ensure_ascii=False)
    return {"messages": user_turn(row), "ground_truth": golds, "dataset": names, "row": text}


EXPORTS = {"verl": to_verl, "trl": to_trl, "open-instruct": to_open_instruct}


def export(rows: list[dict], host: str) -> list[dict]:
    """Rows in the columns of another trainer, every column of one type, as Parquet and `datasets` want it."""
    return [EXPORTS[host](row, i) for i, row in enumerate(same_types(rows))]
