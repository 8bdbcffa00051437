"""The policy: a base model with a LoRA adapter, or with all its weights in training.

Token log-probs come from the completion's hidden states alone, through lm_head in chunks, so no
[tokens x vocabulary] tensor is kept. The base's weights are never written to in LoRA mode;
`base_fingerprint` proves it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from rl_lora.batches import pack, to_device
from rl_lora.config import LoraSection, ModelSection
from rl_lora.config.checks import check_full_dtype
from rl_lora.errors import UserError
from rl_lora.models.architectures import check_architecture
from rl_lora.nn import attention
from rl_lora.nn.experts import adapted_parts, check_rank, expert_tensors, split_experts
from rl_lora.nn.lora import adapters_off, attach_lora, lora_layers
from rl_lora.nn.token_logprobs import score_hidden
from rl_lora.nn.variants import is_shifted
from rl_lora.types import Microbatch, TrainSample

BASE_PREFIX = ".base."  # a LoraLinear's inner layer, in parameter names


def pick_device(name: str) -> torch.device:
    """The device of `model.device`; auto: cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device={name!r} is not usable here: {reason}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `model.dtype`; auto: bfloat16 where its matmul is faster than float32's.

    A CPU without AMX or AVX512-BF16 emulates bfloat16, so the choice is measured (about 0.1 s).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {dtype: _matmul_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=lambda dtype: seconds[dtype])


def check_trainable(model: ModelSection, lora: LoraSection) -> None:
    """Raises UserError for full fine-tuning where model.dtype="auto" is bfloat16 on the device.

    Before anything is loaded; bfloat16 by name is refused by the settings themselves.
    """
    if lora.mode == "full" and model.dtype == "auto":
        dtype = pick_dtype(model.dtype, pick_device(model.device))
        check_full_dtype(lora, str(dtype).removeprefix("torch."))


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The fastest of 5 matmuls of 512 x 512 x 512, after 2 to warm up."""
    a, b = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


class Policy:
    """Base model plus adapter (mode "lora") or the whole model in training (mode "full").

    Raises:
        UserError: the model directory holds no causal language model that this class can score.
    """

    def __init__(
        self,
        model_dir: Path,
        model: ModelSection,
        lora: LoraSection,
        *,
        seed: int,
        checkpoint_activations: bool = False,
        keep_reference: bool = False,
    ) -> None:
        self.model_dir = model_dir
        self.base_name = model.name
        self.base_revision = model.revision
        self.lora = lora
        self.is_full = lora.mode == "full"
        self.device = pick_device(model.device)
        self.dtype = pick_dtype(model.dtype, self.device)
        config = AutoConfig.from_pretrained(model_dir)
        check_architecture(config, lora, model_dir)
        check_rank(config, lora)
        self.model: PreTrainedModel = _load(model_dir, self.dtype)
        self.model.to(self.device)  # type: ignore[arg-type]  # its stubs know no device
        self.can_share_prompts = _can_share_prompts(self.model)
        self.target_names: list[str] = []
        if self.is_full:
            self.model.requires_grad_(True)
        else:
            self.target_names = attach_lora(self.model, lora, seed)
        # Walks over all modules, once: publishing a version asks for them at each step.
        self._lora_layers = list(lora_layers(self.model))
        self.expert_names = adapted_parts(self.model)  # of gate, up and down in files; () without
        self._reference = copy.deepcopy(self.model) if self.is_full and keep_reference else None
        self._has_checkpoints = checkpoint_activations
        if checkpoint_activations:
            self.model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": attention.checkpoint_contexts}
            )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in a fixed order."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """lora_A [rank, d_in] and lora_B [d_out, rank] under PEFT's names (mode "lora").

        As they are served: of twice the rank with PiSSA and OLoRA, with magnitudes for DoRA.
        """
        tensors = {
            f"base_model.model.{name}.{part}": tensor.detach()
            for name, layer in self._lora_layers
            for part, tensor in layer.published().items()
        }
        return tensors | (expert_tensors(self.model) if self.expert_names else {})

    def state_tensors(self) -> dict[str, Tensor]:
        """What training goes on from, the policy's own tensors: as published, but with PiSSA and
        OLoRA the trained factors and the frozen start apart."""
        if self.is_full or not is_shifted(self.lora.variant):
            return self.published_tensors()
        return {
            f"base_model.model.{name}.{part}": tensor.detach()
            for name, layer in self._lora_layers
            for part, tensor in layer.state().items()
        }

    def published_tensors(self) -> dict[str, Tensor]:
        """What a version of this policy consists of: the adapter, or the whole state dict."""
        if not self.is_full:
            return self.adapter_tensors()
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        state = {n: t for n, t in self.model.state_dict().items() if n not in tied}
        return split_experts(self.model, state)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies `state_tensors` in (a published version's, but with PiSSA and OLoRA); names and
        shapes must match exactly.

        Raises:
            UserError: a name or shape differs, as with an adapter of another base model.
        """
        own = self.state_tensors()
        for name in sorted(own.keys() ^ tensors.keys()):
            where = "lacks" if name in own else "has an extra tensor"
            raise UserError(f"adapter of another base model or shape: it {where} {name}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise UserError(
                    f"adapter of another base model or rank: {name} is "
                    f"{list(tensors[name].shape)}, {self.base_name} needs {list(tensor.shape)}"
                )
            tensor.copy_(tensors[name])

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The base model alone (mode "lora")."""
        with adapters_off():
            yield

    def token_logprobs(self, batch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
        """(policy_logprobs_C with gradient, entropy_C without), float32, nats.

        Both are of the distribution softmax(logits / temperature), the one sampled from.
        """
        return _score(self.model, batch, temperature)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Wraps forward and backward passes: activations are checkpointed here, if they are.

        transformers checkpoints in training mode only (dropout is 0), where the model would decode
        without its KV cache; so the mode ends with the block.
        """
        if self._has_checkpoints:
            self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    @torch.no_grad()
    def reference_logprobs(self, batch: Microbatch, temperature: float) -> Tensor:
        """reference_logprobs_C: the base's, float32, nats."""
        if self.is_full:
            assert self._reference is not None, "built without keep_reference"
            return _score(self._reference, batch, temperature)[0]
        with self.adapter_off():
            return _score(self.model, batch, temperature)[0]

    def base_fingerprint(self) -> str:
        """sha256 over exact integer checksums of the base's weights (mode "lora").

        The checksums run on the device in wrap-around int64, so they are exact and quick.
        """
        digest = hashlib.sha256()
        for name, parameter in sorted(self.model.named_parameters()):
            if not parameter.requires_grad:
                digest.update(f"{name.replace(BASE_PREFIX, '.')}{tuple(parameter.shape)}".encode())
                digest.update(repr(_checksum(parameter.detach())).encode())
        return digest.hexdigest()


def _load(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(model_dir)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing tensors, of which `_check_complete` tells
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model {model_dir}: not a loadable causal language model: {reason}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model: PreTrainedModel = loaded[0]
    _check_complete(loaded[1], model_dir)
    model.eval()
    _align(model)
    for module in model.modules():  # a policy gradient needs the sampler's very distribution
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (an attribute nn.Module lacks)
        if hasattr(module, "jitter_noise"):  # of a mixture's router, in training mode
            setattr(module, "jitter_noise", 0.0)  # noqa: B010
    _check_lm_head(model, model_dir)
    return model


def _check_complete(loading_info: dict[str, Any], model_dir: Path) -> None:
    """Raises UserError where weights were drawn at random: the files lack them, or have others."""
    mismatched = sorted(loading_info["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise UserError(
            f"model {model_dir}: {name} is {list(found)} in its files and {list(wanted)} by its "
            f"config.json ({len(mismatched)} such tensors); fetch the model again"
        )
    if missing := sorted(loading_info["missing_keys"]):
        fix = "fetch the model again"
        if "lm_head" in missing[0]:
            fix += (
                ", or set tie_word_embeddings=true in config.json if its lm_head is the embedding"
            )
        raise UserError(
            f"model {model_dir}: its files have no {missing[0]} ({len(missing)} missing); {fix}"
        )
    if unused := sorted(loading_info["unexpected_keys"]):
        warnings.warn(
            f"model {model_dir}: {len(unused)} tensors of its files belong to no layer of the "
            f"model and are not used, {unused[0]} first",
            stacklevel=2,
        )


@torch.no_grad()
def _align(model: PreTrainedModel) -> None:
    """Moves weights that do not begin at a multiple of 64 bytes.

    A file's weights lie where the file has them, or where Python's heap put them, and a matmul
    rounds by its operands' alignment: the same run would then end in other digits now and then.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


@torch.no_grad()
def _check_lm_head(model: PreTrainedModel, model_dir: Path) -> None:
    """Hidden states through lm_head must give the model's own logits (some models scale or cap)."""
    token_ids_BT = torch.arange(1, 9).unsqueeze(0)
    logits_BTV = model(input_ids=token_ids_BT, use_cache=False).logits.float()
    hidden_BTD = model.base_model(input_ids=token_ids_BT, use_cache=False).last_hidden_state
    own_BTV = model.get_output_embeddings()(hidden_BTD).float()
    if not torch.allclose(own_BTV, logits_BTV, atol=1e-2, rtol=1e-2):
        raise UserError(
            f"model {model_dir}: its logits are not lm_head(hidden states); models that scale or "
            "cap their logits are not supported"
        )


@torch.no_grad()
def _can_share_prompts(model: PreTrainedModel) -> bool:
    """Lets the model attend by `attention`, if completions that share a prompt then score as alone.

    Not so under a sliding window, with positions that go by the place in the row, or in a model
    outside transformers' attention interface; such a model keeps SDPA, one completion a row.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and getattr(model.config, "use_sliding_window", True):
        return False
    samples = [
        TrainSample((5, 6, 7), completion, (0.0,) * len(completion), 1.0, 0)
        for completion in ((8, 9, 10, 11), (12, 13))
    ]
    scores = []
    for share_prompts, attention_name in ((False, "sdpa"), (True, attention.NAME)):
        ((batch,),) = pack(
            samples,
            denominator="tokens",
            max_tokens=4,
            microbatch_tokens=64,
            share_prompts=share_prompts,
        )
        model.set_attn_implementation(attention_name)
        batch = to_device(batch, model.device)
        logprobs_C = _score(model, batch, temperature=1.0)[0]
        scores.append(logprobs_C[batch.target_ids_C.argsort()])
    alone_C, shared_C = scores
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    if torch.allclose(alone_C, shared_C, atol=tolerance):
        return True
    model.set_attn_implementation("sdpa")
    return False


def _score(model: PreTrainedModel, batch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
    with attention.using(batch.layout):
        hidden_BTD = model.base_model(
            input_ids=batch.token_ids_BT, position_ids=batch.position_BT, use_cache=False
        ).last_hidden_state
    hidden_CD = take_positions(hidden_BTD, batch.row_C, batch.column_C)
    return score_hidden(hidden_CD, model.get_output_embeddings(), batch.target_ids_C, temperature)


def take_positions(hidden_BTD: Tensor, row_C: Tensor, column_C: Tensor) -> Tensor:
    """[C, D]: the hidden states at (row, column), with a gradient that has one order of sums.

    A prompt's last position is read once for each of its completions. The gradient of
    hidden_BTD[row_C, column_C] adds those up on several threads by atomic additions on a CPU, in
    the order in which they come: two runs of one seed then end in other digits now and then.
    """
    return hidden_BTD.flatten(0, 1).index_select(0, row_C * hidden_BTD.shape[1] + column_C)


def _checksum(tensor: Tensor) -> tuple[int, int]:
    """Plain and position-weighted sums of the tensor's words, in wrap-around int64."""
    words = (
        tensor.contiguous()
        .view(-1)
        .view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    )
    plain = weighted = 0
    for start in range(0, words.numel(), 2**22):
        part = words[start : start + 2**22].to(torch.int64)
        index = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        plain += int(part.sum())
        weighted += int((part * index).sum())
    return plain, weighted
