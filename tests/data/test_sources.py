"""Files, folders, generators and hub names -> rows with question and gold answer."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rl_lora.config import SourceSection
from rl_lora.data.generators import chain_steps, generated_rows, reasoning_gym_rows
from rl_lora.data.messages import Message
from rl_lora.data.row_formats import DataRow, last_boxed, parse_rows
from rl_lora.data.sources import LOADERS, has_eval_part, load_source, question_key
from rl_lora.errors import UserError


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_one(raw: dict[str, Any]) -> DataRow:
    (row,) = parse_rows([raw], "test.jsonl")
    return row


# --- layouts --------------------------------------------------------------------------------------


def test_gsm8k_gold_follows_the_hashes_and_the_solution_loses_its_marks() -> None:
    row = read_one(
        {"question": "How many?", "answer": "1000+80 = <<1000+80=1080>>1080 in all.\n#### 1,080"}
    )
    assert row == DataRow("How many?", "1080", "1000+80 = 1080 in all.")


def test_math_gold_is_the_last_balanced_box() -> None:
    solution = r"First \boxed{1}, no: \boxed{\frac{3}{\sqrt{4}}}. An unclosed \boxed{5"
    assert read_one({"problem": "p", "solution": solution}) == DataRow(
        "p", r"\frac{3}{\sqrt{4}}", solution
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed 7.", "7"),
        (r"$\fbox{a{b}c}$", "a{b}c"),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        ("no box", None),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_math_answer_column_stands_before_the_box_and_a_null_takes_the_box() -> None:
    raw = {"problem": "p", "solution": r"\boxed{2}", "answer": "3"}
    assert read_one(raw).reference == "3"
    assert read_one({**raw, "answer": None}).reference == "2"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("025", "25"), (25, "25"), (51.0, "51"), (0.000001, "0.000001"), ("0", "0"), (7.5, "7.5")],
)
def test_answers_are_numbers_as_people_write_them(answer: object, expected: str) -> None:
    assert read_one({"problem": "p", "answer": answer}).reference == expected


@pytest.mark.parametrize("answer", [None, "", "  ", float("nan"), []])
def test_null_golds_are_none(answer: object) -> None:
    assert read_one({"problem": "p", "answer": answer}).reference is None


def test_svamp_joins_body_and_question_and_solves_by_its_equation() -> None:
    raw = {
        "Body": "Each pack costs 76 dollars. If there is a discount of 25 dollars",
        "Question": "How much is a pack?",
        "Equation": "( 76.0 - 25.0 )",
        "Answer": 51.0,
    }
    assert read_one(raw) == DataRow(
        "Each pack costs 76 dollars. If there is a discount of 25 dollars, How much is a pack?",
        "51",
        "76 - 25 = 51",
    )


def test_masked_svamp_gets_its_numbers_back() -> None:
    raw = {
        "Question": "bob has number0 books on each of his number1 shelves , how many is that ?",
        "Numbers": "56.0 9.0",
        "Equation": "* number0 number1",
        "Answer": "504.0",
    }
    expected = "bob has 56 books on each of his 9 shelves, how many is that?"
    assert read_one(raw) == DataRow(expected, "504")


def test_mawps() -> None:
    assert read_one({"input": "How many?", "target": 43.0}) == DataRow("How many?", "43")


def test_chat_prompts_lose_their_own_answer_instruction() -> None:
    suffix = "Please reason step by step, and put your final answer within \\boxed{{}}."
    raw = {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"What is $1+1$? {suffix}"},
        ],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    row = read_one(raw)
    assert (row.question, row.reference) == ("What is $1+1$?", "2")
    assert row.messages == (Message("system", "Be brief."), Message("user", "What is $1+1$?"))


def test_aime_prompts_lose_their_answer_instruction() -> None:
    text = "Find $n$.\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert read_one({"prompt": text, "answer": 70}) == DataRow("Find $n$.", "70")


def test_column_map_reaches_into_objects() -> None:
    raws = [{"q": {"text": "How many?"}, "gold": {"value": "so\n#### 12"}}]
    rows = parse_rows(raws, "x.jsonl", "q.text", "gold.value")
    assert rows == [DataRow("How many?", "12", "so")]


def test_mapped_column_may_have_a_dot_in_its_name() -> None:
    assert parse_rows([{"a.b": "q", "c": "1"}], "x", "a.b", "c") == [DataRow("q", "1")]


def test_prompt_that_is_no_chat_has_no_question() -> None:
    raw = {"prompt": ["text", {"role": "system"}], "reward_model": {"ground_truth": "2"}}
    assert read_one(raw).question == ""


def test_one_mapped_column_leaves_the_other_to_the_layout() -> None:
    rows = parse_rows([{"question": "q", "answer": "1", "short": "2"}], "x.jsonl", answer="short")
    assert rows == [DataRow("q", "2")]


# --- files and folders ----------------------------------------------------------------------------


def test_every_file_format_gives_the_same_rows(tmp_path: Path) -> None:
    raws = [{"question": "How many?", "answer": "12"}, {"question": "And now?", "answer": "13"}]
    write_jsonl(tmp_path / "a.jsonl", raws)
    (tmp_path / "b.json").write_text(json.dumps(raws))
    (tmp_path / "c.json").write_text(json.dumps({"data": raws}))
    write_jsonl(tmp_path / "d.json", raws)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raws), tmp_path / "e.parquet")
    with (tmp_path / "f.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(raws)
    for name in ("a.jsonl", "b.json", "c.json", "d.json", "e.parquet", "f.csv"):
        loaded = load_source(SourceSection(name=str(tmp_path / name)), "train")
        assert loaded.rows == [DataRow("How many?", "12", row=0), DataRow("And now?", "13", row=1)]


def test_known_defects_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"problem": "What is $x$?", "answer": "1"},
        {"problem": "What is  $ x $?", "answer": "1"},  # the same but for blanks
        {"problem": "What is $x$?", "answer": "2"},
        {"problem": "What is $y$?", "answer": None},
        {"problem": " ", "answer": "3"},
        {"problem": "What is $z$?", "answer": "4"},
    ]
    loaded = load_source(SourceSection(name=str(write_jsonl(tmp_path / "m.jsonl", rows))), "train")
    assert [row.row for row in loaded.rows] == [0, 5]
    assert loaded.num_read == 6
    assert loaded.dropped == {
        "repeated": 1,
        "repeated with another answer": 1,
        "without gold answer": 1,
        "without question": 1,
    }


def test_num_rows_takes_the_first(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(9)]
    source = SourceSection(name=str(write_jsonl(tmp_path / "m.jsonl", rows)), num_rows=4)
    assert [row.reference for row in load_source(source, "train").rows] == ["0", "1", "2", "3"]


def make_folder(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        write_jsonl(folder / name, [{"question": f"from {name}", "answer": "1"}])
    return folder


def questions(folder: Path, role: Any, split: str | None = None) -> list[str]:
    loaded = load_source(SourceSection(name=str(folder), split=split), role)
    return [row.question for row in loaded.rows]


def test_folder_gives_its_train_and_test_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", ["train.jsonl", "test.jsonl", "dev.jsonl"])
    assert questions(folder, "train") == ["from train.jsonl"]
    assert questions(folder, "eval") == ["from test.jsonl"]
    assert questions(folder, "train", split="dev") == ["from dev.jsonl"]
    assert has_eval_part(SourceSection(name=str(folder)))


def test_folder_gives_shards_together(tmp_path: Path) -> None:
    names = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "trainer.jsonl"]
    folder = make_folder(tmp_path / "set", names)
    assert questions(folder, "train") == [f"from {name}" for name in names[:2]]


def test_folder_without_train_file_gives_all_files_together(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "set", ["SET.jsonl", "test.jsonl"])
    (folder / "README.md").write_text("not data")
    assert questions(folder, "train") == ["from SET.jsonl", "from test.jsonl"]
    assert not has_eval_part(SourceSection(name=str(folder)))


def test_label_is_the_folder_for_files_named_by_split(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gsm", ["train.jsonl", "extra.jsonl"])
    labels = [
        load_source(SourceSection(name=str(path)), "train").label
        for path in (folder, folder / "train.jsonl", folder / "extra.jsonl")
    ]
    assert labels == ["gsm", "gsm", "extra"]


# --- errors, each one line ------------------------------------------------------------------------


def error_of(name: str, role: Any = "train", **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_source(SourceSection(name=name, **more), role)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file() -> None:
    assert error_of("data/nowhere.jsonl") == (
        "data file or folder data/nowhere.jsonl does not exist; "
        "check the path (data.train, data.eval)"
    )


def test_unknown_set_names_the_nearest() -> None:
    assert "did you mean 'gsm8k'?" in error_of("gsm8")
    assert "did you mean 'generated:chain_sum'?" in error_of("chain_sum")
    assert "did you mean 'chain_sum'?" in error_of("generated:chain_sums")
    assert "did you mean 'leg_counting'?" in error_of("reasoning_gym:leg_count")


def test_empty_data_set(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("\n")
    assert error_of(str(tmp_path / "m.jsonl")) == f"data set {tmp_path / 'm.jsonl'} is empty"


def test_no_row_with_an_answer(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"problem": "p", "answer": None}] * 3)
    assert "none of its 3 rows can be used (3 without gold answer)" in error_of(str(path))


def test_unknown_columns_name_those_found_and_the_keys_to_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"instruction": "i", "output": "o"}])
    message = error_of(str(path))
    assert "(instruction, output)" in message
    assert "data.train.question and data.train.answer" in message
    assert "has no column 'qestion'" in error_of(str(path), question="qestion", answer="output")
    assert "name both" in error_of(str(path), question="instruction")


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1"}\n{"question": \n')
    assert "line 2 is not JSON" in error_of(str(tmp_path / "a.jsonl"))
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    assert "is not a parquet file" in error_of(str(tmp_path / "b.parquet"))
    (tmp_path / "c.txt").write_text("q")
    assert ".txt is not one of" in error_of(str(tmp_path / "c.txt"))
    (tmp_path / "d.json").write_text('["q"]')
    assert "row 1 is text, not an object" in error_of(str(tmp_path / "d.json"))
    (tmp_path / "e.jsonl").write_bytes(b'{"question": "\xff"}')
    assert "line 1 is not UTF-8 text (byte 0xff)" in error_of(str(tmp_path / "e.jsonl"))


def test_folder_without_data_names_the_folders_that_have_some(tmp_path: Path) -> None:
    make_folder(tmp_path / "inner", ["train.jsonl"])
    assert "has no data files" in error_of(str(tmp_path))
    assert "give one of its folders that do: inner" in error_of(str(tmp_path))
    assert "has no dev.* among its data files (train.jsonl)" in error_of(
        str(tmp_path / "inner"), split="dev"
    )


def test_evaluations_are_not_trained_on_by_mistake() -> None:
    assert "is for evaluation" in error_of("aime24")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: object, **more: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert error_of("data/sums").startswith("data set data/sums: no file or folder here, and (hub")
    message = error_of("gsm8k")
    assert "hub id openai/gsm8k, split train" in message
    assert "check the connection, or give the path of a local copy" in message


def test_a_split_that_is_not_there_is_no_matter_of_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def refuse(*args: object, **more: object) -> None:
        raise ValueError("Unknown split 'tst'. Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = error_of("gsm8k", split="tst")
    assert "Should be one of ['train', 'test'].; set the source's split to one of them" in message
    assert "connection" not in message


# --- the hub --------------------------------------------------------------------------------------


def test_hub_sets_are_read_by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def answer(hub_id: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_list(
            [{"problem": f"p of {config}", "solution": r"\boxed{3}", "level": "1"}]
        )

    monkeypatch.setattr(datasets, "load_dataset", answer)
    loaded = load_source(SourceSection(name="math"), "eval")
    assert loaded.label == "math"
    assert [row.question for row in loaded.rows] == [
        f"p of {one}" for one in LOADERS["math"].configs
    ]
    assert {(hub_id, split) for hub_id, _, split in asked} == {
        ("EleutherAI/hendrycks_math", "test")
    }
    assert len(asked) == 7


def test_aime_leaves_out_the_evaluations_year(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"Year": year, "Question": f"q{year}", "Answer": "025"} for year in (1983, 2023, 2024)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **more: datasets.Dataset.from_list(rows)
    )
    loaded = load_source(SourceSection(name="aime"), "train")
    assert [(row.question, row.reference) for row in loaded.rows] == [
        ("q1983", "25"),
        ("q2023", "25"),
    ]


# --- generators -----------------------------------------------------------------------------------


def test_chain_steps() -> None:
    assert chain_steps("7 + 5 - 20") == ["7 + 5 = 12", "12 - 20 = -8"]
    assert chain_steps("-3 - -4") == ["-3 - -4 = 1"]
    assert chain_steps("2 * 3 * 4") == ["2 * 3 = 6", "6 * 4 = 24"]


@pytest.mark.parametrize("name", ["chain_sum", "products", "word_problems"])
def test_generated_solutions_work_out_and_end_in_the_answer(name: str) -> None:
    options = {"operations": ["add", "subtract", "multiply", "divide"], "max_steps": 5}
    rows = list(islice(generated_rows(name, options if name == "word_problems" else {}, 3), 300))
    for row in rows:
        for line in row.solution.splitlines():
            left, result = line.split(" = ")
            first, sign, second = left.split(" ")
            a, b = int(first), int(second)
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else None}[sign]
            assert value == int(result), line
        assert row.solution.endswith(f" = {row.reference}")
    assert len({row.question for row in rows}) > 200


def test_story_options_set_the_difficulty() -> None:
    options = {"min_steps": 3, "max_steps": 3, "max_number": 9, "operations": ["add", "subtract"]}
    for row in islice(generated_rows("word_problems", options, 0), 200):
        lines = row.solution.splitlines()
        assert len(lines) == 3
        assert "*" not in row.solution
        assert all(int(line.split(" ")[2]) <= 27 for line in lines)
        assert int(row.reference or "-1") >= 0


def test_a_seed_makes_the_same_rows_and_neighbours_share_none() -> None:
    options = {"min_digits": 5, "max_digits": 5}
    rows = [
        [row.question for row in islice(generated_rows("chain_sum", options, seed), 50)]
        for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1]
    assert not set(rows[0]) & set(rows[2])  # reasoning-gym's own seeds 0 and 1 share 49 of 50


def test_generator_makes_distinct_rows_and_none_of_the_excluded() -> None:
    source = SourceSection(name="generated:chain_sum", num_rows=150, options={"max_digits": 1})
    evaluation = {question_key(row.question) for row in load_source(source, "eval").rows}
    train = {question_key(row.question) for row in load_source(source, "train", evaluation).rows}
    assert len(evaluation) == len(train) == 150
    assert not evaluation & train


def test_small_space_of_problems_ends_and_is_counted() -> None:
    options = {"max_terms": 2, "max_digits": 1}
    loaded = load_source(
        SourceSection(name="generated:chain_sum", num_rows=500, options=options), "train"
    )
    assert len(loaded.rows) == 200  # 10 * 10 pairs, + or -
    assert loaded.dropped == {"missing (the options allow no more distinct problems)": 300}


def test_reasoning_gym_rows() -> None:
    loaded = load_source(SourceSection(name="reasoning_gym:gcd", num_rows=20, seed=5), "train")
    assert loaded.label == "gcd"
    assert len(loaded.rows) == 20
    assert all(row.reference and row.reference.isdigit() for row in loaded.rows)
    first = next(reasoning_gym_rows("gcd", {}, 5))
    assert loaded.rows[0].question == first.question


def test_generator_options_are_checked() -> None:
    def message(name: str, **options: Any) -> str:
        return error_of(name, options=options)

    assert "unknown key 'min_term'; did you mean 'min_terms'?" in message(
        "generated:chain_sum", min_term=3
    )
    assert "min_terms=5 is above max_terms=3" in message("generated:chain_sum", min_terms=5)
    assert "operations.0 = 'ad': Input should be 'add'," in message(
        "generated:word_problems", operations=["ad"]
    )
    assert "need 'add' or 'subtract'" in message("generated:word_problems", operations=["divide"])
    assert "max_steps = 99: Input should be less than" in message(
        "generated:word_problems", max_steps=99
    )
    assert "no option 'foo'" in message("reasoning_gym:gcd", foo=1)
    assert "refuses its options" in message("reasoning_gym:gcd", min_numbers=1)


def test_options_are_only_for_generators(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [{"question": "q", "answer": "1"}])
    assert "remove options" in error_of(str(path), options={"max_terms": 2})
    assert "do not apply" in error_of("generated:chain_sum", answer="gold")


# --- real files -----------------------------------------------------------------------------------

REAL = {  # path -> rows kept, dropped
    "gsm8k": (7473, {}),
    "gsm8k/test.jsonl": (1319, {}),
    "math/test.jsonl": (5000, {}),
    "math/rllm_train/math.json": (
        7469,
        {"without gold answer": 4, "repeated": 1},
    ),
    "math500": (500, {}),
    "aime": (90, {}),
    "aime/qwen_aime24": (30, {}),
    "aime/rllm_train/aime.json": (975, {}),
    "svamp": (1000, {"repeated": 1000}),
    "svamp/mawps-asdiv-a_svamp/dev.csv": (1000, {}),
    "mawps": (1868, {"repeated": 196, "repeated with another answer": 1}),
    "deepmath": (14074, {"repeated": 42}),
    "deepscaler": (1206, {"without gold answer": 1, "repeated": 2}),
    "dapo": (16971, {"repeated": 932, "repeated with another answer": 14}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_load_and_their_defects_are_counted(name: str, shared_dir: Path) -> None:
    loaded = load_source(SourceSection(name=str(shared_dir / "data" / name)), "train")
    assert (len(loaded.rows), loaded.dropped) == REAL[name]
    assert all(row.question and row.reference for row in loaded.rows)


def test_chat_text_without_gold_answers_is_refused(shared_dir: Path) -> None:
    files = sorted((shared_dir / "data" / "sft").glob("*/*.json"))
    assert len(files) == 5
    for path in files:
        assert "no question and gold answer among its columns" in error_of(str(path))
