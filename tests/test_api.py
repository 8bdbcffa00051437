"""The public API: what `import rl_lora as rl` gives, and the loop that is written with it."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rl_lora as rl
from rl_lora.adapters.files import load_tensors
from rl_lora.config import RunConfig
from tests.helpers.fakes import FakeSampler, make_prompt
from tests.test_prompts import numbered, word_tokenizer, write_rows

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_loads_neither_torch_nor_its_own_modules() -> None:
    program = "import sys, rl_lora; print(*(n for n in sys.modules if n[:4] in ('torc', 'rl_l')))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["rl_lora"]


def test_every_public_name_is_there_typed_and_listed() -> None:
    for name in rl.__all__:
        assert callable(getattr(rl, name)), name
    assert set(rl.__all__) <= set(dir(rl))
    tree = ast.parse(Path(rl.__file__).read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname or alias.name
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == set(rl.__all__)
    assert rl.RunConfig is RunConfig
    with pytest.raises(AttributeError, match="no attribute 'rollouts_of'"):
        _ = rl.rollouts_of


def test_a_rollout_is_scored_by_a_plain_function() -> None:
    sampler = FakeSampler(lambda prompt, index: "7" if index else "8")

    def is_right(completion: str, reference: str) -> float:
        return float(completion == reference)

    (group,) = rl.rollout(sampler, [make_prompt()], is_right, num_samples=3, stop=("x",), seed=4)
    assert sampler.num_releases == 1  # the learner's turn is next
    assert group.rewards_G == [0.0, 1.0, 1.0]
    ((_, params),) = sampler.calls
    assert params == rl.SampleParams(3, 256, 1.0, stop=("x",), seed=4)


def test_one_data_set_by_its_name_is_a_stream_of_all_its_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", numbered(5))
    stream = rl.load_prompts(path, word_tokenizer(), instruction="", seed=3)
    assert [prompt.prompt_id for prompt in stream.prompts_N] == [f"m/{row}" for row in range(5)]
    assert {prompt.prompt_id for prompt in stream.take(5)} == {f"m/{row}" for row in range(5)}
    first = rl.load_prompts({"name": path, "num_rows": 2}, word_tokenizer(None), template="base")
    assert [prompt.reference for prompt in first.prompts_N] == ["0", "1"]
    with pytest.raises(rl.UserError, match="unknown key 'instructions'; did you mean 'instruction"):
        rl.load_prompts(path, word_tokenizer(), instructions="")


def test_the_loop_by_hand_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A processor that is fast in bfloat16 would choose that, whose rounding makes a KL of 1e-3.
    monkeypatch.setattr("rl_lora.models.device._fast_dtype", lambda device: torch.float32)
    script = ROOT / "scripts" / "minimal_grpo.py"
    assert len(script.read_text().splitlines()) <= 40
    options = ["--model=tiny-fast", "--data=generated:chain_sum", "--steps=2", "--tokens=16"]
    runpy.run_path(str(script))["main"]([*options, f"--out={tmp_path}"])
    steps = re.findall(r"step (\d): reward (0\.\d{3}), KL (\S+)\n", capsys.readouterr().out)
    assert [number for number, _, _ in steps] == ["1", "2"]
    assert any(float(reward) > 0 for _, reward, _ in steps)
    assert all(float(kl) < 1e-9 for _, _, kl in steps)  # each step sampled from its own version
    changed = load_tensors(tmp_path / "v000002")
    assert any(tensor.any() for name, tensor in changed.items() if "lora_B" in name)
