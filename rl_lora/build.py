"""Builds a run from its config; cheap checks come first, so that bad input fails at once."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards import Reward
from rl_lora import distributed
from rl_lora.config import ModelSection, OptimSection, RunConfig, SamplingSection
from rl_lora.config.algorithm import Algorithm, load_algorithm, user_code
from rl_lora.environments.load import episodes_by
from rl_lora.errors import UserError
from rl_lora.launchers.environment import num_restarts
from rl_lora.launchers.interruption import Interrupted
from rl_lora.samplers.make import has_own_weights, load_sampler_class, sampler_maker
from rl_lora.scoring import check_sources, functions_of, make_reward
from rl_lora.seeds import mix_seed
from rl_lora.storage.directories import disk_errors
from rl_lora.types import SampleParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rl_lora.config.sft import SftConfig
    from rl_lora.evaluation.evaluate import Evaluation
    from rl_lora.learner import Learner
    from rl_lora.policy import Policy
    from rl_lora.prompts import PromptSets
    from rl_lora.report.terminal import Display
    from rl_lora.runs.start import Start
    from rl_lora.sampler import Sampler


@dataclass(frozen=True)
class RunContext:
    """What training and evaluation share.

    Example: RunContext(config=RunConfig(...), tokenizer=..., prompts=PromptSets(...), reward=...,
    policy=..., algorithm=Algorithm(...), sampler=...)
    """

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSets
    reward: Reward
    policy: Policy
    algorithm: Algorithm
    sampler: Sampler
    handover: Path | None = None  # in memory, for the versions that only the sampler needs


@contextlib.contextmanager
def open_run(
    config: RunConfig,
    *,
    num_steps: int | None = None,
    on_loaded: Callable[[Policy, PromptSets], None] = lambda policy, prompts: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_warning: Callable[[str], None] = warnings.warn,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Iterator[RunContext]:
    """Builds everything, and closes it at the end in any case.

    Args:
        config: the job.
        num_steps: RL steps that will be sampled for; None: run.num_steps.
        on_loaded: called with policy and prompts before the sampler is built; it may raise.
        on_note: called with one line on each thing that was loaded.
        on_warning: called with one line where the sampler's engine failed and is replaced.
        on_progress: called by the sampler with (completions done, in all, tokens sampled).

    Raises:
        UserError: anything wrong in the config, the model directory or the data.
    """
    algorithm = load_algorithm(config.algorithm)
    reward = make_reward(config)
    with contextlib.ExitStack() as stack:
        stack.callback(reward.close)
        from rl_lora.policy import open_policy
        from rl_lora.samplers.end_tokens import end_token_ids
        from rl_lora.samplers.vllm.checks import check_vllm, with_compilation

        load_sampler_class(config.sampling.backend)
        model_dir, tokenizer, context = open_model(config.model, on_note)
        as_episodes = episodes_by(config, tokenizer, reward)
        if config.sampling.backend == "vllm" and not config.resources.servers:
            check_vllm(model_dir, config)
        prompts = _load_prompts(config, reward, model_dir, tokenizer, context)
        for note in (*user_code(config), *prompts.notes):
            on_note(note)
        policy = open_policy(
            model_dir,
            config.model,
            config.lora,
            seed=config.run.seed,
            checkpoint_activations=config.optim.checkpoint_activations,
            keep_reference=config.algorithm.needs_base,
        )
        on_loaded(policy, prompts)
        template = config.data.template, config.data.chat_template_kwargs
        num_steps = config.run.num_steps if num_steps is None else num_steps
        sampling = with_compilation(config, policy.device, num_steps, on_note)
        options: dict[str, Any] = {
            "end_token_ids": end_token_ids(model_dir, tokenizer, *template),
            "max_model_len": min(context, _longest(config, prompts)),
            "on_warning": on_warning,
            "on_progress": on_progress,
        }
        sampler = _sampler(config, policy, prompts, sampling, options, as_episodes)
        stack.callback(sampler.close)
        yield RunContext(config, tokenizer, prompts, reward, policy, algorithm, sampler)


def _sampler(
    config: RunConfig,
    policy: Policy,
    prompts: PromptSets,
    sampling: SamplingSection,
    options: dict[str, Any],
    as_episodes: Callable[[Sampler], Sampler] | None,
) -> Sampler:
    """The job's, in this process or where [resources] says; as_episodes: with its environment."""
    if config.resources.is_remote:
        from rl_lora.samplers.fleet.job import make_fleet

        sampler: Sampler = make_fleet(config, policy, prompts.eval, sampling=sampling, **options)
    else:
        learner_bytes = _bytes_to_come(config, policy)
        sampler = make_sampler(sampling, policy, learner_bytes=learner_bytes, **options)
    return sampler if as_episodes is None else as_episodes(sampler)


def _bytes_to_come(config: RunConfig, policy: Policy) -> int:
    """GPU memory that the learner will still take and hold while the sampler works."""
    from rl_lora.planning.memory import bytes_to_come

    if policy.device.type == "cpu":
        return 0
    num_base = sum(parameter.numel() for parameter in policy.model.parameters())
    num_trainable = sum(parameter.numel() for parameter in policy.trainable().values())
    num_ranks = distributed.world_size()
    return bytes_to_come(config, policy.model.config, num_base, num_trainable, num_ranks)


def _longest(config: RunConfig, prompts: PromptSets) -> int:
    """Tokens of the longest prompt with the longest completion."""
    longest = max(len(p.token_ids) for p in (*prompts.train, *prompts.eval))
    return longest + max(config.sampling.max_tokens, config.eval.max_tokens or 0)


def _load_prompts(
    config: RunConfig,
    reward: Reward,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
) -> PromptSets:
    """The job's prompts, checked against the model's vocabulary, and the reward tried on one."""
    from rl_lora.models.resolve import check_rows
    from rl_lora.prompts import load_prompt_sets
    from rl_lora.rollouts import MADE_UP, check_reward

    prompts = load_prompt_sets(
        config.data,
        tokenizer,
        context,
        config.sampling.max_tokens,
        config.run.seed,
        max_eval_tokens=config.eval.max_tokens,
        with_columns=any(function.is_batch for function in functions_of(reward)),
    )
    problems = (*prompts.train, *prompts.eval)
    check_rows((prompt.token_ids for prompt in problems), tokenizer, model_dir)
    check_sources(reward, *({one.source for one in part} for part in (prompts.train, prompts.eval)))
    check_reward(reward, problems, tokenizer.encode(MADE_UP, add_special_tokens=False))
    return prompts


def open_model(
    section: ModelSection, on_note: Callable[[str], None]
) -> tuple[Path, PreTrainedTokenizerBase, int]:
    """(directory, tokenizer, context length) of a model, which is fetched or made if need be.

    Raises:
        UserError: no such model, a directory without a model, or a model that cannot be trained.
    """
    from transformers import AutoConfig

    from rl_lora.models.architectures import check_architecture
    from rl_lora.models.resolve import context_length, is_at_hand, load_tokenizer, resolve_model
    from rl_lora.nn.quantized import check_quantizable

    if not is_at_hand(section.name):
        on_note(f"model {section.name}: fetched or made once, then kept; a minute or so")
    with distributed.local_main_first():  # the others find what it has fetched
        model_dir = resolve_model(section)
    config = AutoConfig.from_pretrained(model_dir)
    check_architecture(config, model_dir)
    if section.quantize is not None:
        check_quantizable(config)
    return model_dir, load_tokenizer(model_dir), context_length(config)


def make_learner(
    policy: Policy,
    optim: OptimSection,
    *,
    num_steps: int,
    temperature: float = 1.0,
    on_note: Callable[[str], None] = lambda text: None,
) -> Learner:
    """The learner of [optim].

    Args:
        policy: what learns.
        optim: its settings.
        num_steps: optimizer steps of the whole run, for the schedule.
        temperature: of sampling.
        on_note: called with one line on what was chosen for the machine.
    """
    from rl_lora.learner import Learner
    from rl_lora.planning.microbatch import default_microbatch_tokens
    from rl_lora.schedule import Schedule

    microbatch_tokens = optim.microbatch_tokens
    if microbatch_tokens is None:
        own = default_microbatch_tokens(policy, optim)
        microbatch_tokens = min(distributed.gather(own, "the size of microbatches"))
        on_note(f"microbatches of up to {microbatch_tokens:,} tokens (optim.microbatch_tokens)")
    if policy.is_compiled:
        on_note("the first step compiles the layers, for a minute or two (model.compile)")
    return Learner(
        policy,
        optim.lr,
        schedule=Schedule(optim.schedule, optim.warmup_steps, num_steps, optim.target_kl or 0.0),
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        grad_clip=optim.grad_clip,
        lora_plus_ratio=optim.lora_plus_ratio,
        temperature=temperature,
        microbatch_tokens=microbatch_tokens,
    )


# limits: what samplers are made with, as keywords
def make_sampler(
    section: SamplingSection,
    policy: Policy,
    *,
    end_token_ids: tuple[int, ...],
    max_model_len: int,
    on_warning: Callable[[str], None] = warnings.warn,
    on_progress: Callable[[int, int, int], None] | None = None,
    learner_bytes: int = 0,
) -> Sampler:
    """The sampler of `sampling.backend`.

    A user's own class is called with the policy and the keywords of `TorchSampler`; one that has
    a keyword `engine` also gets vLLM's options. One whose class says has_own_weights = True has an
    engine, and is replaced by a new one where it raises EngineError (`RestartingSampler`).

    Args:
        section: its settings.
        policy: whose versions it samples from.
        end_token_ids: tokens that end a completion.
        max_model_len: of prompt and completion.
        on_warning: called with one line for each new engine.
        on_progress: called with (completions done, in all, tokens sampled).
        learner_bytes: `EngineOptions.learner_bytes`.

    Raises:
        UserError: it cannot be used.
    """
    from rl_lora.samplers.restarts import RestartingSampler

    has_engine = has_own_weights(section.backend)
    if section.max_staleness and not has_engine:
        raise UserError(
            f"sampling.max_staleness={section.max_staleness}: {section.backend} must have its own "
            "copy of the weights, as the learner changes the policy's meanwhile; declare "
            "has_own_weights = True in the class, or set sampling.max_staleness=0"
        )
    make = sampler_maker(
        section,
        policy,
        end_token_ids=end_token_ids,
        max_model_len=max_model_len,
        on_progress=on_progress,
        learner_bytes=learner_bytes,
    )
    if not has_engine:
        return make()
    return RestartingSampler(
        make,
        max_restarts=section.max_restarts,
        timeout_s=section.timeout_s,
        on_restart=on_warning,
    )


def make_evaluation(job: RunContext, on_progress: Callable[[int, int, int], None]) -> Evaluation:
    """The held-out evaluation of a job's policies.

    on_progress: called with (problems done, in all, being sampled now).
    """
    from rl_lora.evaluation.contamination import contamination_notes
    from rl_lora.evaluation.evaluate import Evaluation

    config, prompts_N = job.config, job.prompts.eval
    reward, tags = config.reward, [list(pair) for pair in config.reward.thinking_tags]
    identity = {
        "base_model": config.model.name,
        "backend": config.sampling.backend,
        "dtype": str(job.policy.dtype).removeprefix("torch."),
        "reward": reward.name,
        "reward_policy": reward.policy,
        "format_weight": reward.format_weight,
    }
    more = {"thinking_tags": tags, "reward_terms": [one.model_dump() for one in reward.terms]}
    more["environment"] = config.environment.name and config.environment.model_dump()
    more["quantize"] = config.model.quantize
    return Evaluation(
        prompts_N=prompts_N,
        reward=job.reward,
        params=SampleParams(
            num_samples=config.eval.num_samples,
            max_tokens=config.eval.max_tokens or config.sampling.max_tokens,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            stop=config.sampling.stop,
            seed=mix_seed(config.run.seed, "exam"),  # another label, other samples
        ),
        chunk_samples=config.eval.chunk_samples,
        identity=identity | {key: value for key, value in more.items() if value},
        notes=contamination_notes(config.model, (prompt.source for prompt in prompts_N)),
        on_progress=on_progress,
    )


@contextlib.contextmanager
def open_folder(
    config: RunConfig | SftConfig, *, resume: bool, quiet: bool
) -> Iterator[tuple[Display, Start]]:
    """Holds the run's folder for this job; yields the display, and where the run starts.

    Of several processes rank 0 holds the folder.

    Raises:
        UserError: an older run in the folder, another process using it, a full disk, or processes
            whose configs differ.
    """
    from rl_lora.report.terminal import Display
    from rl_lora.runs.checkpoint import progress
    from rl_lora.runs.lock import run_lock
    from rl_lora.runs.processes import check_processes, check_shared_folder
    from rl_lora.runs.start import find_start

    folder = config.run.folder
    check_processes(config)
    # Nodes count their restarts separately.
    resume = resume or any(distributed.gather(num_restarts() > 0, "the start"))
    with contextlib.ExitStack() as stack:
        taken_over = None
        if distributed.is_main():
            stack.enter_context(disk_errors(folder))
            taken_over = stack.enter_context(run_lock(folder))
            check_run_folder(folder)
        display = stack.enter_context(Display(quiet=quiet))
        if taken_over is not None:
            display.note(taken_over)
        start = distributed.from_main(lambda: find_start(config, resume=resume), "the start")
        check_shared_folder(folder)
        if changed := start.changed_versions():
            display.warn(f"the result may differ in its last digits: {'; '.join(changed)}")
        try:
            yield display, start
        except Interrupted as error:
            error.progress = progress(folder)
            raise


def check_run_folder(folder: Path) -> None:
    """Raises UserError if its disk is about full; that it can be written to, its lock has shown."""
    free = shutil.disk_usage(folder).free
    if free < 50 * 2**20:
        raise UserError(f"run folder {folder} has {free / 2**20:.0f} MiB of disk left; free some")
