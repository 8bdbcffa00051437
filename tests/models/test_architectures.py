"""docs/architectures.md, row by row: what it says trains does, on both back ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rl_lora.config import load_config, parse_config
from rl_lora.errors import UserError
from rl_lora.models.architectures import check_architecture
from rl_lora.models.tiny import RECIPES, train_tokenizer
from rl_lora.planning.memory import memory_plan
from rl_lora.planning.roofline import shape_of
from rl_lora.train import train
from tests.helpers.architectures import (
    DOC,
    REFUSED,
    SERVED,
    Architecture,
    config_of,
    document,
    end_ids,
    make_architecture,
)

JOB = """
[run]
name = "one"
num_steps = 1
loggers = []
[model]
device = "cpu"
dtype = "float32"
[data]
held_out = 2
max_prompt_tokens = 200
[sampling]
num_prompts = 2
num_samples = 4
max_tokens = 8
max_num_seqs = 8
[optim]
lr = 1e-3
[eval]
temperature = 1.0
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(RECIPES["tiny-fast"])


def test_the_document_is_the_table() -> None:
    assert DOC.read_text(encoding="utf-8") == document()


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.key)
def test_refused_by_config_before_weights_are_read(
    row: Architecture, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = config_of(row, tokenizer)
    with pytest.raises(UserError, match=row.refused) as caught:
        check_architecture(config, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.key)
def test_memory_and_time_are_planned(row: Architecture, tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_of(row, tokenizer)
    job = parse_config({"lora": {"mode": row.mode}})
    parts = {part.part: part.num_bytes for part in memory_plan(job, config, 10, 10)}
    assert parts["activations"] > 0
    assert parts["KV cache"] > 0
    shape = shape_of(config)
    assert (shape.hidden, shape.layers) == (64, 2)
    # GPT-2's MLP is 4 times as wide as the model where its config says nothing.
    assert shape.mlp == (256 if row.name == "GPT2" else 96)


# vLLM's engine takes ten seconds each: in CI those that differ most from one another.
IN_CI = {"Llama", "Qwen3", "GPT2"}
RUNS = [
    pytest.param(
        row,
        backend,
        id=f"{row.key}-{backend}",
        marks=[pytest.mark.long] if backend == "vllm" and row.key not in IN_CI else [],
    )
    for row in SERVED
    for backend in ("torch", "vllm")
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "backend"), RUNS)
def test_one_step_with_the_parity_check(
    row: Architecture,
    backend: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)  # most of the time
    if backend == "vllm":
        pytest.importorskip("vllm")
        if torch.cuda.is_available():
            pytest.skip("compares float32 log-probs of vLLM's CPU back end")
    model = make_architecture(row, tmp_path / "model", tokenizer)
    (tmp_path / "job.toml").write_text(JOB)
    data = tmp_path / "data.jsonl"
    problems = [{"question": f"What is {i} + 3?", "answer": str(i + 3)} for i in range(6)]
    data.write_text("\n".join(map(json.dumps, problems)))
    overrides = [
        f"run.output_dir={tmp_path}", f"model.name={model}", f"data={data}",
        f"sampling.backend={backend}", f"lora.mode={row.mode}",
    ]  # fmt: skip
    config = load_config(tmp_path / "job.toml", overrides)
    if backend == "vllm" and row.vllm_refused:
        with pytest.raises(UserError, match=row.vllm_refused):
            train(config, quiet=True)
        return
    train(config, quiet=True)
    (line,) = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    # Float32 on both sides: the run itself stops at 1e-4.
    assert 0 <= metrics["mismatch/kl"] < 1e-6
    assert metrics["mismatch/abs_max"] < 1e-3
    if row.num_ends > 1:
        ends = tuple(tokenizer.decode([token_id]) for token_id in end_ids(row, tokenizer)[1:])
        lines = (tmp_path / "one" / "transcripts.jsonl").read_text().splitlines()
        ended = [shown for shown in map(json.loads, lines) if not shown["truncated"]]
        assert ended
        assert all(shown["completion"].endswith(ends) for shown in ended)
