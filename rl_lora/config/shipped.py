"""Finding a config: a path, or the bare name of one that is shipped.

The shipped configs are in `configs/` of a checkout and in `rl_lora/configs/` of an installed wheel.
"""

from __future__ import annotations

from pathlib import Path

from rl_lora.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_configs() -> dict[str, Path]:
    """Name -> file, e.g. {"examples/dapo": Path(".../configs/examples/dapo.toml"), ...}."""
    installed = _PACKAGE / "configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "configs"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.toml"))
    }


def find_config(path: Path) -> Path:
    """The file of a path, or of a shipped config's name where no such file exists.

    Raises:
        UserError: neither exists.
    """
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.as_posix() in shipped:
        return shipped[path.as_posix()]
    is_example = path.parts[:1] == ("examples",)
    names = [name for name in shipped if name.startswith("examples/") == is_example]
    name = path.as_posix() if is_example else path.stem
    raise UserError(
        f"config file {path} does not exist; shipped configs go by name, as in `rl-lora train "
        f"quickstart`: {nearest(name, names)}"
    )
