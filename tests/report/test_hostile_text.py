"""What a model wrote, from the rollout to files, terminal and page: nothing of it acts."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from rl_lora.cli import main
from rl_lora.rollouts import score_groups
from rl_lora.runs.log import RunLog
from rl_lora.types import Prompt
from tests.helpers.fakes import FakeReward, make_completion, make_prompt
from tests.helpers.report_runs import SCRIPT, write_run

pytestmark = pytest.mark.faults

CLEAR = "\x1b[2J\x1b[31m\x1b]0;title\x07\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\"
HOSTILE = {
    "ANSI": f"{CLEAR} \x9b31m \r over \b\b",
    "markup": f"{SCRIPT}</script></title><svg onload='window.hacked = 1'>[bold red]x[/]",
    "a line of 1 MB": f"{CLEAR}{'a' * 1_000_000}{SCRIPT}",
    "line ends": '\u2028\u2029\x85\n{"step": 1}\r\n',
    "hidden": "\u202e\u200b\ufeff\ud800\x00",
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose last step has nothing but hostile completions, as the loop writes it."""
    folder = write_run(tmp_path / "run")
    prompts: list[Prompt] = []
    for name, text in HOSTILE.items():
        prompts.append(make_prompt(f"{text[:60]}/{name}", text[:100], text[:60], text))
    completions = [[make_completion(text, 5)] for text in HOSTILE.values()]
    groups = score_groups(prompts, completions, FakeReward())
    with RunLog(folder, (), 8, resume_step=12) as log:
        log.transcripts(13, groups)
    return folder


def acting(text: str) -> set[str]:
    """Characters that could act on a terminal; line feeds are the program's own."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"}


def test_the_transcripts_file_has_a_line_each_and_only_ascii(run_folder: Path) -> None:
    content = (run_folder / "transcripts.jsonl").read_bytes()
    assert content.isascii()
    assert not acting(content.decode())
    records = [json.loads(line) for line in content.splitlines()]
    assert [record["step"] for record in records].count(13) == len(HOSTILE)
    assert records[-1]["completion"].startswith("\u202e\u200b")


def test_no_command_lets_it_reach_the_terminal(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"completion": f"{text} \\boxed{{8}}", "reference": "7", "label": True}
        for text in HOSTILE.values()
    ]
    lines = [json.dumps(row) for row in rows] + [json.dumps({"completion": CLEAR})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    for command, code in (
        (["status", str(run_folder)], 0),
        (["report", str(run_folder)], 0),
        (["grade", str(tmp_path / "rows.jsonl"), "--show", "9"], 0),
        (["grade", str(tmp_path / "bad.jsonl")], 2),
        (["train", f"model.name={CLEAR}"], 2),
    ):
        assert main(command) == code, command
        captured = capsys.readouterr()
        output = captured.out + captured.err
        assert output
        assert not acting(output), command
        assert max(map(len, output.splitlines())) < 1000


def test_the_page_holds_it_packed_and_cut(run_folder: Path) -> None:
    assert main(["report", str(run_folder)]) == 0
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    assert SCRIPT not in html
    assert "onload=" not in html
    assert not acting(html)
    assert len(html) < 2_600_000
