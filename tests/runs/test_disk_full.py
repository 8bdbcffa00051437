"""A disk that is full, read-only or gone at each writer: one line, the last good state whole, and
a resumed run ends as an unbroken one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from rl_lora.adapters import files as adapter
from rl_lora.cli import main
from rl_lora.errors import UserError
from rl_lora.runs.checkpoint import latest_checkpoint, read_checkpoint
from rl_lora.runs.log import RunLog
from rl_lora.storage import jsonl
from rl_lora.storage.directories import atomic_directory, disk_errors
from tests.runs.test_resume import result, run
from tests.test_train import SMOKE

pytestmark = pytest.mark.faults

NO_SPACE = "No space left on device"
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["run.name=x", "run.checkpoint_every=1", "run.loggers=['tensorboard']"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MB in memory; its own runs need a thousandth of that."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, free: int = 0) -> None:
    """Writes until the disk is full, but for `free` bytes (whole pages)."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    assert shutil.disk_usage(disk).free == 0
    os.truncate(ballast, max(0, ballast.stat().st_size - free))


# Before which call of what the disk is filled, and how many bytes are left.
WRITERS = {
    "publish, nothing left": ("rl_lora.state.save_adapter", 3, 0),
    "publish, half of it fits": ("rl_lora.state.save_adapter", 3, 8192),
    "a checkpoint": ("rl_lora.state.save_checkpoint", 3, 8192),
    "a step's transcripts": ("rl_lora.runs.log.RunLog.transcripts", 3, 0),
    "a step's line": ("rl_lora.runs.log.RunLog.write", 3, 0),
    "the run's record": ("rl_lora.train.write_record", 1, 0),
    "an evaluation's problems": ("rl_lora.storage.jsonl.append_compressed", 2, 0),
    "an evaluation's result": ("rl_lora.evaluation.scores.EvalResult.save", 2, 0),
    "the best adapter": ("rl_lora.evaluation.best.keep_best", 1, 4096),
    "the last adapter": ("rl_lora.train.finish", 1, 4096),
    "a tracker's events": ("rl_lora.runs.log.RunLog.track", 4, 0),
}


IN_CI = {"a checkpoint"}


def patched(patch: pytest.MonkeyPatch, disk: Path, writer: str) -> None:
    target, call, free = WRITERS[writer]
    module, _, name = target.rpartition(".")
    if module.rpartition(".")[2][0].isupper():
        module, _, owner = module.rpartition(".")
        holder: Any = getattr(__import__(module, fromlist=[owner]), owner)
    else:
        holder = __import__(module, fromlist=[name])
    original, calls = getattr(holder, name), iter(range(1, 1000))

    def after_filling(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            fill(disk, free)
        return original(*arguments, **keywords)

    patch.setattr(holder, name, after_filling)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl_lora.train.draw_figures", lambda folder: None)
        run("rl", folder, *SETTINGS)
    return folder / "x"


@pytest.fixture
def unbroken(finished: Path) -> Any:
    return result(finished)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception in thread")  # TensorBoard's own writes there
@pytest.mark.parametrize(
    "writer", [w if w in IN_CI else pytest.param(w, marks=pytest.mark.long) for w in WRITERS]
)
def test_a_full_disk_is_reported_and_the_run_resumes_once_there_is_room(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any, writer: str
) -> None:
    with monkeypatch.context() as patch:
        patched(patch, small_disk, writer)
        with pytest.raises(UserError) as caught:
            run("rl", small_disk, *SETTINGS)
    line = str(caught.value)
    assert NO_SPACE in line
    assert "\n" not in line
    assert str(small_disk) in line
    folder = small_disk / "x"
    assert not list(folder.rglob(".*partial*"))  # nothing half-written keeps the disk full
    if (newest := latest_checkpoint(folder)) is not None:
        read_checkpoint(newest)
    if writer != "the run's record":
        assert newest is not None
    (small_disk / "ballast").unlink()
    run("rl", small_disk, *SETTINGS, resume=True)
    assert result(folder) == unbroken


# What is run on a full disk, where RUN is a finished run on it.
COMMANDS = {
    "report": ["report", "RUN"],
    "card": ["export", "RUN"],
    "merge": ["export", "RUN", "--merged", "RUN/../merged"],
    "grades": ["grade", "RUN/eval/step_000004.jsonl.gz", "--json", "RUN/../grades.json"],
    "evaluation": ["eval", "RUN", "--name", "own"],
    "study": ["report", "--study", "RUN/../study.jsonl"],
}


def files_on(disk: Path) -> dict[Path, bytes]:
    found = (path for path in disk.rglob("*") if path.is_file() and path.name != "ballast")
    return {path: path.read_bytes() for path in found}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_full_disk_says_so_and_changes_nothing(
    small_disk: Path, finished: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(finished, small_disk / "x")
    shutil.copy(ROOT / "docs" / "study" / "sft_batch.jsonl", small_disk / "study.jsonl")
    command = [part.replace("RUN", str(small_disk / "x")) for part in COMMANDS[name]]
    (small_disk / "figures").mkdir()
    fill(small_disk)
    before = files_on(small_disk)
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert NO_SPACE in line or "0 MiB of disk left" in line
    assert str(small_disk) in line
    assert files_on(small_disk) == before
    (small_disk / "ballast").unlink()
    assert main(command) == 0
    assert files_on(small_disk).keys() > before.keys()


# --- read-only and gone ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_a_folder_that_becomes_read_only(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Any
) -> None:
    """As after an error of the disk: the file system of RUN/adapters is mounted read-only."""
    adapters = small_disk / "x" / "adapters"

    def bind(*options: str) -> None:
        subprocess.run(["mount", "-o", *options], check=True, capture_output=True)

    with monkeypatch.context() as patch:
        calls = iter(range(1, 1000))

        def after_mounting(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == 3:
                bind("bind", str(adapters), str(adapters))
                bind("remount,bind,ro", str(adapters))
            return original(*arguments, **keywords)

        original = adapter.save_adapter
        patch.setattr("rl_lora.state.save_adapter", after_mounting)
        try:
            with pytest.raises(UserError, match=r"adapters/v000002 .*Read-only file system"):
                run("rl", small_disk, *SETTINGS)
        finally:
            subprocess.run(["umount", str(adapters)], check=True)
    run("rl", small_disk, *SETTINGS, resume=True)
    assert result(small_disk / "x") == unbroken


def test_a_run_does_not_start_on_a_read_only_disk(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["train", str(SMOKE), f"run.output_dir={small_disk}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot be written (Read-only file system); set run.output_dir to one that can" in line


@pytest.mark.parametrize("becomes", ["deleted", "replaced"])
def test_a_folder_that_vanishes_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    """The open files of a deleted folder take lines that nobody will see."""
    calls = iter(range(1, 1000))

    def after_deleting(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 3:
            shutil.rmtree(tmp_path / "x")
            if becomes == "replaced":
                (tmp_path / "x").mkdir()
                (tmp_path / "x" / "metrics.jsonl").write_text("")
        return original(*arguments, **keywords)

    original = adapter.save_adapter
    monkeypatch.setattr("rl_lora.state.save_adapter", after_deleting)
    with pytest.raises(UserError, match=r"x/metrics\.jsonl was deleted or replaced while"):
        run("rl", tmp_path, *SETTINGS)


def test_an_error_in_a_folder_that_has_vanished_is_the_users(tmp_path: Path) -> None:
    told = pytest.raises(UserError, match="gone was deleted or moved while it was written to")
    with told, disk_errors(tmp_path / "gone"):
        (tmp_path / "gone" / "eval").mkdir()


def no_room(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, NO_SPACE)


@pytest.mark.parametrize("arm", ["rl", "sft"])
def test_a_full_disk_at_the_publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """By hand, where no file system can be mounted; the tensors' file is begun, and there is no
    room for the rest."""
    run(arm, tmp_path, "run.name=x", "run.num_steps=2")
    newest = latest_checkpoint(tmp_path / "x")
    assert newest is not None
    before = {path: path.read_bytes() for path in newest.iterdir()}
    with monkeypatch.context() as patch:

        def half(tensors: object, path: Path, **_: object) -> None:
            path.write_bytes(b"half")
            no_room()

        patch.setattr(adapter, "save_file", half)
        with pytest.raises(UserError, match=f"adapter .* cannot be written .*{NO_SPACE}.*--resume"):
            run(arm, tmp_path, "run.name=x", "run.num_steps=3", resume=True)
    assert not list((tmp_path / "x" / "adapters").glob(".*"))
    for path, content in before.items():
        assert path.read_bytes() == content
    run(arm, tmp_path, "run.name=x", "run.num_steps=3", resume=True)
    run(arm, tmp_path, "run.name=whole", "run.num_steps=3")
    assert result(tmp_path / "x")[1] == result(tmp_path / "whole")[1]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free disk space, then continue"),
        (errno.EDQUOT, "free disk space, then continue"),
        (errno.EFBIG, "free disk space, then continue"),
        (errno.EROFS, "make it writable again, then continue"),
        (errno.EACCES, "make it writable again, then continue"),
    ],
)
def test_errors_of_the_disk_are_the_users(tmp_path: Path, number: int, fix: str) -> None:
    file = str(tmp_path / "x" / "metrics.jsonl")
    told = pytest.raises(UserError, match=rf"x/metrics\.jsonl cannot be written \(.*\); {fix}")
    with told, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number), file)
    if number == errno.ENOSPC:
        with pytest.raises(UserError, match=f"{tmp_path} cannot be written"), disk_errors(tmp_path):
            raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "denied", "/elsewhere"),
        SafetensorError("invalid header"),
        shutil.Error([("a", "b", "no such file")]),
    ):
        with pytest.raises(type(error)), disk_errors(tmp_path):
            raise error


def test_a_copy_of_a_directory_tells_the_disks_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").write_text("x")
    monkeypatch.setattr(shutil, "copystat", no_room)
    with pytest.raises(UserError, match=NO_SPACE), disk_errors(tmp_path):
        shutil.copytree(tmp_path / "from", tmp_path / "to")


def test_a_directory_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    with atomic_directory(final) as scratch:
        (scratch / "a").write_text("1")
    (tmp_path / ".adapter.99").mkdir()  # left by a kill
    final.rename(tmp_path / ".adapter.replaced")  # killed between the two renames
    with pytest.raises(FileNotFoundError), atomic_directory(final) as scratch:
        (scratch / "a").write_text((tmp_path / "not there").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (final / "a").read_text() == "1"
    with atomic_directory(final) as scratch:
        (scratch / "b").write_text("2")
    assert [path.name for path in final.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_file_that_is_not_replaced_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl.write_text_atomically(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match=NO_SPACE):
        jsonl.write_text_atomically(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_all_of_a_log_is_closed_where_one_file_cannot_be(tmp_path: Path) -> None:
    """/dev/full is what a full disk is, for one file."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, ("tensorboard",), 1, resume_step=None)
    with pytest.raises(OSError, match=NO_SPACE):
        log.write(1, {"reward/mean": 0.5})
    with pytest.raises(OSError, match=NO_SPACE):
        log.close()
    assert log._transcripts is not None
    assert log._transcripts.closed
    log.close()  # nothing is left to close


def test_the_command_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.sft.test_sft import SHORT, TINY

    monkeypatch.setattr("rl_lora.sft.train.write_record", no_room)
    assert main(["sft", str(TINY), *SHORT, f"run.output_dir={tmp_path}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert NO_SPACE in lines[0]
