"""Our arms: the whole step with vLLM, and only the learner (adapter or full fine-tuning)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_stages.measures import bound_s, measured_device
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.probe import Commands, matmul_peak, peak_mb, peak_reset
from benchmarks.workload import Size, config
from rl_lora.batches import pack
from rl_lora.build import RunContext, make_learner, open_run
from rl_lora.models.shapes import build_on_meta
from rl_lora.overlap import step_params
from rl_lora.planning.counts import matmul_counts
from rl_lora.policy import Policy, open_policy
from rl_lora.prompts import load_prompt_sets
from rl_lora.samplers.restarts import RestartingSampler
from rl_lora.types import Adapter, Completion, Microbatch, Prompt, Rollout, RolloutGroup, Score

Built = Iterator[tuple[Commands, dict[str, Any]]]


@contextlib.contextmanager
def whole_step(size: Size) -> Built:
    """The trainer's own loop, phase by phase; only lengths and rewards are fixed."""
    from rl_lora.rollouts import sample_groups, score_groups
    from rl_lora.state import State, publish
    from rl_lora.train import learn

    with (
        tempfile.TemporaryDirectory() as folder,
        open_run(config(size, **{"run.output_dir": folder})) as job,
    ):
        settings, state = job.config, State(job.prompts.stream(job.config), position={})
        learner = make_learner(
            job.policy,
            settings.optim,
            num_steps=settings.run.num_steps,
            temperature=settings.sampling.temperature,
        )
        fix_lengths(job.sampler, size)

        def publish_and_set() -> None:
            publish(job, state)
            job.sampler.set_adapter(state.adapter)

        publish_and_set()
        prompts_N = job.prompts.train[: size.num_prompts]

        def step() -> dict[str, Any]:
            out: dict[str, Any] = {}
            start = time.perf_counter()
            with timed(out, "sample", size.device):
                completions_N_G = sample_groups(
                    job.sampler,
                    prompts_N,
                    step_params(settings, state.step + 1),
                    version=state.step,
                )
                job.sampler.release_memory()
            with timed(out, "score", size.device):
                groups_N = score_groups(prompts_N, completions_N_G, job.reward)
            groups_N = with_rewards(groups_N, size.rewards())
            with timed(out, "learn", size.device):
                metrics = learn(job, learner, groups_N, state.step)
            state.step += 1
            with timed(out, "publish", size.device):
                publish_and_set()
            out["step"] = time.perf_counter() - start
            return out | {"tokens": count_tokens(groups_N), "kl": metrics["mismatch/kl"]}

        def sample_both() -> dict[str, Any]:
            publish_and_set()
            return adapter_and_base(job, state.adapter, prompts_N)

        yield {"step": step, "sample_both": sample_both}, {"memory_built": peak_mb(size.device)}


def adapter_and_base(job: RunContext, adapter: Adapter | None, prompts_N: Any) -> dict[str, Any]:
    """Seconds for the same requests, with the adapter and without.

    The adapter's time includes loading a new version; the base's has no such cost.
    """
    seconds: dict[str, float] = {}
    params = step_params(job.config, adapter.version + 1 if adapter else 1)
    for name in ("lora", "base"):
        job.sampler.set_adapter(adapter if name == "lora" else None)
        if name == "base":
            job.sampler.token_logprobs([prompts_N[0].token_ids])
        start = time.perf_counter()
        job.sampler.sample(prompts_N, params)
        seconds[name] = time.perf_counter() - start
    job.sampler.set_adapter(adapter)
    return seconds


@contextlib.contextmanager
def learner(size: Size, mode: str = "lora") -> Built:
    """Only the learning phase, on made-up completions of the workload's lengths."""
    settings = config(size, mode=mode)
    prompts_N, _, model_dir = bench_prompts(size)
    policy = open_policy(model_dir, settings.model, settings.lora, seed=0)
    learns = make_learner(policy, settings.optim, num_steps=1000)
    groups_N = made_up_groups(prompts_N, size)
    device = measured_device(policy.device)

    def peak_gflops() -> float:
        return matmul_peak() if size.device == "cpu" else device.matmul_flops / 1e9

    def learn() -> dict[str, Any]:
        peak_before = peak_gflops()
        peak_reset(size.device)
        batches = packed(groups_N, learns.microbatch_tokens)
        start = time.perf_counter()
        metrics = learns.update(batches)
        seconds = time.perf_counter() - start
        return {
            "learn": seconds,
            "peak_gflops": max(peak_before, peak_gflops()),
            "bound_s": sum(bound_s(policy, batch, device) for batch in batches[0]),
            "needed_gflop": needed_gflop(policy, groups_N),
            "computed_tokens": metrics["learn/tokens"],
            "memory": peak_mb(size.device),
        }

    def count() -> dict[str, Any]:
        """FLOPs of the matrix products by torch's counter, which sees only its own thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        counter = FlopCounterMode(display=False)
        batches = [
            packed(groups_N, learns.microbatch_tokens)[0][:1]
        ]  # one microbatch stands for all
        with torch.compiler.set_stance("force_eager"), counter:
            learns.update(batches)
        torch.set_num_threads(threads)
        by_name = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        products = sum(n for name, n in by_name.items() if "mm" in name)
        vocab, width = policy.model.get_output_embeddings().weight.shape
        scored = sum(len(b.target_ids_C) for b in batches[0])
        # Full fine-tuning computes the logits a second time, which is not counted.
        remade = 2 * scored * vocab * width if policy.lora.mode == "full" else 0
        per_token = (products - remade) / batches[0][0].num_tokens
        share = scored / batches[0][0].num_tokens
        return {
            "products": products - remade,
            "products_per_token": per_token,
            "formula_per_token": formula_per_token(policy, share),
        }

    yield {"learn": learn, "count": count}, {}


@contextlib.contextmanager
def full(size: Size) -> Built:
    """Full fine-tuning's learning phase."""
    with learner(size, "full") as built:
        yield built


ARMS = {"ours": whole_step, "learner": learner, "full": full}


def packed(groups_N: list[RolloutGroup], microbatch_tokens: int) -> list[list[Microbatch]]:
    """The groups' microbatches, by optimizer step."""
    return pack(
        groups_N,
        [[reward - 0.5 for reward in group.rewards_G] for group in groups_N],
        microbatch_tokens=microbatch_tokens,
        share_prompts=True,
    )


def needed_gflop(policy: Policy, groups_N: list[RolloutGroup]) -> float:
    """GFLOP that a frozen base needs: 4 FLOPs per weight and token (the product and the input's
    gradient), each prompt once, lm_head at completion positions. Attention, norms, the low-rank
    terms and whatever is computed twice are not counted."""
    head = policy.model.get_output_embeddings().weight.numel()
    inner = sum(
        p.numel()
        for name, p in policy.model.named_parameters()
        if p.dim() == 2 and ".layers." in name and "lora_" not in name
    )
    completions = sum(len(r.completion.token_ids) for g in groups_N for r in g.rollouts_G)
    prompts = sum(len(g.prompt.token_ids) for g in groups_N)
    return 4e-9 * (inner * (prompts + completions) + head * completions)


def formula_per_token(policy: Policy, scored_share: float) -> float:
    """FLOPs per token by the article's count, 2 (2 N^2 + 6 N R) or 2 (3 N^2) a layer, where lm_head
    sees only a share of the tokens. It counts an input gradient for every layer; the first needs
    none."""
    counts = matmul_counts(build_on_meta(policy.model.config), policy.lora)
    head = policy.model.get_output_embeddings().weight.numel()
    passes = 3 if policy.lora.mode == "full" else 2
    total = counts.full if policy.lora.mode == "full" else counts.lora
    return 2 * (total - passes * head * (1 - scored_share))


def made_up_groups(prompts_N: Any, size: Size) -> list[RolloutGroup]:
    """Random completions of the workload's lengths, every second one correct."""
    rng = random.Random(1)
    numbers = zip(size.lengths(), size.rewards(), strict=True)
    groups_N = []
    for prompt in prompts_N:
        rollouts_G = []
        for length, reward in itertools.islice(numbers, size.num_samples):
            ids = tuple(rng.randrange(100, 40000) for _ in range(length))
            completion = Completion(ids, "", (-8.0,) * length, False, 0)
            score = Score(reward, reward > 0, "ok", None, True)
            rollouts_G.append(Rollout(completion, score))
        groups_N.append(RolloutGroup(prompt, tuple(rollouts_G)))
    return groups_N


def with_rewards(groups_N: list[RolloutGroup], rewards: list[float]) -> list[RolloutGroup]:
    """The groups with the workload's rewards instead of the verifier's."""
    left = iter(rewards)
    return [
        RolloutGroup(
            group.prompt,
            tuple(
                Rollout(r.completion, dataclasses.replace(r.score, reward=next(left)))
                for r in group.rollouts_G
            ),
        )
        for group in groups_N
    ]


def fix_lengths(sampler: Any, size: Size) -> None:
    """Each request samples exactly the workload's number of tokens, by its cap and no end token."""
    if isinstance(sampler, RestartingSampler):
        sampler = sampler._sampler
    original = sampler._sampling_params
    lengths = itertools.cycle(size.lengths())

    def fixed(params: Any, stops: Any, seed: int) -> Any:
        made = original(dataclasses.replace(params, max_tokens=next(lengths)), stops, seed)
        made.stop_token_ids, made.ignore_eos = [], True
        return made

    sampler._sampling_params = fixed


@contextlib.contextmanager
def timed(out: dict[str, Any], phase: str, device: str) -> Iterator[None]:
    """Seconds and peak memory of a phase."""
    peak_reset(device)
    start = time.perf_counter()
    yield
    out[phase] = time.perf_counter() - start
    out[f"memory_{phase}"] = peak_mb(device)


def count_tokens(groups_N: list[RolloutGroup]) -> int:
    """Completion tokens."""
    return sum(len(r.completion.token_ids) for g in groups_N for r in g.rollouts_G)


def bench_prompts(size: Size) -> tuple[list[Prompt], Any, Path]:
    """(prompts, tokenizer, model directory) of the workload."""
    from rl_lora.models.resolve import load_tokenizer, resolve_model

    settings = config(size)
    model_dir = resolve_model(settings.model)
    tokenizer = load_tokenizer(model_dir)
    prompts = load_prompt_sets(
        settings.data, tokenizer, 2048, size.max_tokens, settings.run.seed
    ).train[: size.num_prompts]
    return list(prompts), tokenizer, model_dir
