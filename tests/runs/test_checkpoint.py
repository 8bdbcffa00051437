"""Checkpoints: exact round trips, kills at every moment, and each way of being broken."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora.errors import UserError
from rl_lora.runs import checkpoint
from rl_lora.runs.checkpoint import (
    STATE_FILE,
    TENSORS_FILE,
    checkpoint_path,
    clean,
    drop_after,
    flatten_optimizer,
    latest_checkpoint,
    prune,
    read_checkpoint,
    restore_optimizer,
    write_checkpoint,
)

pytestmark = pytest.mark.faults


def save(run_folder: Path, step: int, mark: str = "") -> Path:
    """A small checkpoint whose tensor holds its step."""
    return write_checkpoint(run_folder, step, {"a": torch.full((3,), step)}, {"mark": mark})


# --- round trips ----------------------------------------------------------------------------------


def test_tensors_and_state_come_back_exactly(tmp_path: Path) -> None:
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    tensors = {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "half": torch.randn(4).to(torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 2),
        "transposed": base.t(),
        "row": base[1],  # shares memory with the others
        "same": base,
        "grad": torch.nn.Parameter(torch.ones(2)),
    }
    state = {"position": [3, 17], "lr": 0.1, "config": {"lora": {"rank": 1}}, "note": "a\x00\u2028"}
    path = write_checkpoint(tmp_path, 12, tensors, state)
    assert path == tmp_path / "checkpoints" / "step_000012"
    loaded, loaded_state = read_checkpoint(path)
    assert loaded_state == {**state, "step": 12}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    assert read_checkpoint(write_checkpoint(tmp_path, 0, {}, {})) == ({}, {"step": 0})


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == [STATE_FILE, TENSORS_FILE]
    assert json.loads((path / STATE_FILE).read_text())["state"]["step"] == 1


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"loss": float("nan")}, ValueError, "not JSON compliant"),
        ({"path": Path("x")}, TypeError, "not JSON serializable"),
    ],
)
def test_a_state_that_json_cannot_hold_writes_nothing(
    tmp_path: Path, state: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_checkpoint(tmp_path, 2, {}, state)
    assert latest_checkpoint(tmp_path) is None


# --- latest, prune, drop --------------------------------------------------------------------------


def test_latest_goes_by_number_not_by_text(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (999_999, 2, 1_000_000):
        save(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_1000000"


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    assert prune(tmp_path, 2) == []
    paths = [save(tmp_path, step) for step in (1, 2, 3, 10)]
    assert prune(tmp_path, 2) == paths[:2]
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths[2:]
    assert prune(tmp_path, 2) == []


def test_a_resumed_run_deletes_what_a_kill_has_kept_from_it(tmp_path: Path) -> None:
    """The kill came after the save of step 4: steps 1 and 2 were to go, and 2 is half gone."""
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    paths[1].rename(paths[1].with_name(".step_000002.deleted"))
    paths[0].with_name(".step_000005.4711").mkdir()  # another one, in a save
    clean(tmp_path, 4, 2)
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths[2:]
    clean(tmp_path, 3, 2)
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths[2:3]
    clean(tmp_path / "absent", -1, 2)


def test_drop_after_forgets_the_steps_that_are_run_again(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (1, 2, 3)]
    (paths[2] / STATE_FILE).unlink()
    assert drop_after(tmp_path, 1) == paths[1:]
    assert latest_checkpoint(tmp_path) == paths[0]
    assert drop_after(tmp_path, 1) == []
    assert drop_after(tmp_path / "absent", 1) == []


def test_a_step_saved_twice_holds_the_second(tmp_path: Path) -> None:
    save(tmp_path, 4, "first")
    path = save(tmp_path, 4, "second")
    assert read_checkpoint(path)[1]["mark"] == "second"
    assert list((tmp_path / "checkpoints").iterdir()) == [path]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in ("step_12", "step_000009.bak", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    save(tmp_path, 2)
    prune(tmp_path, 1)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_000002", "step_12", "step_000009.bak", "notes"}


# --- broken ones ----------------------------------------------------------------------------------


def flip_bit(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def edit_state(path: Path, **values: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **values}))


def list_another_file(path: Path) -> None:
    """A state file that asks for a file outside, with the right checksum: not by accident."""
    document = json.loads(path.read_text())
    document["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    del document["sha256"]
    document["sha256"] = checkpoint._document_hash(document)
    path.write_text(json.dumps(document))


def rename_another(path: Path) -> None:
    """The checkpoint of step 1 under the name of this one: whole, and of another step."""
    shutil.rmtree(path)
    shutil.copytree(checkpoint_path(path.parents[1], 1), path)


# What is done to the directory of step 2, and what the message says.
BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "there is no such directory"),
    "no state": (lambda p: (p / STATE_FILE).unlink(), "state.json is missing"),
    "no tensors": (lambda p: (p / TENSORS_FILE).unlink(), "tensors.safetensors is missing"),
    "cut state": (lambda p: cut(p / STATE_FILE), "state.json is not valid JSON"),
    "cut tensors": (lambda p: cut(p / TENSORS_FILE), "cut short"),
    "zeroed state": (
        lambda p: (p / STATE_FILE).write_bytes(bytes(400)),
        "state.json is not valid JSON",
    ),
    "other JSON": (
        lambda p: (p / STATE_FILE).write_text("[1]"),
        "not a checkpoint's state",
    ),
    "binary state": (
        lambda p: (p / STATE_FILE).write_bytes(b"\xff\xfe"),
        "state.json is not valid JSON",
    ),
    "flipped bit": (lambda p: flip_bit(p / TENSORS_FILE), "tensors.safetensors is not"),
    "edited state": (
        lambda p: edit_state(p / STATE_FILE, state={"step": 7}),
        "state.json is not the file that was saved",
    ),
    "another file": (
        lambda p: list_another_file(p / STATE_FILE),
        "state.json lists files other than",
    ),
    "of another step": (rename_another, "state.json is of step 1: the directory has been renamed"),
    "newer format": (
        lambda p: edit_state(p / STATE_FILE, format_version=2),
        "format version 2, this program reads 1",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_checkpoint_names_itself_and_the_whole_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    damage, message = BREAKAGES[name]
    whole, broken = save(tmp_path, 1), save(tmp_path, 2)
    damage(broken)
    with pytest.raises(UserError) as caught:
        read_checkpoint(broken)
    assert message in str(caught.value)
    assert str(broken) in str(caught.value)
    assert f"delete it and resume again, from {whole}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert latest_checkpoint(tmp_path) == whole
    assert caplog.messages == (
        [] if not broken.exists() else [f"checkpoint skipped: {broken}: {reason(caught.value)}"]
    )


def reason(error: UserError) -> str:
    """What is wrong, between the checkpoint's name and the fix."""
    return str(error).partition(": ")[2].rpartition("; ")[0]


def test_the_whole_one_that_is_named_is_whole_indeed(tmp_path: Path) -> None:
    whole, flipped, headless, last = (save(tmp_path, step) for step in (1, 2, 3, 4))
    flip_bit(flipped / TENSORS_FILE)
    (headless / STATE_FILE).unlink()
    cut(last / TENSORS_FILE)
    newer = save(tmp_path, 5)
    with pytest.raises(UserError) as caught:
        read_checkpoint(last)
    assert f"from {whole}, " in str(caught.value)
    assert str(newer) not in str(caught.value)


def test_without_any_whole_checkpoint_the_fix_is_a_new_start(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    newer = save(tmp_path, 2)
    flip_bit(path / TENSORS_FILE)
    cut(newer / TENSORS_FILE)
    with pytest.raises(UserError, match="start again under another run"):
        read_checkpoint(newer)
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        latest_checkpoint(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"step_000001 cannot be written"):
        save(tmp_path, 1)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == [old]


# --- kills ----------------------------------------------------------------------------------------


def test_a_kill_before_any_file_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child process dies at its n-th operation on the file system, for every n.

    The work: two saves and a prune. Whatever n, every directory with a checkpoint's name is intact,
    the newest is at least as new as the last save that finished, and the next save and prune tidy
    up.
    """
    # A kill loses nothing that was written: waiting for the disk would only make the test slow.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen = set()
    for number in itertools.count(1):
        run_folder = tmp_path / str(number)
        save(run_folder, 1, "old")
        save(run_folder, 2, "old")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _die_at_operation(number)
            save(run_folder, 3, "new")
            os.write(writer, b"s")
            save(run_folder, 4, "newer")
            os.write(writer, b"s")
            prune(run_folder, 1)
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        num_saved = len(os.read(reader, 9))
        os.close(reader)
        for path in (run_folder / "checkpoints").glob("step_*"):
            tensors, state = read_checkpoint(path)
            assert tensors["a"].tolist() == [state["step"]] * 3
        latest = latest_checkpoint(run_folder)
        assert latest is not None
        mark = read_checkpoint(latest)[1]["mark"]
        assert mark in ("old", "new", "newer")[num_saved:]
        seen.add(mark)
        save(run_folder, 5)
        prune(run_folder, 1)
        assert [p.name for p in (run_folder / "checkpoints").iterdir()] == ["step_000005"]
        if status == 0:
            break
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert number > 30  # the operations were counted indeed
    assert seen == {"old", "new", "newer"}


def _die_at_operation(number: int) -> None:
    """From now on, the number-th file operation (mkdir, write, fsync, rename, ...) kills us."""
    count = itertools.count(1)

    def counted(event: str, _: tuple[Any, ...]) -> None:
        is_operation = event in ("open", "shutil.rmtree") or event.startswith("os.")
        if is_operation and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:  # raises no audit event
        counted("os.fsync", ())
        fsync(descriptor)

    os.fsync = counted_fsync  # type: ignore[assignment]  # this process ends with the test's child
    sys.addaudithook(counted)


SAVER = """
import sys, torch
from pathlib import Path
from rl_lora.runs.checkpoint import prune, write_checkpoint
run_folder, first = Path(sys.argv[1]), int(sys.argv[2])
weights = torch.ones(1_000_000)
for step in range(first, first + 1000):
    write_checkpoint(run_folder, step, {"w": weights * step}, {"w": step})
    prune(run_folder, 2)
    print(step, flush=True)
"""


@pytest.mark.long
@pytest.mark.slow
def test_kill_9_in_the_middle_of_saving(tmp_path: Path) -> None:
    """A real process that saves without a pause is killed three times."""
    generator = random.Random(0)
    first = 2
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(first)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        reported = [int(process.stdout.readline())]
        time.sleep(generator.uniform(0.1, 0.4))
        process.kill()
        reported += [int(line) for line in process.stdout.read().split()]
        process.wait()
        path = latest_checkpoint(tmp_path)
        assert path is not None
        tensors, state = read_checkpoint(path)
        assert state["w"] >= reported[-1]
        assert torch.equal(tensors["w"], torch.full((1_000_000,), float(state["w"])))
        first = state["w"] + 1


# --- optimizer ------------------------------------------------------------------------------------


def make_adam(seed: int, **options: Any) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 2), (4,)]
    ]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3, "eps": 0.0}]
    return torch.optim.Adam(groups, lr=0.1, betas=(0.9, 0.95), **options), parameters


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    for factor in (1.0, 0.3, -2.0):
        for parameter in parameters:
            parameter.grad = torch.cos(parameter.detach() * factor)
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"fused": True}])
def test_adam_resumes_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    optimizer, parameters = make_adam(0, **options)
    train(optimizer, parameters)
    tensors, meta = flatten_optimizer(optimizer)
    weights = {f"weight/{index}": parameter for index, parameter in enumerate(parameters)}
    path = write_checkpoint(tmp_path, 3, {**tensors, **weights}, {"optimizer": meta})
    train(optimizer, parameters)

    other, other_parameters = make_adam(1, **options)
    loaded, state = read_checkpoint(path)
    with torch.no_grad():
        for index, parameter in enumerate(other_parameters):
            parameter.copy_(loaded[f"weight/{index}"])
    restore_optimizer(other, loaded, state["optimizer"])
    assert other.param_groups[0]["betas"] == (0.9, 0.95)
    train(other, other_parameters)
    for ours, theirs in zip(other_parameters, parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_a_fresh_optimizer_and_named_parameters(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.named_parameters(), lr=0.1)
    tensors, meta = flatten_optimizer(optimizer)
    assert tensors == {}
    _, state = read_checkpoint(write_checkpoint(tmp_path, 0, tensors, {"optimizer": meta}))
    other = torch.optim.AdamW(torch.nn.Linear(2, 1).named_parameters(), lr=0.5)
    restore_optimizer(other, {}, state["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1


def test_restoring_does_not_change_the_loaded_tensors() -> None:
    optimizer, parameters = make_adam(0)
    train(optimizer, parameters)
    tensors, meta = flatten_optimizer(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other, other_parameters = make_adam(1)
    restore_optimizer(other, kept, meta)
    train(other, other_parameters)
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)


def test_an_optimizer_of_another_config_is_refused() -> None:
    optimizer, parameters = make_adam(0)
    tensors, meta = flatten_optimizer(optimizer)
    with pytest.raises(UserError, match="does not match this run's"):
        restore_optimizer(torch.optim.Adam(parameters[:1]), tensors, meta)
    with pytest.raises(UserError, match="does not match this run's"):
        restore_optimizer(torch.optim.SGD(parameters, lr=0.1), tensors, meta)


def test_step_names_have_six_digits(tmp_path: Path) -> None:
    assert checkpoint_path(tmp_path, 12).name == "step_000012"
