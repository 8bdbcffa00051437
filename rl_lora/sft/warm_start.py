"""The warm start before RL: supervised fine-tuning by log loss on worked solutions.

RL cannot learn if the base earns no reward at all; a few supervised steps on generated solutions
teach the form of an answer, and RL continues from there. It is a separate stage with separate
metrics (warm_start.jsonl).
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from rl_lora import distributed
from rl_lora.batches import pack_samples
from rl_lora.config import RunConfig
from rl_lora.data.chat_template import end_of_turn
from rl_lora.learner import Learner
from rl_lora.sft.data import Tokens
from rl_lora.types import Prompt, TrainSample


def solution_sample(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, end_id: int) -> TrainSample:
    """The prompt with its worked solution as completion, plus the token that ends a turn."""
    ids = tokenizer.encode(prompt.solution, add_special_tokens=False)
    return Tokens(array("i", prompt.token_ids), array("i", [*ids, end_id])).sample()


def has_solutions(prompts: Sequence[Prompt]) -> bool:
    """Whether any prompt has a worked solution to learn from."""
    return any(prompt.solution for prompt in prompts)


def warm_start(
    learner: Learner,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Takes `warm_start.num_steps` supervised steps, then resets the learner's optimizer.

    The rate is constant: `optim.schedule` only applies to the RL steps that follow. on_step is
    called with (step, metrics) after each step. Some prompt must have a worked solution.
    """
    section = config.warm_start
    solved = [prompt for prompt in prompts if prompt.solution]
    rng = random.Random(f"warm_start/{section.seed}")
    order: list[Prompt] = []
    end_id = end_of_turn(tokenizer, config.data.template, config.data.chat_template_kwargs)
    for step in range(1, section.num_steps + 1):
        while len(order) < section.batch_size:
            order += rng.sample(solved, len(solved))
        batch, order = order[: section.batch_size], order[section.batch_size :]
        samples = [solution_sample(p, tokenizer, end_id) for p in batch]
        (microbatches,) = pack_samples(
            samples,
            microbatch_tokens=learner.microbatch_tokens,
            num_ranks=distributed.world_size(),
        )
        on_step(step, learner.fit(microbatches, lr=section.lr))
    learner.restart()
