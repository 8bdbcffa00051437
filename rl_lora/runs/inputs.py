"""What a run is computed from beside its settings: the base model and the problems, as hashes.

They are kept in the checkpoint and in run.json, and compared on resume and by `rl-lora eval RUN`,
so that no run goes on from another base or other data than it began with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.data.collect import HELD_OUT
from rl_lora.errors import UserError

if TYPE_CHECKING:
    from rl_lora.policy import Policy
    from rl_lora.sft.data import Tokens
    from rl_lora.types import Prompt

FLAG = "--accept-changed-data"
# What a copy of the same model, or a newer transformers, writes otherwise.
_NO_MATTER = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype")
_MADE = ("generated:", "reasoning_gym:")  # names of generators
_NOTHING = hashlib.sha256().hexdigest()  # older records of full fine-tuning hold this
_CONFIG_FILES = ("config.json", "generation_config.json")


class ChangedInputsError(UserError):
    """Base or data are others than when the run began; `what` is the message without the fix."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what}; put the old one back, or accept the change with {FLAG}")


def base_inputs(policy: Policy) -> dict[str, str]:
    """{"name", "dtype", "fingerprint", "config", "directory"} of the base, as it was just loaded.

    The fingerprint is of the weights in the policy's dtype, in full fine-tuning as well; config is
    a hash of the settings in the model's directory.
    """
    return {
        "name": policy.base_name,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "fingerprint": policy.base_fingerprint(),
        "config": _config_hash(policy.model_dir),
        "directory": str(policy.model_dir.resolve()),
    }


def prompt_inputs(prompts_N: Sequence[Prompt]) -> dict[str, Any]:
    """{"rows", "questions", "answers", "prompts"}: their number, and a hash of each, in order.

    Answers are references and worked solutions, prompts the token ids that the model is given.
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
    """Compares two `base_inputs` of one name; a part that an older record lacks is passed over.

    In two dtypes the same weights have two fingerprints: only the configuration is compared then.

    Args:
        old: of the run's record.
        new: as it is now.
        run: the run's folder, for the message.

    Raises:
        ChangedInputsError: weights or configuration are others.
    """
    is_one_dtype = old.get("dtype", new["dtype"]) == new["dtype"]
    for key, what in (("config", "configuration"), ("fingerprint", "weights")):
        if key == "fingerprint" and not is_one_dtype:
            continue
        if old.get(key, _NOTHING) not in (_NOTHING, new[key]):
            verb = "is another" if key == "config" else "are others"
            raise ChangedInputsError(
                f"base model {new['name']} has changed since {run} began: the {what} in "
                f"{new['directory']} {verb}"
            )


def check_data(old: Mapping[str, Any], new: Mapping[str, Any], run: Path) -> None:
    """Compares the parts ("train", "eval") that both have; an older record may have none.

    Raises:
        ChangedInputsError: naming the first part and what of it has changed.
    """
    for part in [part for part in ("train", "eval") if part in old and part in new]:
        if what := data_difference(old[part], new[part]):
            raise ChangedInputsError(f"data.{part} has changed since {run} began: {what}")


def data_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """In words what of a part's `prompt_inputs` or `sequence_inputs` has changed; None: nothing."""
    if old["rows"] != new["rows"]:
        return f"{old['rows']} rows then, {new['rows']} now"
    hashes = [key for key in new if key != "rows"]
    changed = [key for key in hashes if old.get(key, new[key]) != new[key]]
    if not changed:
        return None
    names = {"prompts": "rendered prompts"}
    kind = "rows" if changed == hashes else names.get(changed[0], changed[0])
    return f"its {kind} are others"


def absolute_source(name: str) -> str:
    """A data set's name, as a path from the root where it is a file or folder that is there."""
    is_file = name != HELD_OUT and not name.startswith(_MADE) and _is_there(name)
    return str(Path(name).expanduser().absolute()) if is_file else name


def absolute_model(name: str) -> str:
    """A model's name, as a path from the root where it is a directory that is there."""
    from rl_lora.models.resolve import list_models

    is_own = any(entry.name == name for entry in list_models())
    return str(Path(name).expanduser().absolute()) if _is_there(name) and not is_own else name


def _is_there(name: str) -> bool:
    return Path(name).expanduser().exists()


def _config_hash(model_dir: Path) -> str:
    parts = []
    for name in _CONFIG_FILES:
        if (model_dir / name).is_file():
            content = json.loads((model_dir / name).read_text(encoding="utf-8"))
            kept = {key: value for key, value in content.items() if key not in _NO_MATTER}
            parts.append(json.dumps(kept, sort_keys=True))
    return _hash(parts)


def _hash(parts: Iterable[str | bytes]) -> str:
    """sha256 over the parts, each with its length, so that no two lists have one text."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()
