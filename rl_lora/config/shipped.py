"""Finding a config: a path, or the bare name of one that is shipped.

The shipped configs are in `configs/` of a checkout and in `rl_lora/configs/` of an installed wheel.
"""

from __future__ import annotations

from pathlib import Path

from rl_lora.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_configs() -> dict[str, Path]:
    """Name -> file, e.g. {"quickstart": Path(".../configs/quickstart.toml"), ...}."""
    installed = _PACKAGE / "configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_config(path: Path) -> Path:
    """The file of a path, or of a shipped config's name where no such file exists.

    Raises:
        UserError: neither exists.
    """
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.name == str(path) and path.name in shipped:
        return shipped[path.name]
    raise UserError(
        f"config file {path} does not exist; shipped configs go by name, as in `rl-lora train "
        f"quickstart`: {nearest(path.stem, shipped)}"
    )
