"""Hashes of what a run depends on besides its settings: the base model and the data.

They are stored in run.json and in each checkpoint, and compared on resume and by `rl-lora eval
RUN`, so that a run never continues from another base or with other data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.config import HELD_OUT
from rl_lora.errors import UserError

if TYPE_CHECKING:
    from rl_lora.policy import Policy
    from rl_lora.sft.data import Tokens
    from rl_lora.types import Prompt

FLAG = "--accept-changed-data"
# Keys in which a copy of the same model, or one by a newer transformers, may differ.
_IGNORED_KEYS = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype")
_GENERATORS = ("generated:", "reasoning_gym:")  # prefixes of data sets that are no files
_CONFIG_FILES = ("config.json", "generation_config.json")


class ChangedInputsError(UserError):
    """Base or data have changed since the run began; `what` is the message without the fix."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what}; put the old one back, or accept the change with {FLAG}")


def base_inputs(policy: Policy) -> dict[str, str]:
    """{"name", "dtype", "fingerprint", "config", "directory"} of the base, just after loading.

    The fingerprint is of the weights in the policy's dtype; config is a hash of the settings in the
    model's directory.
    """
    return {
        "name": policy.base_name,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "fingerprint": policy.base_fingerprint(),
        "config": _config_hash(policy.model_dir),
        "directory": str(policy.model_dir.resolve()),
    }


def prompt_inputs(prompts_N: Sequence[Prompt]) -> dict[str, Any]:
    """{"rows", "questions", "answers", "prompts"}: the number of rows, and hashes over all rows.

    Answers are references and worked solutions; prompts are the token ids that the model reads.
    """
    return {
        "rows": len(prompts_N),
        "questions": _hash(prompt.question for prompt in prompts_N),
        "answers": _hash(text for p in prompts_N for text in (p.reference, p.solution)),
        "prompts": _hash(repr(tuple(prompt.token_ids)) for prompt in prompts_N),
    }


def sequence_inputs(sequences: Sequence[Tokens]) -> dict[str, Any]:
    """{"rows", "prompts", "answers"} of supervised sequences: their number, and hashes of ids."""
    return {
        "rows": len(sequences),
        "prompts": _hash(one.prompt_ids.tobytes() for one in sequences),
        "answers": _hash(one.completion_ids.tobytes() for one in sequences),
    }


def check_base(old: Mapping[str, Any], new: Mapping[str, Any], run: Path) -> None:
    """Compares two `base_inputs` of one name.

    The fingerprint of the same weights depends on the dtype: if the dtypes differ, only the
    configurations are compared.

    Raises:
        ChangedInputsError: weights or configuration differ; it names the run's folder.
    """
    what = ""
    if old["config"] != new["config"]:
        what = f"the configuration in {new['directory']} differs"
    elif old["dtype"] == new["dtype"] and old["fingerprint"] != new["fingerprint"]:
        what = f"the weights in {new['directory']} differ"
    if what:
        raise ChangedInputsError(f"base model {new['name']} has changed since {run} began: {what}")


def check_data(old: Mapping[str, Any], new: Mapping[str, Any], run: Path) -> None:
    """Compares the parts ("train", "eval") that `new` has.

    Raises:
        ChangedInputsError: names the first part that differs, and in what.
    """
    for part in new:
        if what := data_difference(old[part], new[part]):
            raise ChangedInputsError(f"data.{part} has changed since {run} began: {what}")


def data_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """What differs between two `prompt_inputs` or `sequence_inputs`, in words; None: nothing."""
    if old["rows"] != new["rows"]:
        return f"{old['rows']} rows then, {new['rows']} now"
    hashes = [key for key in new if key != "rows"]
    changed = [key for key in hashes if old[key] != new[key]]
    if not changed:
        return None
    names = {"prompts": "rendered prompts"}
    kind = "rows" if changed == hashes else names.get(changed[0], changed[0])
    return f"its {kind} differ"


def absolute_source(name: str) -> str:
    """The name of a data set, as an absolute path if it is an existing file or folder."""
    is_path = name != HELD_OUT and not name.startswith(_GENERATORS)
    return _absolute(name) if is_path else name


def absolute_model(name: str) -> str:
    """The name of a model, as an absolute path if it is an existing directory."""
    from rl_lora.models.resolve import list_models

    is_listed = any(entry.name == name for entry in list_models())
    return name if is_listed else _absolute(name)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _config_hash(model_dir: Path) -> str:
    parts = []
    for name in _CONFIG_FILES:
        if (model_dir / name).is_file():
            content = json.loads((model_dir / name).read_text(encoding="utf-8"))
            kept = {key: value for key, value in content.items() if key not in _IGNORED_KEYS}
            parts.append(json.dumps(kept, sort_keys=True))
    return _hash(parts)


def _hash(parts: Iterable[str | bytes]) -> str:
    """sha256 over the parts, each after its length, so that only equal lists hash alike."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()
