"""The processes of one job: who does what, and what is left of them however the job ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rl_lora import distributed
from rl_lora.config import load_config
from rl_lora.errors import UserError
from rl_lora.launchers import environment as launchers
from rl_lora.train import train

ROOT = Path(__file__).resolve().parents[1]


# --- one process ----------------------------------------------------------------------------------


def test_the_most_expensive_item_goes_first_to_the_least_loaded_rank() -> None:
    # 9 to rank 0; 7 and then 3 to rank 1, as 7 < 9; the first 2 to rank 0 (9 < 10).
    assert distributed.share([2, 9, 3, 7, 2], 2) == [[0, 1], [2, 3, 4]]
    # Equal costs are dealt out in turn, and a rank may get nothing.
    assert distributed.share([1.0] * 5, 3) == [[0, 3], [1, 4], [2]]
    assert distributed.share([1.0], 3) == [[0], [], []]
    assert distributed.share([], 2) == [[], []]
    # Items without costs are dealt out as well: the rank with fewer of them is next.
    assert distributed.share([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]
    assert distributed.share([3, 1, 2]) == [[0, 1, 2]]  # one process does everything


@pytest.mark.parametrize(
    ("environment", "is_launched"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1"}, False),  # which some containers always set
        ({"WORLD_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),  # torchrun --nproc_per_node 1
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"PMI_SIZE": "2"}, True),
    ],
)
def test_a_launched_process_is_known_by_its_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_launched: bool
) -> None:
    for name in ("RANK", *launchers._SIZES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launchers.is_launched() == is_launched


def test_one_process_where_accelerate_was_asked_for_several_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `accelerate launch --num_processes 2` does where there are no two GPUs."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    with (
        pytest.raises(UserError, match="add --multi_gpu to `accelerate launch`"),
        distributed.joined(),
    ):
        pass


def test_one_process_needs_no_others_and_loads_nothing_for_it() -> None:
    program = """
import sys
from rl_lora import distributed as d
with d.joined(), d.local_main_first():
    assert (d.rank(), d.world_size(), d.local_rank(), d.local_size()) == (0, 1, 0, 1)
    assert d.is_main() and d.is_speaker()
    value = object()
    assert d.gather(value, "a") == [value]
    assert d.from_main(lambda: value, "b") is value
    assert d.add_up("not even a tensor", "c") == {}
    d.check_same(value, "d", "")
    d.tell(KeyError())
print(sorted({"torch", "accelerate"} & set(sys.modules)))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"


def test_no_rank_waits_for_others_within_what_rank_0_does_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would be elsewhere. In one process nobody would notice, so it is counted."""
    from_main, gather = distributed.from_main, distributed.gather
    inside: list[str] = []

    def watched_from_main(make: Callable[[], Any], phase: str) -> Any:
        assert not inside, (inside, phase)

        def watched_make() -> Any:
            inside.append(phase)
            try:
                return make()
            finally:
                inside.pop()

        return from_main(watched_make, phase)

    def watched_gather(value: Any, phase: str) -> list[Any]:
        assert not inside, (inside, phase)
        return gather(value, phase)

    monkeypatch.setattr(distributed, "from_main", watched_from_main)
    monkeypatch.setattr(distributed, "gather", watched_gather)
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)
    settings = ["run.num_steps=2", "sampling.num_prompts=2", "data.held_out=2", "model.dtype=auto"]
    job = [*settings, "model.device=auto", "run.eval_every=1", f"run.output_dir={tmp_path}"]
    train(load_config(ROOT / "configs" / "smoke.toml", job), quiet=True)
    train(load_config(ROOT / "configs" / "smoke.toml", job), resume=True, quiet=True)


# --- several processes, each of which ends in its own way -----------------------------------------


@dataclass(frozen=True)
class Ending:
    """What a job of tests/helpers/endings.py left."""

    codes: list[int]  # of the ranks; -9: SIGKILL
    lines: list[str]  # ours, of all ranks, each after the rank that printed it
    tracebacks: list[int]  # the ranks that printed one
    host: str


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ending]:
    """The jobs of tests/helpers/endings.py by name; all of them are run once."""
    folder = tmp_path_factory.mktemp("endings")
    program = [sys.executable, "-m", "tests.helpers.endings", str(folder)]
    subprocess.run(program, cwd=ROOT, timeout=240, check=True)
    codes = json.loads((folder / "codes.json").read_text())

    def of(mode: str) -> Ending:
        errors = [
            (folder / f"{mode}.{rank}.stderr").read_text().splitlines()
            for rank in range(len(codes[mode]))
        ]
        lines = [
            f"{rank} {line.removeprefix('rl-lora: ')}"
            for rank, found in enumerate(errors)
            for line in found
            if line.startswith("rl-lora: ")
        ]
        tracebacks = [
            rank
            for rank, found in enumerate(errors)
            if any("Traceback (most recent call last)" in line for line in found)
        ]
        return Ending(codes[mode], lines, tracebacks, codes["host"])

    return of


# mode -> (exit codes, the only line with the rank that prints it; {}: the host, ranks with a
# traceback)
ENDINGS: dict[str, tuple[list[int], str, list[int]]] = {
    # After rank 2 has come through everything that ranks do together:
    "exchanges": (
        [2, 2, 2],
        "0 error: rank 2 on {} has another second setting than rank 0: give all the same file",
        [],
    ),
    "both mistaken": ([2, 2], "0 error: no such file 0", []),
    "one mistaken": ([2, 2], "0 error: rank 1 on {}: no such file", []),
    "one mistaken before joining": ([2, 2], "0 error: rank 1 on {}: no such file", []),
    "one mistaken, the main one busy": ([2, 2], "1 rank 1: error: no such file", []),
    "one has a bug": ([3, 1], "0 the run stopped: rank 1 on {}: KeyError: 'bug'; RESUME", [1]),
    "one hangs": (
        [3, 3, 3],
        "0 the run stopped: rank 1 on {} did not come within 1 s during the sum "
        "(run.process_timeout_s); RESUME",
        [],
    ),
    "main hangs": (
        [3, 3],
        "1 rank 1: the run stopped: rank 0 on {} did not come within 3 s during the sum "
        "(run.process_timeout_s); RESUME",
        [],
    ),
    "one killed": ([3, -9, 3], "0 the run stopped: rank 1 on {} ended during the sum; RESUME", []),
    "one killed, the other busy": (
        [3, -9],
        "0 the run stopped: rank 1 on {} ended after the start; RESUME",
        [],
    ),
    "main killed": (
        [-9, 3],
        "1 rank 1: the run stopped: rank 0 on {} ended during the sum; RESUME",
        [],
    ),
    "interrupted": ([130, 130], "0 stopped by Ctrl-C; RESUME", []),
    "one interrupted": (
        [130, 130],
        "0 the run stopped: rank 1 on {}: stopped by Ctrl-C; RESUME",
        [],
    ),
    "cancelled": ([143, 143], "0 stopped by SIGTERM; RESUME", []),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ENDINGS)
def test_one_rank_says_in_one_line_why_the_job_ends(
    ending: Callable[[str], Ending], mode: str
) -> None:
    codes, line, tracebacks = ENDINGS[mode]
    found = ending(mode)
    assert found.lines == [line.format(found.host)]
    assert found.codes == codes
    assert found.tracebacks == tracebacks


@pytest.mark.slow
def test_a_defect_keeps_its_traceback_and_needs_no_other_line(
    ending: Callable[[str], Ending],
) -> None:
    assert ending("main has a bug") == Ending([1, 3], [], [0], ending("main killed").host)
    another_phase = ending("another phase")
    assert (another_phase.codes, another_phase.tracebacks) == ([1, 1], [0, 1])
