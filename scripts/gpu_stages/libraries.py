"""vLLM's compiled libraries load, and one kernel of each computes what PyTorch does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_stages.stages import CheckFailedError, Context
from rl_lora.samplers.vllm.process import import_vllm, process_kept

HEAD_DIM, BLOCK = 64, 16  # of the attention call: a head's width, tokens of a KV cache block
LENGTHS = (33, 100)  # tokens of its two sequences
NUM_HEADS, NUM_KEY_HEADS = 9, 3


def libraries(context: Context) -> dict[str, Any]:
    """RMSNorm by vLLM's `_C`; on a GPU causal attention over a paged cache by FlashAttention 3."""
    import_vllm(context.device)
    errors = {}
    with process_kept():
        import vllm._custom_ops  # noqa: F401  # loads the kernels
    dtype = torch.bfloat16 if context.is_gpu else torch.float32
    errors["rms_norm_error"] = relative_error(*rms_norms(context.device, dtype))
    call = flash_attention if context.is_gpu else torch_attention
    q, k, v = heads(context.device, dtype)
    errors["attention_error"] = relative_error(call(q, k, v), plain_attention(q, k, v))
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    if not all(error < limit for error in errors.values()):
        raise CheckFailedError(f"a kernel is off by over {limit:g}: {errors}", errors)
    return errors | {"attention": call.__name__}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| (L2)."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def rms_norms(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(by vLLM's kernel, by PyTorch) of 7 rows of 576."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 576, generator=generator).to(device, dtype)
    weight = (1 + torch.randn(576, generator=generator) / 4).to(device, dtype)
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, 1e-5)
    mean_square = x.double().square().mean(-1, keepdim=True)
    return out, x.double() * (mean_square + 1e-5).rsqrt() * weight.double()


def heads(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, width], k and v [T, J, width] of the two sequences, one after the other."""
    generator = torch.Generator().manual_seed(1)
    make = lambda n: torch.randn(sum(LENGTHS), n, HEAD_DIM, generator=generator)  # noqa: E731
    q, k, v = make(NUM_HEADS), make(NUM_KEY_HEADS), make(NUM_KEY_HEADS)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in float64, by its formula."""
    out = []
    for q_THW, k_THW, v_THW in sequences(q, k, v):
        num = len(q_THW)
        scores_HTT = torch.einsum("thw,shw->hts", q_THW.double(), k_THW.double()) / HEAD_DIM**0.5
        hidden = torch.ones(num, num, dtype=torch.bool, device=q.device).triu(1)
        weights_HTT = scores_HTT.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hts,shw->thw", weights_HTT, v_THW.double()))
    return torch.cat(out)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's kernel: vLLM has none for CPUs that works without its KV cache."""
    attend = torch.nn.functional.scaled_dot_product_attention
    out = []
    for three in sequences(q, k, v):
        q_HTW, k_HTW, v_HTW = (t.transpose(0, 1) for t in three)
        out.append(attend(q_HTW, k_HTW, v_HTW, is_causal=True).transpose(0, 1))
    return torch.cat(out)


def sequences(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of each sequence, key heads repeated for their query heads."""
    group = NUM_HEADS // NUM_KEY_HEADS
    parts = (
        t.split(LENGTHS) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    return list(zip(*parts, strict=True))


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3 as vLLM calls it, with keys and values in blocks of a paged cache."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    key_cache, value_cache, table = (paged(k)[0], *paged(v))
    starts = torch.tensor([0, *LENGTHS], device=q.device).cumsum(0).int()
    return flash_attn_varlen_func(
        q=q,
        k=key_cache,
        v=value_cache,
        max_seqlen_q=max(LENGTHS),
        cu_seqlens_q=starts,
        max_seqlen_k=max(LENGTHS),
        seqused_k=torch.tensor(LENGTHS, device=q.device).int(),
        softmax_scale=HEAD_DIM**-0.5,
        causal=True,
        block_table=table,
        fa_version=3,
    )


def paged(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(cache [blocks, BLOCK, J, width], table [sequences, blocks of the longest], int32).

    Block 0 belongs to no sequence and holds values that must not be read.
    """
    most = -(-max(LENGTHS) // BLOCK)
    cache = tensor.new_full((1 + len(LENGTHS) * most, BLOCK, *tensor.shape[1:]), 100.0)
    table = torch.zeros(len(LENGTHS), most, dtype=torch.int32, device=tensor.device)
    for row, part in enumerate(tensor.split(LENGTHS)):
        for column, piece in enumerate(part.split(BLOCK)):
            block = 1 + row * most + column
            cache[block, : len(piece)] = piece
            table[row, column] = block
    return cache, table
