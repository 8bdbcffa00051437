"""From rewards to a step's advantages, less the penalties: the KL to the base model, and length.
Also the limit of that KL (algorithm.max_kl_to_base), and the floor of the entropy.

The groups' own rewards stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rl_lora import distributed
from rl_lora.advantages import AdvantageFn, TermRewards, correlations, takes_terms
from rl_lora.batches import make_samples, pack_samples, to_device
from rl_lora.config import RunConfig
from rl_lora.errors import KlLimitError
from rl_lora.learner import Learner, own_share
from rl_lora.losses import k3
from rl_lora.types import RolloutGroup, TrainSample


def step_advantages(
    advantage: AdvantageFn, config: RunConfig, learner: Learner, groups_N: Sequence[RolloutGroup]
) -> tuple[list[list[float]], dict[str, float]]:
    """advantages_N_G of the penalized rewards, and metrics: those of `penalised_rewards`, and of
    several rewards advantage/correlation/TERM (`advantages.correlations`).

    Raises:
        KlLimitError: the KL to the base is over algorithm.max_kl_to_base.
    """
    rewards_N_G, metrics = penalised_rewards(config, learner, groups_N)
    terms_K = term_rewards(config, groups_N)
    advantages_N_G = _advantages(advantage, rewards_N_G, terms_K)
    if len(terms_K) > 1:
        for name, correlation in correlations(advantages_N_G, terms_K).items():
            metrics[f"advantage/correlation/{name}"] = correlation
    return advantages_N_G, metrics


def _advantages(
    advantage: AdvantageFn, rewards_N_G: list[list[float]], terms_K: list[TermRewards]
) -> list[list[float]]:
    if takes_terms(advantage):
        return advantage(rewards_N_G, terms_K)
    return advantage(rewards_N_G)


def have_signal(
    advantage: AdvantageFn, config: RunConfig, groups_N: Sequence[RolloutGroup]
) -> list[bool]:
    """[N]: whether anything is to be learned from a group, that is whether a completion of it that
    is learned from has another advantage than 0.

    Completions without tokens are not learned from, nor with algorithm.mask_truncated those that
    were cut off. The KL in rewards (algorithm.kl = "reward"), which differs in every group, does
    not count, nor does what a KL in the loss or an entropy bonus would teach.
    """
    rewards_N_G = [group.rewards_G for group in groups_N]
    if config.reward.overlong_tokens:
        rewards_N_G = _less(rewards_N_G, _weighted_overlong(config, groups_N))
    advantages_N_G = _advantages(advantage, rewards_N_G, term_rewards(config, groups_N))
    skip_truncated = config.algorithm.mask_truncated
    return [
        any(
            sample.advantage
            for sample in make_samples([group], [advantages_G], skip_truncated=skip_truncated)
        )
        for group, advantages_G in zip(groups_N, advantages_N_G, strict=True)
    ]


def term_rewards(config: RunConfig, groups_N: Sequence[RolloutGroup]) -> list[TermRewards]:
    """The rewards that the settings sum up: reward.terms, or the one reward; and the penalty of
    length as a reward that is never positive."""
    found = [
        TermRewards(
            term.key,
            term.weight,
            [group.terms_G().get(term.key, [0.0] * len(group.rollouts_G)) for group in groups_N],
        )
        for term in config.reward.terms
    ] or [TermRewards("reward", 1.0, [group.rewards_G for group in groups_N])]
    if config.reward.overlong_tokens:
        penalty_N_G = overlong_penalties(config, groups_N)
        negative_N_G = [[-penalty for penalty in penalty_G] for penalty_G in penalty_N_G]
        found.append(TermRewards("overlong", config.reward.overlong_weight, negative_N_G))
    return found


def penalised_rewards(
    config: RunConfig, learner: Learner, groups_N: Sequence[RolloutGroup]
) -> tuple[list[list[float]], dict[str, float]]:
    """rewards_N_G less what the settings ask for, and metrics: reward/NAME_penalty, what a
    completion's reward has lost on average, reward/kl (`kl_penalties`), and policy/kl_to_base.

    Raises:
        KlLimitError: the KL to the base is over algorithm.max_kl_to_base.
    """
    rewards_N_G = [group.rewards_G for group in groups_N]
    metrics: dict[str, float] = {}
    penalties: dict[str, list[list[float]]] = {}
    if config.algorithm.kl == "reward":
        penalties["kl"], metrics = kl_penalties(learner, groups_N, config.algorithm.kl_weight)
    if config.reward.overlong_tokens:
        penalties["overlong"] = _weighted_overlong(config, groups_N)
    for name, penalty_N_G in penalties.items():
        flat = [penalty for penalty_G in penalty_N_G for penalty in penalty_G]
        metrics[f"reward/{name}_penalty"] = sum(flat) / len(flat)
        rewards_N_G = _less(rewards_N_G, penalty_N_G)
    if (limit := config.algorithm.max_kl_to_base) is None:
        return rewards_N_G, metrics
    kl = metrics["reward/kl"] if "reward/kl" in metrics else kl_to_base(learner, groups_N)
    if not kl <= limit:
        raise KlLimitError(
            f"the policy's KL to the base model is {kl:.3g} nats a token, over "
            f"algorithm.max_kl_to_base={limit:g}. Its checkpoint is written: resume it with a "
            "higher limit, or start another run with a lower optim.lr or with algorithm.kl"
        )
    return rewards_N_G, metrics | {"policy/kl_to_base": kl}


def _weighted_overlong(config: RunConfig, groups_N: Sequence[RolloutGroup]) -> list[list[float]]:
    weight = config.reward.overlong_weight
    return [
        [weight * penalty for penalty in penalty_G]
        for penalty_G in overlong_penalties(config, groups_N)
    ]


def _less(rewards_N_G: list[list[float]], penalty_N_G: list[list[float]]) -> list[list[float]]:
    return [
        [reward - penalty for reward, penalty in zip(*pair, strict=True)]
        for pair in zip(rewards_N_G, penalty_N_G, strict=True)
    ]


def kl_to_base(learner: Learner, groups_N: Sequence[RolloutGroup]) -> float:
    """The k3 estimate of KL(sampler || base) in nats, the mean over all completion tokens; 0 where
    there is none. A job's processes divide the work."""
    samples = make_samples(groups_N, [[1.0] * len(group.rollouts_G) for group in groups_N])
    return _sequence_kls(learner, samples)[1] if samples else 0.0


def loss_terms(
    config: RunConfig, terms: Mapping[str, Any], groups_N: Sequence[RolloutGroup]
) -> tuple[dict[str, Any], dict[str, float]]:
    """The keywords of `Learner.update` for a step: `terms`, without the entropy bonus where the
    samples have an entropy of algorithm.entropy_floor or more (Skywork-OR1, arXiv 2505.22312, with
    a constant coefficient).

    The entropy is estimated without a pass: the mean of -log p_sampler over all sampled tokens, in
    nats, is in expectation that of the entropies of the distributions that they are drawn from.
    It depends on the groups only.

    Returns:
        The keywords, and with a floor as metrics entropy/sampled and entropy/weight.
    """
    if (floor := config.algorithm.entropy_floor) is None:
        return dict(terms), {}
    completions = [rollout.completion for group in groups_N for rollout in group.rollouts_G]
    # An environment's tokens have log-probs of 0 and do not count.
    total = math.fsum(value for one in completions for value in one.sampler_logprobs_T)
    sampled = -total / max(1, sum(one.num_sampled for one in completions))
    weight = terms["entropy_weight"] if sampled < floor else 0.0
    metrics = {"entropy/sampled": sampled, "entropy/weight": weight}
    return {**terms, "entropy_weight": weight}, metrics


def overlong_penalties(config: RunConfig, groups_N: Sequence[RolloutGroup]) -> list[list[float]]:
    """[N][G]: `overlong_penalty` of each completion, by the settings."""
    max_tokens, within = config.sampling.max_tokens, config.reward.overlong_tokens
    return [
        [
            overlong_penalty(len(rollout.completion.token_ids), max_tokens, within)
            for rollout in group.rollouts_G
        ]
        for group in groups_N
    ]


def overlong_penalty(num_tokens: int, max_tokens: int, within: int) -> float:
    """DAPO's soft penalty of length (arXiv 2503.14476, equation 13), as a positive number.

    0 up to `within` tokens before the limit, from there linearly to 1 at the limit.
    """
    return min(max(num_tokens - (max_tokens - within), 0) / within, 1.0)


def kl_penalties(
    learner: Learner, groups_N: Sequence[RolloutGroup], weight: float
) -> tuple[list[list[float]], dict[str, float]]:
    """[N][G]: `weight` times each sequence's KL to the base model, the sum over its tokens of
    log p_sampler - log p_reference (InstructGPT, arXiv 2203.02155, equation 2).

    A job's processes divide the work.

    Returns:
        The penalties, and as a metric reward/kl, the k3 estimate of KL(sampler || base) in nats a
        token.
    """
    samples = make_samples(groups_N, [[1.0] * len(group.rollouts_G) for group in groups_N])
    if not samples:
        return [[0.0] * len(group.rollouts_G) for group in groups_N], {}
    kl_of, kl_per_token = _sequence_kls(learner, samples)
    kls = iter(kl_of)
    penalty_N_G = [
        [
            weight * next(kls) if rollout.completion.token_ids else 0.0
            for rollout in group.rollouts_G
        ]
        for group in groups_N
    ]
    return penalty_N_G, {"reward/kl": kl_per_token}


def _sequence_kls(learner: Learner, samples: Sequence[TrainSample]) -> tuple[list[float], float]:
    """Each sample's sum of log p_sampler - log p_reference, and the mean k3 of its tokens."""
    policy = learner.policy
    (batches,) = pack_samples(
        samples,
        microbatch_tokens=learner.microbatch_tokens,
        num_ranks=distributed.world_size(),
    )
    share = own_share(policy, batches)
    log_ratios = []
    for batch in (*share.own, *share.idle):
        on_device = to_device(batch, policy.device)
        reference_C = policy.reference_logprobs(on_device, learner.temperature)
        log_ratios.append(batch.sampler_logprobs_C.double() - reference_C.double().cpu())
    number_of = {id(sample): number for number, sample in enumerate(samples)}
    kl_of: dict[int, float] = {}
    for batch, log_ratio_C in zip(share.own, log_ratios, strict=False):
        zeros_S = log_ratio_C.new_zeros(batch.num_sequences)
        kl_S = zeros_S.index_add(0, batch.sequence_C, log_ratio_C).tolist()
        numbers = (number_of[id(sample)] for sample in batch.samples_S)
        kl_of |= dict(zip(numbers, kl_S, strict=True))
    values = [log_ratio_C.numpy() for log_ratio_C in log_ratios[: len(share.own)]]
    found = distributed.gather((kl_of, values), "the KL of rewards")
    kl_of = {number: kl for part, _ in found for number, kl in part.items()}
    log_ratio_C = torch.from_numpy(np.concatenate([v for _, part in found for v in part]))
    return [kl_of[number] for number in range(len(samples))], float(k3(-log_ratio_C).mean())
