"""Mixtures of experts on a real vLLM engine of a CPU: what it serves, and why adapters are refused.

Each engine has its own process: one that fails leaves vLLM's state broken.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_models import VOCAB, random_mixtral, random_qwen3_moe

ROOT = Path(__file__).resolve().parents[2]
# Multiples of 32, as vLLM's kernels for CPU want them; heads of 32.
SIZES = {"hidden_size": 64}
EXPERT_WIDTH = {random_mixtral: "intermediate_size", random_qwen3_moe: "moe_intermediate_size"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="these are of vLLM's CPU back end"),
]

PRELUDE = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from rl_lora.samplers.vllm import sampler as vllm_sampler
from rl_lora.adapters.files import save_adapter
from rl_lora.batches import whole_sequence
from rl_lora.config import LoraSection
from rl_lora.samplers.vllm.sampler import VllmSampler
from tests.helpers.tiny_models import make_policy, shake

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
ids = tuple(range(3, 40))

def sampler_of(lora):
    policy = SimpleNamespace(model_dir=model, lora=lora, dtype=torch.float32,
        device=torch.device("cpu"), quantize=None)
    return VllmSampler(policy, max_num_seqs=4, max_model_len=64, end_token_ids=[2])

def difference(sampler, policy):
    own = policy.token_logprobs(whole_sequence(ids), 1.0)[0].detach()
    return float((torch.tensor(sampler.token_logprobs([ids])[0]) - own).abs().max())
"""

SERVE_ALL_WEIGHTS = """
vllm_sampler.check_mixture = lambda *arguments, **named: None
policy = make_policy(model, mode="full")
sampler = sampler_of(LoraSection(mode="full"))
print("base", difference(sampler, policy))
shake(policy)
print("old", difference(sampler, policy))
sampler.set_adapter(save_adapter(policy, folder, version=1, run_name="r"))
print("new", difference(sampler, policy))
"""

SERVE_AN_ADAPTER = """
vllm_sampler.check_mixture = lambda *arguments, **named: None
policy = make_policy(model, rank=2, layers=sys.argv[3])
shake(policy)
sampler = sampler_of(policy.lora)
sampler.set_adapter(save_adapter(policy, folder, version=1, run_name="r"))
print("adapter", difference(sampler, policy))
"""


def make_mixture(make: Any, path: Path) -> Path:
    make(
        path,
        **SIZES,
        **{EXPERT_WIDTH[make]: 64},
        **({"head_dim": 32} if "qwen" in make.__name__ else {}),
    )
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", unk_token="t0")
    tokenizer.save_pretrained(path)
    return path


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("vllm")
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.long
@pytest.mark.parametrize("make", [random_mixtral, random_qwen3_moe])
def test_the_base_is_served_and_reloaded_weights_are_not(make: Any, tmp_path: Path) -> None:
    """Once the last line fails, `vllm_settings.check_mixture` can let lora.mode='full' pass."""
    done = run(SERVE_ALL_WEIGHTS, str(make_mixture(make, tmp_path / "m")), str(tmp_path / "v"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    found = {row[0]: float(row[1]) for row in rows if row and row[0] in ("base", "old", "new")}
    assert found["base"] < 1e-3  # nats: the names and weights of the files are right
    assert found["old"] > 0.05
    assert found["new"] > 0.05


@pytest.mark.long
@pytest.mark.parametrize("layers", ["all", "attention"])
def test_adapters_end_in_triton_kernels_that_a_cpu_has_not(layers: str, tmp_path: Path) -> None:
    """Once this fails because vLLM serves them, `vllm_settings.check_mixture` can go."""
    model = make_mixture(random_qwen3_moe, tmp_path / "m")
    done = run(SERVE_AN_ADAPTER, str(model), str(tmp_path / "v"), layers)
    assert done.returncode != 0
    assert "triton_moe.py" in done.stderr
    assert "AttributeError" in done.stderr
    assert "adapter" not in done.stdout.split()
