"""vLLM engines in a job of two processes."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.vllm_job import PROMPTS, SHARES, open_sampler, sampled
from tests.samplers.test_vllm_sampler import make_model, publish

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 1e-4  # nats, at most; batches of other sizes are added up in another order

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="this compares float32 log-probs of vLLM's CPU back end"
)


@pytest.mark.slow
@pytest.mark.long
def test_each_process_samples_its_share_with_its_own_engine(tmp_path: Path) -> None:
    """See `tests.helpers.vllm_job.main`."""
    pytest.importorskip("vllm")
    model = make_model(tmp_path / "model", tied=False)
    versions = [publish(model, tmp_path / "adapters", number) for number in (1, 2)]
    adapters = json.dumps([asdict(one) | {"path": str(one.path)} for one in versions])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    ended = subprocess.run(
        [sys.executable, *launch, "tests.helpers.vllm_job", str(tmp_path), adapters],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    told = (
        f"rank 0 ends: rank 1 on {platform.node()}: vLLM does not serve {model}: Available memory"
    )
    assert told in ended.stderr, ended.stderr
    assert "rank 1 ends" not in ended.stderr
    done = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert done[0]["too long"].startswith("prompt 'p/0' has 6 tokens, and with sampling.max_tokens")
    assert done[1]["failed"].startswith(f"vLLM does not serve {model}: Available memory")
    for rank, one in enumerate(done):
        assert one["groups"] == [2, rank]
        assert one["sums"] == [[3.0, 3.0, 3.0]] * 3
        assert one["is_same_hook"]

    with contextlib.closing(open_sampler(model)) as sampler:
        single = sampled(sampler, [*versions, None], list(range(len(PROMPTS))))
        sampler.set_adapter(None)
        scored = sampler.token_logprobs([PROMPTS[0].token_ids])
    assert len({json.dumps(groups) for groups in single.values()}) == 3
    for one, share in zip(done, SHARES, strict=True):
        for version, groups in single.items():
            assert_same(one["sampled"][version], [groups[index] for index in share])
    torch.testing.assert_close(done[1]["scored"], scored, atol=ROUNDING, rtol=0)


def assert_same(found: list[list[list[Any]]], expected: list[list[list[Any]]]) -> None:
    """The same token ids, and log-probs up to rounding, in two lists of groups."""
    ids, logprobs = (
        [
            [completion[part] for group in groups for completion in group]
            for groups in (found, expected)
        ]
        for part in (0, 1)
    )
    assert ids[0] == ids[1]
    torch.testing.assert_close(*logprobs, atol=ROUNDING, rtol=0)
