"""Where sampling runs: what [resources] takes, and which combinations it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rl_lora.config import parse_config
from rl_lora.errors import UserError
from rl_lora.runs.record import check_same_job

SERVERS = ["http://one:8000", "http://two:8000"]


@pytest.mark.parametrize(
    ("resources", "uses_ray", "is_remote"),
    [
        ({}, False, False),
        ({"samplers": 2}, True, True),
        ({"ray_address": "auto"}, True, True),
        ({"samplers": 3, "gpus_per_sampler": 0, "ray_address": "local"}, True, True),
        ({"servers": SERVERS}, False, True),
    ],
)
def test_where_sampling_runs(resources: dict[str, Any], uses_ray: bool, is_remote: bool) -> None:
    found = parse_config({"resources": resources}).resources
    assert (found.uses_ray, found.is_remote) == (uses_ray, is_remote)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ({"resources": {"samplers": 2, "servers": SERVERS}}, r"resources\.samplers=2.*remove one"),
        (
            {"resources": {"ray_address": "auto", "servers": SERVERS}},
            r"resources\.ray_address='auto'",
        ),
        ({"resources": {"servers": ["one:8000"]}}, r"'one:8000' is not an address"),
        ({"resources": {"servers": [SERVERS[0]] * 2}}, "twice"),
        ({"resources": {"gpus_per_sampler": 1}}, r"set resources\.samplers to 2 or more"),
        (
            {"resources": {"servers": SERVERS}, "sampling": {"backend": "torch"}},
            r'set sampling\.backend="vllm"',
        ),
        ({"resources": {"servers": SERVERS}, "lora": {"mode": "full"}}, r"set lora\.mode='lora'"),
        ({"resources": {"servers": SERVERS}, "lora": {"lm_head": True}}, "vllm#51594"),
        (
            {"resources": {"servers": SERVERS}, "sampling": {"memory_fraction": 0.5}},
            r"sampling\.memory_fraction has no effect on resources\.servers",
        ),
        ({"resources": {"servers_folder": "/mnt"}}, "and there are none; remove it"),
        ({"resources": {"samplers": 0}}, "greater than or equal to 1"),
    ],
)
def test_contradictions_are_named(raw: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        parse_config(raw)


@pytest.mark.parametrize(
    "address",
    ["ftp://one", "http://", "http:one", "http://one:x", "http://one:0", "http://one/?a=b", "http://[",
     "http://one two", "http://one\n", "", "http://ünï"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not an address; write http://HOST:PORT"):
        parse_config({"resources": {"servers": [address]}})


def test_addresses_and_a_password_in_one() -> None:
    good = ["http://one", "https://two:8000/vllm", "http://[::1]:8000", "http://10.0.0.1:8000/"]
    assert parse_config({"resources": {"servers": good}}).resources.servers == tuple(good)
    with pytest.raises(UserError, match="VLLM_API_KEY") as caught:
        parse_config({"resources": {"servers": ["http://me:s3cret@one:8000"]}})
    assert "s3cret" not in str(caught.value)


def test_a_resumed_job_may_sample_elsewhere() -> None:
    old = parse_config({"resources": {"samplers": 2}}).model_dump(mode="json")
    servers = parse_config({"resources": {"servers": SERVERS, "servers_folder": "/mnt"}})
    check_same_job(old, servers, Path("step_000001"), "float32")
    check_same_job(old, parse_config({}), Path("step_000001"), "float32")


def test_torch_samplers_elsewhere_may_run_ahead() -> None:
    ahead = {"backend": "torch", "max_staleness": 1}
    with pytest.raises(UserError, match=r"resources\.samplers=2"):
        parse_config({"sampling": ahead})
    parse_config({"sampling": ahead, "resources": {"samplers": 2}})
