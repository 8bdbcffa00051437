"""One random token per row of logits on vLLM's CPU back end, in two passes instead of eight.

vLLM draws Gumbel noise for every logit in one thread, then takes log_softmax of all rows, an empty
top-k and the rank of each chosen token: 10 % of a decoding step. Only the token and its log-prob
are needed here, so a softmax, its sums by block and one uniform number per row are enough. The
distribution is the same; a seed gives other draws.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

BLOCK = 128  # logits summed together, in float32; the blocks' sums are added up in float64


def draw(logits_TV: Tensor, uniform_T: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row by the inverse of the distribution function, and its log-prob.

    Args:
        logits_TV: [T, V] float32, already divided by the temperature; overwritten.
        uniform_T: [T] float64 in [0, 1).

    Returns:
        Tokens [T] int64; log-probs [T] float32, nats. A token of probability zero is never drawn.

    Raises:
        FloatingPointError: a row has a NaN, or no finite logit.
    """
    num_rows, num_tokens = logits_TV.shape
    missing = -num_tokens % BLOCK
    if missing:
        logits_TV = torch.nn.functional.pad(logits_TV, (0, missing), value=-torch.inf)
    weights_TV = logits_TV.sub_(logits_TV.amax(1, keepdim=True)).exp_()
    blocks_TNB = weights_TV.view(num_rows, -1, BLOCK)
    ends_TN = blocks_TNB.sum(2).double().cumsum_(1)
    total_T1 = ends_TN[:, -1:]
    if not bool(total_T1.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite: the policy has diverged")
    target_T1 = uniform_T.unsqueeze(1) * total_T1
    block_T1 = torch.searchsorted(ends_TN, _below(target_T1, total_T1), right=True)
    before_T1 = torch.where(block_T1 > 0, ends_TN.gather(1, (block_T1 - 1).clamp_(min=0)), 0.0)
    chosen_TB = blocks_TNB[torch.arange(num_rows), block_T1.squeeze(1)].double()
    within_TB = chosen_TB.cumsum(1)
    rest_T1 = _below(target_T1 - before_T1, within_TB[:, -1:])
    place_T1 = torch.searchsorted(within_TB, rest_T1, right=True)
    logprobs_T1 = chosen_TB.gather(1, place_T1).log_() - total_T1.log()
    tokens_T1 = block_T1 * BLOCK + place_T1
    return tokens_T1.squeeze(1), logprobs_T1.squeeze(1).float()


def _below(target: Tensor, end: Tensor) -> Tensor:
    """The target, clamped to [0, end): rounding may have moved it to the end or past it."""
    return torch.minimum(target.clamp(min=0), torch.nextafter(end, torch.zeros_like(end)))


class OnePassSampler(Sampler):
    """vLLM's sampler, faster where every request samples from its whole distribution.

    Any other batch (greedy, top_p, top_k, several log-probs per token) takes vLLM's own path.
    """

    def sample(
        self,
        logits: Tensor,
        sampling_metadata: Any,
        logprobs_mode_override: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [T] and only their log-probs, [T, 1], where vLLM's are [T, V]."""
        mode = logprobs_mode_override or self.logprobs_mode
        if not (_is_plain(sampling_metadata, logits) and mode == "processed_logprobs"):
            found: tuple[Tensor, Tensor | None] = super().sample(
                logits, sampling_metadata, logprobs_mode_override
            )
            return found
        if not bool((sampling_metadata.temperature == 1).all()):
            logits.div_(sampling_metadata.temperature.unsqueeze(1))
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        generators = sampling_metadata.generators
        uniform_T = torch.empty(logits.shape[0], dtype=torch.float64)
        for row in range(logits.shape[0]):
            uniform_T[row : row + 1].uniform_(generator=generators[row])
        tokens_T, logprobs_T = draw(logits, uniform_T)
        return tokens_T, logprobs_T.unsqueeze(1)

    @staticmethod
    def gather_logprobs(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        """`sample`'s [T, 1] as they are, with rank 0 (ranks are not counted)."""
        if logprobs.shape[1] != 1 or num_logprobs != 0:
            return Sampler.gather_logprobs(logprobs, num_logprobs, token_ids)
        ranks_T = torch.zeros(len(token_ids), dtype=torch.int64)
        return LogprobsTensors(token_ids.unsqueeze(1).to(torch.int32), logprobs, ranks_T)


def _is_plain(metadata: Any, logits: Tensor) -> bool:
    return bool(
        metadata.all_random
        and metadata.top_k is None
        and metadata.top_p is None
        and metadata.max_num_logprobs == 0
        and not metadata.logprob_token_ids
        and len(metadata.generators) == logits.shape[0]
        and logits.shape[1] > 1
    )


def install(worker: Any) -> bool:
    """Replaces vLLM's sampler in a CPU worker; returns whether it could."""
    runner = worker.model_runner
    if type(getattr(runner, "sampler", None)) is not Sampler:
        return False
    made = OnePassSampler(runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel)
    runner.sampler = made.to(next(runner.sampler.parameters(), torch.empty(0)).device)
    return True
