"""Who may import whom: imports point one way, and nothing heavy loads before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("rl_lora", "rewards")
    for path in (ROOT / package).rglob("*.py")
}
# The rooms of the verifier, lowest first: none imports one above it. Types and rules are below all.
REWARD_ROOMS = ("parsing", "extraction", "equality", "workers")
# rollouts, ahead, evaluate score; types passes the record on; job, grade, regrade make a verifier.
MAY_IMPORT_REWARDS = {
    "rl_lora.scoring",
    "rl_lora.rollouts",
    "rl_lora.ahead",
    "rl_lora.evaluate",
    "rl_lora.types",
    "rl_lora.job",
    "rl_lora.grade",
    "rl_lora.regrade",
}
EAGER_VLLM_ROOMS = {"rl_lora.vllm_cpu_lora", "rl_lora.vllm_cpu_sampler"}  # imported lazily
VLLM_ROOMS = EAGER_VLLM_ROOMS | {
    "rl_lora.vllm_sampler",
    "rl_lora.vllm_process",
    "rl_lora.vllm_cpu_norm",
    "rl_lora.vllm_merge",
    "rl_lora.vllm_engine",
    "rl_lora.vllm_classes",
}
STANDARD = sys.stdlib_module_names


def imports_of(module: str, *, lazy: bool = True) -> set[str]:
    """Full names of the modules that a module imports; lazy=False: at its import alone."""
    tree = ast.parse(MODULES[module].read_text())
    return set(_imports(tree, module, lazy=lazy))


def _imports(node: ast.AST, module: str, *, lazy: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: imports are absolute here"
            name = child.module or ""
            yield name
            yield from (f"{name}.{a.name}" for a in child.names if f"{name}.{a.name}" in MODULES)
        elif (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy
        ) or _is_for_type_checkers(child):
            continue
        else:
            yield from _imports(child, module, lazy=lazy)


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_only_scoring_modules_import_the_rewards() -> None:
    importers = {m for m in MODULES if m.startswith("rl_lora") and "rewards" in top(imports_of(m))}
    assert importers <= MAY_IMPORT_REWARDS
    assert "rl_lora.rollouts" in importers  # the walk below these tests does see imports


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("rewards")])
def test_rewards_import_neither_torch_nor_the_trainer(module: str) -> None:
    allowed = STANDARD | {"rewards", "sympy", "mpmath", "math_verify"}
    assert top(imports_of(module)) <= allowed


def test_vllm_is_imported_lazily_and_in_its_rooms_alone() -> None:
    importers = {m for m in MODULES if "vllm" in top(imports_of(m))}
    assert importers
    assert importers <= VLLM_ROOMS
    eager = {m for m in MODULES if "vllm" in top(imports_of(m, lazy=False))}
    assert eager <= EAGER_VLLM_ROOMS
    for module in MODULES:
        assert not EAGER_VLLM_ROOMS & imports_of(module, lazy=False)


def test_types_imports_only_the_record_of_the_rewards_and_the_layout_of_a_row() -> None:
    own = {name for name in imports_of("rl_lora.types") if top({name}) <= {"rl_lora", "rewards"}}
    assert own == {"rewards", "rl_lora.segments"}


@pytest.mark.parametrize("module", ["rl_lora.losses", "rl_lora.advantages", "rl_lora.batches"])
def test_the_maths_knows_neither_models_nor_files(module: str) -> None:
    own = {name for name in imports_of(module) if name.startswith("rl_lora.")}
    assert own <= {"rl_lora.types", "rl_lora.config", "rl_lora.errors", "rl_lora.segments"}
    assert top(imports_of(module)) <= STANDARD | {"torch", "rl_lora"}


def test_only_the_command_line_and_scripts_import_the_loop() -> None:
    importers = {m for m in MODULES if "rl_lora.train" in imports_of(m)}
    assert importers <= {"rl_lora.cli", "rl_lora.study"}


@pytest.mark.parametrize("room", REWARD_ROOMS)
def test_a_room_of_the_verifier_imports_none_above_it(room: str) -> None:
    below = {*REWARD_ROOMS[: REWARD_ROOMS.index(room) + 1], "types", "rules"}
    members = [m for m in MODULES if m.startswith(f"rewards.{room}.")]
    assert members
    for module in members:
        own = {name.split(".")[1] for name in imports_of(module) if name.startswith("rewards.")}
        assert own <= below, module


def test_there_is_no_circle() -> None:
    """At import in rl_lora; in rewards not by an import inside a function either."""
    graph = {
        m: {
            name
            for name in imports_of(m, lazy=m.startswith("rewards"))
            if name in MODULES and name != m
        }
        for m in MODULES
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_command_line_starts_without_heavy_libraries() -> None:
    """These take seconds to import; a help text or a typing mistake needs none of them."""
    program = (
        "import contextlib, sys\n"
        "import rl_lora.cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    rl_lora.cli.main(['train', '--help'])\n"
        "print(*(set(sys.modules) & {'torch', 'transformers', 'vllm', 'peft', 'datasets', 'sympy', "
        "'matplotlib', 'reasoning_gym'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *help_text, heavy = result.stdout.split("\n")[:-1]
    assert "--resume" in "".join(help_text)
    assert heavy == ""
