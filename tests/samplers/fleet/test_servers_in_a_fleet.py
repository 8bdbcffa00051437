"""FleetSampler over servers: what comes back when some of them fail, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rl_lora.errors import EngineError, UserError
from rl_lora.samplers.fleet.fleet import FleetSampler
from rl_lora.samplers.fleet.proofs import Prover
from rl_lora.samplers.fleet.replica import GroupRequest
from rl_lora.samplers.fleet.servers import HttpReplica
from rl_lora.seeds import sample_seeds
from rl_lora.types import Adapter, Completion, Probe, Prompt
from tests.helpers.fake_server import FakeServer, serving
from tests.samplers.fleet.test_servers import (
    LIMIT_S,
    PARAMS,
    PROBES_N,
    expected,
    expected_scores,
    make_job,
    wait_until,
)

PROMPTS = [Prompt(f"p/{n}", "s", "q", "1", (11, 12, 13 + n)) for n in range(6)]


class HashProver(Prover):
    """Whose policy is the stand-in's hash."""

    def __init__(self) -> None:
        pass

    def probe(self, adapter: Adapter | None) -> Probe | None:
        logprobs_N = tuple(tuple(logprobs) for logprobs in expected_scores(adapter))
        return Probe(tuple(PROBES_N), logprobs_N, limit=1e-6)


def expected_groups(adapter: Adapter | None) -> list[list[Completion]]:
    seeds_N_G = sample_seeds(PROMPTS, PARAMS)
    return [
        expected(adapter, GroupRequest(prompt, PARAMS, tuple(seeds_G)))
        for prompt, seeds_G in zip(PROMPTS, seeds_N_G, strict=True)
    ]


@contextmanager
def fleet_on(
    urls: list[str], folder: Path, on_warning: Callable[[str], None], *, max_restarts: int = 9
) -> Iterator[FleetSampler]:
    """Each server takes two groups at once."""
    job = make_job(folder, max_samples=2 * PARAMS.num_samples)
    fleet = FleetSampler(
        [HttpReplica(url, job) for url in urls],
        HashProver(),
        max_restarts=max_restarts,
        timeout_s=LIMIT_S,
        on_warning=on_warning,
    )
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.mark.faults
def test_what_servers_that_come_and_go_sample_is_what_one_would(
    stack: ExitStack,
    tmp_path: Path,
    versions: list[Adapter],
) -> None:
    steady, first, second = FakeServer(), FakeServer(), FakeServer()
    told: list[str] = []
    with ExitStack() as until_death:
        url = until_death.enter_context(serving(first))
        fleet = stack.enter_context(
            fleet_on([stack.enter_context(serving(steady)), url], tmp_path, told.append)
        )
        fleet.set_adapter(versions[0])
        assert fleet.sample(PROMPTS, PARAMS) == expected_groups(versions[0])
        fleet.set_adapter(versions[1])
        first.fault = "hang"
        groups = []
        num_asked = len(first.requests)

        def on_group(index: int, completions_G: list[Completion]) -> None:
            groups.append(index)
            if len(groups) == 4:  # the other two are with the first server, which dies
                wait_until(lambda: len(first.requests) == num_asked + 2 * PARAMS.num_samples)
                until_death.close()

        assert fleet.sample(PROMPTS, PARAMS, on_group) == expected_groups(versions[1])
    assert sorted(groups) == list(range(6))
    assert f"{url}/inference/v1/generate does not answer" in told[0]
    assert "its 2 groups are sampled elsewhere, with the same seeds" in told[0]
    with serving(second, int(url.rpartition(":")[2])):
        wait_until(lambda: len(second.adapters) == 1)  # it got the version
        fleet.set_adapter(versions[2])
        assert fleet.sample(PROMPTS, PARAMS) == expected_groups(versions[2])
        names = {body["model"] for body in second.requests[-PARAMS.num_samples :]}
        assert names == {second.names[-1]}
        metrics = fleet.metrics()
        assert metrics["fleet/live"] == 2
        assert metrics["fleet/groups_sampled_again"] == 2


@pytest.mark.faults
def test_a_server_that_computes_with_an_old_adapter_is_left_out(
    stack: ExitStack,
    tmp_path: Path,
    versions: list[Adapter],
) -> None:
    good, stale = FakeServer(), FakeServer()
    urls = [stack.enter_context(serving(server)) for server in (good, stale)]
    told: list[str] = []
    fleet = stack.enter_context(fleet_on(urls, tmp_path, told.append))
    fleet.set_adapter(versions[1])
    stale.fault = "stale"
    fleet.set_adapter(versions[2])
    stale.fault = "" if fleet.metrics()["fleet/left_out"] else "stale"
    assert fleet.sample(PROMPTS, PARAMS) == expected_groups(versions[2])
    assert f"{urls[1]}: sampler and policy disagree on fixed tokens" in told[0]


@pytest.mark.faults
def test_without_any_server_the_run_ends_with_one_line(
    stack: ExitStack,
    tmp_path: Path,
    versions: list[Adapter],
) -> None:
    server = FakeServer()
    url = stack.enter_context(serving(server))
    fleet = stack.enter_context(fleet_on([url], tmp_path, lambda text: None, max_restarts=1))
    fleet.set_adapter(versions[1])
    server.fault = "500"
    with pytest.raises(EngineError, match=rf"no sampler is left \({url}: .* answered 500"):
        fleet.sample(PROMPTS, PARAMS)


def test_the_first_server_without_a_flag_ends_the_start(
    stack: ExitStack,
    tmp_path: Path,
) -> None:
    urls = [stack.enter_context(serving(server)) for server in (FakeServer(), FakeServer(raw=True))]
    with pytest.raises(UserError, match=f"{urls[1]} .* --logprobs-mode processed_logprobs"):
        stack.enter_context(fleet_on(urls, tmp_path, lambda text: None))
