"""Whole jobs with samplers in Ray: several ranks, signals, a node that dies, vLLM's engines.

With a real Ray on this machine, started as a user's job starts it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from rl_lora.adapters.files import save_adapter
from rl_lora.runs.checkpoint import latest_checkpoint, read_checkpoint
from tests.distributed.test_equal import EPISODES, check_equal
from tests.distributed.test_failures import RESUME, SETTINGS
from tests.helpers.processes import LIMIT_S, Job, faulty, launch, result
from tests.helpers.tiny_models import make_policy, shake
from tests.samplers.fleet.test_ray import MODEL, PARAMS, PROMPTS, expected_of, ray_fleet

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(3 * LIMIT_S),
]

# Each group is decoded by itself, wherever that is.
JOB = ["train", "smoke", *SETTINGS, "sampling.max_num_seqs=4", "run.name=x"]
RAY = ["resources.samplers=2"]


def run(folder: Path, num_processes: int, *more: str, faults: str = "") -> Job:
    logs = folder / "logs" / str(len(list(folder.glob("logs/*"))))
    command = [*JOB, f"run.output_dir={folder}", *more]
    return launch(faulty(command, faults), logs, num_processes)


def without_fleet(found: dict[str, Any]) -> dict[str, Any]:
    """Its metrics are only of jobs that have one."""
    rows = found["metrics"]
    kept = [{name: row[name] for name in row if not name.startswith("fleet/")} for row in rows]
    return {**found, "metrics": kept}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The job in one process, with the sampler in it."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, 1).code == 0
    return result(folder / "x")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_where_a_job_samples_changes_nothing(
    tmp_path: Path, whole: dict[str, Any], num_processes: int
) -> None:
    job = run(tmp_path, num_processes, *RAY)
    assert (job.code, job.lines(), job.left) == (0, [], [])
    check_equal(without_fleet(result(tmp_path / "x")), whole)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_episodes_are_the_same_wherever_their_turns_are_sampled(
    tmp_path: Path, num_processes: int
) -> None:
    """In turns after the first, samples of several prompts are decoded together."""
    for name, num, more in (("here", 1, []), ("there", num_processes, RAY)):
        job = run(tmp_path, num, *EPISODES, *more, f"run.name={name}")
        assert (job.code, job.lines(), job.left) == (0, [], [])
    found, expected = (without_fleet(result(tmp_path / name)) for name in ("there", "here"))
    check_equal(found, expected, 1e-5)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("num_processes", "fault"),
    [
        (1, "0 rl_lora.overlap:sample_and_score 2 signal"),
        (2, "0 rl_lora.overlap:sample_and_score 2 cancel"),
        (2, "1 rl_lora.learner:Learner._step 2 signal"),
    ],
)
def test_a_signal_ends_job_and_ray_and_the_job_resumes(
    tmp_path: Path, whole: dict[str, Any], num_processes: int, fault: str
) -> None:
    ended = run(tmp_path, num_processes, *RAY, "run.checkpoint_every=50", faults=fault)
    step = 1 if "sample" in fault else 2
    assert ended.lines() == [(0, f"stopped by SIGTERM after step {step}{RESUME}")]
    assert (set(ended.codes.values()) <= {143}, ended.left) == (True, [])
    newest = latest_checkpoint(tmp_path / "x")
    assert newest is not None
    assert read_checkpoint(newest)[1]["step"] == step
    resumed = run(tmp_path, num_processes, *RAY, "--resume", "run.checkpoint_every=50")
    assert (resumed.code, resumed.lines(), resumed.left) == (0, [], [])
    check_equal(without_fleet(result(tmp_path / "x")), whole)


@pytest.mark.faults
def test_a_killed_rank_ends_job_and_ray(tmp_path: Path) -> None:
    """Rank 0 has the engines, and sees that rank 1 is missing."""
    killed = run(tmp_path, 2, *RAY, faults="1 rl_lora.learner:Learner._step 2 kill")
    assert killed.codes == {0: 3, 1: -9}
    ((rank, line),) = killed.lines()
    assert (rank, killed.left) == (0, [])
    assert line.startswith("the run stopped: rank 1 on ")


@pytest.mark.faults
def test_a_node_of_a_cluster_dies(tmp_path: Path) -> None:
    """Its sampler is started again on the other node, which has room for both."""
    from ray.cluster_utils import Cluster

    policy = make_policy(MODEL)
    shake(policy)
    adapter = save_adapter(policy, tmp_path, version=1, run_name="r")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        first, _ = nodes.add_node(num_cpus=2), nodes.add_node(num_cpus=2)
        nodes.wait_for_nodes()
        with ray_fleet(policy, address=nodes.address) as (sampler, _, warnings):
            sampler.set_adapter(adapter)
            seen: list[int] = []

            def kill(index: int, _: object) -> None:
                if not seen:
                    nodes.remove_node(first, allow_graceful=False)
                seen.append(index)

            found = sampler.sample(PROMPTS, PARAMS, kill)
            assert sorted(seen) == list(range(len(PROMPTS)))
            sampler.set_adapter(None)
            sampler.set_adapter(adapter)
            assert sampler.num_restarts == 1
            again = sampler.sample(PROMPTS, PARAMS)
    finally:
        nodes.shutdown()
    assert found == again == expected_of(policy, adapter, PARAMS, 64)
    assert len(warnings) == 1
    assert "its process has died; it is started again" in warnings[0]


def test_vllm_in_two_actors_has_the_learners_weights(tmp_path: Path) -> None:
    """Every step's log-probs are the policy's up to rounding."""
    job = run(tmp_path, 1, *RAY, "sampling.backend=vllm", "run.num_steps=2")
    assert (job.code, job.lines(), job.left) == (0, [], [])
    rows = result(tmp_path / "x")["metrics"]
    assert [row["fleet/live"] for row in rows] == [2, 2]
    assert all(abs(row["mismatch/kl"]) < 1e-9 for row in rows)
