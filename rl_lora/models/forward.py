"""A model's forward pass over a microbatch: the log-probs of its completion tokens.

They are computed from the hidden states that predict a completion token only, through lm_head in
chunks, so no [tokens x vocabulary] tensor is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_lora.batches import pack_samples, to_device
from rl_lora.nn import attention
from rl_lora.nn.sharded import run_inside
from rl_lora.nn.token_logprobs import score_hidden, take_positions
from rl_lora.types import Microbatch, TrainSample


def token_logprobs(
    model: PreTrainedModel, batch: Microbatch, temperature: float, is_compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """(policy_logprobs_C with gradient, entropy_C without), float32, nats, as
    `Policy.token_logprobs`; is_compiled: compile what follows the model's layers.

    Raises:
        ValueError: the batch shares prompts in a row, which this model cannot compute.
    """
    return run_inside(model, _token_logprobs, batch, temperature, is_compiled)


def _token_logprobs(
    model: PreTrainedModel, batch: Microbatch, temperature: float, is_compiled: bool
) -> tuple[Tensor, Tensor]:
    attending: dict[str, Any] = {}
    if batch.layout is not None:
        if model.config._attn_implementation != attention.NAME:
            raise ValueError("this model cannot share prompts: pack with share_prompts=False")
        # A mask of four axes is taken as it is, so that none is made; the layout replaces it.
        mask_1111 = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.token_ids_BT.device)
        attending = {"layout": batch.layout, "attention_mask": mask_1111}
    hidden_BTD = model.base_model(
        input_ids=batch.token_ids_BT, position_ids=batch.position_BT, use_cache=False, **attending
    ).last_hidden_state
    hidden_CD = take_positions(hidden_BTD, batch.row_C, batch.column_C)
    head = model.get_output_embeddings()
    return score_hidden(hidden_CD, head, batch.target_ids_C, temperature, is_compiled=is_compiled)


@torch.no_grad()
def can_share_prompts(model: PreTrainedModel) -> bool:
    """Sets the model to `attention`, if completions that share a prompt then score as they do in
    rows to themselves.

    They do not under a sliding window, with positions counted along the row, or in a model outside
    transformers' attention interface; such a model keeps SDPA, one completion a row.
    """
    if attention.has_windows(model.config.get_text_config()):
        return False
    samples = [
        TrainSample((5, 6, 7), completion, (0.0,) * len(completion), 1.0, 0)
        for completion in ((8, 9, 10, 11), (12, 13))
    ]
    scores = []
    for share_prompts, attention_name in ((False, "sdpa"), (True, attention.NAME)):
        ((batch,),) = pack_samples(samples, microbatch_tokens=64, share_prompts=share_prompts)
        model.set_attn_implementation(attention_name)
        batch = to_device(batch, model.device)
        logprobs_C = token_logprobs(model, batch, temperature=1.0)[0]
        scores.append(logprobs_C[batch.target_ids_C.argsort()])
    single_C, shared_C = scores
    tolerance = 1e-4 if model.config.dtype == torch.float32 else 0.1  # shards are float32
    if torch.allclose(single_C, shared_C, atol=tolerance):
        return True
    model.set_attn_implementation("sdpa")
    return False
