"""Builds the page of one run, or of several overlaid, from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_lora.report.blocks import Section
from rl_lora.report.figures import make_sections
from rl_lora.report.page import Page, packed
from rl_lora.report.records import RunRecord, read_runs
from rl_lora.report.summary import evaluation_table, make_tiles, run_table, settings_section
from rl_lora.report.text import Formulas, segments
from rl_lora.report.transcripts import (
    HEAD_CHARS,
    TAIL_CHARS,
    Sample,
    sample_transcripts,
)

MAX_DATA_BYTES = 2_600_000  # in the page, which stays under 5 MB with plotly's 2 MB


def build_page(folders: Sequence[Path]) -> tuple[Page, bytes]:
    """(page, its JSON) of the runs.

    Raises:
        UserError: a folder is not a run's, is given twice, or has a damaged metrics.jsonl.
    """
    runs = read_runs(folders)
    sample = sample_transcripts(runs)
    head_chars, tail_chars = HEAD_CHARS, TAIL_CHARS
    while True:
        page = _page(runs, sample, head_chars, tail_chars)
        data = page.to_json()
        # Text that does not compress well is halved until the page is small enough.
        if len(packed(data)) <= MAX_DATA_BYTES or head_chars < 100:
            return page, data
        head_chars, tail_chars = head_chars // 2, tail_chars // 2


def _page(runs: Sequence[RunRecord], sample: Sample, head_chars: int, tail_chars: int) -> Page:
    sections = make_sections(runs)
    table = evaluation_table(runs)
    if len(runs) > 1:
        sections.insert(0, Section("runs", "Runs", tables=[run_table(runs)]))
    if table is not None:
        sections.append(Section("evaluations", "Evaluations", tables=[table]))
    sections.append(settings_section(runs))
    labels = [run.label for run in runs]
    notes = []
    for run in runs:
        of = f"{run.label}: " if len(runs) > 1 else ""
        evaluations = dict.fromkeys(note for one in run.evaluations for note in one.result.notes)
        notes += [f"{of}{note}" for note in (*run.notes, *evaluations)]
    if sample.num_damaged:
        notes.append(f"transcripts: {sample.num_damaged:,} unreadable lines are left out")
    notes += [f"{run.label} has not finished a step yet" for run in runs if not run.steps]
    return Page(
        title=labels[0] if len(runs) == 1 else f"{len(runs)} runs",
        subtitle=_subtitle(runs),
        tiles=make_tiles(runs[0]) if len(runs) == 1 else [],
        sections=sections,
        transcripts=_transcripts(sample, labels, head_chars, tail_chars),
        notes=notes,
    )


def _subtitle(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        return ", ".join(run.label for run in runs)
    sources = runs[0].setting("data", "train")
    names = [str(s["name"]) for s in sources or [] if isinstance(s, dict) and "name" in s]
    return f"Reinforcement learning on {', '.join(names)}" if names else ""


def _transcripts(
    sample: Sample, labels: Sequence[str], head_chars: int, tail_chars: int
) -> dict[str, Any] | None:
    """The data of the transcript browser; its note says how the sample was drawn."""
    if not sample.records:
        return None
    formulas = Formulas()
    records = [
        {
            **record,
            "question": segments(record["question"].cut(head_chars, 0), formulas),
            "completion": segments(record["completion"].cut(head_chars, tail_chars), formulas),
        }
        for record in sample.records
    ]
    return {
        "note": _sample_note(sample, head_chars, tail_chars),
        "runs": list(labels),
        "records": records,
        "formulas": formulas.table,
    }


def _sample_note(sample: Sample, head_chars: int, tail_chars: int) -> str:
    num, files = len(sample.records), sample.num_files
    source = f"{files} file" + ("s" if files > 1 else "")
    if num == sample.num_read:
        text = f"All {num:,} transcripts of {source}."
    else:
        text = (
            f"A seeded sample of {num:,} of the {sample.num_read:,} transcripts of {source}: up to "
            "the same number of each step and evaluation, half correct and half wrong if there are "
            "enough of both. Shares in this sample are therefore not the run's."
        )
    if sample.num_strata_skipped:
        text += f" {sample.num_strata_skipped:,} steps and evaluations are left out."
    if any(record["completion"].num_cut for record in sample.records):
        text += f" Long completions keep their first {head_chars:,} and last {tail_chars:,}"
        text += " characters."
    return text
