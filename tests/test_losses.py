"""Losses and their gradients against hand-computed numbers."""

import math

import pytest
import torch

from rl_lora.config import AlgorithmSection
from rl_lora.losses import LOSSES, LossInputs, kl_penalty, log_loss

HALF = math.log(0.5)


def inputs(
    ratios: list[float], advantages: list[float], weights: list[float], sequences: list[int]
) -> LossInputs:
    """Tokens of sampler probability 1/2 and policy probability ratio/2."""
    policy_C = torch.tensor([HALF + math.log(r) for r in ratios], requires_grad=True)
    return LossInputs(
        policy_logprobs_C=policy_C,
        sampler_logprobs_C=torch.full((len(ratios),), HALF),
        advantages_C=torch.tensor(advantages),
        weights_C=torch.tensor(weights),
        sequence_C=torch.tensor(sequences),
        num_sequences=max(sequences) + 1,
    )


def run(name: str, x: LossInputs, **options: object) -> tuple[float, list[float], int]:
    section = AlgorithmSection(loss=name, **options)  # type: ignore[arg-type]
    loss, num_clipped = LOSSES[name](x, section)
    loss.backward()
    assert x.policy_logprobs_C.grad is not None
    return loss.item(), x.policy_logprobs_C.grad.tolist(), int(num_clipped)


def test_importance_sampling_is_unclipped() -> None:
    x = inputs([1.0, 4.0], [2.0, -1.0], [0.5, 0.5], [0, 0])
    loss, grad, clipped = run("importance_sampling", x)
    assert loss == pytest.approx(-(0.5 * 1 * 2 + 0.5 * 4 * -1))  # 1.0
    assert grad == pytest.approx([-1.0, 2.0])  # -w r A
    assert clipped == 0


def test_importance_sampling_on_policy_is_reinforce() -> None:
    x = inputs([1.0, 1.0], [0.5, -0.5], [0.25, 0.25], [0, 1])
    assert run("importance_sampling", x)[1] == pytest.approx([-0.125, 0.125])


def test_truncated_keeps_a_capped_gradient() -> None:
    x = inputs([1.0, 4.0], [2.0, -1.0], [0.5, 0.5], [0, 0])
    loss, grad, clipped = run("truncated_importance_sampling", x, ratio_cap=2.0)
    assert grad == pytest.approx([-1.0, 1.0])  # the second: -0.5 * min(4, 2) * -1
    assert loss == pytest.approx(-(0.5 * 1 * 2 * HALF + 0.5 * 2 * -1 * (HALF + math.log(4))))
    assert clipped == 1


def test_ppo_bounds_are_asymmetric_and_pessimistic() -> None:
    # A > 0: ratio 1.5 over 1.28 is clipped, no gradient; ratio 0.5 is not (min takes r A).
    # A < 0: ratio 1.5 keeps its gradient; ratio 0.5 under 0.8 is clipped.
    x = inputs([1.5, 0.5, 1.5, 0.5], [1.0, 1.0, -1.0, -1.0], [1.0] * 4, [0] * 4)
    loss, grad, clipped = run("ppo", x, clip_low=0.2, clip_high=0.28)
    assert loss == pytest.approx(-(1.28 + 0.5 - 1.5 - 0.8))
    assert grad == pytest.approx([0.0, -0.5, 1.5, 0.0])
    assert clipped == 4


def test_gspo_ratio_is_the_geometric_mean_of_the_sequence() -> None:
    # Sequence 0: ratios 2 and 0.5, mean 1: inside. Sequence 1: ratios 4 and 1, mean 2: clipped.
    x = inputs([2.0, 0.5, 4.0, 1.0], [1.0] * 4, [0.25] * 4, [0, 0, 1, 1])
    loss, grad, clipped = run("gspo", x, denominator="sequences", clip_low=0.1, clip_high=0.1)
    assert loss == pytest.approx(-(0.5 * 1.0 + 0.5 * 1.1))
    assert grad == pytest.approx([-0.25, -0.25, 0.0, 0.0])
    assert clipped == 2


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    x = inputs([2.0, 0.1], [1.0, 1.0], [1.0, 1.0], [0, 0])
    _, grad, clipped = run("cispo", x, clip_low=0.5, clip_high=0.28)
    assert grad == pytest.approx([-1.28, -0.5])
    assert clipped == 2


def test_log_loss_is_the_weighted_negative_log_likelihood() -> None:
    x = inputs([1.0, 1.0], [1.0, 1.0], [0.5, 0.5], [0, 0])
    loss, _ = log_loss(x)
    assert float(loss) == pytest.approx(math.log(2))


def test_kl_penalty_is_k3() -> None:
    policy_C = torch.tensor([HALF, HALF], requires_grad=True)
    reference_C = torch.tensor([HALF, HALF + math.log(3)])
    kl = kl_penalty(policy_C, reference_C, torch.tensor([0.5, 0.5]))
    assert float(kl) == pytest.approx(0.5 * (3 - math.log(3) - 1))
    kl.backward()
    assert policy_C.grad is not None
    assert policy_C.grad.tolist() == pytest.approx([0.0, 0.5 * (1 - 3)])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_has_the_policy_gradient_on_policy(name: str) -> None:
    """At ratio 1 all of them push w A per token (GSPO: the sequence's mean of it, here equal)."""
    x = inputs([1.0] * 4, [0.5, 0.5, -1.0, -1.0], [0.25] * 4, [0, 0, 1, 1])
    denominator = "sequences" if name == "gspo" else "tokens"
    _, grad, _ = run(name, x, denominator=denominator)
    assert grad == pytest.approx([-0.125, -0.125, 0.25, 0.25])
