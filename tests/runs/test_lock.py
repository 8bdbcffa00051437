"""A run's folder belongs to one process: others are refused by name, the dead are taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from rl_lora.cli import main
from rl_lora.errors import UserError
from rl_lora.runs import lock as module
from rl_lora.runs.lock import LOCK_FILE, run_lock
from tests.sft.test_sft import SHORT as SFT_SHORT
from tests.sft.test_sft import TINY
from tests.studies.test_studies import raw_study, write_study
from tests.test_train import SHORT, SMOKE

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
from pathlib import Path
from rl_lora.runs.lock import run_lock
with run_lock(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(folder: Path, file: str = LOCK_FILE) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until the block ends, or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)


def write_owner(folder: Path, **values: Any) -> Path:
    """What a process has left that was killed with the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = {"pid": 2**22 + 1, "host": platform.node(), "started": 1.0, **values}
    (folder / LOCK_FILE).write_text(json.dumps(owner))
    return folder / LOCK_FILE


def test_the_folder_is_made_and_left_as_it_was(tmp_path: Path) -> None:
    with run_lock(tmp_path / "a" / "b") as taken_over:
        assert taken_over is None
        found = json.loads((tmp_path / "a" / "b" / LOCK_FILE).read_text())
        assert (found["pid"], found["host"]) == (os.getpid(), platform.node())
        with pytest.raises(UserError, match=f"is being run by process {os.getpid()} on"):
            run_lock(tmp_path / "a" / "b").__enter__()
    assert not list((tmp_path / "a" / "b").iterdir())
    with run_lock(tmp_path / "a" / "b") as taken_over:  # a second time, after the refusal
        assert taken_over is None


@pytest.mark.usefixtures("no_patience")
def test_a_second_process_is_refused_and_a_killed_one_taken_over(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        before = (tmp_path / LOCK_FILE).read_bytes()
        with pytest.raises(UserError) as caught:
            run_lock(tmp_path).__enter__()
        who = f"process {process.pid} on {platform.node()}"
        assert str(caught.value) == f"{tmp_path} is being run by {who}; wait until it ends"
        assert (tmp_path / LOCK_FILE).read_bytes() == before
        process.kill()
        process.wait()
        with run_lock(tmp_path) as taken_over:
            assert taken_over == f"{tmp_path}: taken over from {who}, which is gone"
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.usefixtures("no_patience")
def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As an engine's or a verifier's process may: of `flock` it would inherit the lock."""
    code = HOLDER.replace(
        '    print("held"',
        '    import os, time\n    if os.fork() == 0:\n        time.sleep(600)\n    print("held"',
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), LOCK_FILE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    (child,) = psutil.Process(process.pid).children()
    try:
        process.kill()
        process.wait()
        assert child.is_running()
        with run_lock(tmp_path) as taken_over:
            assert taken_over is not None
    finally:
        child.kill()
        process.communicate()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', "\x00" * 40])
def test_a_file_that_was_not_written_to_its_end_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with run_lock(tmp_path) as taken_over:
        assert taken_over is None


def test_a_dead_process_of_another_host_is_taken_over_where_locks_reach_it(tmp_path: Path) -> None:
    write_owner(tmp_path, host="node7")
    with run_lock(tmp_path) as taken_over:
        assert taken_over is not None
        assert "on node7, which is gone" in taken_over


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(
    ("owner", "expected"),
    [
        ({}, "taken over"),  # no such process
        ({"pid": os.getpid(), "started": psutil.Process().create_time()}, "being run by process"),
        ({"pid": os.getpid(), "started": 1.0}, "taken over"),  # its number went to another one
        ({"host": "node7"}, "or delete"),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_the_file_decides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: dict[str, Any],
    expected: str,
    number: int,
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    path = write_owner(tmp_path, **owner)
    before = path.read_bytes()
    if expected == "taken over":
        with run_lock(tmp_path) as taken_over:
            assert taken_over is not None
            assert expected in taken_over
    else:
        with pytest.raises(UserError, match=expected):
            run_lock(tmp_path).__enter__()
        assert path.read_bytes() == before
        path.unlink()
        with run_lock(tmp_path) as taken_over:
            assert taken_over is None


def test_a_lock_that_is_just_given_back_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 120.0)
    with other_process(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.close()  # it ends
        process.stdin = None
        with run_lock(tmp_path) as taken_over:
            assert taken_over is None
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*set run\.output_dir"):
        run_lock(tmp_path / "file").__enter__()


# --- the commands ---------------------------------------------------------------------------------


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("command", ["train", "sft", "eval", "study"])
def test_every_command_that_writes_is_refused_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, resume: list[str]
) -> None:
    arguments = {
        "train": ["train", str(SMOKE), *SHORT, "run.name=x", *resume],
        "sft": ["sft", str(TINY), *SFT_SHORT, "run.name=x", *resume],
        "eval": ["eval", str(SMOKE), *SHORT, "run.name=x", *(["--overwrite"] if resume else [])],
        "study": [],
    }[command]
    folder, file = tmp_path / "x", LOCK_FILE
    if command == "study":
        folder = tmp_path / "s"
        study = write_study(tmp_path, raw_study(tmp_path))
        arguments = ["study", str(study), *(["--retry"] if resume else [])]
    else:
        arguments += [f"run.output_dir={tmp_path}"]
    if command == "eval":
        file = ".evaluation_evaluation.lock"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "rewa')
    (folder / "eval").mkdir()
    (folder / "eval" / "evaluation.json").write_text("{}")
    with other_process(folder, file) as process:
        before = contents_of(folder)
        assert main(arguments) == 2
        err = capsys.readouterr().err.strip()
        assert f"is being run by process {process.pid} on {platform.node()}" in err
        assert len(err.splitlines()) == 1
        assert contents_of(folder) == before


def test_status_reads_a_run_that_is_locked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    assert main(["status", str(tmp_path)]) == 0
    single = capsys.readouterr().out
    with other_process(tmp_path):
        assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == single.splitlines()[0]
