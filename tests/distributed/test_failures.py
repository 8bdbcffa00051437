"""A job of several processes loses one: it says so, leaves nothing behind, and continues."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rl_lora.runs.checkpoint import checkpoint_steps, latest_checkpoint, read_checkpoint
from tests.helpers.processes import LIMIT_S, Job, faulty, launch, result

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(2 * LIMIT_S)]

SETTINGS = """
    run.num_steps=4 run.transcripts_per_step=64 data.held_out=4 sampling.num_prompts=4
    sampling.num_samples=4 sampling.max_tokens=16 reward.num_workers=1
""".split()
RESUME = "; run the same command with --resume to continue from the last checkpoint"
# Where the rank dies, in step 2 -> the steps whose checkpoints may be the last.
PHASES = {
    "rl_lora.overlap:sample_and_score 2": [1],  # sampling
    "rl_lora.learner:Learner._step 2": [1],  # learning: its gradient is there, and not summed yet
    "rl_lora.train:publish 3": [1],
    "rl_lora.train:save 3": [1, 2],  # rank 0 may have written it
}


def train(folder: Path, *more: str, faults: str = "", **options: Any) -> Job:
    command = ["train", "smoke", f"run.output_dir={folder}", *SETTINGS, *more]
    logs = folder / "logs" / str(len(list(folder.glob("logs/*"))))
    return launch(faulty(command, faults), logs, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same job in two processes, unbroken."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder).code == 0
    return folder / "smoke"


@pytest.mark.long
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_rank_ends_the_job_and_the_same_command_resumes_it(
    tmp_path: Path, whole: Path, phase: str
) -> None:
    killed = train(tmp_path, faults=f"1 {phase} kill")
    assert killed.codes == {0: 3, 1: -9}
    ((rank, line),) = killed.lines()
    assert rank == 0
    assert re.fullmatch(
        rf"the run stopped: rank 1 on \S+ ended (during|after) [\w ]+{RESUME}", line
    )
    assert killed.left == []
    newest = latest_checkpoint(tmp_path / "smoke")
    assert newest is not None
    assert read_checkpoint(newest)[1]["step"] in PHASES[phase]
    resumed = train(tmp_path, "--resume")
    assert (resumed.code, resumed.lines(), resumed.left) == (0, [], [])
    assert result(tmp_path / "smoke") == result(whole)


@pytest.mark.long
def test_the_launchers_signal_does_not_hide_who_ended(tmp_path: Path) -> None:
    """It comes while rank 0 finds out: here from itself, as the launcher's would be too early."""
    faults = "1 rl_lora.train:publish 3 kill, 0 rl_lora.distributed:_who_ended 1 signal"
    killed = train(tmp_path, faults=faults, notices_s=5)
    assert killed.codes == {0: 3, 1: -9}
    ((rank, line),) = killed.lines()
    assert rank == 0
    assert line.startswith("the run stopped: rank 1 on ")


@pytest.mark.long
def test_all_ranks_stop_together_where_the_policy_is_too_far_from_the_base(tmp_path: Path) -> None:
    limit = ["algorithm.max_kl_to_base=1e-9", "run.checkpoint_every=3"]
    stopped = train(tmp_path, *limit)
    assert stopped.codes == {0: 3, 1: 3}
    ((_, line),) = stopped.lines()
    assert line.startswith("the run stopped: the policy's KL to the base model is ")
    assert stopped.left == []
    assert checkpoint_steps(tmp_path / "smoke") == {0, 1}


IN_ENGINE = "rl_lora.samplers.vllm.sampler:VllmSampler._wake"


@pytest.mark.long
def test_an_engine_that_hangs_ends_its_rank_and_the_launcher_resumes_the_job(
    tmp_path: Path,
) -> None:
    """It hangs in a lock, which no exception interrupts."""
    pytest.importorskip("vllm")
    settings = ["sampling.backend=vllm", "sampling.timeout_s=20"]
    job = train(tmp_path, *settings, faults=f"1 {IN_ENGINE} 5 hang", max_restarts=1)
    assert (job.code, job.lines(1), job.left) == (0, [], [])
    (line,) = [line for rank, line in job.lines(0) if rank == 1]
    assert line.startswith("the run stopped: the sampler gave no token for 20 s (sampling.timeout")
    lines = (tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.long
def test_an_engine_that_fails_is_replaced_by_its_own_rank(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    job = train(tmp_path, "sampling.backend=vllm", faults=f"1 {IN_ENGINE} 5 defect")
    assert (job.code, job.lines(), job.left) == (0, [], [])
    assert "rank 1: vLLM failed (RuntimeError: made to fail)" in job.printed(1)
    lines = (tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line).get("system/engine_restarts", 0) for line in lines]
    assert sorted(counts) == [0, 0, 0, 1]


@pytest.mark.long
def test_the_launcher_restarts_a_job_that_then_continues_by_itself(
    tmp_path: Path, whole: Path
) -> None:
    """Rank 1 dies at every start but the last: in the first evaluation, then a step further each
    time, in sampling, learning and publishing."""
    places = ["rl_lora.train:evaluate 1", *list(PHASES)[:3]]
    faults = ";".join(f"1 {place} kill" for place in places)
    job = train(tmp_path, faults=faults, max_restarts=len(places))
    assert job.code == 0
    for attempt in range(len(places)):
        ((rank, line),) = job.lines(attempt)
        assert rank == 0
        assert "rank 1 on" in line
    assert (job.lines(len(places)), job.left) == ([], [])
    assert result(tmp_path / "smoke") == result(whole)


@pytest.mark.long
def test_rank_0_killed_in_a_checkpoint_is_named_by_another_and_leaves_the_older_one(
    tmp_path: Path,
) -> None:
    """It dies when the tensors are written and the rest is not."""
    killed = train(tmp_path, faults="0 rl_lora.runs.checkpoint:_document_hash 3 kill")
    assert killed.codes == {0: -9, 1: 3}
    ((rank, line),) = killed.lines()
    assert rank == 1
    assert re.fullmatch(
        rf"rank 1: the run stopped: rank 0 on \S+ ended during the checkpoint of step 2{RESUME}",
        line,
    )
    assert killed.left == []
    assert checkpoint_steps(tmp_path / "smoke") == {0, 1}
    assert list((tmp_path / "smoke" / "checkpoints").glob(".step_000002*"))  # half of it
    assert train(tmp_path, "--resume", "run.num_steps=2").code == 0


@pytest.mark.long
def test_a_rank_that_hangs_is_named_with_what_the_others_wait_for(tmp_path: Path) -> None:
    fault = "1 rl_lora.overlap:sample_and_score 2 hang"
    job = train(tmp_path, "run.process_timeout_s=20", faults=fault)
    assert job.codes[0] == 3
    assert job.codes[1] in (3, -9)  # it ends by itself, or the launcher is faster
    ((rank, line),) = job.lines()
    assert rank == 0
    assert re.fullmatch(
        r"the run stopped: rank 1 on \S+ did not come within 20 s during sampling and scoring "
        rf"\(run\.process_timeout_s\){RESUME}",
        line,
    )
    assert job.left == []


@pytest.mark.long
def test_ranks_that_sample_ahead_agree_on_versions_and_resume(tmp_path: Path) -> None:
    """Each has its own engine; rank 1 dies in the thread that samples, two steps ahead."""
    ahead = ["sampling.backend=tests.helpers.own_copy:OwnCopy", "sampling.max_staleness=2"]
    assert train(tmp_path / "whole", *ahead).code == 0
    expected = result(tmp_path / "whole" / "smoke")
    lines = (tmp_path / "whole/smoke/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["rollouts/staleness_max"] for line in lines] == [0, 1, 2, 2]
    fault = "1 rl_lora.overlap:sample_and_score 4 kill"
    killed = train(tmp_path / "parts", *ahead, faults=fault)
    assert killed.codes == {0: 3, 1: -9}
    resumed = train(tmp_path / "parts", *ahead, "--resume")
    assert (resumed.code, resumed.lines(), resumed.left) == (0, [], [])
    assert result(tmp_path / "parts" / "smoke") == expected


# --- wrong launches -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "settings", "expected"),
    [
        pytest.param(
            "1 optim.lr=0.5 1 setting",
            [],
            r"the processes were started with different settings: optim\.lr is 0\.001 on rank 0 "
            r"and 0\.5 on rank 1; give all of them the same file and command",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "",
            ["sampling.num_prompts=1"],
            r"2 processes for sampling\.num_prompts=1: each needs a prompt; start 1 or fewer, or "
            r"raise sampling\.num_prompts",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "1 rl_lora.build:make_sampler 1 mistake",
            [],
            r"rank 1 on \S+: made to fail",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_wrong_launch_is_refused_in_one_line(
    tmp_path: Path, faults: str, settings: list[str], expected: str
) -> None:
    job = train(tmp_path, *settings, faults=faults)
    assert job.codes == {0: 2, 1: 2}
    ((rank, line),) = job.lines()
    assert rank == 0
    assert re.fullmatch(f"error: {expected}", line)
    assert job.left == []
