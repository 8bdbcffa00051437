"""Downloads models and adapters from the hub into its cache, which is used where it is offline."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from rl_lora.errors import UserError

_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_IGNORED = ["original/*", "consolidated*", "onnx/*", "*/*.safetensors"]
_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
_LOG = logging.getLogger(__name__)
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def fetch_model(name: str, revision: str | None, *, otherwise: str, hint: str = "") -> Path:
    """The directory of a model from the hub.

    Args:
        name: its hub id, owner/name.
        revision: branch, tag or commit; None: the default branch.
        otherwise: a model that needs no hub, to be suggested in errors.
        hint: the end of the error message.

    Raises:
        UserError: unknown, gated or unreachable, or an invalid name.
    """
    advice = f"give a local directory, or {otherwise!r}, which needs no hub{hint}"
    return _fetch("model", name, revision, _MODEL_FILES, advice)


def adapter_path(name: str | Path) -> Path:
    """An adapter's directory: the path if it exists, else a download if it is a hub id.

    Raises:
        UserError: the adapter of that hub id cannot be fetched.
    """
    path = Path(name)
    if path.exists() or not _ID.fullmatch(str(name)):
        return path
    return _fetch("adapter", str(name), None, _ADAPTER_FILES, "give a local directory")


def _fetch(what: str, name: str, revision: str | None, files: list[str], advice: str) -> Path:
    import httpx
    from huggingface_hub import HfApi, errors, snapshot_download

    where = f"{what} hub id {name!r}" + (f" at revision {revision!r}" if revision else "")
    is_offline = False
    try:
        try:
            HfApi().repo_info(name, revision=revision)
        except (errors.OfflineModeIsEnabled, httpx.TransportError):
            is_offline = True
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=files,
            ignore_patterns=_IGNORED,
            local_files_only=is_offline,
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{where} is neither a directory nor known to the hub; {advice}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{what} {name!r} is neither a directory nor a hub id; {advice}") from error
    except errors.IncompleteSnapshotError as error:
        raise UserError(
            f"{where}: the hub cannot be reached, and the cached copy is incomplete; {advice}"
        ) from error
    except (OSError, errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise UserError(
            f"{where}: there is no such directory, and the hub cannot be reached; {advice}"
        ) from error
    if is_offline:
        _LOG.warning("%s: the hub cannot be reached; the cached copy %s is used", where, found)
    return Path(found)
