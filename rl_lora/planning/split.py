"""GPUs divided into samplers and learners, with bounded staleness: an estimate.

Samplers apart from learners are those of `[resources]` (docs/samplers.md). Without it each process
of a job samples and learns, with `sampling.max_staleness` both at once on the same GPU.
scripts/scaling simulates this design with samples that differ in length and machines that fail, and
compares it with jobs on a CPU.

The learner takes batches in order. A group of batch b may be sampled once version b - k is
published, k being the bound on staleness, so that it is at most k versions old when it is learned
from and none is dropped. With P the seconds of a step in the steady state:

    P >= learning + all-reduce                                  the learners always work
    P >= sampling the batch at the engines' full rate           the samplers always work
    (k + 1) P >= longest completion + hand-over + learning + all-reduce

The last line follows the longest completion of a batch from the version that it starts with to the
one that is learned from it, k + 1 steps later. With k = 0 samplers wait for learners and learners
for samplers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rl_lora.config.dynamic import round_size
from rl_lora.planning.links import broadcast_s
from rl_lora.planning.speed import StepWork

STALENESS = (0, 1, 2, 4)  # bounds that are compared


@dataclass(frozen=True, slots=True)
class Split:
    """Samplers and learners with one GPU each, and a step's seconds in the steady state.

    Example: Split(num_samplers=45, num_learners=19, max_staleness=2, seconds=33.4,
    bound="learning")
    """

    num_samplers: int
    num_learners: int
    max_staleness: int
    seconds: float
    bound: str  # what the seconds are: learning, sampling, or the longest completion


def best_split(work: StepWork, cache_bytes: int, num_gpus: int, max_staleness: int) -> Split:
    """The fastest one; of equally fast ones that with fewer samplers.

    Args:
        work: a step's work; its number of ranks is ignored.
        cache_bytes: of the KV cache of one engine. A sampler without a learner has more.
        num_gpus: at least 2.
        max_staleness: versions that a sample may be old when it is learned from.
    """
    in_flight = (max_staleness + 1) * work.config.sampling.num_prompts  # a prompt has one engine
    return min(
        (
            split_time(work, cache_bytes, num, num_gpus - num, max_staleness)
            for num in range(1, min(in_flight, num_gpus - 1) + 1)
        ),
        key=lambda split: split.seconds,
    )


def split_time(
    work: StepWork, cache_bytes: int, num_samplers: int, num_learners: int, max_staleness: int
) -> Split:
    """The estimate for given numbers of samplers and learners. Arguments as for `best_split`."""
    samplers, learners = (replace(work, num_ranks=n) for n in (num_samplers, num_learners))
    learn_s = learners.learn_s() + learners.all_reduce_s()
    learned_s = learn_s + work.hand_over_s() + broadcast_s(work.version_bytes, num_samplers)
    if max_staleness == 0:
        sample_s = samplers.sampling(samplers.num_at_once(cache_bytes)).total_s
        bound = "sampling" if sample_s > learned_s else "learning"
        return Split(num_samplers, num_learners, 0, sample_s + learned_s, bound)
    seconds, bound = _sampling_bound(work, cache_bytes, num_samplers, learned_s, max_staleness)
    if learn_s > seconds:
        seconds, bound = learn_s, "learning"
    return Split(num_samplers, num_learners, max_staleness, seconds, bound)


def _sampling_bound(
    work: StepWork, cache_bytes: int, num_samplers: int, learned_s: float, max_staleness: int
) -> tuple[float, str]:
    """(a step's least seconds as far as sampling bounds it, by what).

    Larger batches decode more tokens a second, and each sequence more slowly: the best batch is the
    largest with which the longest completion still ends in time.
    """
    sampling, context = work.config.sampling, work.prompt_tokens + work.mean_tokens
    in_step = round_size(sampling) * sampling.num_samples
    prefill_s = work.prefill_s(round_size(sampling)) / num_samplers
    tokens, longest = in_step * work.mean_tokens / num_samplers, work.longest_tokens(in_step)
    found = []
    for batch in range(1, work.num_slots(cache_bytes) + 1):
        decode_s = work.decode(batch, context).total_s
        full_rate_s = prefill_s + tokens / batch * decode_s
        longest_s = (longest * decode_s + learned_s) / (max_staleness + 1)
        found.append(max((full_rate_s, "sampling"), (longest_s, "longest completion")))
    return min(found)
