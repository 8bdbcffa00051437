"""README's loop is the one of scripts/minimal_grpo.py with other values, and it runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def readme_block() -> str:
    (block,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return str(block)


class _Shape(ast.NodeTransformer):
    """Values and command-line options become one placeholder, a choice its default."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Name("VALUE")

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        is_option = isinstance(node.value, ast.Name) and node.value.id == "options"
        return ast.Name("VALUE") if is_option else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        return node  # the printed line is the same

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        return self.visit(node.orelse)


def loop_of(code: str) -> list[str]:
    """The statements from `policy = ...` to the end of the `with` block, without their values."""
    found = next(
        body
        for node in ast.walk(ast.parse(code))
        for body in [getattr(node, "body", None)]
        if isinstance(body, list) and any(ast.unparse(one).startswith("policy =") for one in body)
    )
    start = next(i for i, one in enumerate(found) if ast.unparse(one).startswith("policy ="))
    end = next(i for i, one in enumerate(found) if isinstance(one, ast.With))
    lines = [ast.unparse(_Shape().visit(one)) for one in found[start : end + 1]]
    return [line.replace("sums", "VALUE") for line in lines if not line.startswith("sums =")]


def test_the_readme_shows_the_scripts_loop() -> None:
    script = (ROOT / "scripts" / "minimal_grpo.py").read_text()
    assert loop_of(readme_block()) == loop_of(script)


@pytest.mark.slow
def test_the_readmes_loop_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = readme_block()
    for value, fewer in (("range(60)", "range(2)"), ("take(32)", "take(4)")):
        assert value in code
        code = code.replace(value, fewer)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own page
    steps = re.findall(r"step (\d): reward [01]\.\d+, KL \d\.\de-\d+", capsys.readouterr().out)
    assert steps == ["1", "2"]
