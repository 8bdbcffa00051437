"""Quantities in answers: 9.8 m/s^2, 3 h 20 min, -3 degrees C."""

from __future__ import annotations

from rewards.parsing.nodes import Node, number_node
from rewards.parsing.units import is_unit, read_unit

_TEMPERATURES = {"C": "celsius", "F": "fahrenheit", "K": "K"}


def quantity_of_product(node: Node) -> Node | None:
    r"""A product of numbers and unit symbols as a quantity: 5 m^2, 9.8 \frac{m}{s^2}.

    None for other products.
    """
    if node.kind not in ("mul", "num"):
        return None
    numbers, units = [], []
    for factor in node.args:
        powers = _unit_powers(factor, 1)
        if powers is None:
            numbers.append(factor)
        else:
            units += powers
    if not units or not numbers or any(item.kind == "sym" for n in numbers for item in n.walk()):
        return None
    name = " * ".join(f"{unit}^{power}" for unit, power in units)
    value = numbers[0] if len(numbers) == 1 else Node("mul", tuple(numbers))
    return Node("unit", (value,), name.replace("^1 ", " ").removesuffix("^1"))


def _unit_powers(node: Node, exponent: int) -> list[tuple[str, int]] | None:
    """Unit symbols with their exponents; None if there is anything else."""
    if node.kind == "sym" and is_unit(node.name):
        return [(node.name, exponent)]
    if node.kind == "pow" and node.args[1].kind == "num":
        power = node.args[1].number
        is_small = power.denominator == 1 and abs(power) < 10
        return _unit_powers(node.args[0], exponent * int(power)) if is_small else None
    if node.kind == "mul":
        parts = [_unit_powers(factor, exponent) for factor in node.args]
        if None not in parts:
            return [item for part in parts if part is not None for item in part]
    return None


def temperature(node: Node, letter: str) -> Node | None:
    r"""The temperature of -3^\circ followed by C; None if the node is not an angle."""
    *factors, degrees = node.args if node.kind == "mul" else (node,)
    if degrees.kind != "deg":
        return None
    value = node._replace(args=(*factors, *degrees.args)) if factors else degrees.args[0]
    return Node("unit", (value,), _TEMPERATURES[letter])


def compound(first: Node, second: Node) -> Node | None:
    """3 h and 20 min as one quantity; None unless the second unit is a smaller one of its kind."""
    if first.kind != "unit" or second.kind != "unit":
        return None
    larger, smaller = read_unit(first.name), read_unit(second.name)
    if larger is None or smaller is None or larger.dimension != smaller.dimension:
        return None
    if not smaller.scale < larger.scale:
        return None
    ratio = number_node(smaller.scale / larger.scale)
    part = Node("mul", (ratio, second.args[0]))
    whole = first.args[0]
    terms = (*whole.args, part) if whole.kind == "add" else (whole, part)
    return Node("unit", (Node("add", terms),), first.name)
