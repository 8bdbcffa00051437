"""An evaluation's file: one line per problem. A killed evaluation resumes from it.

    RUN/eval/NAME.jsonl.gz   per problem {"prompt_id": ..., "samples": [...]}; the first line also
                             has the settings, under "evaluation"
    RUN/eval/NAME.json       the result (`scores.EvalResult`), once the evaluation is complete

Problems are appended in chunks, each a gzip member (`jsonl.append_compressed`), so a kill costs at
most the current chunk. Any gzip reader (`zcat`) reads the file.
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
_PLAIN_SUFFIX = ".jsonl"  # not compressed: readable, but never resumed
# Evaluations with equal values of these draw the same random numbers for each problem and sample.
SAMPLING_KEYS = ("num_samples", "temperature", "top_p", "max_tokens", "stop", "seed")


class EvaluationFile:
    """An unfinished or complete evaluation on disk.

    Args:
        folder: the folder of NAME.jsonl.gz; created if needed.
        name: of the evaluation.
        settings: what the samples depend on; only a file with equal settings is resumed.
        restart: delete an unreadable file, or one with other settings, instead of raising.

    Raises:
        UserError: the folder cannot be written, or has a file with other settings.
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
                self._resume(restart)
            else:
                self.path.touch()
        except OSError as error:
            raise UserError(
                f"evaluation: {folder} cannot be written ({error.strerror}); choose another folder"
            ) from error

    def append(self, problems: Sequence[ProblemRecord], adapter_version: int) -> None:
        """Adds a chunk of problems, all or none of them."""
        rows = [problem.to_row() for problem in problems]
        if self.adapter_version is None:
            self.adapter_version = adapter_version
            settings = {**self._settings, "adapter_version": adapter_version}
            rows[0] = {"evaluation": settings, **rows[0]}
        jsonl.append_compressed(self.path, rows)
        self.done |= {problem.prompt_id: problem for problem in problems}

    def _resume(self, restart: bool) -> None:
        try:
            jsonl.cut_torn(self.path)
            settings, problems = read_evaluation(self.path)
            version = settings.pop("adapter_version", None)
            if problems and (difference := settings_difference(settings, self._settings)):
                raise UserError(
                    f"{self.path} holds an evaluation with {difference}; choose another --name, or "
                    "replace it with --overwrite"
                )
        except UserError:
            if not restart:
                raise
            self.path.write_bytes(b"")
        else:
            self.adapter_version = version
            self.done = {problem.prompt_id: problem for problem in problems}


def find_evaluation(path: Path) -> Path:
    """The file of problems that a path stands for: itself, or the one next to a NAME.json.

    Raises:
        UserError: there is no such file.
    """
    stem = path.name.removesuffix(SUFFIX).removesuffix(_PLAIN_SUFFIX).removesuffix(".json")
    for candidate in (path, path.with_name(stem + SUFFIX), path.with_name(stem + _PLAIN_SUFFIX)):
        if candidate.is_file() and candidate.name.endswith((SUFFIX, _PLAIN_SUFFIX)):
            return candidate
    raise UserError(
        f"{path}: no such evaluation; expected a file {stem}{SUFFIX} written by rl-lora eval"
    )


def read_evaluation(path: Path) -> tuple[dict[str, Any], list[ProblemRecord]]:
    """(settings, problems) of an evaluation's file, compressed or plain.

    A last chunk torn by a kill is left out. The settings are empty if the file has none.

    Raises:
        UserError: the file is not an evaluation's, or was written by an earlier version.
    """
    rows = jsonl.read_lines(path)
    if rows and "exam" in rows[0]:
        raise UserError(
            f'{path} was written by an earlier version ("exam" is called "evaluation" now); '
            "evaluate again"
        )
    settings = dict(rows[0].get("evaluation", {})) if rows else {}
    try:
        return settings, [ProblemRecord.from_row(row) for row in rows]
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not an evaluation's file: {reason}") from error


def is_evaluation(path: Path) -> bool:
    """Whether a path is an evaluation's, by its name or first line, and not loose completions."""
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
    """The first setting in which two evaluations differ, in words; None: none does."""
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return f"{key} = {repr(old.get(key))[:60]}, not {repr(new.get(key))[:60]}"
    return None


def problems_key(prompts_N: Sequence[Prompt]) -> str:
    """A hash of the problems as asked: ids, references and prompt tokens."""
    digest = hashlib.sha256()
    for prompt in prompts_N:
        digest.update(repr((prompt.prompt_id, prompt.reference, prompt.token_ids)).encode())
    return digest.hexdigest()[:16]
