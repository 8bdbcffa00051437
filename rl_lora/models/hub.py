"""The hub: a model's or an adapter's repository becomes a directory in its cache."""

from __future__ import annotations

import re
from pathlib import Path

from rl_lora.errors import UserError

_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_IGNORED = ["original/*", "consolidated*", "onnx/*", "*/*.safetensors"]
_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def fetch_model(name: str, revision: str | None, *, otherwise: str, hint: str = "") -> Path:
    """A model's repository; `otherwise` is the name of one that needs no hub.

    Raises:
        UserError: unknown, gated, out of reach, or a name that can be none; `hint` ends the line.
    """
    advice = f"give a local directory, or {otherwise!r}, which needs no hub"
    return _fetch("model", name, revision, _MODEL_FILES, advice, hint)


def adapter_path(name: str | Path) -> Path:
    """An adapter's directory: the path itself, or the repository of a hub id (owner/name).

    Raises:
        UserError: no such directory, and no adapter of that id can be fetched.
    """
    path = Path(name)
    if path.exists() or not _ID.fullmatch(str(name)):
        return path
    return _fetch("adapter", str(name), None, _ADAPTER_FILES, "give a local directory", "")


def _fetch(
    what: str, name: str, revision: str | None, files: list[str], advice: str, hint: str
) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download

    where = f"{what} hub id {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=files, ignore_patterns=_IGNORED
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{where}: neither a directory here nor known to the hub{hint}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{what}.name={name!r} is no directory and no hub id{hint}") from error
    except (OSError, errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise UserError(
            f"{where}: no directory of that name here, and the hub cannot be reached; "
            f"{advice}{hint}"
        ) from error
    return Path(found)
