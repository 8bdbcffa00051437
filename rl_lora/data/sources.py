"""Data sets by name, file, folder, hub id or generator -> rows with question and gold answer.

What a source section's `name` may be, first match first:

- `generated:NAME` (rl_lora.data.generators) and `reasoning_gym:NAME`: made here, no hub needed;
- a file (.jsonl, .json, .parquet, .csv) or a folder of such files;
- a name of LOADERS, or a hub id `owner/name` whose columns have a known row_format.

Null golds and duplicates are dropped here and counted; `rl_lora.prompts` renders what is left.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rl_lora.config import SourceSection
from rl_lora.data.files import (
    SUFFIXES,
    Role,
    file_label,
    folder_files,
    folder_label,
    read_file,
    split_files,
)
from rl_lora.data.generators import GENERATORS, generated_rows, reasoning_gym_rows
from rl_lora.data.row_formats import DataRow, parse_rows
from rl_lora.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class HubSet:
    """Where a named set lies on the hub.

    Example: HubSet("openai/gsm8k", configs=("main",), train="train", eval="test")
    """

    hub_id: str
    train: str | None  # split to train on; None: the set is an evaluation alone
    eval: str | None  # split to be evaluated on; None: held-out rows of train
    configs: tuple[str | None, ...] = (None,)
    ignored: tuple[str, ...] = ()  # large columns that are not read
    last_year: int | None = None  # rows with a later Year are left out


_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

LOADERS: dict[str, HubSet] = {
    "gsm8k": HubSet("openai/gsm8k", "train", "test", configs=("main",)),
    "math": HubSet("EleutherAI/hendrycks_math", "train", "test", configs=_MATH_SUBJECTS),
    "math500": HubSet("HuggingFaceH4/MATH-500", None, "test"),
    "deepmath": HubSet(
        "zwhe99/DeepMath-103K",
        "train",
        None,
        ignored=("r1_solution_1", "r1_solution_2", "r1_solution_3"),
    ),
    "dapo": HubSet("BytedTsinghua-SIA/DAPO-Math-17k", "train", None),
    "deepscaler": HubSet("agentica-org/DeepScaleR-Preview-Dataset", "train", None),
    "svamp": HubSet("ChilleD/SVAMP", "train", "test"),
    # 1983 to 2023: the year 2024 is in the file too, and is an evaluation here.
    "aime": HubSet("di-zhang-fdu/AIME_1983_2024", "train", None, last_year=2023),
    "aime24": HubSet("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": HubSet("MathArena/aime_2025", None, "train"),
    "aime26": HubSet("MathArena/aime_2026", None, "train"),
}

DEFAULT_ROWS = 1000  # of a generator without num_rows


@dataclass(slots=True)
class LoadedSet:
    """The usable rows of one source, and what was dropped on the way.

    Example: LoadedSet(label="gsm8k", rows=[DataRow(...)], num_read=7473, dropped={})
    """

    label: str  # the data set's name in metrics
    rows: list[DataRow]
    num_read: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows


def load_source(
    source: SourceSection, role: Role, exclude: Collection[str] = frozenset()
) -> LoadedSet:
    """The rows of one source for training or for the evaluation; no two have the same question.

    Args:
        source: what to read.
        role: chooses the split or the folder's file.
        exclude: keys (`question_key`) of questions that a generator must not make.

    Raises:
        UserError: unknown name, missing or unreadable file, unknown columns, or no usable row.
    """
    kind, separator, generator = source.name.partition(":")
    if separator and kind in ("generated", "reasoning_gym"):
        return _load_generated(source, kind, generator, exclude)
    path = Path(source.name).expanduser()
    if path.is_dir():
        return _load_files(source, folder_files(path, role, source.split), folder_label(path))
    if path.is_file():
        return _load_files(source, [path], file_label(path))
    if source.name in LOADERS:
        return _load_hub(source, LOADERS[source.name], source.name, role)
    if is_hub_id(source.name):
        hub_set = next(
            (known for known in LOADERS.values() if known.hub_id == source.name),
            HubSet(source.name, "train", "test"),
        )
        return _load_hub(source, hub_set, source.name.split("/")[1], role)
    raise UserError(unknown_set(source.name))


def has_eval_part(source: SourceSection) -> bool:
    """Whether a training source brings its own evaluation rows (a test split or a test.* file)."""
    if ":" in source.name or source.split is not None:
        return False
    path = Path(source.name).expanduser()
    if path.is_dir():
        return bool(split_files(path, "train")) and bool(split_files(path, "test"))
    if path.exists():
        return False
    known = LOADERS.get(source.name)
    known = known or next((one for one in LOADERS.values() if one.hub_id == source.name), None)
    return known is not None and known.train is not None and known.eval is not None


def question_key(question: str) -> str:
    """Questions with the same key are the same problem.

    Left out is only what cannot change a problem: blanks that part nothing (those of `x + 1`), a
    last full stop, and characters without width. Case, other marks, superscripts and blanks that
    part numbers, words or signs stay: 5! is not 5?, 5² not 52, 1 1/2 not 11/2, 2 -3 not 2-3.
    """
    text = unicodedata.normalize("NFC", question).translate(_WITHOUT_WIDTH)
    text = _PARTING_BLANK.sub("\t", " ".join(text.split()))
    return re.sub(r"(?<!\.)\.$", "", text.replace(" ", "").replace("\t", " "))


_WITHOUT_WIDTH = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))
_PARTING_BLANK = re.compile(
    r"(?<=[^\W_]) (?=[^\W_])|(?<=[)\]!%']) (?=[^\W_])"  # 1 1/2, a b, 5! 3
    r"|(?<=[\d)\]!%']) (?=[(\[])"  # 5 (3), (1) (2)
    r"|(?<=[^\W_]) (?=[-+.\u2212][^ ])|(?<=[)\]}!%']) (?=[-+.\u2212][^ ])"  # 2 -3, 3 .5
    r"|(?<=\d[.,]) (?=\d)|(?<=\d) (?=[.,] ?\d)"  # 1, 234
)


# --- cleaning -------------------------------------------------------------------------------------


def _clean(source: SourceSection, label: str, rows: list[DataRow]) -> LoadedSet:
    """Drops rows without question or gold answer and repeated questions, and counts them."""
    if not rows:
        raise UserError(f"data set {source.name} is empty")
    if source.num_rows is not None:
        rows = rows[: source.num_rows]
    dropped: dict[str, int] = {}
    kept: dict[str, DataRow] = {}
    for row in rows:
        key = question_key(row.asked(with_system=True))
        reason = _reason_to_drop(row, kept.get(key))
        if reason is None:
            kept[key] = row
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    if not kept:
        reasons = " and ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(
            f"data set {source.name}: none of its {len(rows)} rows can be used ({reasons}); "
            "name the columns by data.train.question and data.train.answer if it has others"
        )
    return LoadedSet(label, list(kept.values()), len(rows), dropped)


def _reason_to_drop(row: DataRow, earlier: DataRow | None) -> str | None:
    if not row.question:
        return "without question"
    if row.reference is None:
        return "without gold answer"
    if earlier is None:
        return None
    return "repeated" if row.reference == earlier.reference else "repeated with another answer"


# --- generators -----------------------------------------------------------------------------------


def _load_generated(
    source: SourceSection, kind: str, name: str, exclude: Collection[str]
) -> LoadedSet:
    if source.question or source.answer or source.split or source.list_answers:
        raise UserError(
            f"{source.name} is generated: question, answer, list_answers and split do not apply"
        )
    make = generated_rows if kind == "generated" else reasoning_gym_rows
    wanted = source.num_rows or DEFAULT_ROWS
    kept: dict[str, DataRow] = {}
    dropped: dict[str, int] = {}
    # Small settings have few distinct problems, so that the search for new ones must end.
    for index, row in enumerate(islice(make(name, source.options, source.seed), 20 * wanted + 200)):
        key = question_key(row.question)
        if row.reference is None:
            dropped["without gold answer"] = dropped.get("without gold answer", 0) + 1
        elif key not in kept and key not in exclude:
            kept[key] = DataRow(row.question, row.reference, row.solution, index)
        if len(kept) == wanted:
            break
    if not kept:
        raise UserError(
            f"{source.name}: no usable problem at these options: all of them lack a single gold "
            "answer or are in the evaluation; widen the options"
        )
    if len(kept) < wanted:
        reason = "missing (the options allow no more distinct problems)"
        dropped[reason] = wanted - len(kept)
    return LoadedSet(name, list(kept.values()), wanted, dropped)


# --- files and folders ----------------------------------------------------------------------------


def _load_files(source: SourceSection, paths: list[Path], label: str) -> LoadedSet:
    if source.options:
        raise UserError(f"data set {source.name} is read from disk: options are for generators")
    rows: list[DataRow] = []
    for path in paths:
        raws = read_file(path)
        if raws:
            rows += parse_rows(raws, str(path), source.question, source.answer, source.list_answers)
    numbered = [replace(row, row=i) for i, row in enumerate(rows)]
    return _clean(source, label, numbered)


# --- the hub --------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    owner_and_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    return bool(owner_and_name) and Path(name).suffix.lower() not in SUFFIXES


def unknown_set(name: str) -> str:
    """The error for a data set's name that is nothing known."""
    if "/" in name or Path(name).suffix.lower() in SUFFIXES or name.startswith(("~", ".")):
        return f"data file or folder {name} does not exist"
    kind, separator, generator = name.partition(":")
    known = [*LOADERS, *(f"generated:{one}" for one in GENERATORS)]
    if separator and kind not in ("hub", "file"):
        return f"data set {name!r} is unknown: write generated:NAME or reasoning_gym:NAME; " + (
            nearest(f"generated:{generator}", known)
        )
    return f"data set {name!r} is no file, folder or known name; {nearest(name, known)}"


def _load_hub(source: SourceSection, hub_set: HubSet, label: str, role: Role) -> LoadedSet:
    if source.options:
        raise UserError(f"data set {source.name} comes from the hub: options are for generators")
    split = source.split or (hub_set.train if role == "train" else hub_set.eval or hub_set.train)
    if split is None:
        raise UserError(
            f"data set {source.name} is an evaluation; list it under data.eval, or train on it "
            f"knowingly by its split={hub_set.eval!r}"
        )
    rows: list[DataRow] = []
    for config in hub_set.configs:
        raws = list(_hub_rows(source.name, hub_set, config, split))
        rows += parse_rows(
            raws, f"data set {source.name}", source.question, source.answer, source.list_answers
        )
    numbered = [replace(row, row=i) for i, row in enumerate(rows)]
    return _clean(source, label, numbered)


def _hub_rows(
    name: str, hub_set: HubSet, config: str | None, split: str
) -> Iterator[dict[str, Any]]:
    loaded = load_hub(name, hub_set, config, split)
    for raw in loaded:
        year = raw.get("Year")
        if hub_set.last_year is None or year is None or int(year) <= hub_set.last_year:
            yield raw


def load_hub(name: str, hub_set: HubSet, config: str | None, split: str) -> Any:
    """One split as a `datasets.Dataset`, without the columns that are not read.

    Raises:
        UserError: it cannot be loaded, saying why.
    """
    import datasets
    import httpx

    try:
        loaded = datasets.load_dataset(hub_set.hub_id, config, split=split)
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:160]
        known = "" if "/" not in name else ": no file or folder here, and"
        raise UserError(
            f"data set {name}{known} (hub id {hub_set.hub_id}, split {split}) cannot be loaded: "
            f"{reason}; check the connection, or give the path of a local copy as name"
        ) from error
    return loaded.remove_columns([one for one in hub_set.ignored if one in loaded.column_names])
