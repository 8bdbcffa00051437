"""The KL to the base model before a step learns: as a penalty on rewards (algorithm.kl="reward"),
and as a limit of the run (algorithm.max_kl_to_base)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rl_lora import distributed
from rl_lora.batches import make_samples, pack_samples, to_device
from rl_lora.config import AlgorithmSection
from rl_lora.errors import KlLimitError
from rl_lora.learner import Learner, own_share
from rl_lora.losses import k3
from rl_lora.types import RolloutGroup, TrainSample


def rewards_and_kl(
    learner: Learner, groups_N: Sequence[RolloutGroup], algorithm: AlgorithmSection
) -> tuple[list[list[float]], dict[str, float]]:
    """rewards_N_G to learn from, and metrics of the KL to the base, as far as the settings ask for
    it: policy/kl_to_base is the k3 estimate of KL(sampler || base) in nats a token.

    Raises:
        KlLimitError: it is over algorithm.max_kl_to_base.
    """
    rewards_N_G, metrics = [group.rewards_G for group in groups_N], dict[str, float]()
    if algorithm.kl == "reward":
        rewards_N_G, metrics = penalised_rewards(learner, groups_N, algorithm.kl_weight)
    if (limit := algorithm.max_kl_to_base) is None:
        return rewards_N_G, metrics
    kl = metrics["reward/kl"] if "reward/kl" in metrics else kl_to_base(learner, groups_N)
    if not kl <= limit:
        raise KlLimitError(
            f"the policy's KL to the base model is {kl:.3g} nats a token, over "
            f"algorithm.max_kl_to_base={limit:g}. Its checkpoint is written: resume it with a "
            "higher limit, or start another run with a lower optim.lr or with algorithm.kl"
        )
    return rewards_N_G, metrics | {"policy/kl_to_base": kl}


def kl_to_base(learner: Learner, groups_N: Sequence[RolloutGroup]) -> float:
    """The k3 estimate of KL(sampler || base) in nats, the mean over all completion tokens; 0 where
    there is none. A job's processes divide the work."""
    samples = make_samples(groups_N, [[1.0] * len(group.rollouts_G) for group in groups_N])
    return _sequence_kls(learner, samples)[1] if samples else 0.0


def penalised_rewards(
    learner: Learner, groups_N: Sequence[RolloutGroup], weight: float
) -> tuple[list[list[float]], dict[str, float]]:
    """rewards_N_G less `weight` times each sequence's KL to the base model, the sum over its tokens
    of log p_sampler - log p_reference (InstructGPT, arXiv 2203.02155, equation 2).

    The groups' own rewards stay as they are. A job's processes divide the work.

    Returns:
        The rewards, and as metrics reward/kl, the k3 estimate of KL(sampler || base) in nats a
        token, and reward/kl_penalty, what a completion's reward has lost on average.
    """
    samples = make_samples(groups_N, [[1.0] * len(group.rollouts_G) for group in groups_N])
    if not samples:
        return [group.rewards_G for group in groups_N], {}
    kl_of, kl_per_token = _sequence_kls(learner, samples)
    kls = iter(kl_of)
    kl_N_G = [
        [next(kls) if rollout.completion.token_ids else 0.0 for rollout in group.rollouts_G]
        for group in groups_N
    ]
    rewards_N_G = [
        [reward - weight * kl for reward, kl in zip(group.rewards_G, kl_G, strict=True)]
        for group, kl_G in zip(groups_N, kl_N_G, strict=True)
    ]
    flat = [kl for kl_G in kl_N_G for kl in kl_G]
    return rewards_N_G, {
        "reward/kl": kl_per_token,
        "reward/kl_penalty": weight * sum(flat) / len(flat),
    }


def _sequence_kls(learner: Learner, samples: Sequence[TrainSample]) -> tuple[list[float], float]:
    """Each sample's sum of log p_sampler - log p_reference, and the mean k3 of its tokens."""
    policy = learner.policy
    (batches,) = pack_samples(
        samples,
        microbatch_tokens=learner.microbatch_tokens,
        min_microbatches=distributed.world_size(),
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
