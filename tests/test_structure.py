"""Who may import whom: imports point one way, and nothing heavy loads before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONG_FILES, TESTS

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("rl_lora", "rewards")
    for path in (ROOT / package).rglob("*.py")
}
# Who may import whom: a package or module imports none that stands after it.
RANKS = """
    errors launchers distributed seeds advantages losses config nn types storage data
    sampler prompts scoring rollouts environments overlap batches evaluation models adapters policy
    step_stats schedule learner penalties samplers runs report export planning build sft state train
    studies commands cli __main__
""".split()
REWARD_RANKS = (
    "types rules parsing extraction equality workers grading user_function combined load".split()
)
VLLM_ROOM = "rl_lora.samplers.vllm."
EAGER_VLLM = {VLLM_ROOM + "cpu_lora", VLLM_ROOM + "cpu_sampling"}  # imported when an engine starts
MAX_FILES, MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 20, 400, 60, 6
WITH_SCRIPTS = [*MODULES.values(), *sorted((ROOT / "scripts").rglob("*.py"))]
STANDARD = sys.stdlib_module_names


def imports_of(module: str, *, lazy: bool = True) -> set[str]:
    """Full names of the modules that a module imports; lazy=False: only at its import."""
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


@pytest.mark.parametrize(("package", "ranks"), [("rl_lora", RANKS), ("rewards", REWARD_RANKS)])
def test_no_import_goes_up(package: str, ranks: list[str]) -> None:
    members = [m for m in MODULES if m.startswith(f"{package}.")]
    assert {name.split(".")[1] for name in members} == set(ranks)
    for module in members:
        for name in imports_of(module):
            if name.startswith(f"{package}.") and name.split(".")[1] != module.split(".")[1]:
                below, above = (ranks.index(one.split(".")[1]) for one in (name, module))
                assert below < above, f"{module} imports {name}"


def test_folders_and_files_are_small() -> None:
    for folder in {path.parent for path in WITH_SCRIPTS}:
        rooms = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(rooms) <= MAX_FILES, folder
    for path in WITH_SCRIPTS:
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, path


def test_the_long_test_files_exist() -> None:
    assert [name for name in LONG_FILES if not (TESTS / name).is_file()] == []


def over_limits(source: str) -> list[str]:
    """Names of the functions that are too long or take too much, and give no reason.

    A reason is a comment `# limits: REASON` on the line above the function or within its header.
    """
    found, lines = [], source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = [a for a in ast.iter_child_nodes(node.args) if isinstance(a, ast.arg)]
        num_parameters = sum(a.arg not in ("self", "cls") for a in arguments)
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        length = (node.end_lineno or first) - first + 1
        header = lines[max(first - 2, 0) : node.body[0].lineno]
        has_reason = any(re.match(r"\s*# limits: \w", line) for line in header)
        if (length > MAX_FUNCTION_LINES or num_parameters > MAX_PARAMETERS) and not has_reason:
            found.append(node.name)
    return found


def test_functions_are_short_and_take_few_parameters_or_say_why_not() -> None:
    found = {f"{path.relative_to(ROOT)}: {over_limits(path.read_text())}" for path in WITH_SCRIPTS}
    assert not {line for line in found if not line.endswith(": []")}


def test_the_limits_of_functions() -> None:
    long = "def long():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    wide = "def wide(self, a, b, /, c, *d, e=lambda z: z, f=2, **g):\n    pass\n"
    assert over_limits(long) == ["long"]
    assert over_limits(long.replace("    x = 1\n", "", 1)) == []
    assert over_limits("class A:\n" + textwrap.indent(wide, "    ")) == ["wide"]
    assert over_limits(wide.replace(", **g", "")) == []
    reason = "# limits: they are the kernel's\n"
    assert over_limits(reason + wide) == []
    assert over_limits("# limits:\n" + wide) == ["wide"]
    assert over_limits(reason + "x = 1\n" + wide) == ["wide"]
    assert (
        over_limits(wide.replace("    pass", "    # limits: the hook's signature\n    pass")) == []
    )


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("rewards")])
def test_rewards_import_neither_torch_nor_the_trainer(module: str) -> None:
    allowed = STANDARD | {"rewards", "sympy", "mpmath", "math_verify"}
    assert top(imports_of(module)) <= allowed


def test_vllm_is_imported_lazily_and_in_one_package() -> None:
    importers = {m for m in MODULES if "vllm" in top(imports_of(m))}
    assert importers
    assert all(m.startswith(VLLM_ROOM) for m in importers)
    eager = {m for m in MODULES if "vllm" in top(imports_of(m, lazy=False))}
    assert eager <= EAGER_VLLM
    for module in MODULES:
        assert not EAGER_VLLM & imports_of(module, lazy=False)


def test_ray_is_imported_lazily_and_in_one_place() -> None:
    assert {m for m in MODULES if "ray" in top(imports_of(m))} == {
        "rl_lora.samplers.fleet.ray_start"
    }
    assert "ray" not in top(imports_of("rl_lora.samplers.fleet.ray_start", lazy=False))


def test_types_imports_only_the_record_of_the_rewards_and_the_layout_of_a_row() -> None:
    own = {name for name in imports_of("rl_lora.types") if top({name}) <= {"rl_lora", "rewards"}}
    assert own == {"rewards", "rl_lora.nn.segments"}


@pytest.mark.parametrize(
    "module",
    ["rl_lora.advantages", "rl_lora.batches", *(m for m in MODULES if "rl_lora.losses" in m)],
)
def test_the_maths_knows_neither_models_nor_files(module: str) -> None:
    own = {name for name in imports_of(module) if name.startswith("rl_lora.")}
    own = {name for name in own if not name.startswith("rl_lora.losses")}
    known = {"types", "config", "errors", "nn.segments", "distributed"}  # the last for `share` only
    assert own <= {f"rl_lora.{name}" for name in known}
    assert top(imports_of(module)) <= STANDARD | {"torch", "pydantic", "rl_lora"}
    assert set(re.findall(r"\bdistributed\.(\w+)", MODULES[module].read_text("utf-8"))) <= {"share"}


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
    """These take long to import; a help text, a typing mistake, settings or a status needs none."""
    program = (
        "import contextlib, sys\n"
        "import rl_lora.cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    rl_lora.cli.main(['train', '--help'])\n"
        "import rl_lora.config, rl_lora.commands.status\n"
        "print(*(set(sys.modules) & {'torch', 'transformers', 'vllm', 'peft', 'datasets', 'sympy', "
        "'mpmath', 'matplotlib', 'reasoning_gym', 'ray'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *help_text, heavy = result.stdout.split("\n")[:-1]
    assert "--resume" in "".join(help_text)
    assert heavy == ""
