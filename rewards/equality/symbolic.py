"""The last tier, only in a worker: sympy, on expressions built node by node from our tree.

sympy never parses text. Powers, factorials and binomials that are too large are rejected before
they are built, since sympy would evaluate them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from rewards.equality.exact import Undecided
from rewards.equality.tiers import decide
from rewards.parsing.nodes import LimitExceeded, Node, ParseError
from rewards.parsing.parser import parse
from rewards.rules import GradingRules
from rewards.types import Verdict

MAX_EVALUATED = 5000

_SAME_NAMES = (
    "sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth asinh acosh atanh"
    " log exp floor factorial factorial2 gcd lcm"
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(sympy, name) for name in _SAME_NAMES.split()},
    "ln": sympy.log, "abs": sympy.Abs, "ceil": sympy.ceiling, "binom": sympy.binomial,
    "max": sympy.Max, "min": sympy.Min, "mod": sympy.Mod,
}  # fmt: skip
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}


def decide_symbolically(gold: str, answer: str, rules: GradingRules) -> Verdict:
    """All tiers, with sympy if the others are undecided. If sympy is too, the answer is wrong."""
    verdict = decide(gold, answer, rules, last_resort=equal_symbolically).verdict
    return Verdict(verdict.correct, verdict.status, "symbolic")


def equal_symbolically(gold: Node, answer: Node) -> bool:
    """Does the difference simplify to zero? Raises Undecided as `to_sympy` does."""
    difference = sympy.simplify(to_sympy(gold) - to_sympy(answer))
    return bool(difference == 0 or (difference.is_number and difference.equals(0)))


def to_sympy(node: Node) -> Any:
    """The sympy expression of a tree. Raises Undecided if there is none or it is too large."""
    kind = node.kind
    if kind == "num":
        return sympy.Rational(node.number.numerator, node.number.denominator)
    if kind == "sym":
        return sympy.Symbol(node.name)
    if kind == "const":
        return _CONSTANTS[node.name]
    if kind == "open":
        return _open(node)
    args = [to_sympy(arg) for arg in node.args]
    if kind == "add":
        return sympy.Add(*args)
    if kind == "mul":
        return sympy.Mul(*args)
    if kind == "pow":
        return _power(args[0], args[1])
    if kind == "percent":
        return args[0] / 100
    if kind == "deg":
        return args[0] * sympy.pi / 180
    if kind == "call":
        return sympy.Function(node.name)(*args)
    if kind == "func":
        return _function(node.name, args)
    raise Undecided


def _power(base: Any, exponent: Any) -> Any:
    size = abs(exponent.evalf(5)) if exponent.is_number else 0
    if (base.is_number and size > MAX_EVALUATED) or (base.is_Add and size > 64):
        raise Undecided
    return sympy.Pow(base, exponent)


def _function(name: str, args: list[Any]) -> Any:
    if name in ("factorial", "factorial2", "binom"):
        if any(arg.is_number and abs(arg.evalf(5)) > MAX_EVALUATED for arg in args):
            raise Undecided
    if name == "root":
        return sympy.Pow(args[0], 1 / args[1])
    if name == "cis":
        return sympy.exp(sympy.I * args[0])
    if name not in _FUNCTIONS:
        raise Undecided
    return _FUNCTIONS[name](*args)


def _open(node: Node) -> Any:
    if node.name in ("gcd", "lcm", "max", "min", "mod"):
        return _FUNCTIONS[node.name](*[to_sympy(arg) for arg in node.args])
    if node.name == "det":
        rows = [[to_sympy(cell) for cell in row.args] for row in node.args[0].args]
        if len(rows) != len(rows[0]) or len(rows) > 5:
            raise Undecided
        return sympy.Matrix(rows).det()
    if node.name in ("sum", "product"):
        body, lower, upper = node.args
        name, _, start_text = lower.name[1:].partition("=")
        index, start = sympy.Symbol(name), _parsed(start_text)
        stop = _parsed(upper.name[1:])
        combine = sympy.Sum if node.name == "sum" else sympy.Product
        if start.is_number and stop.is_Integer and stop - start > MAX_EVALUATED:
            raise Undecided
        return combine(to_sympy(body), (index, start, stop)).doit()
    if node.name == "integral":
        return _integral(node)
    raise Undecided


def _parsed(text: str) -> Any:
    try:
        return to_sympy(parse(text).node)
    except (ParseError, LimitExceeded) as error:
        raise Undecided from error


def _integral(node: Node) -> Any:
    r"""\int_a^b f dx; the body is a product that ends in d x."""
    body, lower, upper = node.args
    factors = list(body.args) if body.kind == "mul" else [body]
    if len(factors) < 2 or factors[-2] != Node("sym", name="d") or factors[-1].kind != "sym":
        raise Undecided
    variable = sympy.Symbol(factors[-1].name)
    integrand = sympy.Mul(*[to_sympy(factor) for factor in factors[:-2]])
    if len(lower.name) < 2 or len(upper.name) < 2:
        raise Undecided
    limits = (variable, _parsed(lower.name[1:]), _parsed(upper.name[1:]))
    return sympy.integrate(integrand, limits)
