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
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rl_lora.config import SourceSection
from rl_lora.data.columns import COLUMN_KEYS, Raw
from rl_lora.data.files import (
    SUFFIXES,
    Role,
    folder_files,
    label_of,
    read_file,
    split_files,
)
from rl_lora.data.generators import GENERATORS, generated_rows, reasoning_gym_rows
from rl_lora.data.row_formats import DataRow, parse_rows
from rl_lora.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class HubSet:
    """Where a data set is on the hub."""

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
    """The usable rows of one source, and counts of the dropped ones."""

    label: str  # the data set's name in metrics
    rows: list[DataRow]
    num_read: int
    dropped: Counter[str]  # reason -> rows


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
    if source.options:
        raise UserError(f"data set {source.name} is not generated; remove options, a generator's")
    path = Path(source.name).expanduser()
    if path.is_dir():
        files = folder_files(path, role, source.split)
        return _clean(source, label_of(path), ((str(file), read_file(file)) for file in files))
    if path.is_file():
        return _clean(source, label_of(path), [(str(path), read_file(path))])
    hub_set = _known_set(source.name)
    if hub_set is None and not is_hub_id(source.name):
        raise UserError(unknown_set(source.name))
    hub_set = hub_set or HubSet(source.name, "train", "test")
    return _clean(source, source.name.rpartition("/")[2], _hub_tables(source, hub_set, role))


def _known_set(name: str) -> HubSet | None:
    """The row of LOADERS with this name or hub id."""
    by_id = {one.hub_id: one for one in LOADERS.values()}
    return LOADERS.get(name) or by_id.get(name)


def has_eval_part(source: SourceSection) -> bool:
    """Whether a training source has its own evaluation rows (a test split or test.* file)."""
    if ":" in source.name or source.split is not None:
        return False
    path = Path(source.name).expanduser()
    if path.is_dir():
        return bool(split_files(path, "train")) and bool(split_files(path, "test"))
    if path.exists():
        return False
    known = _known_set(source.name)
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


def _clean(
    source: SourceSection, label: str, tables: Iterable[tuple[str, Sequence[Raw]]]
) -> LoadedSet:
    """The rows of the tables, each with its name, without rows that have no question or answer and
    without repeated questions."""
    rows = [
        row
        for where, raws in tables
        if raws
        for row in parse_rows(raws, where, source.question, source.answer, source.list_answers)
    ]
    if not rows:
        raise UserError(f"data set {source.name} is empty")
    rows = [replace(row, row=place) for place, row in enumerate(rows[: source.num_rows])]
    dropped: Counter[str] = Counter()
    kept: dict[str, DataRow] = {}
    for row in rows:
        key = question_key(row.asked(with_system=True))
        if not row.question:
            dropped["without question"] += 1
        elif row.reference is None:
            dropped["without gold answer"] += 1
        elif (earlier := kept.setdefault(key, row)) is not row:
            is_same = row.reference == earlier.reference
            dropped["repeated" if is_same else "repeated with another answer"] += 1
    if not kept:
        reasons = " and ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(
            f"data set {source.name}: none of its {len(rows)} rows can be used ({reasons}); if it "
            f"has other columns, name them: {COLUMN_KEYS}"
        )
    return LoadedSet(label, list(kept.values()), len(rows), dropped)


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
    dropped: Counter[str] = Counter()
    # Some options allow few distinct problems, so the number of tries is bounded.
    for index, row in enumerate(islice(make(name, source.options, source.seed), 20 * wanted + 200)):
        key = question_key(row.question)
        if row.reference is None:
            dropped["without gold answer"] += 1
        elif key not in kept and key not in exclude:
            kept[key] = replace(row, row=index)
        if len(kept) == wanted:
            break
    if not kept:
        raise UserError(
            f"{source.name}: no usable problem with these options: each lacks a single gold answer "
            "or is in the evaluation; widen the options"
        )
    if len(kept) < wanted:
        dropped["missing (the options allow no more distinct problems)"] = wanted - len(kept)
    return LoadedSet(name, list(kept.values()), wanted, dropped)


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


def _hub_tables(
    source: SourceSection, hub_set: HubSet, role: Role
) -> Iterator[tuple[str, list[Raw]]]:
    split = source.split or (hub_set.train if role == "train" else hub_set.eval or hub_set.train)
    if split is None:
        raise UserError(
            f"data set {source.name} is for evaluation; list it under data.eval, or set "
            f"split={hub_set.eval!r} to train on it anyway"
        )
    last = hub_set.last_year
    for config in hub_set.configs:
        raws = load_hub(source.name, hub_set, config, split)
        kept = [raw for raw in raws if last is None or int(raw.get("Year") or 0) <= last]
        yield f"data set {source.name}", kept


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
