"""The same step by TRL's GRPOTrainer with PEFT, at its faster settings.

On a CPU: float32 (bfloat16 is emulated on this kind of CPU), TRL's default of 8 sequences per
backward pass, generation by transformers (TRL's way without vLLM); a logits processor fixes the
lengths by forcing the end token. On a GPU: bfloat16, 16 sequences, and vLLM in the same process
("colocate"), whose requests get the lengths as their token limits. No activation checkpointing,
beta 0.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any, TextIO

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback

from benchmarks.our_arms import bench_prompts
from benchmarks.probe import peak_mb, peak_reset
from benchmarks.workload import SETTINGS, Size, config
from rewards import load_reward

NUM_STEPS = 1000  # never reached: the parent stops it first
SEQUENCES = {"cpu": 8, "cuda": 16}  # of a backward pass


class FixedLengths(LogitsProcessor):
    """Row i ends exactly at its token number lengths[i]."""

    def __init__(self, lengths: list[int], end_id: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.end_id = end_id
        self.num_prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [rows, vocabulary]."""
        if self.num_prompt is None:
            self.num_prompt = input_ids.shape[1]
        ends = self.lengths == input_ids.shape[1] - self.num_prompt + 1
        scores[:, self.end_id] = float("-inf")
        scores[ends] = float("-inf")
        scores[ends, self.end_id] = 0.0
        return scores


class TakesTurns(TrainerCallback):
    """Waits for `step` before each step and answers with its seconds and memory."""

    def __init__(self, out: TextIO, device: str) -> None:
        self.out = out
        self.device = device
        self.numbers: dict[str, Any] = {}
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Blocks until the parent's turn."""
        line = sys.stdin.readline().strip()
        if line != "step":
            control.should_training_stop = True
            self.out.flush()
            raise SystemExit(0)
        self.numbers = {"memory_sample": 0.0}
        peak_reset(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports the step."""
        numbers = self.numbers
        numbers["memory_learn"] = peak_mb(self.device)
        numbers["step"] = time.perf_counter() - self.start
        numbers["learn"] = numbers["step"] - numbers["generated"]
        print(json.dumps(numbers), file=self.out, flush=True)


def trainer_options(size: Size, longest_prompt: int) -> dict[str, Any]:
    """GRPOConfig's keywords for a size, without the output directory.

    longest_prompt: tokens.
    """
    optim = config(size).optim
    options: dict[str, Any] = {
        "per_device_train_batch_size": SEQUENCES[size.device],
        "gradient_accumulation_steps": size.num_prompts
        * size.num_samples
        // SEQUENCES[size.device],
        "num_generations": size.num_samples,
        "max_completion_length": size.max_tokens,
        "learning_rate": optim.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "max_steps": NUM_STEPS,
        "temperature": 1.0,
        "beta": 0.0,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
    if size.device == "cpu":
        model = {"model_init_kwargs": {"dtype": "float32"}, "bf16": False, "use_cpu": True}
        return options | model
    return options | {
        "model_init_kwargs": {"dtype": "bfloat16"},
        "bf16": True,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": SETTINGS[size.device]["sampling.memory_fraction"],
        "vllm_max_model_length": longest_prompt + size.max_tokens,
    }


def run(size: Size, out: TextIO) -> None:
    """Trains until the parent says `end`."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    prompts, tokenizer, model_dir = bench_prompts(size)
    lengths = size.lengths()
    reward = load_reward("math", rules="gsm8k")
    texts = [tokenizer.decode(p.token_ids) for p in prompts]
    references = {text: p.reference for text, p in zip(texts, prompts, strict=True)}

    def fixed_rewards(prompts: list[str], completions: list[str], **kwargs: Any) -> Any:
        reward.score_batch(completions, [references[text] for text in prompts])
        return size.rewards()

    turns = TakesTurns(out, size.device)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(model_dir),
            reward_funcs=fixed_rewards,
            args=GRPOConfig(output_dir=folder, **trainer_options(size, longest)),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=size.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[turns],
        )
        time_generation(trainer, turns)
        if size.device == "cpu":
            fix_generated(trainer, lengths, tokenizer.eos_token_id)
        else:
            fix_requested(trainer.vllm_generation.llm, lengths)
        built = {"ready": True, "memory_built": peak_mb(size.device)}
        print(json.dumps(built), file=out, flush=True)
        trainer.train()


def time_generation(trainer: Any, turns: TakesTurns) -> None:
    """Times generation including scoring."""
    produce = trainer._generate_and_score_completions

    def timed_produce(inputs: Any) -> Any:
        start = time.perf_counter()
        made = produce(inputs)
        turns.numbers["memory_sample"] = peak_mb(turns.device)
        turns.numbers["generated"] = time.perf_counter() - start
        turns.numbers["tokens"] = int(made["completion_mask"].sum())
        peak_reset(turns.device)
        return made

    trainer._generate_and_score_completions = timed_produce


def fix_generated(trainer: Any, lengths: list[int], end_id: int) -> None:
    """Fixes the lengths of what transformers generates."""
    generate = trainer.model.generate

    def fixed_generate(*args: Any, **kwargs: Any) -> Any:
        forced = LogitsProcessorList([FixedLengths(lengths, end_id)])
        return generate(*args, logits_processor=forced, **kwargs)

    trainer.model.generate = fixed_generate


def fix_requested(llm: Any, lengths: list[int]) -> None:
    """Fixes the lengths of what a vllm.LLM samples: each request ends at its limit only."""
    generate = llm.generate

    def fixed_generate(prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        params = []
        for length in lengths:
            own = sampling_params.clone()
            own.max_tokens, own.ignore_eos = length, True
            params.append(own)
        return generate(prompts, sampling_params=params, **kwargs)

    llm.generate = fixed_generate
