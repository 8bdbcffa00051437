"""README.md, CONTRIBUTING.md and docs/ work as printed: commands, settings, code, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docs_configuration
import pytest

from rl_lora import cli
from rl_lora.config import load_config
from rl_lora.config.algorithm import load_algorithm
from rl_lora.config.sft import load_sft_config
from rl_lora.config.shipped import shipped_configs
from rl_lora.studies.config import load_study

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LOADERS: dict[str, Callable[..., object]] = {
    "train": load_config,
    "sft": load_sft_config,
    "study": load_study,
}
GENERATED = {"configuration.md", "architectures.md"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, language: str) -> Iterator[str]:
    """The fenced blocks of a language ("": of none)."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match.group(1) == language:
            yield match.group(2)


def commands(page: Path) -> list[str]:
    """The `rl-lora` commands of a page's blocks."""
    text = page.read_text()
    text = "\n".join(block for name in ("", "bash") for block in blocks(text, name))
    lines = text.replace("\\\n", " ").splitlines()
    return [
        line.removeprefix("$ ").removeprefix(".venv/bin/")
        for line in lines
        if re.match(r"(\$ )?(\.venv/bin/)?rl-lora ", line)
    ]


@each_page
def test_commands_parse_with_their_settings(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        arguments = cli._parse(words)
        if words[0] in LOADERS:
            LOADERS[words[0]](arguments.config, arguments.overrides)
        elif words[0] == "eval":
            job = arguments.target if str(arguments.target) in shipped_configs() else None
            load_config(job, arguments.overrides)


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name
)
def test_settings_in_the_text_exist(page: Path) -> None:
    sections = r"run|model|lora|data|sampling|reward|algorithm|optim|warm_start|eval"
    setting = re.compile(rf"`((?:{sections})\.(\w+))(=[^`]*)?`")
    for match in setting.finditer(page.read_text()):
        key, _, value = match.groups()
        section = docs_configuration.RunConfig.model_fields[key.split(".")[0]].annotation
        known = getattr(section, "model_fields", {})
        assert match.group(2) in known or key in ("data.train", "data.eval"), key
        if value and page.name != "gpu-check.md":
            _value_is_of_its_field(key, value[1:])


def _value_is_of_its_field(key: str, value: str) -> None:
    partners = {"algorithm.kl": ["algorithm.kl_weight=0.1"], "lora.mode": ["model.dtype=float32"]}
    overrides = [f"{key}={value}", *partners.get(key, [])]
    if "staleness" not in key:
        overrides.append("sampling.backend=torch")
    load_config(None, overrides)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


@each_page
def test_files_named_in_the_text_exist(page: Path) -> None:
    named = re.findall(
        r"`(?:python3?(?:\.\d+)? )?((?:tests|scripts|docs|configs|requirements|rewards|notebooks)"
        r"/[\w./-]*)",
        page.read_text(),
    )
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_fault_has_its_tests() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if "|" in line]
    found = [re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row) for row in rows]
    assert sum(map(bool, found)) >= 30
    for row, tests in zip(rows, found, strict=True):
        assert tests or re.match(r"\|(-|.*\| (test|promised) \|)", row), row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text() or not name, (file, name)


@each_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z][a-z-]+)\b", "\n".join(_code(page.read_text()))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def _code(text: str) -> Iterator[str]:
    yield from blocks(text, "")
    yield from blocks(text, "bash")
    yield from re.findall(r"`([^`\n]+)`", text)


def test_the_verifiers_example_runs() -> None:
    (example,) = blocks((ROOT / "docs" / "verifier.md").read_text(), "python")
    exec(compile(example, "docs/verifier.md", "exec"), {})  # noqa: S102 - our own page


def test_the_example_rewards_run() -> None:
    text = (ROOT / "docs" / "rewards.md").read_text()
    names: dict[str, object] = {}
    for example in blocks(text, "python"):
        exec(compile(example, "docs/rewards.md", "exec"), names)  # noqa: S102 - our own page
    one, batch = names["short_and_right"], names["by_difficulty"]
    assert callable(one)
    assert callable(batch)
    assert one("so 42", "42") == pytest.approx(0.995)
    assert batch(["so 42", "no"], ["42", "7"], [3, 5]) == [3, 0]


def test_the_example_loss_trains(write_module: Callable[[str, str], Path]) -> None:
    (example,) = blocks((ROOT / "docs" / "algorithms.md").read_text(), "python")
    write_module("my_losses", example)
    section = load_config(
        None, ["algorithm.loss=my_losses:reinforce", "algorithm.scale=0.5"]
    ).algorithm
    loss = load_algorithm(section).loss  # tried out there
    assert isinstance(loss, partial)
    assert loss.keywords == {"scale": 0.5}


def test_the_example_environment_answers() -> None:
    (example,) = blocks((ROOT / "docs" / "environments.md").read_text(), "python")
    names: dict[str, Any] = {}
    exec(compile(example, "docs/environments.md", "exec"), names)  # noqa: S102 - our own page
    environment, turn = names["HigherOrLower"](), names["Turn"]
    environment.reset(SimpleNamespace(reference="7"), 0)
    steps = [environment.step(turn(text, None, False)) for text in ("9", "7 or so", "3", "7")]
    assert [step.observation for step in steps] == ["lower", "Give a number.", "higher", None]
    assert steps[-1].score.reward == pytest.approx(0.8)


def test_the_configuration_page_is_current() -> None:
    assert docs_configuration.PAGE.read_text() == docs_configuration.page(), (
        "run `python scripts/docs_configuration.py`"
    )


def test_every_setting_has_a_meaning() -> None:
    rows = re.findall(r"^\| (`\w+(?:\.\w+)?`) \|.*\| ([^|]*) \|$", docs_configuration.page(), re.M)
    assert len(rows) > 80
    assert [key for key, meaning in rows if not meaning.strip()] == []


def test_contributing_names_every_package_and_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "rl_lora").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"\n  {path.name}/ " in text, path.name
    for path in (ROOT / "rewards").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"{path.name}/ (" in text, path.name


@pytest.mark.parametrize(
    ("page", "lines"),
    [("README.md", 150), ("CONTRIBUTING.md", 170)],
    ids=["readme", "contributing"],
)
def test_the_first_pages_stay_short(page: str, lines: int) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= lines
