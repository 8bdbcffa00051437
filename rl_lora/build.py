"""Puts a job together from its config: cheap checks first, so bad input costs no long work."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rewards import FunctionReward, Reward, load_reward
from rl_lora.advantages import AdvantageFn
from rl_lora.config import (
    DataSection,
    LoraSection,
    ModelSection,
    OptimSection,
    RunConfig,
    SamplingSection,
)
from rl_lora.config.algorithm import load_algorithm
from rl_lora.errors import UserError
from rl_lora.losses import LossFn
from rl_lora.seeds import mix_seed
from rl_lora.types import SampleParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rl_lora.evaluation.evaluate import Evaluation
    from rl_lora.learner import Learner
    from rl_lora.policy import Policy
    from rl_lora.prompts import PromptSets
    from rl_lora.sampler import Sampler


@dataclass(frozen=True)
class RunContext:
    """What training and evaluation share.

    Example: RunContext(config=RunConfig(...), model_dir=Path(...), tokenizer=...,
    prompts=PromptSets(...), end_ids=(2,), reward=..., policy=..., sampler=...)
    """

    config: RunConfig
    model_dir: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSets
    end_ids: tuple[int, ...]
    reward: Reward
    policy: Policy
    sampler: Sampler

    @cached_property
    def algorithm(self) -> tuple[LossFn, AdvantageFn]:
        """The loss and the advantage of [algorithm]; UserError as `load_algorithm`."""
        return load_algorithm(self.config.algorithm)


@contextlib.contextmanager
def open_run(
    config: RunConfig,
    *,
    num_steps: int | None = None,
    on_loaded: Callable[[Policy, PromptSets], None] = lambda policy, prompts: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Iterator[RunContext]:
    """Builds everything and closes it at the end, whatever happens.

    Args:
        config: the job.
        num_steps: RL steps that it samples for; None: run.num_steps.
        on_loaded: looks at the policy and the problems before the sampler, which takes long, is
            built; what it raises ends the job.
        on_note: takes one line on what was loaded.
        on_progress: takes (completions done, in all, tokens sampled) within a call of the sampler.

    Raises:
        UserError: anything wrong in the config, the model directory or the data.
    """
    reward = make_reward(config)
    with contextlib.ExitStack() as stack:
        stack.callback(reward.close)
        from rl_lora.models.resolve import check_rows
        from rl_lora.prompts import load_prompts
        from rl_lora.rollouts import MADE_UP, check_reward

        model_dir, tokenizer, context = open_model(config.model, on_note, config.lora)
        if config.sampling.backend == "vllm":
            check_vllm(model_dir, config)
        prompts = load_prompts(
            config.data,
            tokenizer,
            context,
            config.sampling.max_tokens,
            config.run.seed,
            max_eval_tokens=config.eval.max_tokens,
            with_columns=isinstance(reward, FunctionReward) and reward.is_batch,
        )
        for note in prompts.notes:
            on_note(note)
        problems = (*prompts.train, *prompts.eval)
        check_rows((prompt.token_ids for prompt in problems), tokenizer, model_dir)
        made_up = tokenizer.encode(MADE_UP, add_special_tokens=False)
        check_reward(reward, problems[0], made_up)
        from rl_lora.policy import open_policy

        policy = open_policy(
            model_dir,
            config.model,
            config.lora,
            seed=config.run.seed,
            checkpoint_activations=config.optim.checkpoint_activations,
            keep_reference=config.algorithm.kl != "none",
        )
        on_loaded(policy, prompts)
        end_ids = end_token_ids(model_dir, tokenizer, config.data)
        longest = max(len(p.token_ids) for p in (*prompts.train, *prompts.eval))
        cap = max(config.sampling.max_tokens, config.eval.max_tokens or 0)
        num_steps = config.run.num_steps if num_steps is None else num_steps
        sampler = make_sampler(
            _with_compilation(config.sampling, policy.device, num_steps, on_note),
            policy,
            tokenizer,
            end_ids,
            context_length=min(context, longest + cap),
            on_progress=on_progress,
        )
        stack.callback(sampler.close)
        yield RunContext(config, model_dir, tokenizer, prompts, end_ids, reward, policy, sampler)


def check_vllm(model_dir: Path, config: RunConfig) -> None:
    """What vLLM would refuse, told before the data is read and the model is loaded.

    Raises:
        UserError: the device, the adapter, the model or a setting is none for vLLM, or vLLM is not
            installed.
    """
    import torch

    from rl_lora.models.device import pick_device
    from rl_lora.samplers.vllm.engine import check_device
    from rl_lora.samplers.vllm.process import import_vllm
    from rl_lora.samplers.vllm.settings import check_mixture, merges_adapter

    device = pick_device(config.model.device)
    if importlib.util.find_spec("vllm") is None:
        import_vllm(device)  # which says how to get it
    check_device(device, config.lora)
    check_mixture(model_dir, device)
    # dtype auto is float32 or bfloat16 by a timing, and asked again once it is known.
    dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
    merges_adapter(config.sampling, config.lora, dtype=dtype, device=device)


def _with_compilation(
    section: SamplingSection,
    device: torch.device,
    num_steps: int,
    on_note: Callable[[str], None],
) -> SamplingSection:
    """With sampling.eager=false where the job leaves it open and is long enough on a CPU."""
    from rl_lora.samplers.vllm.settings import is_worth_compiling

    is_open = section.backend == "vllm" and section.eager is None and device.type == "cpu"
    if not (is_open and is_worth_compiling(section, num_steps)):
        return section
    on_note(
        "a long job: vLLM compiles the model first, a minute or two; sampling.eager=true if not"
    )
    return section.model_copy(update={"eager": False})


def open_model(
    section: ModelSection, on_note: Callable[[str], None], lora: LoraSection | None = None
) -> tuple[Path, PreTrainedTokenizerBase, int]:
    """(directory, tokenizer, context length) of a model, fetched or made where it is not at hand.

    Raises:
        UserError: there is no such model, its directory is no model's, or it is one that cannot be
            trained as `lora` says.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    from rl_lora.models.architectures import check_architecture
    from rl_lora.models.resolve import context_length, is_at_hand, load_tokenizer, resolve_model

    logging.disable_progress_bar()  # of weights that load in a second; it garbles our own
    if not is_at_hand(section.name):
        on_note(f"model {section.name}: fetched or made once, then kept; a minute or so")
    model_dir = resolve_model(section)
    config = AutoConfig.from_pretrained(model_dir)
    if lora is not None:
        check_architecture(config, lora, model_dir)
    return model_dir, load_tokenizer(model_dir), context_length(config)


def make_learner(
    policy: Policy, optim: OptimSection, *, num_steps: int, temperature: float = 1.0
) -> Learner:
    """The learner of [optim]; num_steps: optimizer steps of the whole run, for the schedule.

    Raises:
        UserError: full fine-tuning in bfloat16.
    """
    from rl_lora.learner import Learner, Schedule

    return Learner(
        policy,
        optim.lr,
        schedule=Schedule(optim.schedule, optim.warmup_steps, num_steps),
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        grad_clip=optim.grad_clip,
        lora_plus_ratio=optim.lora_plus_ratio,
        temperature=temperature,
    )


def make_reward(config: RunConfig) -> Reward:
    """The reward of the config. Raises UserError where its name or policy is unknown."""
    section = config.reward
    try:
        return load_reward(
            section.name,
            format_weight=section.format_weight,
            num_workers=section.num_workers,
            timeout_s=section.timeout_s,
            rules=section.policy,
            thinking_tags=section.thinking_tags,
        )
    except ValueError as error:
        raise UserError(f"config: reward: {error}") from error


def make_sampler(
    section: SamplingSection,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: tuple[int, ...],
    *,
    context_length: int,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Sampler:
    """The sampler of `sampling.backend`. Raises UserError where vLLM is asked for and missing."""
    if section.backend == "torch":
        from rl_lora.samplers.torch_sampler import TorchSampler

        return TorchSampler(
            policy,
            tokenizer,
            end_ids,
            context_length=context_length,
            max_num_seqs=section.max_num_seqs,
            on_progress=on_progress,
        )
    from rl_lora.samplers.vllm.sampler import VllmSampler

    return VllmSampler(
        policy.model_dir,
        section,
        policy.lora,
        dtype=policy.dtype,
        device=policy.device,
        max_model_len=context_length,
        end_token_ids=end_ids,
        on_progress=on_progress,
    )


def make_evaluation(job: RunContext, on_progress: Callable[[int, int, int], None]) -> Evaluation:
    """The held-out evaluation of a job's policies.

    on_progress: takes (problems done, in all, being sampled now).
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
    return Evaluation(
        prompts_N=prompts_N,
        reward=job.reward,
        params=SampleParams(
            num_samples=config.eval.num_samples,
            max_tokens=config.eval.max_tokens or config.sampling.max_tokens,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            stop=config.sampling.stop,
            seed=mix_seed(config.run.seed, "evaluation"),
        ),
        chunk_samples=config.eval.chunk_samples,
        identity=identity | ({"thinking_tags": tags} if tags else {}),
        notes=contamination_notes(config.model, (prompt.source for prompt in prompts_N)),
        on_progress=on_progress,
    )


def end_token_ids(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase, data: DataSection
) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's, those of generation_config.json, and the
    one that ends a turn of the chat template, which base models name in neither (Qwen3-8B-Base)."""
    from transformers import GenerationConfig

    from rl_lora.data.chat_template import end_of_turn

    ids = {int(tokenizer.eos_token_id)}
    ids.add(end_of_turn(tokenizer, data.template, data.chat_template_kwargs))
    if (model_dir / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return tuple(sorted(ids))


def check_run_folder(folder: Path) -> None:
    """Raises UserError where the run folder cannot be written."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"run folder {folder} cannot be written ({error.strerror}); set run.output_dir to a "
            "folder that can"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < 50 * 2**20:
        raise UserError(f"run folder {folder} has {free / 2**20:.0f} MiB of disk left; free some")
