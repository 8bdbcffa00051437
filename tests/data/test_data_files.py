"""Files of rows as other programs leave them: hidden ones, saved data sets, csv, odd JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rl_lora.config import SourceSection
from rl_lora.config.sft import SftDataSection
from rl_lora.data.files import read_file
from rl_lora.data.sources import has_eval_part, load_source
from rl_lora.errors import UserError
from rl_lora.sft.data import load_sft
from tests.data.test_sources import error_of, questions, write_jsonl
from tests.test_prompts import word_tokenizer

pytestmark = pytest.mark.faults

ROW = {"question": "How many?", "answer": "12"}
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \x00\x02\xff\xfe"


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["._problems.jsonl", "._train.parquet", ".problems.csv", "~$problems.csv", ".~lock.x.csv#"],
)
def test_hidden_files_are_no_data(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "problems.jsonl", [ROW])
    (tmp_path / name).write_bytes(APPLE_DOUBLE)
    assert questions(tmp_path, "train") == ["How many?"]


def test_folder_of_only_hidden_files_has_no_data(tmp_path: Path) -> None:
    (tmp_path / "._a.jsonl").write_bytes(APPLE_DOUBLE)
    assert "has no data files" in error_of(str(tmp_path))


def test_files_about_the_data_are_no_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [ROW])
    (tmp_path / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    assert questions(tmp_path, "train") == ["How many?"]


def saved(folder: Path, splits: dict[str, list[str]]) -> Path:
    rows = {
        split: datasets.Dataset.from_list([{"question": text, "answer": "1"} for text in texts])
        for split, texts in splits.items()
    }
    datasets.DatasetDict(rows).save_to_disk(str(folder))
    return folder


def test_saved_data_set_of_one_split(tmp_path: Path) -> None:
    folder = saved(tmp_path / "sums", {"train": ["q0", "q1", "q2"]}) / "train"
    loaded = load_source(SourceSection(name=str(folder)), "train")
    assert [(row.question, row.reference, row.row) for row in loaded.rows] == [
        ("q0", "1", 0),
        ("q1", "1", 1),
        ("q2", "1", 2),
    ]
    assert not has_eval_part(SourceSection(name=str(folder)))


def test_saved_data_sets_splits_by_role_and_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "sums", {"train": ["a"], "test": ["b"], "validation": ["c"]})
    assert questions(folder, "train") == ["a"]
    assert questions(folder, "eval") == ["b"]
    assert questions(folder, "train", split="validation") == ["c"]
    assert has_eval_part(SourceSection(name=str(folder)))
    assert load_source(SourceSection(name=str(folder)), "train").label == "sums"
    assert "has no dev.* among its data files (test, train, validation)" in error_of(
        str(folder), split="dev"
    )


def test_saved_shards_and_chosen_rows_are_read_as_datasets_reads_them(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"question": f"q{i}", "answer": "1"} for i in range(6)])
    rows.select([5, 3, 1]).save_to_disk(str(tmp_path / "rows"), num_shards=2)
    assert questions(tmp_path / "rows", "train") == ["q5", "q3", "q1"]


def test_damaged_saved_data_set(tmp_path: Path) -> None:
    folder = saved(tmp_path / "sums", {"train": ["a"]}) / "train"
    next(folder.glob("*.arrow")).write_bytes(b"no arrow")
    assert "cannot be read by datasets.load_from_disk" in error_of(str(folder))


def test_supervised_jobs_read_saved_chats(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ho"}]
        for i in range(3)
    ]
    rows = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    rows.save_to_disk(str(tmp_path / "chats"))
    data = SftDataSection(train=str(tmp_path / "chats"), held_out=1)  # type: ignore[arg-type]
    assert load_sft(data, word_tokenizer(), 100, 0).notes[0] == "chats (train): 3 of 3 rows"


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\u000b", "\x1c", "\x0c"])
def test_only_line_feeds_end_a_line(tmp_path: Path, mark: str) -> None:
    # JSON has control characters escaped, and the others may stand as they are.
    text = json.dumps({"question": f"a{mark}b", "answer": "1"}, ensure_ascii=mark < " ")
    (tmp_path / "m.jsonl").write_bytes(f"{text}\r\n{text}\n".encode())
    assert [row["question"] for row in read_file(tmp_path / "m.jsonl")] == [f"a{mark}b"] * 2


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv"])
def test_byte_order_marks_are_skipped(tmp_path: Path, name: str) -> None:
    text = "question,answer\nHow many?,12\n" if name == "m.csv" else json.dumps(ROW)
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert read_file(tmp_path / name) == [ROW]


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.csv"])
@pytest.mark.parametrize(("encoding", "advice"), [("latin1", "latin1"), ("utf-16", "utf-16")])
def test_other_encodings_name_the_file_and_the_way_out(
    tmp_path: Path, name: str, encoding: str, advice: str
) -> None:
    text = "question,answer\nCafé?,12\n" if name == "m.csv" else '{"question": "Café?"}'
    (tmp_path / name).write_bytes(text.encode(encoding))
    message = error_of(str(tmp_path / name))
    assert message.startswith(f"{tmp_path / name}")
    assert f"`iconv -f {advice} -t utf-8`" in message


DIGITS = "7" * 5000


@pytest.mark.parametrize("name", ["m.jsonl", "m.json"])
@pytest.mark.parametrize("number", [DIGITS, f"-{DIGITS}", f"[{DIGITS}]"])
def test_numbers_of_thousands_of_digits_are_golds(tmp_path: Path, name: str, number: str) -> None:
    (tmp_path / name).write_text(f'{{"question": "q", "answer": {number}}}\n')
    (row,) = load_source(SourceSection(name=str(tmp_path / name)), "train").rows
    assert row.reference == number.strip("[]")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("m.jsonl", '["How many?", "12"]\n', "line 1 is an array, not an object"),
        ("m.jsonl", '{"question": "q", "answer": "1"}\n\n3\n', "line 3 is a number, not an object"),
        ("m.jsonl", '"text"\n', "line 1 is text, not an object"),
        ("m.jsonl", "null\n", "line 1 is null, not an object"),
        ("m.jsonl", "true\n", "line 1 is true or false, not an object"),
        ("m.jsonl", '{"question": "q"}{"question": "r"}\n', "line 1 is not JSON: Extra data"),
        ("m.jsonl", "{'question': 'q'}\n", "line 1 is not JSON: Expecting property name"),
        ("m.jsonl", "[" * 100_000, "line 1 is not JSON: nested too deeply"),
        ("m.jsonl", '{"question": "a\x0cb"}\n', "line 1 is not JSON: Invalid control character"),
        ("m.json", '[["How many?", "12"]]', "row 1 is an array, not an object"),
        (
            "m.json",
            '[\n{"question": "q"},\n{"question": }\n]',
            "is not JSON: Expecting value at lin",
        ),
        ("m.json", '{"question": "q"}\n{"question": \n', "line 2 is not JSON"),
        ("m.json", '{"train": [{"q": 1}], "test": [{"q": 1}]}', "has several lists of rows"),
        ("m.json", "3", "is not a list of rows"),
        ("m.json", "", "is not JSON"),
        ("m.json", "[]", "is empty"),
    ],
)
def test_odd_json_is_one_line(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    message = error_of(str(tmp_path / name))
    assert told in message
    assert str(tmp_path / name) in message


def test_json_lines_may_be_a_single_one(tmp_path: Path) -> None:
    row = {"question": "A root of x^2 = 9?", "answer": ["3", "-3"]}
    (tmp_path / "m.json").write_text(json.dumps(row))
    assert read_file(tmp_path / "m.json") == [row]


# --- csv and parquet ------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_goes_by_the_sign_that_parts_its_header(tmp_path: Path, delimiter: str) -> None:
    lines = [["question", "answer"], ['"What is 1, 2; 3?\nNow ""x"""', "12"]]
    text = "\r\n".join(delimiter.join(cells) for cells in lines) + "\r\n"
    (tmp_path / "m.csv").write_bytes(text.encode())
    assert read_file(tmp_path / "m.csv") == [
        {"question": 'What is 1, 2; 3?\nNow "x"', "answer": "12"}
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("question,answer\nq,1\nWhat is 1, 2?,12\n", "line 3 has 3 cells under a header of 2"),
        ("question,answer,answer\nq,1,2\n", "its header has the column 'answer' twice"),
        ('question,answer\n"What is 1?,12\n', "line 2 cannot be read: unexpected end of data"),
        ("", "is empty"),
        ("question,answer\n", "is empty"),
    ],
)
def test_odd_csv_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    assert told in error_of(str(tmp_path / "m.csv"))


def test_short_csv_rows_lack_their_last_columns(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("question,answer\nq\n\nr,1\n")
    assert read_file(tmp_path / "m.csv") == [
        {"question": "q", "answer": None},
        {"question": "r", "answer": "1"},
    ]


def test_folders_on_the_way_to_a_parquet_file_are_no_columns(tmp_path: Path) -> None:
    folder = tmp_path / "answer=7"
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"question": "q", "answer": "1"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "m.parquet")
    assert read_file(folder / "m.parquet") == rows


def test_unreadable_file_names_the_reason(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"m\.jsonl cannot be read: No such file"):
        read_file(tmp_path / "m.jsonl")
