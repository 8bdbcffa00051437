"""The reference sampler's KV cache: buffers with room to grow, instead of a copy per token.

transformers' DynamicCache copies all keys and values for each new token; its StaticCache attends
over its whole length at each token, however little is filled, and cannot drop rows. Here layers of
full attention write into buffers and return views of the filled part; other layers (sliding
windows) remain transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from rl_lora.errors import UserError

_ROOM = 256  # tokens beyond the prompt in a new buffer, which doubles when it is full


class KvCache(DynamicCache):
    """transformers' cache, with `BufferedLayer`s for full attention.

    Example: KvCache(model.config), then for each batch begin(longest=132), the prompts' forward
    pass, batch_repeat_interleave(8), and a forward pass per token.

    Raises:
        UserError: a layer whose state is not keys and values, as with linear attention.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        strange = {type(x).__name__ for x in self.layers if not isinstance(x, DynamicLayer)}
        if strange:
            raise UserError(
                f"sampling.backend='torch' has no cache for {', '.join(sorted(strange))}: "
                "models with other layers than attention are not supported"
            )
        self.layers = [
            BufferedLayer() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]

    def begin(self, longest: int) -> None:
        """Empties the cache for a batch of at most `longest` tokens per row; buffers are kept."""
        for layer in self.layers:
            # Before 5.19, transformers' reset only zeroes: the next batch would be appended.
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.reset()
        for layer in self.layers:
            if isinstance(layer, BufferedLayer):
                layer.longest = longest

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Keeps only these rows, in this order (see `front`)."""
        moved = [(slot, row) for slot, row in enumerate(rows) if slot != row]
        slots_M = torch.tensor([slot for slot, _ in moved], dtype=torch.int64, device=device)
        rows_M = torch.tensor([row for _, row in moved], dtype=torch.int64, device=device)
        rows_S = torch.tensor(rows, dtype=torch.int64, device=device)
        for layer in self.layers:
            if isinstance(layer, BufferedLayer):
                layer.keep(len(rows), slots_M, rows_M)
            elif isinstance(layer, DynamicLayer):  # all are: see __init__
                layer.batch_select_indices(rows_S)


class BufferedLayer(DynamicLayer):
    """Keys and values [S, J, T, D] as views of buffers that outlive the batch.

    Those of the prompts stay as the model made them until `batch_repeat_interleave` writes them
    into the buffers, once per sample.
    """

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0
        self._buffers: tuple[_Buffer, _Buffer] = (_Buffer(), _Buffer())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """(keys, values), the new ones last."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        else:
            assert self.keys is not None
            assert self.values is not None
            keys, values = self._buffers
            self.keys = keys.append(self.keys, key_states, self.longest)
            self.values = values.append(self.values, value_states, self.longest)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Writes each row's keys and values into the rows of its `repeats` samples."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self._buffers
        self.keys = keys.fill(self.keys, repeats, self.longest)
        self.values = values.fill(self.values, repeats, self.longest)

    def keep(self, num_rows: int, slots_M: Tensor, rows_M: Tensor) -> None:
        """Copies rows into slots, and drops the rows after num_rows."""
        for name in ("keys", "values"):
            states = getattr(self, name)
            states[slots_M] = states[rows_M]
            setattr(self, name, states[:num_rows])


class _Buffer:
    """One tensor [rows, J, capacity, D], of which the first rows and tokens are filled."""

    def __init__(self) -> None:
        self._storage: Tensor | None = None

    def fill(self, states_NJTD: Tensor, repeats: int, longest: int) -> Tensor:
        """The view [N x repeats, J, T, D], each row written `repeats` times."""
        num_rows, num_tokens = states_NJTD.shape[0] * repeats, states_NJTD.shape[2]
        storage = self._storage
        if storage is None or storage.shape[0] < num_rows or storage.shape[2] < num_tokens:
            self._storage = storage = None  # freed before the next one is made
            self._storage = storage = _empty(
                states_NJTD, num_rows, min(longest, num_tokens + _ROOM)
            )
        view_SJTD = storage[:num_rows, :, :num_tokens]
        view_SJTD.unflatten(0, (-1, repeats)).copy_(states_NJTD.unsqueeze(1))
        return view_SJTD

    def append(self, view_SJTD: Tensor, states_SJTD: Tensor, longest: int) -> Tensor:
        """The view with new tokens at its end."""
        num_rows, _, num_before, _ = view_SJTD.shape
        num_tokens = num_before + states_SJTD.shape[2]
        if self._storage is None or num_tokens > self._storage.shape[2]:
            capacity = max(num_tokens, min(longest, 2 * num_before))
            self._storage = _empty(view_SJTD, num_rows, capacity)
            self._storage[:, :, :num_before] = view_SJTD
        self._storage[:num_rows, :, num_before:num_tokens] = states_SJTD
        return self._storage[:num_rows, :, :num_tokens]


def front(is_live_S: Sequence[bool]) -> list[int]:
    """The live rows, moved as little as possible.

    Example: [True, False, True, True] -> [0, 3, 2].
    """
    num_live = sum(is_live_S)
    late = [row for row in range(num_live, len(is_live_S)) if is_live_S[row]]
    return [row if is_live_S[row] else late.pop() for row in range(num_live)]


def _empty(like_SJTD: Tensor, num_rows: int, capacity: int) -> Tensor:
    """An unfilled buffer of the tensor's heads, width, dtype and device."""
    _, heads, _, width = like_SJTD.shape
    return like_SJTD.new_empty(num_rows, heads, capacity, width)
