"""lm_head's element-wise part compiled, on the CPU's compiler: values, and bytes per logit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, config, metrics

from rl_lora.nn import token_logprobs as logprobs

VOCAB, WIDTH = 1000, 16


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that remembers nothing and counts the bytes that its kernels read and write."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logprobs._compiled.cache_clear()
    metrics.reset()
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "isEnabledFor", lambda level: True)
    with config.patch(fx_graph_cache=False):
        yield


def head_and_inputs(
    num_tokens: int, dtype: torch.dtype, *, has_bias: bool = False
) -> tuple[nn.Linear, Tensor, Tensor]:
    """Weights of a usual size; logits with a standard deviation of about 4."""
    generator = torch.Generator().manual_seed(num_tokens)
    head = nn.Linear(WIDTH, VOCAB, bias=has_bias).requires_grad_(has_bias)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, WIDTH, generator=generator))
    hidden_CD = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    target_ids_C = torch.randint(VOCAB, (num_tokens,), generator=generator)
    return head.to(dtype), hidden_CD, target_ids_C


def scored(
    hidden_CD: Tensor, head: nn.Linear, target_ids_C: Tensor, *, is_compiled: bool
) -> list[Tensor]:
    """Log-probs, entropies and the gradient of hidden states, for weights 1, 2, ... of tokens."""
    weights_C = torch.arange(1, len(target_ids_C) + 1).to(torch.float32)
    logprobs_C, entropy_C = logprobs.score_hidden(
        hidden_CD, head, target_ids_C, 0.7, is_compiled=is_compiled
    )
    (gradient_CD,) = torch.autograd.grad((weights_C * logprobs_C).sum(), hidden_CD)
    return [logprobs_C.detach(), entropy_C, gradient_CD]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16]
)
def test_a_compiled_head_agrees_with_the_definition_and_the_eager_one(
    dtype: torch.dtype, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks, the last of another size, in two chunks; then other lengths, without another
    compilation. The definition is computed in float64 from the same rounded inputs.

    In bfloat16 the logits carry 8 bits, an error of 4 x 2^-9 nats or so, whichever way they are
    added up.
    """
    monkeypatch.setattr(logprobs, "CPU_BLOCK", 400)
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 24)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for num_tokens in (40, 31, 77):
        head, hidden_CD, target_ids_C = head_and_inputs(num_tokens, dtype)
        found = scored(hidden_CD, head, target_ids_C, is_compiled=True)
        eager = scored(hidden_CD, head, target_ids_C, is_compiled=False)
        exact_head = nn.Linear(WIDTH, VOCAB, bias=False).double().requires_grad_(False)
        exact_head.weight.copy_(head.weight)
        exact_CD = hidden_CD.detach().double().requires_grad_()
        logits_CV = (exact_head(exact_CD) / 0.7).log_softmax(-1)
        chosen_C = logits_CV.gather(-1, target_ids_C[:, None]).squeeze(-1)
        weights_C = torch.arange(1, num_tokens + 1).double()
        (gradient_CD,) = torch.autograd.grad((weights_C * chosen_C).sum(), exact_CD)
        entropy_C = -(logits_CV.exp() * logits_CV).sum(-1).detach()
        for value, other, expected in zip(
            found, eager, (chosen_C.detach(), entropy_C, gradient_CD), strict=True
        ):
            assert relative(value, expected) < limit
            assert relative(value, other) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # reduced, joined, rescaled


def test_a_compiled_head_writes_the_exponentials_and_nothing_else_per_logit(
    compiler: None,
) -> None:
    """In bfloat16 2 bytes read and 2 written; the eager one moves 44, at a temperature 52."""
    num_tokens = 32
    head, hidden_CD, target_ids_C = head_and_inputs(num_tokens, torch.bfloat16)
    logits_cv = hidden_CD.detach() @ head.weight.T
    sums = logprobs._RunningSums(hidden_CD.detach(), target_ids_C, 0.7, has_grad=True).sums
    for has_grad, num_bytes in ((True, 4), (False, 2)):
        metrics.reset()
        logprobs._compiled(logprobs.reduced_logits)(
            sums, logits_cv, target_ids_C[:, None], 0.7, has_grad
        )
        found = metrics.num_bytes_accessed / logits_cv.numel()
        assert num_bytes <= found < 1.1 * num_bytes


@pytest.mark.slow
def test_a_compiled_head_in_training_has_its_gradients(compiler: None) -> None:
    """With a bias, the way of full fine-tuning and of adapters on lm_head."""
    head, hidden_CD, target_ids_C = head_and_inputs(9, torch.float32, has_bias=True)
    gradients = []
    for is_compiled in (False, True):
        logprobs_C, _ = logprobs.score_hidden(
            hidden_CD, head, target_ids_C, 0.7, is_compiled=is_compiled
        )
        gradients.append(torch.autograd.grad(logprobs_C.sum(), [hidden_CD, *head.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("wanted", "found"), [(0, 1), (5, 5), (256, 256), (300, 256), (9265, 9216)]
)
def test_blocks_of_the_vocabulary_keep_rows_aligned(wanted: int, found: int) -> None:
    assert logprobs.aligned(wanted) == found
