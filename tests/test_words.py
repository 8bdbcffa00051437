"""One word for one idea: names and turns of phrase that the project has given up do not return."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Pattern (letter case counts only where it has a capital) -> what to write instead.
RETIRED = {
    # Names.
    r"\bexam(s|ined|ining)?\b": "evaluation, evaluate",
    r"\brun_record\b": "record",
    r"\bopen_job\b": "open_run, RunContext",
    r"\b(?!snapshot_download)\w*snapshots?(_\w+)?\b": "checkpoint (of a run)",
    r"\blay_out\b": "build_on_meta",
    r"\b(max_)?slack\b": "max_wasted_pairs",
    r"\bSeen\b": "PassStats",
    r"\bLayout\b|\bRowLayout\b": "RowFormat, AttentionLayout",
    r"\bsft_run\b": "sft.train",
    r"\bnll\.py\b": "held_out_loss",
    r"\bBatches\b|\bahead\.py\b|\brl_lora\.ahead\b": "RolloutWorker, overlap",
    r"\bmax_age\b|\brollouts/age": "staleness",
    r"\bsampling\.overlap\b": "sampling.max_staleness",
    r"\.(rest|settle|serve)\(|\bnum_rests\b": "set_adapter, wait, release_memory",
    r"\bChoice\b|\bresults\.Split\b": "BestCheckpoint, OutcomeStats",
    r"\bequality[./](forms|regions|decide|worked_out|words)\b": "answer_shape, tiers, ...",
    # Turns of phrase.
    r"\bh(eld|olds?|olding) (\w+ ){0,3}against\b": "compared with",
    r"\banew\b": "again",
    r"\b(go|goes|going|gone|went) on\b(?! board)": "resumes, continues",
    r"\b(lies|lie|lain)\b": "is",
    r"\bin hand\b": "plain verbs",
    # But not "of its own kind".
    r"\bof (its|their|our) own(?= (a|an|and|or|in|at|by|for|than|to)\b| *[^\w\s]|\s*$)": "its own",
    r"(?<!let )(?<!left )(?<!MLP )(?<!attention )\balone\b": "only, by itself",
    r"\bbeside\b": "next to, besides, with",
    r"\b(that|which|it) (is|are) (?-i:none)\b(?! of)": "is not one",
    r"\b(is|are|was|were|be|being|unless|get|gets) told\b": "is reported, is given",
}
PATTERNS = {re.compile(p, 0 if re.search(r"\\b[A-Z]", p) else re.I | re.M): p for p in RETIRED}
FOLDERS = ("rl_lora", "rewards", "scripts", "tests", "configs", "docs", "notebooks")
FILES = ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", ".ci/run")
SUFFIXES = (".py", ".md", ".toml", ".html", ".js", ".css", ".ipynb", "Makefile", "run")
# Where a retired word is meant: (path, part of the line).
ALLOWED = [
    ("rl_lora/build.py", 'mix_seed(config.run.seed, "exam")'),  # what was drawn stays drawn
    # What a file of an earlier version has.
    ("rl_lora/evaluation/best.py", '"exam"'),
    ("rl_lora/evaluation/files.py", '"exam"'),
    ("rl_lora/report/records.py", '"figures/exams.png"'),
    ("rl_lora/report/records.py", "rollouts/age_"),
    ("rl_lora/runs/record.py", "rollouts/age_"),
    ("rl_lora/runs/record.py", '"exam"'),
    ("rl_lora/config/load.py", '"sampling.overlap"'),
    ("tests/config/test_configs.py", "sampling.overlap"),
    # The hub's own names.
    ("tests/data/test_data_faults.py", '"snapshots"'),
    ("tests/evaluation/test_paired.py", '"exam"'),
    ("tests/config/test_configs.py", '"exam_deepmath_qwen3_8b"'),
    ("tests/report/test_report.py", '"exams.png"'),
    ("tests/report/test_report.py", "figures/exams.png"),
    ("tests/report/test_report.py", "rollouts/age_"),
]


def retired_words(path: str, text: str) -> list[str]:
    """`path:line: word -> instead` for each retired word in a text."""
    lines = text.split("\n")
    hits = [
        (text.count("\n", 0, found.start()), found[0], RETIRED[retired])
        for pattern, retired in PATTERNS.items()
        for found in pattern.finditer(text if "_" in retired else text.replace("_", " "))
    ]
    return [
        f"{path}:{index + 1}: {word!r} -> {instead}"
        for index, word, instead in sorted(hits)
        if not any(path == where and part in lines[index] for where, part in ALLOWED)
    ]


def texts() -> dict[str, str]:
    """{path: text} of code, docs and configs; LOG.md and CHANGELOG.md are history."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    names = [n for n in listed if n in FILES or n.startswith(tuple(f"{f}/" for f in FOLDERS))]
    return {
        name: (ROOT / name).read_text("utf-8")
        for name in names
        if name.endswith(SUFFIXES) and name != "tests/test_words.py" and (ROOT / name).is_file()
    }


def test_retired_words_do_not_return() -> None:
    found = texts()
    assert len(found) > 200
    assert not [line for name, text in found.items() for line in retired_words(name, text)]


def test_places_where_a_retired_word_is_meant_still_have_one() -> None:
    found = texts()
    assert all(any(part in line for line in found[where].splitlines()) for where, part in ALLOWED)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("# Held exams are", "evaluation, evaluate"),
        ("def load_snapshot(path):", "checkpoint (of a run)"),
        ("the samples are held closely against", "compared with"),
        ("the adapter alone", "only, by itself"),
        ("a file that is none", "is not one"),
        ("class Layout:", "RowFormat, AttentionLayout"),
        ("sampler.rest()", "set_adapter, wait, release_memory"),
    ],
)
def test_a_retired_word_is_found(line: str, instead: str) -> None:
    assert [found.split(" -> ")[1] for found in retired_words("x.py", line)] == [instead]


@pytest.mark.parametrize(
    "line",
    [
        "for example, an examination of the layout",
        "huggingface_hub.snapshot_download(name)",
        "None where there is none, let alone two; AttentionLayout",
        "all go on board; what follows is their own",
    ],
)
def test_ordinary_words_pass(line: str) -> None:
    assert retired_words("x.py", line) == []
