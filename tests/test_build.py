"""What a back end would refuse is refused before data and model are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora import build as job
from rl_lora.config import parse_config
from rl_lora.errors import UserError
from rl_lora.models import device as devices


@pytest.mark.parametrize(
    ("device", "settings", "told"),
    [
        ("cuda", {"lora": {"lm_head": True}}, "lora.lm_head=true: vLLM on GPUs"),
        ("cuda:1", {}, "vLLM takes the first visible GPU"),
        ("cuda", {"sampling": {"merge_adapter": True}}, "sampling.merge_adapter=true with"),
        (
            "cpu",
            {"sampling": {"merge_adapter": True}, "model": {"dtype": "bfloat16"}},
            "sampling.merge_adapter=true with torch.bfloat16 on cpu",
        ),
    ],
)
def test_refused_before_data_and_model_are_read(
    device: str,
    settings: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "pick_device", lambda _: torch.device(device))
    raw: dict[str, Any] = {"data": "no-such-file.jsonl", "model": {}, **settings}
    raw["model"]["name"] = "tiny-fast"
    with pytest.raises(UserError, match=told), job.open_run(parse_config(raw)):
        pass


def test_missing_vllm_is_told_before_data_and_model_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    config = parse_config({"data": "no-such-file.jsonl", "model": {"device": "cpu"}})
    with pytest.raises(UserError, match="vLLM is not installed"):
        job.check_vllm(Path("/nowhere"), config)
