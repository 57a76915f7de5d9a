"""Every preset of data.py on a local copy of its hub layout, read by the real `datasets` library.

The columns are those of the published sets, the texts are invented. Where a layout could not be confirmed
data.py says so beside the preset (`?`, `~`); the columns here are then the ones it expects.
"""

import pytest

import data

STEPS = "Let's think step by step and output the final answer within \\boxed{}."


def turns(text):
    return [{"content": text, "role": "user"}]


def ai2(text, gold, verifiers):
    return {"messages": turns(text), "ground_truth": gold, "dataset": verifiers}


DEEPSCALER = {"problem": "Add 2 and 2.", "answer": "4", "solution": "It is $2+2=\\boxed{4}$."}
EURUS2 = {
    "data_source": "numina_olympiads",
    "prompt": [{"content": "When tackling complex tasks, ...", "role": "system"}, *turns("Add 2 and 2.")],
    "ability": "math",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"index": 0, "split": "train"},
}
EURUS2_CODE = EURUS2 | {
    "ability": "code",
    "reward_model": {"ground_truth": '{"inputs": []}', "style": "rule"},
}
EXACT = f"Add 2 and 2. {STEPS} Think for 300 tokens."
AIMO = {"id": 0, "problem": "Add 2 and 2.", "solution": "\\boxed{4}", "answer": "4", "url": "u"}
GPQA = {
    "Question": "Which is it?",
    "Correct Answer": "right",
    "Record ID": "rec1",
    "Subdomain": "Physics (general)",
}
GPQA |= {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)} | {"High-level domain": "Physics"}
LSAT = {"query": "P Q: Which?\nAnswer Choices: (A)one (B)two (C)three (D)four (E)five\nA:", "gold": [4]}
LSAT["choices"] = ["(A)one", "(B)two", "(C)three", "(D)four", "(E)five"]
MMLU = {"question": "Which is it?", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 3}
OLYMPIAD = {
    "id": 1606, "question": "Roots of $x^2=1$?", "solution": ["..."], "final_answer": ["$1$", "$-1$"],
    "context": None,
    **{f"image_{i}": None for i in range(1, 6)}, "modality": "Text-only", "difficulty": "Competition",
    "is_multiple_answer": True, "unit": None, "answer_type": "Numerical", "error": None,
    "question_type": "Open-ended", "subfield": "Algebra", "subject": "Math", "language": "English",
}  # fmt: skip
OMNI = {
    "domain": ["Mathematics -> Algebra -> Sums"],
    "difficulty": 4.5,
    "problem": "Add 2 and 2.",
    "answer": "4",
}
OMNI |= {"solution": "...", "source": "imo_shortlist"}
GSM_PLUS = {
    "question": "Add 2 and 2.",
    "solution": "...",
    "answer": "4",
    "perturbation_type": "digit expansion",
}
GSM_PLUS |= {"seed_question": "Add 1 and 1.", "seed_solution": "...", "seed_answer": "2"}
R300 = ai2("Add 2 and 2.\nThink for 300 tokens.", ["4", "300"], ["MATH", "max_length"])
R1024 = ai2("Add 2 and 2.\nThink for 1024 tokens.", ["4", "1024"], ["MATH", "max_length"])
FOUR = {"problem": "Add 2 and 2.", "answer": "4", "kind": "math"}
E300 = FOUR | {"budget": 300, "mode": "exact"}

# preset: (a record, what must come out of it)
SETS = {
    "deepscaler": (DEEPSCALER, FOUR),
    "eurus2": (EURUS2, FOUR | {"source": "numina_olympiads", "prompt": "Add 2 and 2.", "budget": None}),
    "eurus2_ai2": (ai2("Add 2 and 2.", "4", "MATH"), FOUR | {"budget": None, "mode": None}),
    "math500": ({**DEEPSCALER, "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
                FOUR | {"id": "test/algebra/1.json", "level": 2, "subject": "Algebra"}),
    "math": ({"problem": "Add 2 and 2.", "level": "Level 5", "type": "Algebra", "solution": "$\\boxed{4}$"},
             FOUR | {"level": 5, "subject": "Algebra"}),
    "aime2022_2024": (AIMO, FOUR | {"id": "0"}),
    "aime2024": (AIMO | {"year": "2024"}, FOUR | {"id": "0"}),
    "aime2025": ({"question": "Add 2 and 2.", "answer": "4"}, FOUR),
    "amc": ({"id": 0, "problem": "Add 2 and 2.", "answer": 4.0, "url": "u"}, FOUR | {"id": "0"}),
    "amc23": ({"id": 0, "question": "Add 2 and 2.", "answer": "4.0", "url": "u"}, FOUR | {"id": "0"}),
    "olympiadbench": (OLYMPIAD, {"id": "1606", "answer": ["$1$", "$-1$"], "subject": "Algebra"}),
    "minerva": ({"question": "Add 2 and 2.", "answer": "4"}, FOUR),
    "gpqa": (GPQA, {"id": "rec1", "kind": "choice"}),
    **dict.fromkeys(("lsat_ar", "lsat_lr", "lsat_rc"),
                    (LSAT, {"problem": LSAT["query"], "answer": "E", "kind": "choice",
                            "choices": ["one", "two", "three", "four", "five"]})),
    **dict.fromkeys(("mmlu", "mmlu_1000"),
                    (MMLU, {"problem": "Which is it?\n\nOptions:\nA. w\nB. x\nC. y\nD. z", "answer": "D"})),
    "gsm8k": ({"question": "Add 2 and 2.", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, FOUR),
    "omni_math": (OMNI, FOUR | {"level": 4.5, "subject": "Mathematics -> Algebra -> Sums"}),
    "svamp": ({"ID": "chal-1", "Body": "Two and two.", "Question": "How many?", "Equation": "( 2.0 + 2.0 )",
               "Answer": "4.0", "Type": "Addition", "question_concat": "Two and two. How many?"},
              FOUR | {"id": "chal-1", "problem": "Two and two. How many?"}),
    "gsm_plus": (GSM_PLUS, FOUR),
}  # fmt: skip


def hub_folder(folder, records, configs, split, kind):
    """A repository as the hub has it: one file per configuration, named in the README's header."""
    import datasets

    header = ["---", "configs:"]
    for config in configs or ("default",):
        path = f"{config}-{split}.{kind}"
        table = datasets.Dataset.from_list(records)
        table.to_parquet(folder / path) if kind == "parquet" else table.to_json(folder / path)
        header += [f"- config_name: {config}", f"  data_files:\n  - split: {split}\n    path: {path}"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))


def check(found, expected, copies=1):
    assert len(found) == copies
    for row in found:
        assert {key: row.get(key) for key in expected} == expected
    return found[0]


@pytest.mark.parametrize("kind", ["parquet", "json", "save_to_disk"])
@pytest.mark.parametrize("preset", data.PRESETS)
def test_preset(preset, kind, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    record, expected = SETS[preset]
    hub_id, configs, split = data.PRESETS[preset]
    records = [record, EURUS2_CODE] if preset == "eurus2" else [record]
    if kind == "save_to_disk":
        configs = ()
        datasets.DatasetDict({split: datasets.Dataset.from_list(records)}).save_to_disk(str(tmp_path / "hub"))
    else:
        hub_folder(tmp_path / "hub", records, configs, split, kind)
    monkeypatch.setitem(data.PRESETS, preset, (str(tmp_path / "hub"), configs, split))
    row = check(data.load_problems(preset), expected, max(1, len(configs)))
    if preset == "gpqa":
        assert row["choices"]["ABCD".index(row["answer"])] == "right" and len(row["choices"]) == 4
    # So is any other copy of the set.
    if len(configs) < 2:
        again = data.load_problems(str(tmp_path / "hub"), split=split)
        assert [r | {"source": 0, "id": 0} for r in again] == [row | {"source": 0, "id": 0}]


def test_a_set_saved_to_disk_without_splits(tmp_path):
    import datasets

    datasets.Dataset.from_list([DEEPSCALER]).save_to_disk(str(tmp_path / "one"))
    check(data.load_problems(str(tmp_path / "one")), FOUR)
    with pytest.raises(data.BadInput, match="one has the splits train: choose one with --split"):
        data.load_problems(str(tmp_path / "one"), split="test")


# What L1 and AI2 published, beside the rows of test_data.py. The old scripts pushed both forms to one hub id.
@pytest.mark.parametrize(
    "record, expected",
    [
        (ai2("Add 2 and 2.\nUse no more than 300 tokens.", "4<sep>300", "MATH,max_length"), E300),
        (R300, E300),
        (EURUS2 | {"prompt": turns(EXACT),
                   "reward_model": {"style": "rule", "ground_truth": "4", "num_tokens": 300}},
         E300 | {"prompt": EXACT}),
        (EURUS2 | {"prompt": turns(EXACT.replace("for 300", "for maximum 300")),
                   "reward_model": {"style": "rule", "ground_truth": "4", "num_tokens": -300}},
         E300 | {"mode": "max"}),
        (EURUS2 | {"prompt": turns(f"Add 2 and 2. {STEPS}"),
                   "reward_model": {"style": "rule", "ground_truth": ["4", "four"], "num_tokens": -1}},
         FOUR | {"answer": ["4", "four"], "budget": None, "mode": None}),
        # Stock verl: the budget in extra_info.
        (EURUS2 | {"prompt": turns(EXACT), "extra_info": {"index": 3, "budget": 300, "mode": "exact"}},
         E300),
    ],
)  # fmt: skip
def test_published_layouts_from_parquet(tmp_path, record, expected):
    import datasets

    datasets.Dataset.from_list([record]).to_parquet(tmp_path / "rows.parquet")
    check(data.load_problems(str(tmp_path / "rows.parquet")), expected)


def test_every_preset_has_a_fixture():
    assert set(SETS) == set(data.PRESETS)
