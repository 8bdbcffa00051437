"""Gradient accumulation, optimizer steps and KL, on a real tiny model."""

from pathlib import Path

import pytest
import torch

from rewards import Score
from rl_lora.advantages import group_mean
from rl_lora.batches import make_samples, pack
from rl_lora.config import AlgorithmSection, OptimSection
from rl_lora.learner import Learner, learning_rate
from rl_lora.losses import LOSSES
from rl_lora.policy import Policy
from rl_lora.types import Completion, Prompt, Rollout, RolloutGroup, TrainSample
from tests.tiny_models import make_policy, random_llama, shake


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
        ((batch,),) = pack([raw], denominator="tokens", max_tokens=8, microbatch_tokens=99)
        with torch.no_grad():
            logprobs = tuple(policy.token_logprobs(batch, 1.0)[0].tolist())
        out.append(TrainSample(prompt, completion, logprobs, advantage, 0))
    return out


def make_learner(policy: Policy, *, lr: float = 1e-2, **algorithm: object) -> Learner:
    return Learner(
        policy,
        OptimSection(lr=lr, grad_clip=1e9),
        AlgorithmSection(**algorithm),  # type: ignore[arg-type]
        temperature=1.0,
        num_steps=10,
    )


@pytest.mark.parametrize("denominator", ["tokens", "sequences", "max_tokens"])
@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo"])
def test_accumulation_equals_one_big_batch(tmp_path: Path, denominator: str, loss: str) -> None:
    path = random_llama(tmp_path / "model")
    after = []
    for microbatch_tokens in (8, 10_000):
        policy = make_policy(path)
        shake(policy)
        learner = make_learner(policy, loss=loss, denominator=denominator)
        updates = pack(
            samples_of(policy),
            denominator=denominator,
            max_tokens=8,
            microbatch_tokens=microbatch_tokens,
        )
        assert len(updates[0]) == (3 if microbatch_tokens == 8 else 1)
        metrics = learner.update(updates)
        after.append((metrics["grad/norm"], policy.adapter_tensors()))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-5)
    assert after[0][0] > 1e-3
    for name, tensor in after[0][1].items():
        assert torch.allclose(tensor, after[1][1][name], atol=1e-5), name


def test_a_step_raises_the_good_and_lowers_the_bad(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    samples = samples_of(policy, (1.0, -1.0))
    learner = make_learner(policy, lr=3e-3)
    for _ in range(3):
        learner.update(pack(samples, denominator="tokens", max_tokens=8, microbatch_tokens=99))
    after = samples_of(policy, (1.0, -1.0))
    assert sum(after[0].sampler_logprobs_T) > sum(samples[0].sampler_logprobs_T)
    assert sum(after[1].sampler_logprobs_T) < sum(samples[1].sampler_logprobs_T)


def test_all_tied_takes_no_step_and_says_so(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = make_learner(policy)
    learner.update(
        pack(samples_of(policy), denominator="tokens", max_tokens=8, microbatch_tokens=99)
    )
    before = {n: t.clone() for n, t in policy.adapter_tensors().items()}
    tied = samples_of(policy, (0.0, 0.0))
    metrics = learner.update(pack(tied, denominator="tokens", max_tokens=8, microbatch_tokens=99))
    assert (metrics["learn/updates"], metrics["learn/skipped_updates"]) == (0, 1)
    assert metrics["mismatch/abs_max"] < 1e-5  # still measured
    assert all(torch.equal(before[n], t) for n, t in policy.adapter_tensors().items())


def test_base_weights_are_never_written_to(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    before = policy.base_fingerprint()
    learner = make_learner(policy)
    for _ in range(3):
        samples = samples_of(policy)
        learner.update(pack(samples, denominator="tokens", max_tokens=8, microbatch_tokens=99))
    assert policy.base_fingerprint() == before
    assert learner.parameter_norm() > 0


def test_several_updates_measure_mismatch_before_the_first_step(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = make_learner(policy, loss="ppo")
    updates = pack(
        samples_of(policy, (1.0, -1.0, 0.5, 0.5)),
        denominator="tokens",
        max_tokens=8,
        microbatch_tokens=99,
        num_updates=2,
    )
    metrics = learner.update(updates)
    assert metrics["learn/updates"] == 2
    assert metrics["mismatch/abs_max"] < 1e-5
    assert metrics["ratio/max"] > 1.001  # the second update saw a moved policy


def test_kl_loss_pulls_back_to_the_base(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy, size=0.05)
    learner = make_learner(policy, lr=5e-3, kl="loss", kl_weight=1.0)
    kls = []
    for _ in range(8):
        samples = samples_of(policy, (1e-9, 1e-9, 1e-9))
        updates = pack(
            samples,
            denominator="tokens",
            max_tokens=8,
            microbatch_tokens=99,
            keep_zero_advantage=True,
        )
        kls.append(learner.update(updates)["loss/kl"])
    assert kls[0] > 0
    assert kls[-1] < 0.5 * kls[0]


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
    learner = make_learner(policy, kl="reward", kl_weight=0.1)
    penalised_N_G = learner.penalised_rewards(groups, microbatch_tokens=9)
    with policy.adapter_off():
        base = samples_of(policy)
    for sample, base_sample, (reward,) in zip(samples, base, penalised_N_G, strict=True):
        kl = sum(sample.sampler_logprobs_T) - sum(base_sample.sampler_logprobs_T)
        assert reward == pytest.approx(1.0 - 0.1 * kl, abs=1e-5)
    assert [g.rewards_G for g in groups] == [[1.0]] * 3  # rewards stay as they were
    assert len(make_samples(groups, group_mean(penalised_N_G))) == 3


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = make_learner(policy)
    before = {n: t.clone() for n, t in policy.adapter_tensors().items()}
    bad = samples_of(policy, (float("inf"),))
    with pytest.raises(FloatingPointError, match=r"lower optim\.lr"):
        learner.update(pack(bad, denominator="tokens", max_tokens=8, microbatch_tokens=99))
    assert all(torch.equal(before[n], t) for n, t in policy.adapter_tensors().items())


def test_supervised_steps_lower_the_log_loss(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = make_learner(policy)
    ((batch,),) = pack(samples_of(policy), denominator="tokens", max_tokens=8, microbatch_tokens=99)
    losses = [learner.fit([batch], lr=1e-2)["sft/loss"] for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1


def test_a_supervised_stage_before_rl_has_a_constant_rate(tmp_path: Path) -> None:
    """However many RL steps are to follow; a supervised run's own steps follow the schedule."""
    moved = {}
    for num_steps in (2, 100):
        for is_scheduled in (False, True):
            policy = make_policy(random_llama(tmp_path / f"{num_steps}{is_scheduled}"))
            optim = OptimSection(lr=1e-2, schedule="linear")
            learner = Learner(
                policy, optim, AlgorithmSection(), temperature=1.0, num_steps=num_steps
            )
            ((batch,),) = pack(
                samples_of(policy), denominator="tokens", max_tokens=8, microbatch_tokens=99
            )
            for _ in range(2):
                learner.fit([batch], lr=1e-2, is_scheduled=is_scheduled)
            moved[num_steps, is_scheduled] = learner.parameter_norm()
    assert moved[2, False] == moved[100, False]
    assert moved[2, True] != moved[100, True]


def test_learning_rate_schedules() -> None:
    constant = OptimSection(lr=1.0)
    assert [learning_rate(constant, s, 10) for s in (1, 10)] == [1.0, 1.0]
    warm = OptimSection(lr=1.0, warmup_steps=4, schedule="linear")
    assert [learning_rate(warm, s, 14) for s in (1, 4, 5, 10, 14)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.5, 0.1]
    )
    cosine = OptimSection(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 6, 10) == pytest.approx(0.5)


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
        updates = pack(
            samples,
            denominator=denominator,
            max_tokens=8,
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
            value, _ = LOSSES[loss](
                Learner._inputs(batch, logprobs_C),
                AlgorithmSection(loss=loss, denominator=denominator),  # type: ignore[arg-type]
            )
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
