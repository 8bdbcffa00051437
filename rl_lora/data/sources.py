"""Loads data sets by name, file, folder, hub id or generator into rows of question and answer.

A source's `name` is the first of these that it matches:

- `generated:NAME` (rl_lora.data.generators) or `reasoning_gym:NAME`: generated, no hub needed;
- a file (.jsonl, .json, .parquet, .csv) or a folder of such files;
- a key of LOADERS, or a hub id `owner/name` whose columns have a known row format.

Rows without an answer and duplicates are dropped and counted; `rl_lora.prompts` renders the rest.
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
from rl_lora.data.columns import COLUMN_KEYS
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
    """Where a data set is on the hub.

    Example: HubSet("openai/gsm8k", configs=("main",), train="train", eval="test")
    """

    hub_id: str
    train: str | None  # training split; None: the set is for evaluation only
    eval: str | None  # evaluation split; None: held-out rows of train
    configs: tuple[str | None, ...] = (None,)
    ignored: tuple[str, ...] = ()  # large columns to skip
    last_year: int | None = None  # rows with a later Year are skipped


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
    # 1983 to 2023; the file also has 2024, which is used for evaluation here.
    "aime": HubSet("di-zhang-fdu/AIME_1983_2024", "train", None, last_year=2023),
    "aime24": HubSet("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": HubSet("MathArena/aime_2025", None, "train"),
    "aime26": HubSet("MathArena/aime_2026", None, "train"),
}

DEFAULT_ROWS = 1000  # for a generator without num_rows


@dataclass(slots=True)
class LoadedSet:
    """The usable rows of one source, and counts of the dropped ones.

    Example: LoadedSet(label="gsm8k", rows=[DataRow(...)], num_read=7473, dropped={})
    """

    label: str  # the data set's name in metrics
    rows: list[DataRow]
    num_read: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows


def load_source(
    source: SourceSection, role: Role, exclude: Collection[str] = frozenset()
) -> LoadedSet:
    """Loads one source for training or evaluation; no two rows have the same question.

    Args:
        source: the data set.
        role: selects the split, or the file in a folder.
        exclude: `question_key`s of questions that a generator must not produce.

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
    """Whether a training source has its own evaluation rows (a test split or test.* file)."""
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

    The key drops only what cannot change a problem: insignificant blanks (as in `x + 1`), a final
    period, and zero-width characters. Case, punctuation, superscripts and blanks that separate
    numbers, words or signs are kept: 5! is not 5?, 5² not 52, 1 1/2 not 11/2, 2 -3 not 2-3.
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
    """Drops and counts rows without a question or answer, and repeated questions."""
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
            f"data set {source.name}: none of its {len(rows)} rows can be used ({reasons}); if it "
            f"has other columns, name them: {COLUMN_KEYS}"
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
            f"{source.name} is generated; remove question, answer, list_answers and split, which "
            "do not apply"
        )
    make = generated_rows if kind == "generated" else reasoning_gym_rows
    wanted = source.num_rows or DEFAULT_ROWS
    kept: dict[str, DataRow] = {}
    dropped: dict[str, int] = {}
    # Some options allow few distinct problems, so the number of tries is bounded.
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
            f"{source.name}: no usable problem with these options: each lacks a single gold answer "
            "or is in the evaluation; widen the options"
        )
    if len(kept) < wanted:
        reason = "missing (the options allow no more distinct problems)"
        dropped[reason] = wanted - len(kept)
    return LoadedSet(name, list(kept.values()), wanted, dropped)


# --- files and folders ----------------------------------------------------------------------------


def _load_files(source: SourceSection, paths: list[Path], label: str) -> LoadedSet:
    if source.options:
        raise UserError(f"data set {source.name} is read from disk; remove options, a generator's")
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
    """The error message for an unknown data set."""
    if "/" in name or Path(name).suffix.lower() in SUFFIXES or name.startswith(("~", ".")):
        return f"data file or folder {name} does not exist; check the path (data.train, data.eval)"
    kind, separator, generator = name.partition(":")
    known = [*LOADERS, *(f"generated:{one}" for one in GENERATORS)]
    if separator and kind not in ("hub", "file"):
        return f"data set {name!r} is unknown: write generated:NAME or reasoning_gym:NAME; " + (
            nearest(f"generated:{generator}", known)
        )
    return f"data set {name!r} is not a file, folder or known name; {nearest(name, known)}"


def _load_hub(source: SourceSection, hub_set: HubSet, label: str, role: Role) -> LoadedSet:
    if source.options:
        raise UserError(f"data set {source.name} is from the hub; remove options, a generator's")
    split = source.split or (hub_set.train if role == "train" else hub_set.eval or hub_set.train)
    if split is None:
        raise UserError(
            f"data set {source.name} is for evaluation; list it under data.eval, or set "
            f"split={hub_set.eval!r} to train on it anyway"
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
    """One split as a `datasets.Dataset`, without the ignored columns.

    Raises:
        UserError: it cannot be loaded; the message gives the reason.
    """
    import datasets
    import httpx

    try:
        loaded = datasets.load_dataset(hub_set.hub_id, config, split=split)
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:160]
        known = "" if "/" not in name else ": no file or folder here, and"
        is_split = isinstance(error, ValueError) and "split" in reason.lower()
        fix = "set the source's split to one of them" if is_split else "check the connection"
        raise UserError(
            f"data set {name}{known} (hub id {hub_set.hub_id}, split {split}) cannot be loaded: "
            f"{reason}; {fix}, or give the path of a local copy as name"
        ) from error
    return loaded.remove_columns([one for one in hub_set.ignored if one in loaded.column_names])
