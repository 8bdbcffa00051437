"""Proves that the sampler uses the learner's adapter, and not the base model or an old adapter.

The most common failure of such systems is silent: the engine keeps using the base or an old
adapter. There are three checks. At the start both sides score fixed tokens under a probe adapter
that really changes the model (a fresh one does not: its B is zero), and under the base model. At
each step the sampler's log-probs of the rollouts are compared with the policy's, or, where sampling
runs ahead, those of fixed tokens under each version. A fixed limit misses small errors, such as an
adapter that is one step old, so the rollouts are also compared with the version before
(`VersionCheck`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from rl_lora import distributed
from rl_lora.adapters.files import save_adapter
from rl_lora.batches import pack_samples, to_device, whole_sequence
from rl_lora.errors import StaleAdapterError
from rl_lora.nn.experts import expert_adapters, expert_size
from rl_lora.nn.lora import lora_layers
from rl_lora.nn.sharded import gathered, local_part, own_part
from rl_lora.policy import Policy
from rl_lora.sampler import Sampler
from rl_lora.types import Adapter, Microbatch, Probe, Prompt, RolloutGroup, TrainSample

PROBE_VERSION = 10**6 - 1  # never reached by training steps; its name is never reused either
_PROBE_PROMPTS, _PROBE_TOKENS = 4, 48  # fixed prompts, and tokens of each
# Rough relative change of a layer's output by the probe; the first that is large enough is used.
_PROBE_SHIFTS = (0.05, 0.1, 0.2, 0.4, 0.8)
_CHECKED_ROLLOUTS, _CHECKED_TOKENS = 4, 64  # of a step, and of each completion
# Two more forward passes of so few tokens are some percent of a small job's step, so they are left
# out in most steps: a sampler that has missed an update will miss the next ones, too.
_FIRST_STEPS, _EVERY = 4, 8
_FAR = 1e-4  # nats, far above a healthy sampler's rounding in float32 (measured: mean 6e-6)
_TOLERANCES = {torch.float32: (1e-4, 2e-3), torch.bfloat16: (2e-2, 1e-1)}  # KL, mean |difference|


def tolerances(dtype: torch.dtype, max_kl: float | None) -> tuple[float, float]:
    """(KL, mean absolute difference) in nats per token that a healthy sampler stays below."""
    kl, absolute = _TOLERANCES[dtype]
    return (max_kl, absolute * (max_kl / kl) ** 0.5) if max_kl is not None else (kl, absolute)


def check_step(metrics: dict[str, float], dtype: torch.dtype, max_kl: float | None) -> None:
    """Stops a run whose sampler and policy disagree on the step's rollouts.

    Raises:
        StaleAdapterError: the KL or the mean absolute difference exceeds its tolerance.
    """
    kl_limit, absolute_limit = tolerances(dtype, max_kl)
    kl, absolute = metrics["mismatch/kl"], metrics["mismatch/abs_mean"]
    if not (kl < kl_limit and absolute < absolute_limit):
        raise StaleAdapterError(
            f"sampler and policy disagree on this step's rollouts: KL {kl:.2e} (limit "
            f"{kl_limit:.0e}), mean |difference| {absolute:.2e} nats (limit {absolute_limit:.0e}); "
            "the sampler uses a stale or wrong adapter, or rounds more than sampling.max_kl allows"
        )


def drop_stale(
    groups_N: Sequence[RolloutGroup], version: int, max_staleness: int
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """The groups to learn from, and rollouts/staleness_*: how many versions the learning policy is
    ahead of the sampler.

    Where sampling runs ahead, groups with a sample older than allowed are left out and counted.

    Args:
        groups_N: the step's rollouts.
        version: of the policy that will learn from them.
        max_staleness: `sampling.max_staleness`.

    Raises:
        StaleAdapterError: a sample is from a future version; or too old, and none may be, or no
            group is left.
    """
    ages_N = [[version - r.completion.adapter_version for r in g.rollouts_G] for g in groups_N]
    ages = [age for ages_G in ages_N for age in ages_G]
    kept = [n for n, ages_G in enumerate(ages_N) if max(ages_G) <= max_staleness]
    has_too_few = len(kept) < (1 if max_staleness else len(groups_N))
    if min(ages) < 0 or has_too_few:
        raise StaleAdapterError(
            f"samples have staleness {min(ages)} to {max(ages)} for policy version {version}, and "
            f"staleness 0 to {max_staleness} is allowed: the sampler uses a stale or wrong adapter"
        )
    ages = [age for n in kept for age in ages_N[n]]
    metrics = {
        "rollouts/staleness_mean": sum(ages) / len(ages),
        "rollouts/staleness_max": float(max(ages)),
    }
    if max_staleness:
        metrics["rollouts/num_versions"] = float(len(set(ages)))
        metrics["rollouts/stale_groups"] = float(len(groups_N) - len(kept))
    return [groups_N[n] for n in kept], metrics


class VersionCheck:
    """Finds rollouts that are not of the policy's version although they are close to it.

    A step may move the log-probs by less than any limit that rounding allows. But on the tokens
    that it moved most, the sampler's log-probs must be near this version's and not the previous
    one's. Only where the step moved them by far more than the sampler rounds can this be said; in
    bfloat16 it hardly ever can, and nothing is checked. The first steps of a process are checked,
    and then every eighth.

    Args:
        policy: not checked if it is a whole model, which would have to be kept twice.
        temperature: of the sampling.
    """

    def __init__(self, policy: Policy, temperature: float) -> None:
        self._policy, self._temperature = policy, temperature or 1.0
        self._before: list[torch.Tensor] = []  # the trained weights; empty: unknown
        self._num_steps = 0
        self.num_decided = 0  # steps that moved the policy far enough

    def check(
        self, groups_N: Sequence[RolloutGroup], version: int, own: Sequence[int] | None = None
    ) -> None:
        """Call once per step, with its rollouts, before the policy of `version` learns from them.

        own: which groups this process's sampler made; None: all. Where the weights are sharded,
        passes are collective, and all processes check the same groups.

        Raises:
            StaleAdapterError: they are no nearer to this version than to the one before.
        """
        policy = self._policy
        if not policy.has_base or policy.dtype != torch.float32:
            return
        if own is not None and not policy.is_sharded:
            groups_N = [groups_N[index] for index in own]
        self._num_steps += 1
        if not self._before and not self._is_due(self._num_steps + 1):
            return
        weights = [local_part(parameter.detach()) for parameter in policy.trainable().values()]
        now = [weight.clone() for weight in weights]
        picked = [sample for group in groups_N if (sample := _first(group, version)) is not None]
        if self._before and picked:
            (batches,) = pack_samples(picked[:_CHECKED_ROLLOUTS])
            logprobs_C = self._logprobs(batches)
            torch._foreach_copy_(weights, self._before)
            try:
                moved_C = (logprobs_C - self._logprobs(batches)).abs()
            finally:
                torch._foreach_copy_(weights, now)
            sampler_C = torch.cat([batch.sampler_logprobs_C for batch in batches])
            self._compare((logprobs_C - sampler_C).abs(), moved_C, version)
        self._before = now if self._is_due(self._num_steps + 1) else []

    @staticmethod
    def _is_due(step: int) -> bool:
        return step <= _FIRST_STEPS or step % _EVERY == 0

    def _compare(self, off_C: torch.Tensor, moved_C: torch.Tensor, version: int) -> None:
        """off_C: |sampler - policy|; moved_C: |policy - policy of the version before|."""
        most = moved_C.topk(min(len(moved_C), max(8, len(moved_C) // 8)))
        if not float(most.values[-1]) > _FAR or not moved_C.isfinite().all():
            return
        self.num_decided += 1
        share = float((off_C[most.indices] < most.values / 4).float().mean())
        if share < 0.5:
            raise StaleAdapterError(
                f"the rollouts are not of version {version}: of the tokens that its last step "
                f"moved most, only {share:.0%} have log-probs near this version's; the sampler "
                "uses a stale or wrong adapter"
            )

    @torch.no_grad()
    def _logprobs(self, batches: Sequence[Microbatch]) -> torch.Tensor:
        on_device = (to_device(batch, self._policy.device) for batch in batches)
        found = [self._policy.token_logprobs(batch, self._temperature)[0] for batch in on_device]
        return torch.cat(found).float().cpu()


def _first(group: RolloutGroup, version: int) -> TrainSample | None:
    """The beginning of a group's first completion; None if it is empty or of another version."""
    completion = group.rollouts_G[0].completion
    if completion.adapter_version != version or not completion.token_ids:
        return None
    ids = completion.token_ids[:_CHECKED_TOKENS]
    logprobs = completion.sampler_logprobs_T[:_CHECKED_TOKENS]
    is_sampled_T = completion.is_sampled_T[:_CHECKED_TOKENS]
    return TrainSample(group.prompt.token_ids, ids, logprobs, 1.0, version, is_sampled_T)


def make_probe(policy: Policy, prompts: Sequence[Prompt], max_kl: float | None) -> Probe:
    """The policy's log-probs of the ends of these prompts, under the version that it has now.

    Samples of older versions differ from the policy by its steps in between, which have no known
    bound; on fixed tokens, under the same version, both sides must agree.
    """
    return _probe(policy, prompts, max_kl, adapter_off=False)


def base_probe(policy: Policy, prompts: Sequence[Prompt], max_kl: float | None) -> Probe:
    """As `make_probe`, of the base model under the adapter."""
    return _probe(policy, prompts, max_kl, adapter_off=True)


def _probe(
    policy: Policy, prompts: Sequence[Prompt], max_kl: float | None, *, adapter_off: bool
) -> Probe:
    token_ids_N = tuple(_probe_tokens(prompts))
    logprobs_N = tuple(
        tuple(_policy_logprobs(policy, [ids], adapter_off=adapter_off).tolist())
        for ids in token_ids_N
    )
    return Probe(token_ids_N, logprobs_N, tolerances(policy.dtype, max_kl)[1])


def compare(probe: Probe, logprobs_N: Sequence[Sequence[float]]) -> float:
    """Mean |difference| of a sampler's log-probs from the policy's, in nats per token.

    Raises:
        StaleAdapterError: it exceeds its limit.
    """
    served, expected = (
        torch.tensor([logprob for one in side for logprob in one])
        for side in (logprobs_N, probe.logprobs_N)
    )
    found = _distance(served, expected)
    if not found < probe.limit:
        raise StaleAdapterError(
            f"sampler and policy disagree on fixed tokens: mean |difference| {found:.2e} nats "
            f"(limit {probe.limit:.0e}); the sampler uses a stale or wrong adapter, or rounds more "
            "than sampling.max_kl allows"
        )
    return found


def check_version(sampler: Sampler, adapter: Adapter) -> dict[str, float]:
    """Compares the sampler with the policy of the version that it has been given: `check_step`
    where sampling runs ahead.

    Returns:
        mismatch/live_abs_mean: mean |difference| in nats per token; nothing without a probe, as in
        a checkpoint of an earlier release.

    Raises:
        StaleAdapterError: it exceeds its limit.
    """
    if adapter.probe is None:
        return {}
    found = compare(adapter.probe, sampler.token_logprobs(adapter.probe.token_ids_N))
    return {"mismatch/live_abs_mean": found}


def check_at_start(
    policy: Policy, sampler: Sampler, prompts: Sequence[Prompt], folder: Path, max_kl: float | None
) -> dict[str, float]:
    """Compares fixed tokens under a probe adapter and under the base model, on both sides.

    Afterwards the policy's own adapter is as before, and the probe's files are deleted.

    Returns:
        mean |difference| in nats per token: probe, base, and probe against base (the control).

    Raises:
        StaleAdapterError: a side disagrees, or the probe changes nothing.
    """
    token_ids_N = _probe_tokens(prompts)
    _, limit = tolerances(policy.dtype, max_kl)
    weights = [local_part(parameter.detach()) for parameter in policy.trainable().values()]
    saved = [weight.clone() for weight in weights]
    base_policy = _policy_logprobs(policy, token_ids_N, adapter_off=True)
    for shift in _PROBE_SHIFTS:  # the probe must be far above the limit, which is wide in bfloat16
        torch._foreach_copy_(weights, saved)
        _shake(policy, shift)
        if _distance(_policy_logprobs(policy, token_ids_N), base_policy) > 5 * limit:
            break
    probe = save_adapter(policy, folder, version=PROBE_VERSION, run_name="probe")
    with contextlib.ExitStack() as at_end:
        if distributed.is_main():
            at_end.callback(_remove, probe)
        at_end.callback(torch._foreach_copy_, weights, saved)
        sampler.set_adapter(probe)
        probe_sampler = torch.cat([torch.tensor(x) for x in sampler.token_logprobs(token_ids_N)])
        probe_policy = _policy_logprobs(policy, token_ids_N)
        distributed.gather(None, "the probe of the sampler")  # all have read its files
    found = {"probe": _distance(probe_sampler, probe_policy)}
    if policy.has_base:
        sampler.set_adapter(None)
        base_sampler = torch.cat([torch.tensor(x) for x in sampler.token_logprobs(token_ids_N)])
        found["base"] = _distance(base_sampler, base_policy)
    found["control"] = _distance(probe_policy, base_policy)
    if found["control"] < 5 * limit:
        raise StaleAdapterError(
            f"the probe adapter changes the policy too little for a check: {found}"
        )
    worst = max(value for key, value in found.items() if key != "control")
    if not worst < limit:
        raise StaleAdapterError(
            f"the sampler does not serve the learner's weights: mean |difference| of log-probs on "
            f"fixed tokens {found} nats, limit {limit:.0e}"
        )
    return found


def described(differences: dict[str, float]) -> str:
    """One line of what `check_at_start` has found."""
    found = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return f"sampler serves the learner's weights: mean |difference| of log-probs {found} nats"


@torch.no_grad()
def _shake(policy: Policy, shift: float) -> None:
    """Random B (or, in full mode, noise on the weights)."""
    generator = torch.Generator().manual_seed(0)
    if not policy.has_base:
        for parameter in policy.trainable().values():
            whole = gathered(parameter)
            noise = torch.randn(whole.shape, generator=generator).to(whole)
            change = noise * whole.float().std().nan_to_num().to(whole) * shift
            local_part(parameter).add_(own_part(change, parameter))
    for _, layer in lora_layers(policy.model):
        # A x has elements of about |x| times the size of A's, 1 / sqrt(3 d_in) at LoRA's start;
        # this makes scaling * B A x about shift times |W x| for weights of the layer's size.
        size = gathered(layer.base.weight).float().std() / layer.lora_A.square().mean().sqrt()
        noise = torch.randn(layer.lora_B.shape, generator=generator).to(layer.lora_B)
        layer.lora_B.copy_(
            noise * size * (shift / layer.lora_A.shape[0] ** 0.5 / layer.scaling)
            + (layer.lora_B0 if layer.is_shifted else 0.0)
        )
    for _, experts in expert_adapters(policy.model):
        for part, matrix in experts.lora_B.items():
            noise = torch.randn(matrix.shape, generator=generator).to(matrix)
            size = expert_size(experts, part)
            rank = matrix.shape[-1]
            matrix.copy_(noise * size * (shift * (3 / rank) ** 0.5 / experts.scaling))


def _probe_tokens(prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """The fixed tokens that both sides score: the end of each prompt."""
    return [prompt.token_ids[-_PROBE_TOKENS:] for prompt in prompts[:_PROBE_PROMPTS]]


@torch.no_grad()
def _policy_logprobs(
    policy: Policy, token_ids_N: Sequence[tuple[int, ...]], *, adapter_off: bool = False
) -> torch.Tensor:
    """Log-probs of tokens 1, 2, ... of each sequence, concatenated, nats."""
    out = []
    for ids in token_ids_N:
        batch = to_device(whole_sequence(ids), policy.device)
        if adapter_off and policy.has_base:
            out.append(policy.reference_logprobs(batch, temperature=1.0))
        else:
            out.append(policy.token_logprobs(batch, temperature=1.0)[0])
    return torch.cat(out).cpu()


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean |difference|; not a number where there is nothing to compare."""
    return float((a.double() - b.double()).abs().mean())


def _remove(adapter: Adapter) -> None:
    for file in adapter.path.iterdir():
        file.unlink()
    adapter.path.rmdir()
