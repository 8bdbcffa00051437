"""`rl_lora::attend`, in each of its implementations, against the definition."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from rl_lora.batches import pack_samples
from rl_lora.nn import attention, block_attention, flash
from rl_lora.nn.segments import AttentionLayout, Segment, make_buckets, make_layout, segments_of
from rl_lora.types import TrainSample
from tests.helpers import plain_flash
from tests.helpers.tiny_models import make_policy, random_llama, shake

SCALE = 0.3
# A prompt of 3 with completions of 2 and 4, then a prompt of 1 with one of 3: 13 tokens.
TWO_FAMILIES = make_layout([3, 1], [[2, 4], [3]])
SEQUENCES = [[0, 1, 2, 4, 5], [0, 1, 2, 6, 7, 8, 9], [3, 10, 11, 12]]
LAYOUTS = {
    "two families": TWO_FAMILIES,
    "one token each": make_layout([1], [[1]]),
    "many": make_layout([5, 2, 7], [[1, 9, 3], [2], [4, 4]]),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs_of(
    layout: AttentionLayout, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Queries, keys and values of heads of 8."""
    num_tokens = int(layout.starts_S[-1])
    shapes = [(num_tokens, count, 8) for count in (heads[0], heads[1], heads[1])]
    return [random(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def by_definition(query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, *layout: Any) -> Tensor:
    """Softmax over the whole row, with a mask that is made segment by segment."""
    starts_S, families_N, _, scale = layout
    num_tokens, num_heads, _ = query_THD.shape
    is_seen_TT = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for s in segments_of(starts_S, families_N):
        rows = slice(s.start, s.start + s.length)
        is_seen_TT[rows, s.prefix_start : s.prefix_start + s.prefix_length] = True
        is_seen_TT[rows, rows] = torch.ones(s.length, s.length).tril().bool()
    groups = num_heads // key_TJD.shape[1]
    key_THD, value_THD = (x.repeat_interleave(groups, 1) for x in (key_TJD, value_TJD))
    logits_HTT = torch.einsum("qhd,khd->hqk", query_THD, key_THD) * scale
    probs_HTT = logits_HTT.masked_fill(~is_seen_TT, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs_HTT, value_THD)


def by_operator(*inputs: Any) -> Tensor:
    query_THD, key_TJD, value_TJD, *layout, scale = inputs
    out_THD: Tensor = attention.attend(
        query_THD, key_TJD, value_TJD, AttentionLayout(*layout), scale
    )
    return out_THD


def values_and_gradients(function: Any, inputs: list[Tensor], layout: AttentionLayout) -> Any:
    out_THD = function(*inputs, *layout, SCALE)
    weights_THD = random(*out_THD.shape, seed=7, dtype=out_THD.dtype)
    return [out_THD.detach(), *torch.autograd.grad((out_THD * weights_THD).sum(), inputs)]


def use(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the operator take an implementation, on a CPU."""
    if implementation == "flash":
        monkeypatch.setattr(flash, "can_run", lambda query_THD: True)
        monkeypatch.setattr(flash, "forward_part", plain_flash.forward_part)
        monkeypatch.setattr(flash, "backward_part", plain_flash.backward_part)
    elif implementation == "buckets":
        monkeypatch.setattr(attention, "_blocks", lambda *inputs: None)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("flash", torch.float64),
        ("flash", torch.float32),
        ("buckets", torch.float64),
        ("buckets", torch.float32),
        ("blocks", torch.float32),
    ],
)
def test_values_and_gradients_are_those_of_the_definition(
    implementation: str,
    dtype: torch.dtype,
    layout: str,
    heads: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(implementation, monkeypatch)
    inputs = inputs_of(LAYOUTS[layout], heads, dtype)
    found = values_and_gradients(by_operator, inputs, LAYOUTS[layout])
    expected = values_and_gradients(by_definition, inputs, LAYOUTS[layout])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", ["flash", "blocks"])
def test_half_precision_is_rounded_at_the_end_only(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(implementation, monkeypatch)
    inputs = inputs_of(LAYOUTS["many"], dtype=torch.bfloat16)
    found = values_and_gradients(by_operator, inputs, LAYOUTS["many"])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = values_and_gradients(by_definition, wide, LAYOUTS["many"])
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value.double() - other).norm() < 0.005 * other.norm()  # a rounding: 2^-9


def test_a_row_attends_as_its_sequences_do_by_themselves() -> None:
    query_THD, key_TJD, value_TJD = (x.detach() for x in inputs_of(TWO_FAMILIES))
    out_THD = by_operator(query_THD, key_TJD, value_TJD, *TWO_FAMILIES, SCALE)
    for ids in SEQUENCES:
        query, key, value = (x[ids].transpose(0, 1)[None] for x in (query_THD, key_TJD, value_TJD))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
        )
        assert torch.allclose(out_THD[ids], expected[0].transpose(0, 1), atol=1e-5)


def test_a_layout_by_hand() -> None:
    starts_S, families_N, sizes = TWO_FAMILIES
    assert starts_S.tolist() == [0, 3, 4, 6, 10, 13]
    assert families_N.tolist() == [0, 6, 9]
    assert (starts_S.dtype, families_N.dtype) == (torch.int32, torch.int32)
    assert sizes == (4, 4, 3, 6)
    assert segments_of(starts_S, families_N) == [
        *(Segment(0, 3), Segment(3, 1)),
        *(Segment(4, 2, 0, 3), Segment(6, 4, 0, 3), Segment(10, 3, 3, 1)),
    ]
    buckets = make_buckets(starts_S, families_N)
    assert [tuple(b.mask_S1QK.shape) for b in buckets.buckets] == [
        *((1, 1, 1, 1), (1, 1, 2, 5), (2, 1, 3, 4), (1, 1, 4, 7)),
    ]


@pytest.mark.parametrize("implementation", ["blocks", "buckets", "flash"])
def test_pytorch_finds_no_fault_with_the_operators(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, registrations, fake tensors, and tracing with lengths left open; the inputs are
    [H, T, D] in memory, the outputs have to be contiguous."""
    use(implementation, monkeypatch)
    inputs = [
        x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for x in inputs_of(TWO_FAMILIES)
    ]
    starts_S, families_N, _ = TWO_FAMILIES
    if implementation == "flash":
        layout: tuple[Any, ...] = TWO_FAMILIES
        inputs = [x.detach() for x in inputs]
        torch.library.opcheck(flash.attend_in_parts, (*inputs, *layout, SCALE))
        backward, kept = (
            flash.attend_in_parts_backward,
            flash.attend_in_parts(*inputs, *layout, SCALE)[:2],
        )
    else:
        layout = starts_S, families_N
        torch.library.opcheck(attention.attend_in_blocks, (*inputs, *layout, SCALE))
        inputs = [x.detach() for x in inputs]
        backward, kept = attention.attend_backward, ()
    grad_THD = torch.ones_like(inputs[0], memory_format=torch.contiguous_format)
    torch.library.opcheck(backward, (grad_THD, *inputs, *kept, *layout, SCALE))


class Layer(nn.Module):
    """Attention with its projections, after a norm, as in a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(16, 4 * 8 + 2 * 8 + 2 * 8)
        self.out = nn.Linear(4 * 8, 16)

    def forward(self, hidden_TD: Tensor, layout: AttentionLayout) -> Tensor:
        """[T, 16] to [T, 16]."""
        joined = self.project(nn.functional.rms_norm(hidden_TD, (16,)))
        query_THD, key_TJD, value_TJD = joined.unflatten(1, (8, 8)).split([4, 2, 2], 1)
        out_THD = attention.attend(query_THD, key_TJD, value_TJD, layout, SCALE)
        return hidden_TD + self.out(out_THD.flatten(1))


@pytest.mark.parametrize("implementation", ["blocks", "buckets", "flash"])
def test_a_compiled_layer_serves_all_lengths(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole graphs, at most two over ten batches of other lengths (the first batch's equal lengths
    may be taken for a rule), with the gradients of the eager layer."""
    use(implementation, monkeypatch)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = Layer()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for number in range(10):
        groups = [range(3 + prompt, 4 + prompt + number % 4) for prompt in range(1 + number % 3)]
        layout = make_layout([5 + number + prompt for prompt in range(len(groups))], groups)
        hidden_TD = random(int(layout.starts_S[-1]), 16, seed=number)
        gradients = [
            torch.autograd.grad(run(hidden_TD, layout).square().sum(), [*layer.parameters()])
            for run in (layer, compiled)
        ]
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 1 <= counter.frame_count <= 2


def test_what_is_made_of_a_layout_goes_with_it() -> None:
    layout = make_layout([3], [[2]])
    before = len(attention._MADE)
    by_operator(*inputs_of(layout), *layout, SCALE)
    assert len(attention._MADE) == before + 1
    del layout
    gc.collect()
    assert len(attention._MADE) == before


def test_the_policy_makes_blocks_once_for_all_layers_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy, seed=3)
    samples = [
        TrainSample((5, 6, 7), tuple(range(30, 30 + n)), (-1.0,) * n, 1.0, 0) for n in (2, 4, 4)
    ]
    ((batch,),) = pack_samples(samples, microbatch_tokens=99, share_prompts=True)
    calls: list[str] = []

    def spied(name: str) -> Any:
        original = getattr(block_attention, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return call

    for name in ("make_blocks", "attend", "attend_backward"):
        monkeypatch.setattr(block_attention, name, spied(name))
    gradients = []
    for implementation in ("blocks", "buckets"):
        use(implementation, monkeypatch)
        logprobs_C, _ = policy.token_logprobs(batch, 1.0)
        gradients.append(
            torch.autograd.grad((logprobs_C * random(10)).sum(), list(policy.trainable().values()))
        )
    assert calls == ["make_blocks", "attend", "attend", "attend_backward", "attend_backward"]
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()
