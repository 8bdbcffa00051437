"""The whole loop: the embedded model unpacked from its file, and GRPO steps with vLLM on it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_stages.run import ROOT
from gpu_stages.stages import Context
from rl_lora.config import ModelSection, load_config
from rl_lora.models.resolve import EMBEDDED, convert_embedded, is_at_hand, resolve_model
from rl_lora.train import train

METRICS = ("mismatch/kl", "mismatch/abs_mean", "reward/mean", "rollouts/staleness_mean")


def convert(context: Context) -> dict[str, Any]:
    """The embedded model's directory, from the file that --gguf gives; else fetched."""
    started = time.monotonic()
    was_at_hand = is_at_hand(EMBEDDED)
    if context.gguf and not was_at_hand:
        whole = context.work / "embedded.gguf"
        with whole.open("wb") as file:
            for part in context.gguf:
                file.write(part.read_bytes())
        folder = convert_embedded(whole)
    else:
        folder = resolve_model(ModelSection(name=EMBEDDED))
    size = (folder / "model.safetensors").stat().st_size
    return {
        "was_at_hand": was_at_hand,
        "convert_s": round(time.monotonic() - started, 1),
        "model_bytes": size,
    }


def grpo(context: Context) -> dict[str, Any]:
    """Two steps, sampling and learning in turn; on a GPU each has nearly all of the memory while it
    works, which it has only if the sampler releases it. Both eager, as compiling would take most of
    the stage's time."""
    fraction = 0.3 if context.is_shared else 0.9
    overrides = ["sampling.eager=true", "model.compile=false"]
    return _run(context, "grpo", [*overrides, f"sampling.memory_fraction={fraction}"])


def grpo_overlap(context: Context) -> dict[str, Any]:
    """The same, sampling the next step while learning from this one, with memory for both."""
    overrides = ["sampling.max_staleness=1", "sampling.memory_fraction=0.45"]
    return _run(context, "grpo-overlap", overrides)


def one_rank(context: Context) -> dict[str, Any]:
    """One launched process with all weights as FSDP2's shards: two steps of full fine-tuning in
    bfloat16, sampled by PyTorch."""
    runs = context.work / "runs"
    shutil.rmtree(runs / "one-rank", ignore_errors=True)  # of an earlier check
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += ["-m", "rl_lora", "train", "smoke", f"run.output_dir={runs}", "run.name=one-rank"]
    command += ["run.num_steps=2", "run.eval_every=0", "data.held_out=16", "lora.mode=full"]
    command += [f"model.device={context.device}", "model.dtype=bfloat16", "model.shard=true"]
    subprocess.run(command, cwd=ROOT, check=True)
    return {"steps": _steps(runs / "one-rank")}


def _run(context: Context, name: str, overrides: list[str]) -> dict[str, Any]:
    """Phases and KL of two steps in bfloat16; the loop stops if sampler and learner disagree.

    On a GPU with the embedded model, if `convert` made it; else with a tiny one made here.
    """
    is_real = context.is_gpu and is_at_hand(EMBEDDED)
    config = ROOT / "configs" / ("quickstart.toml" if is_real else "smoke.toml")
    num_prompts, num_samples = (32, 16) if is_real else (4, 4)
    settings = [
        f"run.name={name}",
        f"run.output_dir={context.work / 'runs'}",
        "run.num_steps=2",
        "run.eval_every=0",
        "run.loggers=[]",
        f"model.device={context.device}",
        "model.dtype=bfloat16",
        "data.held_out=16",
        "sampling.backend=vllm",
        f"sampling.num_prompts={num_prompts}",
        f"sampling.num_samples={num_samples}",
        "warm_start.num_steps=0",
        f"optim.microbatch_tokens={16384 if context.is_gpu else 1024}",
        *overrides,
    ]
    shutil.rmtree(context.work / "runs" / name, ignore_errors=True)  # of an earlier check
    outcome = train(load_config(config, settings), quiet=True)
    return {"model": EMBEDDED if is_real else "tiny", "steps": _steps(outcome.folder)}


def _steps(run_folder: Path) -> dict[str, dict[str, float]]:
    """Times, memory and METRICS of each step."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        str(row["step"]): {
            key: value
            for key, value in row.items()
            if key.startswith(("time/", "memory/")) or key in METRICS
        }
        for row in map(json.loads, lines)
    }
