"""Equations and chains of relations: the value an equation gives a name, and equivalence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

from rewards.equality.exact import Undecided
from rewards.equality.modular import PRIME, Residues
from rewards.equality.numeric import (
    FLOATS,
    HIGH,
    IMAGINARY,
    LOW,
    Arithmetic,
    corners,
    is_real,
    line_in,
    points,
    value_of,
)
from rewards.equality.text_answers import words_of
from rewards.parsing.names import is_asked, is_name
from rewards.parsing.nodes import Node, negative
from rewards.parsing.vocabulary import FILLER_WORDS

Equal = Callable[[Node, Node], bool]
MAX_AGREED = 6  # points at which agreement to 40 digits suffices
_UPWARD = {"<": "<", "<=": "<=", ">": "<", ">=": "<="}


class Contradiction(Exception):
    """The answer states something false, such as 3 = 5."""


def unwrap(node: Node, equal: Equal, *, is_trusted: bool) -> tuple[Node, Node] | None:
    """(name, value) if an equation gives a name its value; None if it relates unknowns.

    A chain without a name, such as 2 + 3 = 5, stands for its value. Raises Contradiction if the
    steps of an answer's chain disagree; a gold `is_trusted`.
    """
    operators = node.name.split(" ")
    operands = list(node.args)
    if is_name(operands[0]):
        num_names = 1
        while num_names < len(operands) - 1 and operands[num_names].kind == "sym":
            num_names += 1
        name, steps = operands[0], operands[num_names:]
        operators = operators[num_names:]
        if len(steps) == 1 and is_name(steps[0]) and steps[0].kind == "sym" and name.kind != "call":
            return None  # x = y relates two unknowns
    elif is_name(operands[-1]) and operands[-1].kind != "open":
        name, steps = operands[-1], operands[:-1]
        operators = operators[:-1]
        if len(steps) > 1 and not is_trusted:
            raise Contradiction
    elif is_trusted and len(operands) > 2:
        return operands[0], operands[-1]
    else:
        if any(step.symbols() for step in operands):
            return None
        name, steps = operands[0], operands
    if name.kind == "seq" and steps[-1].kind not in ("seq", "set", "list", "matrix"):
        return None
    if name.kind in ("add", "mul") and name.symbols() and is_asked(name) and steps[-1].symbols():
        return None  # a + b = 2c relates unknowns
    if name.kind in ("sym", "seq") and name.symbols() & steps[-1].symbols():
        return None
    if not is_trusted:
        _check_steps(steps, operators, equal)
    value = steps[-1]
    if "~=" in operators and len(steps) > 1 and steps[0].kind != "open":
        value = steps[operators.index("~=")]  # the exact form precedes its approximation
    return name, value


def _check_steps(steps: list[Node], operators: list[str], equal: Equal) -> None:
    for left, right, operator in zip(steps, steps[1:], operators, strict=False):
        if left.has("open"):
            continue
        if operator == "~=":
            try:
                a, b = value_of(left, {}, LOW), value_of(right, {}, LOW)
            except (Undecided, KeyError):
                continue
            error = abs(a) / 100
            if right.kind == "num":  # one unit of its last decimal, 1/2 for an integer
                error = LOW.number(Fraction(1, 10**right.decimals if right.decimals else 2))
            if abs(a - b) > error:
                raise Contradiction
        elif not equal(left, right):
            raise Contradiction


def bind_arguments(name: Node, value: Node) -> tuple[Node, Node]:
    """Standard names for the arguments of a function, so that f(z) = z equals f(x) = x."""
    if name.kind != "call":
        return name, value
    names = {
        arg.name: f"_{place}"
        for place, arg in enumerate(name.args)
        if arg.kind == "sym" and not arg.name.isupper()  # P(A) is not P(B)
    }
    return name.rename(names), value.rename(names)


def compatible_names(left: Node, right: Node) -> bool:
    """Can two names mean the same? AB and BA, y and f(x), f(x) and f(t), but not a and b."""
    left, right = standard_name(left), standard_name(right)
    if left == right:
        return True
    kinds = {left.kind, right.kind}
    if kinds == {"text"}:
        left_words, right_words = set(left.name.split()), set(right.name.split())
        return left_words <= right_words or right_words <= left_words
    if "text" in kinds:
        return True  # the area and S
    if "open" in kinds:
        return kinds != {"open"}  # a task and the name that it was given
    if kinds == {"call"}:  # f(x) and f(t), but neither f(x) and f(x^2) nor P(A) and P(B)
        are_free = all(
            arg.kind == "sym" and arg.name.islower() for n in (left, right) for arg in n.args
        )
        return left.name == right.name and len(left.args) == len(right.args) and are_free
    if kinds == {"call", "sym"}:
        call, letter = (left, right) if left.kind == "call" else (right, left)
        is_value = letter.name in ("y", call.name) or letter.name.startswith(call.name + "_")
        return is_value and all(arg.kind == "sym" and arg.name.islower() for arg in call.args)
    return False


def standard_name(node: Node) -> Node:
    r"""Standard spelling: AB for |AB|, \overline{AB} and BA; \angle ABC for \angle CBA."""
    if node.kind == "func" and node.name == "abs" and node.args[0].kind == "mul":
        node = node.args[0]
    if node.kind == "mul" and all(item.kind == "sym" for item in node.args):
        if node.args[0].name == "m" and len(node.args) == 2:
            return standard_name(node.args[1])  # m\angle A
        letters = sorted(item.name for item in node.args)
        return node._replace(args=tuple(Node("sym", name=letter) for letter in letters))
    if node.kind == "sym" and node.name.startswith("\\overline "):
        letters = sorted(node.name.removeprefix("\\overline "))
        if len(letters) == 2 and all(letter.isupper() for letter in letters):  # a segment
            return Node("mul", tuple(Node("sym", name=letter) for letter in letters))
    if node.kind == "sym" and node.name.startswith("\\angle "):
        letters = list(node.name.removeprefix("\\angle "))
        return node._replace(name="\\angle " + "".join(min(letters, letters[::-1])))
    if node.kind == "text":
        words = [word for word in words_of(node.name) if word not in FILLER_WORDS]
        return node._replace(name=" ".join(sorted(words)))
    return node


def same_equation(left: Node, right: Node) -> bool:
    """Is one equation a multiple of the other?"""
    a = Node("add", (left.args[0], negative(left.args[1])))
    b = Node("add", (right.args[0], negative(right.args[1])))
    verdict = _proportional_residues(a, b)
    if verdict is not None:
        return verdict
    try:
        return _proportional_values(a, b)
    except Undecided:
        return False


def solution_of(equation: Node, solution: Node) -> tuple[Node, Node] | None:
    r"""Both sides of an equation with its unknown replaced by a solution; equal if that solves it.

    Example: \rho \sin t = 3 with 3 \csc t for \rho. None if the solution has no symbols, or the
    equation is not linear in the one symbol that the solution does not contain.
    """
    unknowns = equation.symbols() - solution.symbols()
    if len(unknowns) != 1 or not solution.symbols() or len(equation.args) != 2:
        return None
    (unknown,) = unknowns
    difference = Node("add", (equation.args[0], negative(equation.args[1])))
    (point,) = points(equation.symbols(), 1, True)
    try:
        line_in(difference, unknown, {name: LOW.number(value) for name, value in point.items()})
    except Undecided:
        return None
    left, right = (side.substitute(Node("sym", name=unknown), solution) for side in equation.args)
    return left, right


def _proportional_residues(a: Node, b: Node) -> bool | None:
    here, there, third = Residues(11), Residues(12), Residues(13)
    pairs = [(place.of(a), place.of(b)) for place in (here, there, third)]
    if any(x == 0 and y == 0 for x, y in pairs):
        return None
    is_proportional = all(
        x * w % PRIME == y * z % PRIME for (x, y), (z, w) in itertools.pairwise(pairs)
    )
    if is_proportional:
        # An identity (0 = 0) or a nonzero constant is not an equation.
        return pairs[0][0] != 0 and pairs[0][1] != 0 and bool(a.symbols())
    return None if here.is_opaque else False


def _proportional_values(a: Node, b: Node) -> bool:
    """Is a / b constant wherever both are defined? Floats may refute it, 40 digits confirm it."""
    names = a.symbols() | b.symbols()
    # An equation with i has complex unknowns: |z - i| and |z + i| agree on the real line.
    is_complex = IMAGINARY in [*a.walk(), *b.walk()]
    positive, mixed = points(names, 5, True), points(names, 6, False)
    try:
        if not _same_ratio(a, b, [*positive, *mixed, *corners(names)], FLOATS, is_complex):
            return False
    except Undecided:
        pass
    return _same_ratio(a, b, [*positive, *mixed], LOW, is_complex)


def _same_ratio(
    a: Node, b: Node, places: list[dict[str, Fraction]], system: Arithmetic, is_complex: bool
) -> bool:
    """Is a / b the same at all points? Raises Undecided if it is defined at too few of them."""
    turn = system.number(Fraction(1)) + (system.i if is_complex else 0)
    small, num_agreed, first = math.sqrt(system.tiny), 0, None
    for point in places:
        values = {name: turn * system.number(value) for name, value in point.items()}
        try:
            x, y = value_of(a, values, system), value_of(b, values, system)
        except Undecided:
            continue
        if not is_complex and is_real(x) != is_real(y):
            if all(value > 0 for value in point.values()):
                return False
            continue  # the real and the principal root of a negative number
        if min(abs(x), abs(y)) < small * small:
            if max(abs(x), abs(y)) > small:
                return False  # only one of the equations holds here
            continue
        ratio = x / y
        first = ratio if first is None else first
        if abs(ratio - first) > system.tiny * abs(first):
            return False
        num_agreed += 1
        if num_agreed == MAX_AGREED and system is LOW:
            return True
    if num_agreed < 3:
        raise Undecided
    return True


def ascending(node: Node) -> tuple[list[Node], list[str]] | None:
    """(operands, operators) of a chain of inequalities in ascending order; None if it is mixed."""
    operators = node.name.split(" ")
    if not all(operator in _UPWARD or operator == "=" for operator in operators):
        return None
    directions = {operator[0] for operator in operators if operator != "="}
    if len(directions) != 1:
        return None
    operands = list(node.args)
    upward = [_UPWARD.get(operator, operator) for operator in operators]
    if directions == {">"}:
        operands.reverse()
        upward.reverse()
    return operands, upward


def same_inequality(left: Node, right: Node) -> bool | None:
    """Is one a positive multiple of the other: 2x + y < 3 and y < 3 - 2x? None if undecided."""
    a, b = ascending(left), ascending(right)
    if a is None or b is None or len(a[1]) != 1 or a[1] != b[1]:
        return None
    difference = [Node("add", (side[0][0], negative(side[0][1]))) for side in (a, b)]
    if any(item.has("call", "open", "text") for item in difference):
        return None
    names = difference[0].symbols() | difference[1].symbols()
    try:
        if not names or not _proportional_values(*difference):
            return False
        point = points(names, 1, True)[0]
        values = {name: HIGH.number(value) for name, value in point.items()}
        return bool(
            value_of(difference[0], values, HIGH) / value_of(difference[1], values, HIGH) > 0
        )
    except (Undecided, TypeError):
        return None
