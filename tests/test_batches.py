"""The shift, the masks and the denominators."""

from dataclasses import replace
from random import Random

import pytest

from rl_lora import distributed
from rl_lora.batches import halves, pack_samples
from rl_lora.nn.segments import AttentionLayout, make_buckets
from rl_lora.types import Microbatch, TrainSample


def sample(num_prompt: int, num_completion: int, advantage: float = 1.0) -> TrainSample:
    """Prompt ids 10, 11, ...; completion ids 20, 21, ..."""
    return TrainSample(
        prompt_ids=tuple(range(10, 10 + num_prompt)),
        completion_ids=tuple(range(20, 20 + num_completion)),
        sampler_logprobs_T=tuple(-0.1 * (i + 1) for i in range(num_completion)),
        advantage=advantage,
        adapter_version=0,
    )


def pack_one(samples: list[TrainSample], **options: object) -> list[Microbatch]:
    defaults = {"microbatch_tokens": 64}
    (microbatches,) = pack_samples(samples, **(defaults | options))  # type: ignore[arg-type]
    return microbatches


def test_each_token_is_predicted_one_position_before_its_own() -> None:
    (batch,) = pack_one([sample(2, 3), sample(1, 1, advantage=-2.0)])
    assert batch.token_ids_BT.tolist() == [[10, 20, 0, 0, 0], [10, 11, 20, 21, 22]]
    assert batch.row_C.tolist() == [0, 1, 1, 1]
    assert batch.column_C.tolist() == [0, 1, 2, 3]
    assert batch.target_ids_C.tolist() == [20, 20, 21, 22]
    assert batch.sampler_logprobs_C.tolist() == pytest.approx([-0.1, -0.1, -0.2, -0.3])
    assert batch.advantages_C.tolist() == [-2.0, 1.0, 1.0, 1.0]
    assert (batch.num_sequences, batch.num_tokens) == (2, 7)


def test_denominators_are_step_wide() -> None:
    samples = [sample(1, 1), sample(1, 3)]

    def weights(denominator: str | int) -> list[float]:
        batches = pack_one(samples, denominator=denominator, microbatch_tokens=4)
        assert len(batches) == 2
        return [w for b in batches for w in b.weights_C.tolist()]

    assert weights("tokens") == pytest.approx([1 / 4] * 4)
    assert weights("sequences") == pytest.approx([1 / 2] + [1 / 6] * 3)
    assert weights(8) == pytest.approx([1 / 16] * 4)


def test_zero_advantage_is_skipped_but_counted() -> None:
    (batch,) = pack_one([sample(1, 1), sample(1, 3, advantage=0.0)])
    assert batch.num_sequences == 1
    assert batch.weights_C.tolist() == pytest.approx([1 / 4])
    (whole,) = pack_one([sample(1, 1), sample(1, 3, advantage=0.0)], keep_zero_advantage=True)
    assert whole.num_sequences == 2


def test_all_tied_keeps_some_for_the_sampler_check() -> None:
    (batch,) = pack_one([sample(1, 1, 0.0), sample(1, 3, 0.0)])
    assert batch.num_sequences >= 1
    assert not batch.advantages_C.any()


def test_budget_bounds_the_padded_size_and_long_ones_get_their_own_batch() -> None:
    samples = [sample(2, n) for n in (1, 2, 3, 30, 3)]
    batches = pack_one(samples, microbatch_tokens=15)
    assert [b.num_sequences for b in batches] == [3, 1, 1]
    assert all(b.token_ids_BT.numel() <= 15 for b in batches[:-1])
    assert sum(len(b.target_ids_C) for b in batches) == 39


def test_updates_split_round_robin_with_their_own_denominators() -> None:
    samples = [sample(1, n) for n in (1, 2, 3, 4)]
    first, second = pack_samples(samples, microbatch_tokens=64, num_updates=2)
    assert sorted(set(first[0].weights_C.tolist())) == pytest.approx([1 / 4])
    assert sorted(set(second[0].weights_C.tolist())) == pytest.approx([1 / 6])


def episode(num_prompt: int, is_sampled: str, advantage: float = 1.0) -> TrainSample:
    """A sample whose tokens were sampled where the text has an s."""
    plain = sample(num_prompt, len(is_sampled), advantage)
    return replace(plain, is_sampled_T=tuple(one == "s" for one in is_sampled))


def test_an_environments_tokens_are_seen_and_not_scored() -> None:
    (batch,) = pack_one([episode(2, "ss--s"), sample(1, 1, -2.0)])
    assert batch.token_ids_BT.tolist() == [[10, 20, 0, 0, 0, 0, 0], [10, 11, 20, 21, 22, 23, 24]]
    assert batch.row_C.tolist() == [0, 1, 1, 1]
    assert batch.column_C.tolist() == [0, 1, 2, 5]  # 24 is predicted where 23 stands
    assert batch.target_ids_C.tolist() == [20, 20, 21, 24]
    assert batch.sampler_logprobs_C.tolist() == pytest.approx([-0.1, -0.1, -0.2, -0.5])
    assert batch.advantages_C.tolist() == [-2.0, 1.0, 1.0, 1.0]
    assert batch.sequence_C.tolist() == [0, 1, 1, 1]
    assert batch.num_tokens == 9


def test_an_environments_tokens_are_in_a_shared_row_too() -> None:
    samples = [episode(2, "s-s"), sample(2, 2), episode(2, "s---s")]
    (batch,) = pack_one(samples, share_prompts=True)
    assert batch.token_ids_BT.tolist() == [[10, 11, 20, 21, 22, 20, 21, 20, 21, 22, 23, 24]]
    assert batch.position_BT is not None
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 4, 2, 3, 2, 3, 4, 5, 6]]
    assert batch.column_C.tolist() == [1, 3, 1, 5, 1, 10]
    assert batch.target_ids_C.tolist() == [20, 22, 20, 21, 20, 24]
    assert batch.layout is not None
    assert seen_by_token(batch.layout, 12)[4] == {0, 1, 2, 3, 4}
    assert seen_by_token(batch.layout, 12)[11] == {0, 1, 7, 8, 9, 10, 11}


def test_denominators_count_what_was_sampled() -> None:
    samples = [episode(1, "s-s"), episode(1, "s----sss"), sample(1, 4, 0.0)]

    def weights(denominator: str | int) -> list[float]:
        (batch,) = pack_one(samples, denominator=denominator)
        return [float(batch.weights_C[batch.sequence_C == n][0]) for n in (0, 1)]

    assert weights("tokens") == pytest.approx([1 / 10, 1 / 10])
    assert weights("sequences") == pytest.approx([1 / 6, 1 / 12])
    assert weights(8) == pytest.approx([1 / 24, 1 / 24])


@pytest.mark.parametrize("share_prompts", [False, True])
def test_halves_of_episodes_have_the_weights_of_the_whole(share_prompts: bool) -> None:
    samples = [episode(2, "s-s"), episode(2, "s----sss"), episode(1, "s--s"), sample(1, 4)]
    (whole,) = pack_one(samples, denominator="sequences", share_prompts=share_prompts)
    parts = halves(whole)
    assert [part.num_sequences for part in parts] == [2, 2]
    for name in ("target_ids_C", "sampler_logprobs_C", "weights_C"):
        found = [value for part in parts for value in getattr(part, name).tolist()]
        assert found == getattr(whole, name).tolist(), name


def test_unknown_denominator_is_an_error() -> None:
    with pytest.raises(ValueError, match="not tokens"):
        pack_samples([sample(1, 1)], denominator="words")


def completion_of(
    prompt: tuple[int, ...], completion: tuple[int, ...], advantage: float
) -> TrainSample:
    return TrainSample(prompt, completion, (-0.5,) * len(completion), advantage, 0)


def test_completions_of_one_prompt_share_it_in_one_row_without_padding() -> None:
    samples = [
        completion_of((10, 11), (20, 21), 1.0),
        completion_of((12,), (22,), 2.0),
        completion_of((10, 11), (23,), -1.0),
    ]
    (batch,) = pack_one(samples, share_prompts=True)
    assert batch.token_ids_BT.tolist() == [[10, 11, 12, 20, 21, 23, 22]]
    assert batch.position_BT is not None
    assert batch.position_BT.tolist() == [[0, 1, 0, 2, 3, 2, 1]]
    assert batch.row_C.tolist() == [0, 0, 0, 0]
    assert batch.column_C.tolist() == [1, 3, 1, 2]  # 23 follows the prompt's last token, not 21
    assert batch.sequence_C.tolist() == [0, 0, 1, 2]
    assert batch.target_ids_C.tolist() == [20, 21, 23, 22]
    assert batch.advantages_C.tolist() == [1.0, 1.0, -1.0, 2.0]
    assert (batch.num_sequences, batch.num_tokens) == (3, 7)
    assert batch.layout is not None
    assert seen_by_token(batch.layout, 7) == [
        {0}, {0, 1}, {2}, {0, 1, 3}, {0, 1, 3, 4}, {0, 1, 5}, {2, 6},
    ]  # fmt: skip


def seen_by_token(layout: AttentionLayout, num_tokens: int) -> list[set[int]]:
    """Which tokens each token of the row sees, read back from the buckets."""
    by_output = []
    buckets = make_buckets(layout.starts_S, layout.families_N)
    for bucket in buckets.buckets:
        masks_SQK = bucket.mask_S1QK[:, 0]
        for keys_K, mask_QK in zip(bucket.key_SK, masks_SQK, strict=True):
            by_output += [set(keys_K[mask_K].tolist()) for mask_K in mask_QK]
    return [by_output[int(buckets.output_T[token])] for token in range(num_tokens)]


def test_a_family_too_large_for_one_microbatch_is_cut_with_its_prompt_in_each() -> None:
    samples = [completion_of((10, 11), tuple(range(20, 23)), 1.0) for _ in range(5)]
    batches = pack_one(samples, share_prompts=True, microbatch_tokens=11)
    assert [b.num_sequences for b in batches] == [3, 2]
    assert [b.num_tokens for b in batches] == [11, 8]
    assert sum(float(b.weights_C.sum()) for b in batches) == pytest.approx(1.0)


def test_families_stay_whole_and_come_largest_first() -> None:
    """Widths 6, 7, 3 and 5 in microbatches of 10: 7 with 3, 6 and 5 singly; no prompt twice."""
    samples = [
        completion_of((prompt, 11), tuple(range(width - 2)), 1.0)
        for prompt, width in ((1, 6), (2, 7), (3, 3), (4, 5))
    ]
    batches = pack_one(samples, share_prompts=True, microbatch_tokens=10)
    assert [b.num_tokens for b in batches] == [10, 6, 5]
    assert [b.token_ids_BT[0, 0].item() for b in batches] == [2, 1, 4]


def test_ranks_get_as_many_tokens() -> None:
    """8 families of 10 tokens, up to three together: 30, 30 and 20 suit one rank or three, but two
    ranks would have 50 tokens and 30."""
    samples = [replace(sample(2, 8), prompt_ids=(n, n)) for n in range(8)]
    options = {"microbatch_tokens": 30, "share_prompts": True}
    sizes = [
        [batch.num_tokens for batch in pack_one(samples, num_ranks=num, **options)]
        for num in (1, 2, 3)
    ]
    assert sizes == [[30, 30, 20], [20, 20, 20, 20], [30, 30, 20]]


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 3, 8, 16])
def test_ranks_finish_together(num_ranks: int, share_prompts: bool) -> None:
    draw = Random(num_ranks)
    samples = [
        replace(sample(draw.randint(20, 60), draw.randint(1, 200)), prompt_ids=(n // 8,) * 30)
        for n in range(1024)
    ]
    batches = pack_one(
        samples, num_ranks=num_ranks, share_prompts=share_prompts, microbatch_tokens=7000
    )
    assert sorted(s for batch in batches for s in map(id, batch.samples_S)) == sorted(
        map(id, samples)
    )
    sizes = [batch.token_ids_BT.numel() for batch in batches]
    assert max(sizes) <= 7000
    tokens = [sum(sizes[i] for i in part) for part in distributed.share(sizes, num_ranks)]
    assert max(tokens) < 1.05 * sum(tokens) / num_ranks


def test_buckets_waste_little() -> None:
    lengths = [5, 90, 7, 40, 44, 6, 95, 8, 60, 33]
    samples = [completion_of(tuple(range(1, 31)), tuple(range(n)), 1.0) for n in lengths]
    (batch,) = pack_one(samples, share_prompts=True, microbatch_tokens=4096)
    assert batch.layout is not None
    computed = sum(b.mask_S1QK.numel() for b in make_buckets(*batch.layout[:2]).buckets)
    needed = 30 * 30 + sum(n * (30 + n) for n in lengths)
    assert needed <= computed <= 1.3 * needed
