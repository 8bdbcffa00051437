"""The file of an evaluation: one line a problem; it survives a kill, and the evaluation goes on.

    RUN/eval/NAME.jsonl.gz   {"prompt_id": ..., "samples": [...]} a problem; the first line has the
                             settings as well, under "evaluation"
    RUN/eval/NAME.json       the result (`results.EvalResult`), once the evaluation is complete

Problems are appended in chunks, each a gzip member (`jsonl.append_compressed`): a kill costs
the chunk under way at most. Any gzip reader (`zcat`) reads the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.errors import UserError
from rl_lora.evaluation.scores import ProblemRecord
from rl_lora.storage import jsonl

if TYPE_CHECKING:  # a reader of the files needs no torch
    from rl_lora.types import Prompt

SUFFIX = ".jsonl.gz"
_OLD_SUFFIX = ".jsonl"  # without settings, not compressed: readable, and never gone on with
# Two evaluations that agree in these draw the same random numbers for the same problem and sample.
SAMPLING_KEYS = ("num_samples", "temperature", "top_p", "max_tokens", "stop", "seed")


class EvaluationFile:
    """An evaluation on disk that is under way or complete.

    Args:
        folder: where NAME.jsonl.gz lies; made if it is not there.
        name: of the evaluation.
        settings: what the samples depend on; a file of other settings is not gone on with.
        restart: delete a file of other settings, or any unreadable one; else it is an error.

    Raises:
        UserError: the folder cannot be written, or a file of other settings is there.
    """

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self.path = folder / f"{name}{SUFFIX}"
        self.done: dict[str, ProblemRecord] = {}  # prompt_id -> what is on disk
        self.adapter_version: int | None = None  # of the samples on disk
        self._settings = jsonl.storable(dict(settings))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self._take_over(restart)
            else:
                self.path.touch()
        except OSError as error:
            raise UserError(
                f"evaluation: {folder} cannot be written ({error.strerror}); choose another folder"
            ) from error

    def append(self, problems: Sequence[ProblemRecord], adapter_version: int) -> None:
        """Adds a chunk of problems, all of it or none."""
        rows = [problem.to_row() for problem in problems]
        if self.adapter_version is None:
            self.adapter_version = adapter_version
            rows[0] = {
                "evaluation": {**self._settings, "adapter_version": adapter_version},
                **rows[0],
            }
        jsonl.append_compressed(self.path, rows)
        self.done |= {problem.prompt_id: problem for problem in problems}

    def _take_over(self, restart: bool) -> None:
        if restart and not _is_of(self.path, self._settings):
            self.path.unlink()
            self.path.touch()
            return
        jsonl.cut_torn(self.path)
        settings, problems = read_evaluation(self.path)
        if not problems:
            return
        self.adapter_version = settings.pop("adapter_version", None)
        if difference := settings_difference(settings, self._settings):
            raise UserError(
                f"{self.path} holds an evaluation with {difference}; choose another --name, or "
                "--overwrite"
            )
        self.done = {problem.prompt_id: problem for problem in problems}


def find_evaluation(path: Path) -> Path:
    """The file of problems that a path stands for: itself, or the one beside a NAME.json.

    Raises:
        UserError: there is no such file.
    """
    stem = path.name.removesuffix(SUFFIX).removesuffix(_OLD_SUFFIX).removesuffix(".json")
    for candidate in (path, path.with_name(stem + SUFFIX), path.with_name(stem + _OLD_SUFFIX)):
        if candidate.is_file() and candidate.name.endswith((SUFFIX, _OLD_SUFFIX)):
            return candidate
    raise UserError(
        f"{path}: no such evaluation; give a file {stem}{SUFFIX} that rl-lora eval wrote"
    )


def read_evaluation(path: Path) -> tuple[dict[str, Any], list[ProblemRecord]]:
    """(settings, problems) of an evaluation's file, compressed or of the older plain kind.

    A last chunk that a kill tore is left out; the settings of an older file are empty.

    Raises:
        UserError: a line is not of an evaluation, naming the file.
    """
    rows = jsonl.read_lines(path)
    settings = dict(rows[0].get("evaluation", {})) if rows else {}
    try:
        return settings, [ProblemRecord.from_row(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not an evaluation's file: a line lacks {error}") from error


def is_evaluation(path: Path) -> bool:
    """Whether a path is of an evaluation, by its name or first line, and not of loose
    completions."""
    stem = path.name.removesuffix(".json")
    if path.name.endswith(SUFFIX) or (
        stem != path.name and path.with_name(stem + SUFFIX).is_file()
    ):
        return True
    try:
        with path.open(encoding="utf-8") as file:
            first = jsonl.parse_json(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and isinstance(first.get("samples"), list)


def settings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first setting in which two evaluations differ, in words; None: there is none."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} = {_short(old.get(key))}, not {_short(new.get(key))}"
    return None


def problems_key(prompts_N: Sequence[Prompt]) -> str:
    """A hash of the problems as they are asked: ids, references and prompt tokens."""
    digest = hashlib.sha256()
    for prompt in prompts_N:
        digest.update(repr((prompt.prompt_id, prompt.reference, prompt.token_ids)).encode())
    return digest.hexdigest()[:16]


def _is_of(path: Path, settings: Mapping[str, Any]) -> bool:
    try:
        found, _ = read_evaluation(path)
    except UserError:
        return False
    found.pop("adapter_version", None)
    return settings_difference(found, settings) is None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
