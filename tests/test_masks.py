"""Masks against hand-computed ratios, and what a masked token leaves of loss, KL and metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rl_lora.batches import pack_samples
from rl_lora.learner import Learner
from rl_lora.losses import LOSSES, MASKS, LossInputs, MaskFn
from tests.helpers.tiny_models import make_policy, random_llama
from tests.test_learner import samples_of


def inputs(ratios: list[float], sequences: list[int], old: list[float] | None = None) -> LossInputs:
    """Tokens of sampler probability 1/2, whose policy and old policy have `ratios` and `old` times
    that."""
    sampler_C = torch.full((len(ratios),), 0.5).log()
    return LossInputs(
        policy_logprobs_C=(sampler_C + torch.tensor(ratios).log()).requires_grad_(),
        sampler_logprobs_C=sampler_C,
        advantages_C=torch.ones(len(ratios)),
        weights_C=torch.ones(len(ratios)),
        sequence_C=torch.tensor(sequences),
        num_sequences=max(sequences) + 1,
        old_logprobs_C=None if old is None else sampler_C + torch.tensor(old).log(),
    )


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Of the sequences 0.4, 2; 1.5, 1.5; 0.9, 1 the products are 0.8, 2.25 and 0.9, and the
        # geometric means 0.894, 1.5 and 0.949.
        ("token", {}, [False, True, True, True, True, True]),  # 0.5 to 5
        ("token", {"mask_low": 0.0, "mask_high": 1.6}, [True, False, True, True, True, True]),
        ("sequence", {}, [True, True, False, False, True, True]),  # up to 2
        ("sequence", {"mask_low": 0.85}, [False, False, False, False, True, True]),
        ("geometric", {}, [False] * 6),  # 0.999 to 1.001
        (
            "geometric",
            {"mask_low": 0.9, "mask_high": 1.5001},
            [False, False, True, True, True, True],
        ),
    ],
)
def test_tokens_or_sequences_within_the_bounds_stay(
    name: str, options: dict[str, float], expected: list[bool]
) -> None:
    x = inputs([0.4, 2.0, 1.5, 1.5, 0.9, 1.0], [0, 0, 1, 1, 2, 2])
    kept_C = MASKS[name](x, **options)
    assert kept_C.tolist() == expected
    assert not kept_C.requires_grad


def test_the_old_policy_is_compared_with_the_sampler_where_the_loss_has_it() -> None:
    x = inputs([1.0, 9.0], [0, 1], old=[9.0, 1.0])
    assert MASKS["token"](x).tolist() == [False, True]


def test_an_overflowing_product_of_ratios_is_out_of_bounds() -> None:
    x = inputs([math.exp(60.0)] * 2, [0, 0])
    assert MASKS["sequence"](x).tolist() == [False, False]


def second_sequence_only(x: LossInputs) -> torch.Tensor:
    return x.sequence_C == 1


def everything(x: LossInputs) -> torch.Tensor:
    return torch.ones_like(x.sequence_C, dtype=torch.bool)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo"])
def test_a_masked_sequence_has_no_part_in_the_step_but_in_its_denominator(
    loss: str, tmp_path: Path
) -> None:
    """Masking the first of two sequences is like giving it no advantage, to the last bit."""
    path = random_llama(tmp_path / "model")
    norms = []
    for mask, advantages in [(second_sequence_only, (1.0, -0.5)), (everything, (0.0, -0.5))]:
        policy = make_policy(path)
        samples = samples_of(policy, advantages)
        updates = pack_samples(samples, microbatch_tokens=99, keep_zero_advantage=True)
        metrics = Learner(policy, grad_clip=1e9).update(updates, LOSSES[loss], mask=mask)
        norms.append(metrics["grad/norm"])
        expected = 2 / 8 if mask is second_sequence_only else 0.0  # of 2 + 6 tokens
        assert metrics["mask/fraction"] == pytest.approx(expected)
    assert norms[0] == norms[1] > 0


def test_without_a_mask_there_is_no_metric_of_it(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    metrics = Learner(policy).update(pack_samples(samples_of(policy), microbatch_tokens=99))
    assert "mask/fraction" not in metrics


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_rounding_of_a_bfloat16_sampler_masks_and_clips_nothing_on_policy(name: str) -> None:
    """0.02 nats a token of noise, which GSPO's bounds on the ratio to the sampler would take for a
    policy that has moved, in most sequences."""
    generator = torch.Generator().manual_seed(0)
    policy_C = -torch.rand(8192, generator=generator)
    x = LossInputs(
        policy_logprobs_C=policy_C.clone().requires_grad_(),
        sampler_logprobs_C=policy_C + 0.02 * torch.randn(8192, generator=generator),
        advantages_C=torch.randn(128, generator=generator).repeat_interleave(64),
        weights_C=torch.full((8192,), 1 / 8192),
        sequence_C=torch.arange(128).repeat_interleave(64),
        num_sequences=128,
        old_logprobs_C=policy_C,
    )
    mask: MaskFn = MASKS[name]
    assert mask(x).all()
    _, num_clipped = LOSSES["gspo"](x)
    assert num_clipped == 0
    sampler_ratio_C = x.at_level(x.log_mismatch(), "geometric").exp()
    assert (sampler_ratio_C - 1).abs().gt(4e-4).float().mean() > 0.5
