"""The reference sampler: batched decoding with a KV cache on the learner's own weights.

For parity tests and for machines without vLLM. Each sample draws from its own seeded stream by the
inverse CDF, so two runs with one seed give the same samples however they are batched (up to
rounding of the log-probs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rl_lora.batches import to_device, whole_sequence
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.launchers import interruption
from rl_lora.models.resolve import context_length
from rl_lora.policy import Policy
from rl_lora.sampler import BASE_VERSION, OnGroup, OnProgress, Stops, check_lengths, max_tokens_of
from rl_lora.samplers.end_tokens import end_token_ids as model_end_token_ids
from rl_lora.samplers.kv_cache import KvCache, front
from rl_lora.seeds import sample_seeds
from rl_lora.types import Adapter, Completion, Prompt, SampleParams

_SEQUENCES_AT_ONCE = 128
_COMPACT_BELOW = 0.75  # share of live rows below which finished rows are dropped


class TorchSampler:
    """Samples with the policy object that is being trained."""

    has_own_weights = False

    def __init__(
        self,
        policy: Policy,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        end_token_ids: Sequence[int] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Loads nothing: the weights are the policy's.

        Args:
            policy: sampled from.
            tokenizer: None: the policy's.
            end_token_ids: tokens that end a completion; None: those of the model directory.
            max_model_len: tokens of prompt and completion together, at most; None: the model's
                context.
            max_num_seqs: sequences decoded at once; None: 128.
            on_progress: called as completions finish.
        """
        self.policy = policy
        self.tokenizer = tokenizer or policy.tokenizer
        if end_token_ids is None:
            end_token_ids = model_end_token_ids(policy.model_dir, self.tokenizer)
        self.end_ids = frozenset(end_token_ids)
        self.max_model_len = max_model_len or context_length(policy.model.config)
        self.max_num_seqs = max_num_seqs or _SEQUENCES_AT_ONCE
        self.on_progress = on_progress
        self.num_steps = 0  # decoding steps so far
        self._version = BASE_VERSION

    def progress(self) -> int:
        """Another value after every token, for any thread."""
        return self.num_steps

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Notes the version; the weights are the policy's own.

        Raises:
            StaleAdapterError: the policy's weights are not that version's.
        """
        if adapter is not None and self.policy.fingerprint() != adapter.fingerprint:
            raise StaleAdapterError(f"the policy's weights are not those of {adapter.name}")
        if adapter is None and not self.policy.has_base:
            raise UserError("lora.mode='full' has no adapter to switch off")
        self._version = BASE_VERSION if adapter is None else adapter.version

    @torch.no_grad()
    def sample(
        self,
        prompts_N: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """[N][G] completions; `on_group` as the protocol says.

        Of a job's processes all call it, also for no prompts at all. Where memory runs out, half as
        many sequences are decoded at once from then on: the same samples, up to rounding.

        Raises:
            UserError: a prompt leaves no room for max_tokens.
            torch.OutOfMemoryError: even the samples of one prompt take too much.
        """
        check_lengths(prompts_N, params, self.max_model_len)
        at_once = max(1, self.max_num_seqs // params.num_samples)
        out: list[list[Completion]] = []
        num_tokens = 0
        cache = KvCache(self.policy.model.config)  # its buffers serve all chunks
        seeds_N_G, caps_N = sample_seeds(prompts_N, params), max_tokens_of(prompts_N, params)
        with self._weights():
            while len(out) < len(prompts_N):
                chunk = slice(len(out), len(out) + at_once)
                try:
                    rows = _Rows(
                        prompts_N[chunk], seeds_N_G[chunk], caps_N[chunk], self.policy.device
                    )
                    done = _decode(self, rows, params, cache)
                except torch.OutOfMemoryError:
                    done, at_once = [], len(prompts_N[chunk]) // 2
                    if not at_once:
                        raise
                    self.max_num_seqs = at_once * params.num_samples
                    cache = KvCache(self.policy.model.config)
                if not done and self.policy.device.type == "cuda":
                    torch.cuda.empty_cache()  # the exception, which held memory, is gone
                for index, completions_G in enumerate(done, len(out)):
                    if on_group is not None:
                        on_group(index, completions_G)
                out += done
                num_tokens += sum(len(c.token_ids) for group in done for c in group)
                if self.on_progress:
                    total = len(prompts_N) * params.num_samples
                    self.on_progress(len(out) * params.num_samples, total, num_tokens)
        return out

    @contextlib.contextmanager
    def _weights(self) -> Iterator[None]:
        """The model computes the version in use inside, on each rank by itself."""
        is_base = self._version == BASE_VERSION and self.policy.has_base
        off = self.policy.adapter_off() if is_base else contextlib.nullcontext()
        with self.policy.whole_weights(), off:
            yield

    @torch.no_grad()
    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of tokens 1, 2, ... of each sequence."""
        out = []
        with self._weights():
            for ids in token_ids_N:
                batch = to_device(whole_sequence(ids), self.policy.device)
                out.append(self.policy.token_logprobs(batch, temperature=1.0)[0].tolist())
        return out

    def completion(
        self, token_ids: Sequence[int], logprobs: Sequence[float], max_tokens: int, stopped: bool
    ) -> Completion:
        """The record of one finished row."""
        ended = stopped or (bool(token_ids) and token_ids[-1] in self.end_ids)
        return Completion(
            token_ids=tuple(token_ids),
            text=str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)),
            sampler_logprobs_T=tuple(logprobs),
            is_truncated=not ended and len(token_ids) >= max_tokens,
            adapter_version=self._version,
        )

    def release_memory(self) -> None:
        """Nothing to free: the cache only lives during a call."""

    def close(self) -> None:
        """Nothing to free: the weights are the policy's."""


class _Rows:
    """The state of the rows still being decoded; S of them, dropped as they finish."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seeds_N_G: Sequence[Sequence[int]],
        max_tokens_N: Sequence[int],
        device: torch.device,
    ) -> None:
        num, group, self.max_tokens = len(prompts), len(seeds_N_G[0]), max(max_tokens_N)
        self.caps = [cap for cap in max_tokens_N for _ in range(group)]  # by sample
        self.width = max(len(p.token_ids) for p in prompts)
        ids_NP = torch.zeros(num, self.width, dtype=torch.int64)
        mask_NP = torch.zeros(num, self.width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):  # left-padded: every row's next token lines up
            ids_NP[row, self.width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask_NP[row, self.width - len(prompt.token_ids) :] = 1
        self.ids_NP, self.mask_NP = ids_NP.to(device), mask_NP.to(device)
        # Every row's later tokens count, so the mask is written once for the longest row.
        mask_SP = self.mask_NP.repeat_interleave(group, 0)
        self.mask_ST = torch.nn.functional.pad(mask_SP, (0, self.max_tokens), value=1)
        self.position_S = mask_SP.sum(-1)  # position of the next token
        self.index = list(range(num * group))  # row -> its sample's number
        self.token_ids: list[list[int]] = [[] for _ in self.index]
        self.logprobs: list[list[float]] = [[] for _ in self.index]
        self.stopped = [False] * len(self.index)
        self.live = [True] * len(self.index)
        self.uniforms_ST = torch.stack(
            [_uniforms(seed, self.max_tokens) for seeds_G in seeds_N_G for seed in seeds_G]
        ).to(device)

    def keep(self, rows: list[int]) -> Tensor:
        """Drops the other rows; returns the kept rows' numbers as a tensor."""
        keep_S = torch.tensor(rows, device=self.mask_ST.device)
        self.mask_ST, self.position_S = self.mask_ST[keep_S], self.position_S[keep_S]
        self.uniforms_ST = self.uniforms_ST[keep_S]
        self.index = [self.index[row] for row in rows]
        self.live = [True] * len(rows)
        return keep_S


def _decode(
    sampler: TorchSampler, rows: _Rows, params: SampleParams, cache: KvCache
) -> list[list[Completion]]:
    """Prefill each prompt once, copy its keys and values to its samples, then decode."""
    model = sampler.policy.model
    stops = Stops.of(params.stop, sampler.tokenizer)
    cache.begin(longest=rows.width + rows.max_tokens)
    positions_NP = (rows.mask_NP.cumsum(-1) - 1).clamp(min=0)
    logits_NV = model(
        input_ids=rows.ids_NP,
        attention_mask=rows.mask_NP,
        position_ids=positions_NP,
        past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(params.num_samples)
    logits_SV = logits_NV.repeat_interleave(params.num_samples, 0)
    for step in range(rows.max_tokens):
        interruption.check()
        sampler.num_steps += 1
        token_S, logprob_S = _draw(logits_SV, rows.uniforms_ST[:, step], params)
        _record(sampler, rows, token_S.tolist(), logprob_S.tolist(), stops)
        num_live = sum(rows.live)
        if not num_live:
            break
        if num_live < _COMPACT_BELOW * len(rows.live):
            live = front(rows.live)
            cache.keep(live, token_S.device)
            token_S = token_S[rows.keep(live)]
        logits_SV = model(
            input_ids=token_S.unsqueeze(-1),
            attention_mask=rows.mask_ST[:, : rows.width + step + 1],
            position_ids=rows.position_S.unsqueeze(-1),
            past_key_values=cache,
        ).logits[:, -1]
        rows.position_S = rows.position_S + 1
    done = [
        sampler.completion(ids, logprobs, cap, stopped)
        for ids, logprobs, cap, stopped in zip(
            rows.token_ids, rows.logprobs, rows.caps, rows.stopped, strict=True
        )
    ]
    group = params.num_samples
    return [done[start : start + group] for start in range(0, len(done), group)]


def _record(
    sampler: TorchSampler,
    rows: _Rows,
    token_ids: list[int],
    logprobs: list[float],
    stops: Stops,
) -> None:
    """Appends a token to each live row and marks the rows that end."""
    for row, (token, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        if not rows.live[row]:
            continue
        sample = rows.index[row]
        rows.token_ids[sample].append(token)
        rows.logprobs[sample].append(logprob)
        if token in sampler.end_ids:
            rows.live[row] = False
        elif token in stops.token_ids:
            rows.live[row], rows.stopped[sample] = False, True
        elif stops.texts:
            text = sampler.tokenizer.decode(
                rows.token_ids[sample], skip_special_tokens=not stops.in_special
            )
            if any(stop in text for stop in stops.texts):
                rows.live[row], rows.stopped[sample] = False, True
        if len(rows.token_ids[sample]) == rows.caps[sample]:
            rows.live[row] = False


def _draw(logits_SV: Tensor, uniform_S: Tensor, params: SampleParams) -> tuple[Tensor, Tensor]:
    """(token_S, logprob_S): greedy at temperature 0, else by the inverse CDF."""
    if params.temperature == 0:
        logprobs_SV = logits_SV.float().log_softmax(-1)
        token_S = logprobs_SV.argmax(-1)
    else:
        logprobs_SV = (logits_SV.float() / params.temperature).log_softmax(-1)
        if params.top_p < 1:
            logprobs_SV = _nucleus(logprobs_SV, params.top_p)
        cdf_SV = logprobs_SV.double().exp().cumsum(-1)
        target_S1 = uniform_S.unsqueeze(-1) * cdf_SV[:, -1:]
        token_S = torch.searchsorted(cdf_SV, target_S1, right=True).squeeze(-1)
        token_S = token_S.clamp(max=logits_SV.shape[-1] - 1)
    return token_S, logprobs_SV.gather(-1, token_S.unsqueeze(-1)).squeeze(-1)


def _nucleus(logprobs_SV: Tensor, top_p: float) -> Tensor:
    """The smallest set of tokens with at least top_p of the mass, renormalised."""
    sorted_SV, order_SV = logprobs_SV.sort(-1, descending=True)
    before_SV = sorted_SV.exp().cumsum(-1) - sorted_SV.exp()
    sorted_SV = sorted_SV.masked_fill(before_SV >= top_p, float("-inf"))
    kept_SV = torch.full_like(logprobs_SV, float("-inf")).scatter(-1, order_SV, sorted_SV)
    return kept_SV.log_softmax(-1)


def _uniforms(seed: int, count: int) -> Tensor:
    """One sample's stream of uniform numbers, float64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)
