"""A bounded, seeded sample of a run's transcripts, read as a stream: rollouts and evaluation
answers.

Each step's rollouts, and each evaluation, are a stratum. A stratum gives up to its quota, half
correct and half wrong where there are enough of both, so that rare answers are seen; the shares of
the sample are therefore not the run's. Files of any size are read line by line, and long texts keep
their head and tail.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from rl_lora.report.records import RunRecord, number
from rl_lora.runs.log import TRANSCRIPTS_FILE

MAX_TRANSCRIPTS = 1200  # of one report
MAX_STRATUM = 60  # of one step or evaluation
HEAD_CHARS, TAIL_CHARS = 2400, 1600  # kept of a completion
QUESTION_CHARS = 2000
FIELD_CHARS = 200  # of an answer, a reference, a name
MAX_LINE_BYTES = 64 * 10**6  # a line over that is left out

Record = dict[str, Any]
Stratum = tuple[int, str, float]  # (run, origin, step)


@dataclass(frozen=True, slots=True)
class CutText:
    """A text, or its two ends.

    Example: CutText(head="We have", num_cut=998_000, tail="so 7.")
    """

    head: str
    num_cut: int = 0  # characters between head and tail
    tail: str = ""

    def cut(self, head_chars: int, tail_chars: int) -> CutText:
        """The text with at most that many characters at its two ends."""
        if self.num_cut == 0 and len(self.head) <= head_chars + tail_chars:
            return self
        # An uncut text is all head, and its end is then where the tail is taken from.
        end = self.tail if self.num_cut else self.head
        head, tail = self.head[:head_chars], end[max(0, len(end) - tail_chars) :]
        total = len(self.head) + self.num_cut + len(self.tail)
        return CutText(head, total - len(head) - len(tail), tail)


@dataclass(slots=True)
class Sample:
    """What the browser of transcripts shows, and what it was taken from."""

    records: list[Record]  # by run, origin, step
    num_read: int = 0
    num_damaged: int = 0  # lines that are no transcript
    files: list[str] = field(default_factory=list)
    num_strata_skipped: int = 0  # steps and evaluations that gave nothing, there being too many


def sample_transcripts(
    runs: Sequence[RunRecord], *, max_transcripts: int = MAX_TRANSCRIPTS, seed: int = 0
) -> Sample:
    """Draws from all files of all runs; the same files and seed give the same sample."""
    sources = [
        (index, path, evaluation_name, step)
        for index, run in enumerate(runs)
        for path, evaluation_name, step in _files(run)
    ]
    num_strata = sum(
        1 if evaluation_name else max(1, len(runs[index].steps))
        for index, _, evaluation_name, _ in sources
    )
    stride = max(1, -(-2 * num_strata // max_transcripts))  # at least two of each stratum taken
    quota = min(MAX_STRATUM, max(2, max_transcripts * stride // max(1, num_strata)))
    sample = Sample([])
    drawn: list[Record] = []
    for place, (index, path, evaluation_name, step) in enumerate(sources):
        sample.files.append(f"{runs[index].label}/{path.relative_to(runs[index].folder)}")
        if evaluation_name and place % stride and place != len(sources) - 1:
            sample.num_strata_skipped += 1
            continue
        keep_step = stride if not evaluation_name else 1
        drawn += _draw(path, index, evaluation_name, step, quota, keep_step, seed, sample)
    sample.records = drawn
    return sample


def _files(run: RunRecord) -> Iterator[tuple[Path, str, int | None]]:
    """(path, evaluation's name or "", evaluation's step) of the run's files that are there, plain
    or gzip."""
    rollouts = run.folder / TRANSCRIPTS_FILE
    for path in (rollouts, rollouts.with_name(rollouts.name + ".gz")):
        if path.is_file():
            yield path, "", None
            break
    for evaluation in run.evaluations:
        for suffix in (".jsonl", ".jsonl.gz"):
            path = run.folder / "eval" / (evaluation.name + suffix)
            if path.is_file():
                yield path, evaluation.name, evaluation.step
                break


class _Reservoir:
    """Algorithm R (Vitter 1985, 'Random sampling with a reservoir'), for a stratum's verdict."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self._size, self._rng = size, rng
        self._num_offered = 0
        self.items: list[tuple[int, Record]] = []  # (place in the file, record)

    def slot(self) -> int | None:
        """Where the next item has to go; None: it is not taken."""
        self._num_offered += 1
        if len(self.items) < self._size:
            return len(self.items)
        slot = self._rng.randrange(self._num_offered)
        return slot if slot < self._size else None

    def put(self, slot: int, place: int, record: Record) -> None:
        """Puts an item into the slot that was given for it."""
        self.items[slot : slot + 1] = [(place, record)]


def _draw(
    path: Path,
    run: int,
    evaluation_name: str,
    evaluation_step: int | None,
    quota: int,
    keep_step: int,
    seed: int,
    sample: Sample,
) -> list[Record]:
    """The file's part of the sample, in the file's order."""
    rng = random.Random(f"{seed}/{run}/{evaluation_name}")
    reservoirs: dict[float, tuple[_Reservoir, _Reservoir]] = {}
    skipped_steps: set[float] = set()
    for place, raw in enumerate(_transcripts(path, sample)):
        sample.num_read += 1
        step = evaluation_step if evaluation_name else number(raw.get("step"))
        key = -1.0 if step is None else float(step)
        if not evaluation_name and int(key) % keep_step:
            skipped_steps.add(key)
            continue
        if key not in reservoirs:
            reservoirs[key] = (_Reservoir(quota, rng), _Reservoir(quota, rng))
        reservoir = reservoirs[key][raw.get("correct") is not True]
        slot = reservoir.slot()
        if slot is not None:
            reservoir.put(slot, place, _record(raw, run, evaluation_name, step))
    sample.num_strata_skipped += len(skipped_steps)
    kept: list[Record] = []
    for key in sorted(reservoirs):
        correct, wrong = (reservoir.items for reservoir in reservoirs[key])
        num_correct = min(len(correct), max(quota // 2, quota - len(wrong)))
        chosen = correct[:num_correct] + wrong[: quota - num_correct]
        kept += [record for _, record in sorted(chosen, key=lambda item: item[0])]
    return kept


def _transcripts(path: Path, sample: Sample) -> Iterator[Record]:
    """One raw record a completion, of rollouts and of evaluation rows alike."""
    for row in stream_objects(path):
        if row is None:
            sample.num_damaged += 1
        elif isinstance(samples := row.get("samples"), list):
            for answer in samples:
                if isinstance(answer, dict):
                    yield {**row, **answer}
                else:
                    sample.num_damaged += 1
        elif isinstance(row.get("completion"), str):
            yield row
        else:
            sample.num_damaged += 1


def stream_objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSONL file, plain or gzip; None for a line that is none.

    A last line without its line feed, which a kill cut short or which is being written, is left
    out. So is the torn end of a gzip file; what stands before it is given.
    """
    with ExitStack() as stack:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if path.suffix == ".gz":
            file = cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=file)))
        try:
            while line := file.readline(MAX_LINE_BYTES):
                if line.endswith(b"\n"):
                    yield _object(line)
                elif len(line) == MAX_LINE_BYTES:
                    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield None
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _record(raw: Record, run: int, evaluation_name: str, step: float | None) -> Record:
    """The fields that the page shows, of bounded length and known types."""
    tokens = number(raw.get("tokens"))
    return {
        "run": run,
        "origin": evaluation_name or "training",
        "step": step,
        "source": _field(raw.get("source")) or "",
        "problem": _field(raw.get("prompt_id")) or "",
        "question": CutText(str(raw.get("question", ""))).cut(QUESTION_CHARS, 0),
        "reference": _field(raw.get("reference")),
        "completion": CutText(str(raw.get("completion", ""))).cut(HEAD_CHARS, TAIL_CHARS),
        "answer": _field(raw.get("answer")),
        "reward": number(raw.get("reward")),
        "correct": raw.get("correct") is True,
        "format": raw.get("has_format") is True,
        "status": _field(raw.get("status")) or "unknown",
        "tokens": 0 if tokens is None else int(tokens),
        "truncated": raw.get("truncated") is True,
    }


def _field(value: Any) -> str | None:
    if value is None:
        return None
    text = str(value)
    return text if len(text) <= FIELD_CHARS else text[: FIELD_CHARS - 1] + "…"
