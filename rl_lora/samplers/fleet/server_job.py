"""A job's servers: the line that starts one, and the replicas on those that run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from rl_lora.config import ResourcesSection, RunConfig, SamplingSection
from rl_lora.errors import UserError
from rl_lora.models.dequantized import dequantized_dir
from rl_lora.models.device import pick_device, pick_dtype
from rl_lora.models.resolve import context_length
from rl_lora.models.shapes import has_own_head
from rl_lora.samplers.fleet.servers import HttpReplica, ServedJob
from rl_lora.samplers.fleet.shared_versions import SharedVersions
from rl_lora.samplers.vllm.settings import (
    CPU_BATCHED_TOKENS,
    CPU_BLOCK_SIZE,
    ServedPolicy,
    decoded_at_once,
    lora_settings,
    text_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


def server_command(config: RunConfig, model_dir: Path, port: int) -> str:
    """The shell line of a server for a job, on a machine of the learner's kind.

    Args:
        config: the job's.
        model_dir: of its base model, there as well.
        port: of the server.

    Raises:
        UserError: vLLM's LoRA layers do not compute in the job's dtype.
    """
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    _check_dtype(dtype, device)
    model_dir = dequantized_dir(model_dir, config.model.quantize, dtype)
    model_config = AutoConfig.from_pretrained(model_dir)
    longest = config.data.max_prompt_tokens
    longest += max(config.sampling.max_tokens, config.eval.max_tokens or 0)
    longest = min(longest, context_length(model_config))
    num_seqs = decoded_at_once(config.sampling.max_num_seqs, device.type)
    words = ["vllm", "serve", str(model_dir), "--port", str(port)]
    words += ["--dtype", str(dtype).removeprefix("torch."), "--max-model-len", str(longest)]
    words += ["--max-num-seqs", str(num_seqs), "--enable-lora"]
    words += ["--max-lora-rank", str(lora_settings(config.lora, dtype)["max_lora_rank"])]
    # The versions that samples are under way from, the newest, and the one that replaces it.
    words += ["--max-loras", str(config.sampling.max_staleness + 2)]
    words += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out"]
    if has_own_head(model_dir, model_config):
        words += ["--hf-overrides", json.dumps({"tie_word_embeddings": False})]
    if device.type == "cpu":  # as `engine_settings`, which says why
        num_batched = max(CPU_BATCHED_TOKENS, num_seqs, longest)
        words += ["--enforce-eager", "--block-size", str(CPU_BLOCK_SIZE)]
        words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(num_batched)]
    return f"{RUNTIME_LORA} {shlex.join(words)}"


# limits: what samplers are made with
def server_replicas(
    resources: ResourcesSection,
    sampling: SamplingSection,
    policy: ServedPolicy,
    *,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: tuple[int, ...],
    max_model_len: int,
    folder: Path,
) -> list[HttpReplica]:
    """One replica for each of `resources.servers`; none is asked for anything yet.

    Args:
        resources: names them.
        sampling: the job's.
        policy: whose versions they serve.
        tokenizer: of its model.
        end_token_ids: tokens that end a completion.
        max_model_len: of prompt and completion.
        folder: for the adapters' files, unless `resources.servers_folder` names another.

    Raises:
        UserError: vLLM's LoRA layers do not compute in the policy's dtype.
    """
    _check_dtype(policy.dtype, policy.device)
    root = Path(resources.servers_folder) if resources.servers_folder else folder
    job = ServedJob(
        tokenizer=tokenizer,
        end_token_ids=end_token_ids,
        max_model_len=max_model_len,
        vocab_size=text_config(policy.model_dir).vocab_size,
        max_samples=decoded_at_once(sampling.max_num_seqs, policy.device.type),
        max_lora_rank=lora_settings(policy.lora, policy.dtype)["max_lora_rank"],
        wait_s=sampling.timeout_s,
        versions=SharedVersions(root),
    )
    return [HttpReplica(url, job) for url in resources.servers]


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.float32 and device.type != "cpu":
        raise UserError(
            f"resources.servers with model.dtype=float32 on {device.type}: vLLM's LoRA kernels for "
            "GPUs compute in 16 bits only; set model.dtype='bfloat16'"
        )
