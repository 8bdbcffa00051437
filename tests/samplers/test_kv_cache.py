"""The sampler's KV cache: what transformers' own would hold, in buffers that stay in place."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from rl_lora.errors import UserError
from rl_lora.nn.attention import attend_last
from rl_lora.samplers import kv_cache
from rl_lora.samplers.kv_cache import BufferedLayer, KvCache, front

CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CPU = torch.device("cpu")


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 2, tokens, 3, generator=generator) for _ in range(2))
    return keys, values


def feed(caches: list[DynamicCache], rows: int, tokens: int, seed: int) -> None:
    for layer in range(2):
        for cache in caches:
            cache.update(*states(rows, tokens, seed + layer), layer)


def check_same(ours: DynamicCache, theirs: DynamicCache, order: list[int] | None = None) -> None:
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        for a, b in ((own.keys, other.keys), (own.values, other.values)):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b if order is None else b[order])
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)


@pytest.mark.parametrize("room", [256, 2])  # 2: the buffers are full at once, and grow
def test_it_holds_what_the_dynamic_cache_holds(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_ROOM", room)
    ours = KvCache(CONFIG)
    for batch in range(2):  # the second in the first one's buffers
        theirs = DynamicCache(config=CONFIG)
        ours.begin(longest=5 + 9)
        feed([ours, theirs], 3, 5, seed=10 * batch)
        for cache in (ours, theirs):
            cache.batch_repeat_interleave(2)
        check_same(ours, theirs)
        for step in range(4):
            feed([ours, theirs], 6, 1, seed=100 * batch + step)
            check_same(ours, theirs)
        rows = front([True, False, True, False, False, True])
        assert rows == [0, 5, 2]
        ours.keep(rows, CPU)
        theirs.batch_select_indices(torch.tensor(rows))
        for step in range(5):
            feed([ours, theirs], 3, 1, seed=1000 * batch + step)
            check_same(ours, theirs)


@pytest.mark.parametrize("config", [CONFIG, MistralConfig(num_hidden_layers=2, sliding_window=8)])
def test_a_batch_starts_empty_where_reset_only_zeroes(
    config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers before 5.19, for full attention and a sliding window."""
    monkeypatch.setattr(DynamicLayer, "reset", CacheLayerMixin.reset)
    cache = KvCache(config)
    for rows in (3, 2):
        cache.begin(longest=9)
        feed([cache], rows, 2, seed=rows)
        for number, layer in enumerate(cache.layers):
            assert layer.keys is not None
            assert torch.equal(layer.keys, states(rows, 2, rows + number)[0])
            assert layer.get_seq_length() == 2


def test_tokens_rows_and_batches_go_into_one_buffer() -> None:
    cache = KvCache(CONFIG)
    places = set()
    for rows in (3, 2):  # a smaller batch fits
        cache.begin(longest=20)
        feed([cache], rows, 5, seed=1)
        cache.batch_repeat_interleave(4)
        for step in range(15):
            if step == 7:
                cache.keep(front([True, False] * (2 * rows)), CPU)
            feed([cache], cache.layers[0].keys.shape[0], 1, seed=step)  # type: ignore[union-attr]
            places.add(cache.layers[0].keys.data_ptr())  # type: ignore[union-attr]
    assert len(places) == 1


def test_no_more_is_taken_than_a_row_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_ROOM", 4)
    layer = BufferedLayer()
    layer.longest = 11
    layer.update(*states(2, 3, 0))
    layer.batch_repeat_interleave(2)
    sizes = []
    for step in range(8):
        layer.update(*states(4, 1, step))
        assert layer.keys is not None
        sizes.append(layer.keys.untyped_storage().nbytes() // (4 * 2 * 3 * 4))
    assert sizes == [7, 7, 7, 7, 11, 11, 11, 11]  # 3 + 4; twice 7 would be 14


def test_sliding_windows_stay_transformers_own() -> None:
    config = MistralConfig(num_hidden_layers=2, sliding_window=4, num_key_value_heads=2)
    ours, theirs = KvCache(config), DynamicCache(config=config)
    assert not any(isinstance(layer, BufferedLayer) for layer in ours.layers)
    ours.begin(longest=9)
    feed([ours, theirs], 2, 3, seed=1)
    ours.keep([1], CPU)
    theirs.batch_select_indices(torch.tensor([1]))
    check_same(ours, theirs)


def test_layers_without_keys_and_values_are_refused() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no cache for LinearAttentionLayer"):
        KvCache(config)


@pytest.mark.parametrize(
    ("is_live", "rows"),
    [
        ([True, False, True, True], [0, 3, 2]),
        ([False, False, True], [2]),
        ([True, True, False], [0, 1]),
        ([True], [0]),
    ],
)
def test_front_moves_no_row_that_is_in_place(is_live: list[bool], rows: list[int]) -> None:
    assert front(is_live) == rows


@pytest.mark.parametrize("has_mask", [True, False])
def test_attention_of_last_tokens_is_that_of_repeated_heads(has_mask: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 1, 8, generator=generator)
    key, value = (torch.randn(3, 2, 5, 8, generator=generator) for _ in range(2))
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., :2] = False
    out = attend_last(query, key, value, mask if has_mask else None, 0.3)
    scores = (query @ key.repeat_interleave(3, 1).mT) * 0.3
    if has_mask:
        scores = scores.masked_fill(~mask, float("-inf"))
    expected = scores.softmax(-1) @ value.repeat_interleave(3, 1)
    assert out.shape == query.shape
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
