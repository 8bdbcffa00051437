"""A bounded, seeded sample of a run's transcripts, of rollouts and of evaluations.

The rollouts of each step form a stratum, and so does each evaluation. A stratum gives up to its
quota, half correct and half wrong if there are enough of both, so that rare outcomes are seen; the
shares of the sample are therefore not the run's. Files of any size are streamed line by line, and
long texts keep their head and tail.
"""

from __future__ import annotations

import gzip
import heapq
import random
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_lora.report.records import Evaluation, RunRecord, number
from rl_lora.report.tables import printable
from rl_lora.runs.log import TRANSCRIPTS_FILE
from rl_lora.storage.jsonl import parse_object

MAX_TRANSCRIPTS = 1200  # in one report
MAX_STRATUM = 60  # from one step or evaluation
HEAD_CHARS, TAIL_CHARS = 2400, 1600  # kept of a completion
QUESTION_CHARS = 2000
FIELD_CHARS = 200  # of an answer, a reference, a name
MAX_TERMS = 20  # of a reward

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CutText:
    """A text, or its two ends.

    Example: CutText(head="We have", num_cut=998_000, tail="so 7.")
    """

    head: str
    num_cut: int = 0  # characters between head and tail
    tail: str = ""

    def cut(self, head_chars: int, tail_chars: int) -> CutText:
        """The text cut to at most that many characters at its ends."""
        if self.num_cut == 0 and len(self.head) <= head_chars + tail_chars:
            return self
        # An uncut text is all head, so the tail comes from the head's end.
        end = self.tail if self.num_cut else self.head
        head, tail = self.head[:head_chars], end[max(0, len(end) - tail_chars) :]
        total = len(self.head) + self.num_cut + len(self.tail)
        return CutText(head, total - len(head) - len(tail), tail)


@dataclass(slots=True)
class Sample:
    """The transcripts shown, and where they come from."""

    records: list[Record]  # by run, origin, step
    num_read: int = 0
    num_damaged: int = 0  # lines that are not transcripts
    num_files: int = 0
    num_strata_skipped: int = 0  # steps and evaluations left out because there are too many


@dataclass(frozen=True, slots=True)
class _Source:
    """A file of transcripts: a run's rollouts, or one of its evaluations."""

    run: int  # index
    path: Path
    evaluation: Evaluation | None  # None: rollouts of training


def sample_transcripts(
    runs: Sequence[RunRecord], *, max_transcripts: int = MAX_TRANSCRIPTS, seed: int = 0
) -> Sample:
    """Draws from all files of all runs; the same files and seed give the same sample."""
    sources = [source for index, run in enumerate(runs) for source in _sources(index, run)]
    num_strata = sum(
        1 if source.evaluation else max(1, len(runs[source.run].steps)) for source in sources
    )
    stride = max(1, -(-2 * num_strata // max_transcripts))  # at least two of each stratum taken
    quota = min(MAX_STRATUM, max(2, max_transcripts * stride // max(1, num_strata)))
    sample = Sample([], num_files=len(sources))
    for place, source in enumerate(sources):
        if source.evaluation and place % stride and place != len(sources) - 1:
            sample.num_strata_skipped += 1
        else:
            name = source.evaluation.name if source.evaluation else ""
            rng = random.Random(f"{seed}/{source.run}/{name}")
            sample.records += _draw(source, quota, stride, rng, sample)
    return sample


def _sources(index: int, run: RunRecord) -> Iterator[_Source]:
    """The run's files, plain or gzip."""
    files: list[tuple[Path, Evaluation | None]] = [(run.folder / TRANSCRIPTS_FILE, None)]
    files += [(run.folder / "eval" / f"{one.name}.jsonl", one) for one in run.evaluations]
    for plain, evaluation in files:
        for path in (plain, plain.with_name(f"{plain.name}.gz")):
            if path.is_file():
                yield _Source(index, path, evaluation)
                break


def _draw(
    source: _Source, quota: int, stride: int, rng: random.Random, sample: Sample
) -> list[Record]:
    """The file's part of the sample, in the file's order; every stride-th step of rollouts."""
    # (step, is correct) -> the `quota` records with the largest random keys: a uniform sample.
    strata: defaultdict[tuple[float, bool], list[tuple[float, int, Record]]] = defaultdict(list)
    skipped_steps: set[float] = set()
    for place, raw in enumerate(_transcripts(source.path, sample)):
        sample.num_read += 1
        step = source.evaluation.step if source.evaluation else number(raw.get("step"))
        key = -1.0 if step is None else float(step)
        if not source.evaluation and int(key) % stride:
            skipped_steps.add(key)
            continue
        record = _record(raw, source, step)
        heap = strata[key, record["correct"]]
        heapq.heappush(heap, (rng.random(), place, record))
        if len(heap) > quota:
            heapq.heappop(heap)
    sample.num_strata_skipped += len(skipped_steps)
    kept: list[Record] = []
    for key in sorted({key for key, _ in strata}):
        correct, wrong = strata[key, True], strata[key, False]
        num_correct = min(len(correct), max(quota // 2, quota - len(wrong)))
        chosen = heapq.nlargest(num_correct, correct) + heapq.nlargest(quota - num_correct, wrong)
        kept += [record for _, _, record in sorted(chosen, key=lambda item: item[1])]
    return kept


def _transcripts(path: Path, sample: Sample) -> Iterator[Record]:
    """One raw record per completion, of rollouts and of evaluation rows alike."""
    for row in stream_objects(path):
        if row is None:
            sample.num_damaged += 1
        elif isinstance(samples := row.get("samples"), list):
            for one in samples:
                if isinstance(one, dict):
                    yield {**row, **one}
                else:
                    sample.num_damaged += 1
        elif isinstance(row.get("completion"), str):
            yield row
        else:
            sample.num_damaged += 1


def stream_objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSONL file, plain or gzip; None for a line that is not an object.

    A last line without its line feed (cut short by a kill, or being written) is left out, and so
    is the torn end of a gzip file.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for line in file:
                if line.endswith(b"\n"):
                    yield parse_object(line.decode("utf-8", "replace"))
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return


def _record(raw: Record, source: _Source, step: float | None) -> Record:
    """The fields that the page shows, with bounded lengths and known types."""
    tokens = number(raw.get("tokens"))
    return {
        "run": source.run,
        "origin": source.evaluation.name if source.evaluation else "training",
        "step": step,
        "source": _field(raw.get("source")) or "",
        "problem": _field(raw.get("prompt_id")) or "",
        "question": CutText(str(raw.get("question", ""))).cut(QUESTION_CHARS, 0),
        "reference": _field(raw.get("reference")),
        "completion": CutText(_shown(raw)).cut(HEAD_CHARS, TAIL_CHARS),
        "answer": _field(raw.get("answer")),
        "reward": number(raw.get("reward")),
        "terms": _terms(raw.get("terms")),
        "correct": raw.get("correct") is True,
        "format": raw.get("has_format") is True,
        "status": _field(raw.get("status")) or "unknown",
        "tokens": 0 if tokens is None else int(tokens),
        "truncated": raw.get("truncated") is True,
    }


def _shown(raw: Record) -> str:
    """The completion; of an episode all its turns, each under a line that says whose it is."""
    turns = raw.get("turns")
    if not isinstance(turns, list) or len(turns) < 2:
        return str(raw.get("completion", ""))
    texts = [str(turn) for turn in turns]
    texts[1::2] = [f"[environment]\n{text}" for text in texts[1::2]]
    texts[0::2] = [f"[turn {place}]\n{text}" for place, text in enumerate(texts[0::2], 1)]
    return "\n\n".join(texts)


def _terms(value: Any) -> list[tuple[str, float]]:
    """The values of the reward's terms; a few at most, as the file may be anyone's."""
    items = list(value.items())[:MAX_TERMS] if isinstance(value, dict) else []
    found = [(printable(name, FIELD_CHARS), number(one)) for name, one in items]
    return [(name, one) for name, one in found if one is not None]


def _field(value: Any) -> str | None:
    return None if value is None else printable(str(value), FIELD_CHARS)
