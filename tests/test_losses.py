"""Losses and their gradients against hand-computed numbers."""

import math

import pytest
import torch

from rl_lora.losses import (
    LOSSES,
    MAX_LOG_RATIO,
    LossInputs,
    entropy_bonus,
    k3,
    kl_penalty,
    log_loss,
)

HALF = math.log(0.5)


def inputs(
    ratios: list[float],
    advantages: list[float],
    weights: list[float],
    sequences: list[int],
    of_old: list[float] | None = None,
) -> LossInputs:
    """Tokens of sampler probability 1/2, policy probability ratio/2 and old policy's of_old/2
    (None: 1/2); `ratios` are to the sampler."""
    policy_C = torch.tensor([HALF + math.log(r) for r in ratios], requires_grad=True)
    old_C = torch.tensor([HALF + math.log(r) for r in of_old or [1.0] * len(ratios)])
    return LossInputs(
        policy_logprobs_C=policy_C,
        old_logprobs_C=old_C,
        sampler_logprobs_C=torch.full((len(ratios),), HALF),
        advantages_C=torch.tensor(advantages),
        weights_C=torch.tensor(weights),
        sequence_C=torch.tensor(sequences),
        num_sequences=max(sequences) + 1,
    )


def run(name: str, x: LossInputs, **options: object) -> tuple[float, list[float], int]:
    loss, num_clipped = LOSSES[name](x, **options)
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
    assert clipped == 0  # the gradient is capped, not dropped


def test_ppo_bounds_are_asymmetric_and_pessimistic() -> None:
    # A > 0: ratio 1.5 over 1.28 is clipped, no gradient; ratio 0.5 is not (min takes r A).
    # A < 0: ratio 1.5 keeps its gradient; ratio 0.5 under 0.8 is clipped.
    x = inputs([1.5, 0.5, 1.5, 0.5], [1.0, 1.0, -1.0, -1.0], [1.0] * 4, [0] * 4)
    loss, grad, clipped = run("ppo", x, clip_low=0.2, clip_high=0.28)
    assert loss == pytest.approx(-(1.28 + 0.5 - 1.5 - 0.8))
    assert grad == pytest.approx([0.0, -0.5, 1.5, 0.0])
    assert clipped == 2  # those without gradient; a ratio out of bounds that min passes is not one


def test_gspo_ratio_is_the_geometric_mean_of_the_sequence() -> None:
    # Sequence 0: ratios 2 and 0.5, mean 1: inside. Sequence 1: ratios 4 and 1, mean 2: clipped.
    x = inputs([2.0, 0.5, 4.0, 1.0], [1.0] * 4, [0.25] * 4, [0, 0, 1, 1])
    loss, grad, clipped = run("gspo", x, clip_low=0.1, clip_high=0.1)
    assert loss == pytest.approx(-(0.5 * 1.0 + 0.5 * 1.1))
    assert grad == pytest.approx([-0.25, -0.25, 0.0, 0.0])
    assert clipped == 2


def test_the_weight_has_a_floor_and_a_cap_for_the_token_its_sequence_or_the_geometric_mean() -> (
    None
):
    # Ratios to the sampler 4 and 1/2 in one sequence: product 2, geometric mean sqrt(2).
    for level, expected in [("token", [3.0, 0.6]), ("sequence", [2.0, 2.0])]:
        x = inputs([4.0, 0.5], [1.0, 1.0], [1.0, 1.0], [0, 0])
        bounds = {"ratio_level": level, "ratio_floor": 0.6, "ratio_cap": 3.0}
        _, grad, clipped = run("truncated_importance_sampling", x, **bounds)
        assert grad == pytest.approx([-weight for weight in expected])
        assert clipped == 0
    x = inputs([4.0, 0.5], [1.0, 1.0], [1.0, 1.0], [0, 0])
    _, grad, _ = run("truncated_importance_sampling", x, ratio_level="geometric")
    assert grad == pytest.approx([-math.sqrt(2)] * 2)


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "sapo"])
def test_the_sampler_of_a_bounded_loss_is_weighed_at_any_level(name: str) -> None:
    # The policy has not moved; old / sampler 4 and 1/4 in sequence 0, 1/2 in sequence 1.
    for level, expected in [
        ("token", [3.0, 0.3, 0.5]),
        ("sequence", [1.0, 1.0, 0.5]),
        ("geometric", [1.0, 1.0, 0.5]),
    ]:
        ratios = [4.0, 0.25, 0.5]
        x = inputs(ratios, [1.0] * 3, [1.0] * 3, [0, 0, 1], of_old=ratios)
        _, grad, _ = run(name, x, ratio_level=level, ratio_floor=0.3, ratio_cap=3.0)
        if name != "gspo":
            assert grad == pytest.approx([-weight for weight in expected])
        else:  # the sequence's ratio is the geometric mean: its gradient is shared
            assert grad == pytest.approx([-sum(expected[:2]) / 2] * 2 + [-expected[2]])


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    x = inputs([2.0, 0.1], [1.0, 1.0], [1.0, 1.0], [0, 0])
    _, grad, clipped = run("cispo", x, clip_low=0.5, clip_high=0.28)
    assert grad == pytest.approx([-1.28, -0.5])
    assert clipped == 0


def test_bounds_are_on_the_ratio_to_the_old_policy_and_the_sampler_is_a_truncated_weight() -> None:
    # old / sampler 1.6, 5 (cut at 2) and 0.5; policy / old 1.1, 1.1 and 2: only the last is
    # clipped, though to the sampler they are 1.76, 5.5 and 1.
    of_old = [1.6, 5.0, 0.5]
    ratios = [1.1 * 1.6, 1.1 * 5.0, 2 * 0.5]
    sequences = [0, 1, 2]
    bounds = {"clip_low": 0.2, "clip_high": 0.28}
    for name in ("ppo", "gspo"):
        x = inputs(ratios, [1.0] * 3, [1.0] * 3, sequences, of_old)
        loss, grad, clipped = run(name, x, **bounds)
        assert loss == pytest.approx(-(1.1 * 1.6 + 1.1 * 2.0 + 1.28 * 0.5))
        assert grad == pytest.approx([-1.1 * 1.6, -1.1 * 2.0, 0.0])
        assert clipped == 1
    x = inputs(ratios, [1.0] * 3, [1.0] * 3, sequences, of_old)
    _, grad, clipped = run("cispo", x, **bounds, ratio_cap=1.5)
    assert grad == pytest.approx([-1.1 * 1.5, -1.1 * 1.5, -1.28 * 0.5])
    assert clipped == 0


def test_gspos_weight_is_the_sequences_geometric_mean() -> None:
    # old / sampler 4 and 1 make a weight of 2 for both tokens; the policy has not moved.
    x = inputs([4.0, 1.0], [1.0, 1.0], [0.5, 0.5], [0, 0], [4.0, 1.0])
    _, grad, clipped = run("gspo", x, ratio_cap=3.0)
    assert grad == pytest.approx([-1.0, -1.0])
    assert clipped == 0


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo"])
def test_a_policy_that_has_not_moved_is_within_all_bounds_however_the_sampler_rounds(
    name: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    policy_C = -torch.rand(4000, generator=generator).exp()
    x = LossInputs(
        policy_logprobs_C=policy_C.requires_grad_(),
        sampler_logprobs_C=policy_C.detach() + 0.05 * torch.randn(4000, generator=generator),
        advantages_C=torch.randn(500, generator=generator).repeat_interleave(8),
        weights_C=torch.full((4000,), 1 / 4000),
        sequence_C=torch.arange(4000) // 8,
        num_sequences=500,
        old_logprobs_C=policy_C.detach(),
    )
    _, grad, clipped = run(name, x)
    assert clipped == 0
    log_weight_C = policy_C.detach() - x.sampler_logprobs_C
    if name == "gspo":
        log_weight_C = log_weight_C.view(500, 8).mean(1).repeat_interleave(8)
    expected_C = -x.weights_C * x.advantages_C * log_weight_C.exp()
    assert torch.allclose(torch.tensor(grad), expected_C, rtol=1e-5, atol=1e-9)


def test_sapo_damps_the_gradient_the_further_the_policy_has_moved() -> None:
    # (4 / tau) sigmoid(tau (r - 1)): at r = 1 the value 2 / tau and the gradient 1.
    x = inputs([1.0, 2.0, 2.0], [1.0, 1.0, -1.0], [1.0] * 3, [0, 0, 0])
    loss, grad, clipped = run("sapo", x, tau_positive=1.0, tau_negative=2.0)
    s1, s2 = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(-2.0))
    assert loss == pytest.approx(-(2.0 + 4 * s1 - 2 * s2))
    # d/d log p = r f'(r), and f'(r) = 4 s (1 - s) whatever the temperature.
    assert grad == pytest.approx([-1.0, -2 * 4 * s1 * (1 - s1), 2 * 4 * s2 * (1 - s2)])
    assert clipped == 0


def test_dppo_drops_what_has_moved_far_in_probability_where_the_advantage_pushes() -> None:
    # Sampler 1/2. Policy 0.7 and 0.3: TV 0.2, over 0.15. Policy 0.6: TV 0.1. A wrong direction,
    # back to the sampler, is always followed.
    ratios, advantages = [1.4, 0.6, 1.2, 1.4, 0.6], [1.0, -1.0, 1.0, -1.0, 1.0]
    x = inputs(ratios, advantages, [1.0] * 5, [0] * 5)
    loss, grad, clipped = run("dppo_tv", x)
    assert grad == pytest.approx([0.0, 0.0, -1.2, 1.4, -0.6])
    assert loss == pytest.approx(-(1.2 - 1.4 + 0.6))
    assert clipped == 2
    # Binary KL(1/2 || p) = -log(4 p (1 - p)) / 2: 0.0872 at 0.7 and 0.3, 0.0204 at 0.6.
    x = inputs(ratios, advantages, [1.0] * 5, [0] * 5)
    assert run("dppo_kl", x, max_divergence=0.087)[1] == pytest.approx([0, 0, -1.2, 1.4, -0.6])
    for bound, num_clipped in [(0.088, 0), (0.0205, 2), (0.0203, 3)]:
        x = inputs(ratios, advantages, [1.0] * 5, [0] * 5)
        assert run("dppo_kl", x, max_divergence=bound)[2] == num_clipped


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_lets_a_rare_token_move_by_a_large_ratio(name: str) -> None:
    # From 1e-4 to 1e-2 is a ratio of 100 and a distance of 0.0099; PPO would drop it.
    policy_C = torch.tensor([1e-2, 1.0]).log().requires_grad_()
    x = LossInputs(
        policy_logprobs_C=policy_C,
        sampler_logprobs_C=torch.tensor([1e-4, 1.0]).log(),  # the second is certain: KL 0 * log 0
        old_logprobs_C=torch.tensor([1e-4, 1.0]).log(),
        advantages_C=torch.ones(2),
        weights_C=torch.ones(2),
        sequence_C=torch.tensor([0, 0]),
        num_sequences=1,
    )
    _, grad, clipped = run(name, x)
    assert grad == pytest.approx([-100.0, -1.0])
    assert clipped == 0
    policy_C.grad = None
    assert run("ppo", x)[2] == 1


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


@pytest.mark.parametrize("log_ratio", [1e-9, -1e-9, 1e-7, -1e-7, 1.4e-5, -1.4e-5, 1e-3, -0.5, 2.0])
def test_k3_has_no_rounding_noise(log_ratio: float) -> None:
    terms = (log_ratio**n / math.factorial(n) for n in range(30, 1, -1))
    assert float(k3(torch.tensor([log_ratio], dtype=torch.float64))) == pytest.approx(
        sum(terms), rel=1e-6
    )


def test_k3_of_float32_log_probs_is_half_their_variance_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    policy_C = -10 * torch.rand(100_000, generator=generator)
    other_C = policy_C + 1.4e-5 * torch.randn(100_000, generator=generator)
    values_C = k3(other_C.double() - policy_C.double())
    assert values_C.min() >= 0
    assert float(values_C.mean()) == pytest.approx(1.4e-5**2 / 2, rel=0.05)
    kl = kl_penalty(policy_C, other_C, torch.full((100_000,), 1e-5))
    assert float(kl) == pytest.approx(1.4e-5**2 / 2, rel=0.05)


@pytest.mark.parametrize("far", [25.0, 100.0, 800.0, 1e5])
def test_the_penalty_of_a_token_far_off_is_finite_and_still_pulls(far: float) -> None:
    policy_C = torch.tensor([-far, -1.0], requires_grad=True)
    kl = kl_penalty(policy_C, torch.tensor([0.0, -1.0]), torch.tensor([0.5, 0.5]))
    steepest = math.expm1(MAX_LOG_RATIO)  # the slope at the bound, kept from there on
    at_bound = steepest - MAX_LOG_RATIO
    assert float(kl) == pytest.approx(0.5 * (at_bound + steepest * (far - MAX_LOG_RATIO)))
    kl.backward()
    assert policy_C.grad is not None
    assert policy_C.grad.tolist() == pytest.approx([-0.5 * steepest, 0.0])


def test_the_penaltys_value_is_unbiased_and_its_gradient_is_of_the_other_kl() -> None:
    """All tokens of a vocabulary of three, each weighted by its chance under the policy."""
    logits_V = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    reference_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    policy_V = logits_V.log_softmax(-1)
    chance_V = policy_V.detach().exp()
    value = kl_penalty(policy_V, reference_V, chance_V)
    assert float(value) == pytest.approx(float((chance_V * (policy_V - reference_V)).sum()))
    (gradient_V,) = torch.autograd.grad(value, logits_V, retain_graph=True)
    other = (reference_V.exp() * (reference_V - policy_V)).sum()  # KL(reference || policy)
    (expected_V,) = torch.autograd.grad(other, logits_V)
    assert gradient_V.tolist() == pytest.approx(expected_V.tolist())


def test_the_gradient_of_k2_is_that_of_the_kl_and_of_k1_is_none() -> None:
    """All tokens of a vocabulary of three, each weighted by its chance under the policy."""
    logits_V = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    reference_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    policy_V = logits_V.log_softmax(-1)
    chance_V = policy_V.detach().exp()
    log_ratio_V = policy_V.detach() - reference_V
    value = kl_penalty(policy_V, reference_V, chance_V, "k2")
    assert float(value) == pytest.approx(float((chance_V * log_ratio_V.square() / 2).sum()))
    kl = (policy_V.exp() * (policy_V - reference_V)).sum()  # KL(policy || reference)
    k1 = (chance_V * (policy_V - reference_V)).sum()
    found, expected, of_k1 = (
        torch.autograd.grad(one, logits_V, retain_graph=True)[0] for one in (value, kl, k1)
    )
    assert found.tolist() == pytest.approx(expected.tolist())
    assert of_k1.tolist() == pytest.approx([0.0] * 3)


def test_the_entropy_bonus_has_the_entropys_gradient_whoever_sampled() -> None:
    """All tokens of a vocabulary of three, weighted by their chance under another sampler."""
    logits_V = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    sampler_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    policy_V = logits_V.log_softmax(-1)
    entropy = -(policy_V.exp() * policy_V).sum()
    x = LossInputs(
        policy_logprobs_C=policy_V,
        sampler_logprobs_C=sampler_V.log(),
        advantages_C=torch.zeros(3),
        weights_C=sampler_V,
        sequence_C=torch.tensor([0, 0, 0]),
        num_sequences=1,
    )
    bonus = entropy_bonus(x, entropy.detach().expand(3))
    found, expected = (
        torch.autograd.grad(one, logits_V, retain_graph=True)[0] for one in (bonus, entropy)
    )
    assert found.tolist() == pytest.approx(expected.tolist())
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_has_the_policy_gradient_on_policy(name: str) -> None:
    """At ratio 1 all of them push w A per token (GSPO: the sequence's mean of it, here equal)."""
    x = inputs([1.0] * 4, [0.5, 0.5, -1.0, -1.0], [0.25] * 4, [0, 0, 1, 1])
    _, grad, _ = run(name, x)
    assert grad == pytest.approx([-0.125, -0.125, 0.25, 0.25])
