"""Gradient accumulation, optimizer steps and KL, on a real tiny model."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch

from rewards import Score
from rl_lora.advantages import group_mean
from rl_lora.batches import make_samples, pack_samples
from rl_lora.config import (
    AlgorithmSection,
    LoraSection,
    ModelSection,
    RunConfig,
    RunSection,
    parse_config,
)
from rl_lora.errors import KlLimitError
from rl_lora.learner import Learner, loss_inputs
from rl_lora.losses import LOSSES, ppo
from rl_lora.penalties import kl_to_base, penalised_rewards
from rl_lora.policy import Policy, open_policy
from rl_lora.runs.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from rl_lora.schedule import Schedule
from rl_lora.step_stats import PassStats, StepStats, quantiles
from rl_lora.types import Completion, Microbatch, Prompt, Rollout, RolloutGroup, TrainSample
from tests.helpers.tiny_models import make_policy, random_llama, shake
from tests.nn.test_optimized import distance


def samples_of(
    policy: Policy, advantages: tuple[float, ...] = (1.0, -0.5, 0.25)
) -> list[TrainSample]:
    """Sequences of different lengths with the policy's own log-probs as the sampler's."""
    shapes = ((3, 2), (2, 6), (4, 4), (1, 3))
    out = []
    for (num_prompt, num_completion), advantage in zip(shapes, advantages, strict=False):
        prompt = tuple(range(5, 5 + num_prompt))
        completion = tuple(range(30, 30 + num_completion))
        raw = TrainSample(prompt, completion, (0.0,) * num_completion, 1.0, 0)
        ((batch,),) = pack_samples([raw], microbatch_tokens=99)
        with torch.no_grad():
            logprobs = tuple(policy.token_logprobs(batch, 1.0)[0].tolist())
        out.append(TrainSample(prompt, completion, logprobs, advantage, 0))
    return out


def make_learner(policy: Policy, lr: float = 1e-2) -> Learner:
    return Learner(policy, lr, grad_clip=1e9)


@pytest.mark.parametrize("denominator", ["tokens", "sequences", 8])
@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo"])
def test_accumulation_equals_one_big_batch(
    tmp_path: Path, denominator: str | int, loss: str
) -> None:
    path = random_llama(tmp_path / "model")
    after = []
    for microbatch_tokens in (8, 10_000):
        policy = make_policy(path)
        shake(policy)
        learner = make_learner(policy)
        updates = pack_samples(
            samples_of(policy),
            denominator=denominator,
            microbatch_tokens=microbatch_tokens,
        )
        assert len(updates[0]) == (3 if microbatch_tokens == 8 else 1)
        metrics = learner.update(updates, LOSSES[loss])
        after.append((metrics["grad/norm"], policy.published_tensors()))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-5)
    assert after[0][0] > 1e-3
    for name, tensor in after[0][1].items():
        assert torch.allclose(tensor, after[1][1][name], atol=1e-5), name


@pytest.mark.parametrize("share_prompts", [False, True])
def test_an_episodes_loss_and_gradient_are_those_of_its_sampled_tokens(
    tmp_path: Path, share_prompts: bool
) -> None:
    """Worked out token by token on one whole sequence; the environment's tokens have no term."""
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy)
    prompt, completion, sampled = (5, 6, 7), (30, 31, 40, 41, 42, 32), (0, 1, 5)
    is_sampled_T = tuple(place in sampled for place in range(6))
    episode = TrainSample(prompt, completion, (-2.0, -3.0, 0, 0, 0, -4.0), 0.5, 0, is_sampled_T)
    other = TrainSample(prompt, (33, 34), (-1.0, -1.5), -1.0, 0)  # shares the prompt, or fills up

    def found() -> dict[str, torch.Tensor]:
        return {name: one.grad for name, one in policy.trainable().items() if one.grad is not None}

    expected = torch.zeros(())
    for one, places in ((episode, sampled), (other, (0, 1))):
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        logprobs_TV = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        for place in places:
            logprob = logprobs_TV[2 + place, one.completion_ids[place]]
            ratio = (logprob - one.sampler_logprobs_T[place]).exp()
            expected = expected - one.advantage * ratio / 5  # 3 + 2 sampled tokens
    expected.backward()
    by_hand = {name: grad.clone() for name, grad in found().items()}
    policy.model.zero_grad()
    ((batch,),) = pack_samples([episode, other], share_prompts=share_prompts)
    logprobs_C, _ = policy.token_logprobs(batch, 1.0)
    loss, _ = LOSSES["importance_sampling"](loss_inputs(batch, logprobs_C))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert by_hand.keys() == found().keys()
    for name, grad in found().items():
        torch.testing.assert_close(grad, by_hand[name], atol=1e-6, rtol=1e-4)
    assert any(grad.abs().max() > 1e-3 for grad in by_hand.values())


def test_a_step_raises_the_good_and_lowers_the_bad(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    samples = samples_of(policy, (1.0, -1.0))
    learner = make_learner(policy, lr=3e-3)
    for _ in range(3):
        learner.update(pack_samples(samples, microbatch_tokens=99))
    after = samples_of(policy, (1.0, -1.0))
    assert sum(after[0].sampler_logprobs_T) > sum(samples[0].sampler_logprobs_T)
    assert sum(after[1].sampler_logprobs_T) < sum(samples[1].sampler_logprobs_T)


def test_all_tied_takes_no_step_and_says_so(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = make_learner(policy)
    learner.update(pack_samples(samples_of(policy), microbatch_tokens=99))
    before = {n: t.clone() for n, t in policy.published_tensors().items()}
    tied = samples_of(policy, (0.0, 0.0))
    metrics = learner.update(pack_samples(tied, microbatch_tokens=99))
    assert (metrics["learn/updates"], metrics["learn/skipped_updates"]) == (0, 1)
    assert metrics["mismatch/abs_max"] < 1e-5  # still measured
    assert all(torch.equal(before[n], t) for n, t in policy.published_tensors().items())


def test_base_weights_are_never_written_to(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    before = policy.base_fingerprint()
    learner = make_learner(policy)
    for _ in range(3):
        samples = samples_of(policy)
        learner.update(pack_samples(samples, microbatch_tokens=99))
    assert policy.base_fingerprint() == before
    assert learner.parameter_norm() > 0


def test_several_updates_measure_mismatch_before_the_first_step(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = make_learner(policy)
    updates = pack_samples(
        samples_of(policy, (1.0, -1.0, 0.5, 0.5)),
        microbatch_tokens=99,
        num_updates=2,
    )
    metrics = learner.update(updates, ppo)
    assert metrics["learn/updates"] == 2
    assert metrics["mismatch/abs_max"] < 1e-5
    assert metrics["ratio/max"] > 1.001  # the second update saw a moved policy


def test_kl_loss_pulls_back_to_the_base(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy, size=0.05)
    learner = make_learner(policy, lr=5e-3)
    kls = []
    for _ in range(8):
        updates = pack_samples(
            samples_of(policy, (0.0, 0.0, 0.0)),  # a step without any other signal
            microbatch_tokens=99,
            keep_zero_advantage=True,
        )
        metrics = learner.update(updates, kl_weight=1.0)
        assert (metrics["learn/updates"], metrics["learn/skipped_updates"]) == (1, 0)
        assert metrics["grad/norm"] > 0
        kls.append(metrics["loss/kl"])
    assert kls[0] > 0
    assert kls[-1] < 0.5 * kls[0]


def test_a_tied_steps_gradient_is_the_kls_own(tmp_path: Path) -> None:
    """0.5 nats of log-ratio and more: the numbers by hand, from log-probs of both sides."""
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy, size=0.05)
    (batches,) = pack_samples(
        samples_of(policy, (0.0, 0.0, 0.0)),
        microbatch_tokens=999,
        keep_zero_advantage=True,
    )
    (batch,) = batches
    logprobs_C, _ = policy.token_logprobs(batch, 1.0)
    d_C = policy.reference_logprobs(batch, 1.0).double() - logprobs_C.double()
    expected = (batch.weights_C * (d_C.exp() - d_C - 1)).sum()
    gradients = torch.autograd.grad(0.3 * expected, list(policy.trainable().values()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    metrics = make_learner(policy).update([batches], kl_weight=0.3)
    assert metrics["loss/kl"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert metrics["grad/norm"] == pytest.approx(float(norm), rel=1e-4)


def test_reward_penalty_is_the_sequence_kl(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy, size=0.05)
    samples = samples_of(policy)
    score = Score(reward=1.0, correct=True, status="ok", answer="1", has_format=True)
    groups = [
        RolloutGroup(
            Prompt(f"p/{i}", "s", "q", "1", s.prompt_ids),
            (Rollout(Completion(s.completion_ids, "", s.sampler_logprobs_T, False, 0), score),),
        )
        for i, s in enumerate(samples)
    ]
    learner = Learner(policy, microbatch_tokens=9)
    config = parse_config({"algorithm": {"kl": "reward", "kl_weight": 0.1}})
    penalised_N_G, metrics = penalised_rewards(config, learner, groups)
    with policy.adapter_off():
        base = samples_of(policy)
    log_ratios = [
        reference - sampled
        for sample, base_sample in zip(samples, base, strict=True)
        for sampled, reference in zip(
            sample.sampler_logprobs_T, base_sample.sampler_logprobs_T, strict=True
        )
    ]
    k3s = [math.exp(d) - d - 1 for d in log_ratios]
    assert metrics["reward/kl"] == pytest.approx(sum(k3s) / len(k3s), rel=1e-4)
    assert metrics["reward/kl_penalty"] == pytest.approx(-0.1 * sum(log_ratios) / 3, abs=1e-5)
    assert metrics["reward/kl"] > 1e-3
    for sample, base_sample, (reward,) in zip(samples, base, penalised_N_G, strict=True):
        kl = sum(sample.sampler_logprobs_T) - sum(base_sample.sampler_logprobs_T)
        assert reward == pytest.approx(1.0 - 0.1 * kl, abs=1e-5)
    assert [g.rewards_G for g in groups] == [[1.0]] * 3  # rewards stay as they were
    assert len(make_samples(groups, group_mean(penalised_N_G))) == 3


def test_the_kl_to_the_base_by_hand_and_its_limit(tmp_path: Path) -> None:
    """Of 8 tokens one is twice as probable under the sampler as under the base, whose k3 is
    1/2 + ln 2 - 1, and one half as probable, 2 - ln 2 - 1: together 1/2."""
    policy = make_policy(random_llama(tmp_path / "model"))  # a fresh adapter changes nothing
    samples = samples_of(policy)[:2]
    shifts = [math.log(2), -math.log(2)]
    groups = []
    for i, (sample, shift) in enumerate(zip(samples, shifts, strict=True)):
        logprobs_T = (sample.sampler_logprobs_T[0] + shift, *sample.sampler_logprobs_T[1:])
        completion = Completion(sample.completion_ids, "", logprobs_T, False, 0)
        score = Score(reward=1.0, correct=True, status="ok", answer="1", has_format=True)
        prompt = Prompt(f"p/{i}", "s", "q", "1", sample.prompt_ids)
        groups.append(RolloutGroup(prompt, (Rollout(completion, score),)))
    expected = 0.5 / 8
    learner = Learner(policy, microbatch_tokens=9)
    assert kl_to_base(learner, groups) == pytest.approx(expected, rel=1e-5)

    section = AlgorithmSection(max_kl_to_base=1.01 * expected)
    config = RunConfig(algorithm=section)
    rewards_N_G, metrics = penalised_rewards(config, learner, groups)
    assert rewards_N_G == [[1.0], [1.0]]
    assert metrics == {"policy/kl_to_base": pytest.approx(expected, rel=1e-5)}
    assert penalised_rewards(RunConfig(), learner, groups) == ([[1.0], [1.0]], {})
    low = AlgorithmSection(max_kl_to_base=0.99 * expected)
    with pytest.raises(KlLimitError, match=r"nats a token, over algorithm\.max_kl_to_base=0\."):
        penalised_rewards(RunConfig(algorithm=low), learner, groups)
    penalised = AlgorithmSection(kl="reward", kl_weight=0.1, max_kl_to_base=1.0)
    metrics = penalised_rewards(RunConfig(algorithm=penalised), learner, groups)[1]
    assert metrics["policy/kl_to_base"] == metrics["reward/kl"] == pytest.approx(expected, rel=1e-5)


def test_an_update_whose_gradient_is_not_finite_is_left_out(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = make_learner(policy)
    before = {n: t.clone() for n, t in policy.published_tensors().items()}
    bad, good = samples_of(policy, (float("inf"),)), samples_of(policy)
    found = learner.update(pack_samples(bad, microbatch_tokens=99))
    assert (found["learn/nonfinite_updates"], found["learn/skipped_updates"]) == (1, 1)
    assert (found["learn/updates"], found["grad/norm"]) == (0, 0)
    assert all(torch.equal(before[n], t) for n, t in policy.published_tensors().items())
    after = learner.update(pack_samples(good, microbatch_tokens=99))
    assert (after["learn/nonfinite_updates"], after["learn/updates"]) == (0, 1)
    fresh = make_learner(make_policy(random_llama(tmp_path / "model")))
    assert after["grad/norm"] == fresh.update(pack_samples(good, microbatch_tokens=99))["grad/norm"]
    ((batch,),) = pack_samples(bad, microbatch_tokens=99)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        learner.fit([replace(batch, weights_C=batch.weights_C * math.nan)])


def test_a_step_without_any_completion_token(tmp_path: Path) -> None:
    learner = make_learner(make_policy(random_llama(tmp_path / "model")))
    found = learner.update(pack_samples([], num_updates=2))
    assert (found["learn/updates"], found["learn/skipped_updates"]) == (0, 2)
    assert learner.num_updates_done == 2
    assert "mismatch/kl" not in found


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_where_memory_runs_out_microbatches_are_halved_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, share_prompts: bool
) -> None:
    """Four sequences in one microbatch, and room for 9 tokens at a time."""
    path = random_llama(tmp_path / "model")

    def learned() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        policy = make_policy(path, mode=mode)
        updates = pack_samples(
            samples_of(policy, (1.0, -0.5, 0.25, 0.75)) * 2,
            num_updates=2,
            share_prompts=share_prompts,
            microbatch_tokens=99,
        )
        found = make_learner(policy, 1e-3).update(updates, ppo)
        return found, policy.published_tensors()

    whole, whole_tensors = learned()
    given = Policy.token_logprobs
    sizes = []

    def short_of_memory(self: Policy, batch: Microbatch, temperature: float):  # type: ignore[no-untyped-def]
        out = given(self, batch, temperature)  # the memory runs out late
        sizes.append(batch.num_tokens)
        if batch.num_tokens > limit:
            raise torch.OutOfMemoryError("no memory left")
        return out

    monkeypatch.setattr(Policy, "token_logprobs", short_of_memory)
    limit = 99
    policy = make_policy(path)
    ((batch,),) = pack_samples(samples_of(policy), microbatch_tokens=99)
    limit = 9
    halved, halved_tensors = learned()
    assert halved["learn/out_of_memory"] >= 2
    assert max(sizes) > limit
    assert halved["grad/norm"] == pytest.approx(whole["grad/norm"], rel=1e-5)
    assert halved["loss/policy"] == pytest.approx(whole["loss/policy"], rel=1e-5, abs=1e-7)
    # Adam moves an element whose gradient is nearly 0 by what rounding makes of it.
    start = make_policy(path, mode=mode).published_tensors()
    assert distance(halved_tensors, whole_tensors, start) < 1e-3
    limit = 3  # less than any sequence has
    with pytest.raises(torch.OutOfMemoryError):
        make_learner(policy).update([[batch]])


def test_supervised_steps_lower_the_log_loss(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = make_learner(policy)
    ((batch,),) = pack_samples(samples_of(policy), microbatch_tokens=99)
    losses = [learner.fit([batch], lr=1e-2)["sft/loss"] for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1


def test_a_supervised_stage_before_rl_has_a_constant_rate(tmp_path: Path) -> None:
    """However many RL steps are to follow; a supervised run's own steps follow the schedule."""
    moved = {}
    for num_steps in (2, 100):
        for is_scheduled in (False, True):
            policy = make_policy(random_llama(tmp_path / f"{num_steps}{is_scheduled}"))
            schedule = Schedule("linear", num_steps=num_steps)
            learner = Learner(policy, 1e-2, schedule=schedule)
            ((batch,),) = pack_samples(samples_of(policy), microbatch_tokens=99)
            for _ in range(2):
                learner.fit([batch], None if is_scheduled else 1e-2)
            moved[num_steps, is_scheduled] = learner.parameter_norm()
    assert moved[2, False] == moved[100, False]
    assert moved[2, True] != moved[100, True]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_goes_by_the_step_whether_or_not_it_is_tied(
    tmp_path: Path, schedule: Literal["linear", "cosine"]
) -> None:
    rates: dict[str, list[float]] = {}
    for name, tied in {"none": (), "some": (1, 2, 4), "all": range(6)}.items():
        policy = make_policy(random_llama(tmp_path / name))
        learner = Learner(policy, 1e-3, schedule=Schedule(schedule, num_steps=12))
        rates[name] = []
        for step in range(6):
            # Step 3 has one sample, and so one update where the others have two.
            advantages = ((1.0,) if step == 3 else (1.0, -1.0, 0.5)) if step not in tied else (0.0,)
            updates = pack_samples(
                samples_of(policy, advantages),
                microbatch_tokens=99,
                num_updates=2,
            )
            metrics = learner.update(updates)
            num_updates = sum(bool(microbatches) for microbatches in updates)
            assert num_updates == min(2, len(advantages))
            assert metrics["learn/updates"] == (0 if step in tied else num_updates)
            assert learner.num_updates_done == 2 * (step + 1)
            rates[name].append(learner.schedule.rate(1e-3, learner.num_updates_done))
    assert rates["some"] == rates["all"] == rates["none"]
    assert rates["none"][-1] < 0.1 * rates["none"][0]


def test_tied_steps_report_their_own_rates_across_a_resume(tmp_path: Path) -> None:
    config = RunConfig(run=RunSection(output_dir=str(tmp_path)))

    def make() -> Learner:
        return Learner(make_policy(path), 1.0, schedule=Schedule("linear", num_steps=4))

    path = random_llama(tmp_path / "model")
    learner = make()
    tied = pack_samples(samples_of(learner.policy, (0.0,)), microbatch_tokens=99)
    assert [learner.update(tied)["optim/lr"] for _ in range(2)] == [1.0, 0.75]
    save_checkpoint(2, learner, config)
    resumed = make()
    checkpoint = latest_checkpoint(config.run.folder)
    assert checkpoint is not None
    load_checkpoint(checkpoint, resumed)
    assert [resumed.update(tied)["optim/lr"] for _ in range(2)] == [0.5, 0.25]


def test_learning_rate_schedules() -> None:
    constant = Schedule(num_steps=10)
    assert [constant.rate(1.0, s) for s in (1, 10)] == [1.0, 1.0]
    warm = Schedule("linear", warmup_steps=4, num_steps=14)
    assert [warm.rate(1.0, s) for s in (1, 4, 5, 10, 14)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.5, 0.1]
    )
    assert Schedule("cosine", num_steps=10).rate(1.0, 6) == pytest.approx(0.5)


def noisy(samples: list[TrainSample], size: float) -> list[TrainSample]:
    """The samples with a sampler that rounds: normal noise of `size` nats on its log-probs."""
    generator = torch.Generator().manual_seed(0)
    return [
        replace(
            sample,
            sampler_logprobs_T=tuple(
                value + size * float(torch.randn((), generator=generator))
                for value in sample.sampler_logprobs_T
            ),
        )
        for sample in samples
    ]


@pytest.mark.parametrize(
    ("dtype", "num_updates"), [("float32", 1), ("float32", 2), ("bfloat16", 4)]
)
@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_a_samplers_rounding_drops_no_token(
    tmp_path: Path, loss: str, dtype: str, num_updates: int
) -> None:
    """With noise like bfloat16's, far over GSPO's bounds, and a policy that stands still."""
    path = random_llama(tmp_path / "model")
    model = ModelSection(name=str(path), device="cpu", dtype=dtype)  # type: ignore[arg-type]
    policy = open_policy(path, model, LoraSection(), seed=0)
    shake(policy)
    denominator = "sequences" if loss == "gspo" else "tokens"
    learner = make_learner(policy, lr=1e-12)
    updates = pack_samples(
        noisy(samples_of(policy, (1.0, -1.0, 0.5, -0.5)), 0.02),
        denominator=denominator,
        microbatch_tokens=8,
        num_updates=num_updates,
    )
    metrics = learner.update(updates, LOSSES[loss])
    assert metrics["learn/updates"] == num_updates
    assert metrics["ratio/max"] > 1.01  # to the sampler
    assert metrics["clip/fraction"] == 0


def test_with_one_update_the_bounds_have_no_say(tmp_path: Path) -> None:
    """Whatever the sampler's noise and the version it had: old is the policy itself."""
    path = random_llama(tmp_path / "model")
    norms = []
    for bound in (1e-6, 0.5):
        policy = make_policy(path)
        learner = make_learner(policy)
        samples = noisy(samples_of(policy), 0.3)
        updates = pack_samples(samples, microbatch_tokens=99)
        metrics = learner.update(updates, partial(ppo, clip_low=bound, clip_high=bound))
        assert metrics["clip/fraction"] == 0
        norms.append(metrics["grad/norm"])
    assert norms[0] == norms[1] > 0


def test_later_updates_are_bounded_against_the_policy_before_the_first_step(
    tmp_path: Path,
) -> None:
    """Twice the same samples: the second time the better half of the tokens is out of bounds."""
    path = random_llama(tmp_path / "model")
    logprobs, fractions = [], []
    bound, share = 0.5, 0.0
    for num_updates in (1, 2):
        policy = make_policy(path)
        shake(policy)
        samples = noisy(samples_of(policy, (1.0, 1.0, 1.0)), 0.02)
        (update,) = pack_samples(samples, microbatch_tokens=8)
        assert len(update) == 3
        logprobs.append(torch.cat([policy.token_logprobs(b, 1.0)[0].detach() for b in update]))
        learner = make_learner(policy, lr=1e-3)
        metrics = learner.update([update] * num_updates, partial(ppo, clip_high=bound))
        fractions.append(metrics["clip/fraction"])
        if num_updates == 1:  # how far the first step goes, whatever the bounds
            after_C = torch.cat([policy.token_logprobs(b, 1.0)[0].detach() for b in update])
            moves_C = (after_C - logprobs[0]).exp() - 1
            bound = float(moves_C.quantile(0.5)) + 1e-4
            share = float((moves_C > bound).float().mean())
    assert 0.3 < share < 0.6
    assert fractions == [0, pytest.approx(share / 2)]


def test_quantiles_are_torchs_own() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = (0.0, 0.01, 0.25, 0.5, 0.99, 1.0)
    for count in (1, 2, 3, 10, 101, 4999):
        values = torch.randn(count, generator=generator)
        expected = values.double().quantile(torch.tensor(levels, dtype=torch.float64))
        assert quantiles(values, levels) == expected.tolist()


@pytest.mark.slow
def test_a_step_of_more_than_2_to_the_24_tokens_has_its_metrics() -> None:
    """128 prompts x 16 samples x 8192 tokens are 2^24, torch.quantile's limit."""
    count = 2**24 + 1
    row = torch.zeros(1)
    batch = Microbatch(
        token_ids_BT=torch.zeros(1, 2, dtype=torch.int64),
        position_BT=None,
        layout=None,
        row_C=row,
        column_C=row,
        target_ids_C=row,
        sampler_logprobs_C=torch.zeros(()).expand(count),
        advantages_C=row,
        weights_C=row,
        sequence_C=row,
        samples_S=(),
        num_tokens=count,
    )
    policy_C = torch.linspace(0, 1, count).log1p()  # ratios from 1 to 2
    record = StepStats()
    record.add(batch, PassStats(torch.zeros(()), policy_C, torch.zeros(()).expand(count)), update=0)
    metrics = record.metrics()
    expected = {"ratio/p01": 1.01, "ratio/p50": 1.5, "ratio/p99": 1.99}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_the_mismatch_is_exact_below_float32s_rounding(tmp_path: Path) -> None:
    """A spread of s nats is a KL of s^2 / 2: 1e-10 where float32 says 4e-9 or less than nothing."""
    policy = make_policy(random_llama(tmp_path / "model"))
    samples = noisy(samples_of(policy, (1.0, -1.0, 0.5, 0.5)), 1.4e-5)
    (batches,) = pack_samples(samples, microbatch_tokens=99)
    sampled_C = torch.cat([batch.sampler_logprobs_C for batch in batches]).double()
    own_C = torch.cat([policy.token_logprobs(b, 1.0)[0].detach() for b in batches]).double()
    expected = float((own_C - sampled_C).square().mean()) / 2
    assert 3e-11 < expected < 3e-10
    found = make_learner(policy).update([batches])["mismatch/kl"]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss", ["importance_sampling", "gspo"])
def test_sharing_a_prompts_row_changes_neither_values_nor_gradients(
    tmp_path: Path, loss: str
) -> None:
    path = random_llama(tmp_path / "model")
    denominator = "sequences" if loss == "gspo" else "tokens"
    seen = []
    for share_prompts in (False, True):
        policy = make_policy(path)
        shake(policy)
        samples = [
            TrainSample((5, 6, 7), (30 + i, 31, 32 + i)[: 1 + i % 3], (-4.0,) * (1 + i % 3), a, 0)
            for i, a in enumerate((1.0, -1.0, 0.5, -0.5, 2.0))
        ] + [TrainSample((8,), (40, 41), (-4.0, -4.0), 1.0, 0)]
        updates = pack_samples(
            samples,
            denominator=denominator,
            microbatch_tokens=40,
            share_prompts=share_prompts,
        )
        logprobs: dict[tuple[int, ...], float] = {}
        loss_sum = torch.zeros(())
        for batch in updates[0]:
            logprobs_C, _ = policy.token_logprobs(batch, 1.0)
            for sequence in range(batch.num_sequences):
                mine = batch.sequence_C == sequence
                key = (int(batch.token_ids_BT[batch.row_C[mine][0], batch.column_C[mine][0]]),)
                key += tuple(batch.target_ids_C[mine].tolist())
                logprobs[key] = float(logprobs_C.detach()[mine].sum())
            x = replace(loss_inputs(batch, logprobs_C), old_logprobs_C=logprobs_C.detach())
            value, _ = LOSSES[loss](x)
            loss_sum = loss_sum + value
        loss_sum.backward()
        seen.append((logprobs, {n: p.grad for n, p in policy.trainable().items()}))
    plain_logprobs, plain_grads = seen[0]
    assert len(plain_logprobs) == 6
    for logprobs, grads in seen[1:]:
        assert logprobs == pytest.approx(plain_logprobs, abs=1e-5)
        for name, grad in grads.items():
            assert grad is not None
            assert torch.allclose(grad, plain_grads[name], atol=1e-5), name  # type: ignore[arg-type]
