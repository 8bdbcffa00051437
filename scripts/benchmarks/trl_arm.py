"""The same step by TRL's GRPOTrainer with PEFT, at its faster settings.

float32 (bfloat16 is emulated on this kind of CPU), no activation checkpointing, beta 0, TRL's
default of 8 sequences per backward pass, generation by transformers (TRL's way without vLLM).
A logits processor fixes the lengths by forcing the end token.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any, TextIO

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.our_arms import bench_prompts
from benchmarks.probe import peak_mb, peak_reset
from benchmarks.workload import Size, config
from rewards import load_reward

NUM_STEPS = 1000  # never reached: the parent stops it first


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

    def __init__(self, out: TextIO) -> None:
        self.out = out
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
        peak_reset()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports the step."""
        numbers = self.numbers
        numbers["step"] = time.perf_counter() - self.start
        numbers["learn"] = numbers["step"] - numbers["generated"]
        numbers["memory_learn"] = peak_mb()
        print(json.dumps(numbers), file=self.out, flush=True)


def run(size: Size, out: TextIO) -> None:
    """Trains until the parent says `end`."""
    prompts, tokenizer, model_dir = bench_prompts(size)
    lengths = size.lengths()
    reward = load_reward("math", rules="gsm8k")
    texts = [tokenizer.decode(p.token_ids) for p in prompts]
    references = {text: p.reference for text, p in zip(texts, prompts, strict=True)}

    def fixed_rewards(prompts: list[str], completions: list[str], **kwargs: Any) -> Any:
        reward.score_batch(completions, [references[text] for text in prompts])
        return size.rewards()

    turns = TakesTurns(out)
    settings = config(size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(model_dir),
            reward_funcs=fixed_rewards,
            args=GRPOConfig(
                output_dir=folder,
                model_init_kwargs={"dtype": "float32"},
                per_device_train_batch_size=8,
                gradient_accumulation_steps=size.num_prompts * size.num_samples // 8,
                num_generations=size.num_samples,
                max_completion_length=size.max_tokens,
                learning_rate=settings.optim.lr,
                lr_scheduler_type="constant",
                adam_beta1=settings.optim.betas[0],
                adam_beta2=settings.optim.betas[1],
                max_steps=NUM_STEPS,
                temperature=1.0,
                beta=0.0,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                shuffle_dataset=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=size.rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[turns],
        )
        hook(trainer, turns, lengths, tokenizer.eos_token_id)
        print(json.dumps({"ready": True, "memory_built": peak_mb()}), file=out, flush=True)
        trainer.train()


def hook(trainer: Any, turns: TakesTurns, lengths: list[int], end_id: int) -> None:
    """Times generation including scoring, and fixes the lengths."""
    produce, generate = trainer._generate_and_score_completions, trainer.model.generate

    def timed_produce(inputs: Any) -> Any:
        start = time.perf_counter()
        made = produce(inputs)
        turns.numbers["generated"] = time.perf_counter() - start
        turns.numbers["tokens"] = int(made["completion_mask"].sum())
        turns.numbers["memory_sample"] = peak_mb()
        peak_reset()
        return made

    def fixed_generate(*args: Any, **kwargs: Any) -> Any:
        forced = LogitsProcessorList([FixedLengths(lengths, end_id)])
        return generate(*args, logits_processor=forced, **kwargs)

    trainer._generate_and_score_completions = timed_produce
    trainer.model.generate = fixed_generate
