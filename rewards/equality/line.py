"""The algebra of subsets of the real line: unions of pieces with open or closed ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rewards.equality.exact import Undecided
from rewards.equality.numeric import FLOATS, is_real, value_of
from rewards.parsing.nodes import INFINITY, Node, negative

MAX_PIECES = 64
MINUS_INFINITY = negative(INFINITY)


class NotARegion(Exception):
    """The answer does not describe a subset of the real line."""


class End(NamedTuple):
    """One end of a piece; `value` is NaN if it is symbolic."""

    node: Node
    is_closed: bool
    value: float


class Piece(NamedTuple):
    """Everything between two ends."""

    low: End
    high: End


LOWEST, HIGHEST = End(MINUS_INFINITY, False, -math.inf), End(INFINITY, False, math.inf)


@dataclass(frozen=True)
class Region:
    """A union of pieces; `variable` is the unknown in it, None if the answer does not name one."""

    pieces: tuple[Piece, ...]
    variable: Node | None = None

    @property
    def is_numeric(self) -> bool:
        return not any(math.isnan(end.value) for piece in self.pieces for end in piece)


LINE = Region((Piece(LOWEST, HIGHEST),))


def order_of(node: Node) -> float:
    """The real value of a number; NaN if it has symbols. Raises NotARegion if it is not real."""
    if node == INFINITY:
        return math.inf
    if node == MINUS_INFINITY:
        return -math.inf
    if node.symbols():
        return math.nan
    try:
        value = value_of(node, {}, FLOATS)
    except Undecided:
        raise NotARegion from None
    if not is_real(value):
        raise NotARegion
    return float(getattr(value, "real", value))


def end_at(node: Node, is_closed: bool) -> End:
    """An end with its value; infinite ends are open."""
    value = order_of(node)
    return End(node, is_closed and not math.isinf(value), value)


def between(low: End, high: End) -> Piece:
    """A piece. Raises NotARegion if its ends are the wrong way round."""
    if low.value > high.value:
        raise NotARegion
    return Piece(low, high)


def point(node: Node) -> Piece:
    """A single number."""
    return Piece(end_at(node, True), end_at(node, True))


def normalised(pieces: list[Piece]) -> Region:
    """Sort pieces and merge those that touch; with symbolic ends they stay as they are."""
    region = Region(tuple(pieces))
    if not region.is_numeric:
        return region
    if len(pieces) > MAX_PIECES:
        raise NotARegion
    merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.low.value, not p.low.is_closed)):
        low, high = piece
        last = merged[-1].high if merged else LOWEST
        is_closed = low.is_closed or last.is_closed
        if not merged or low.value > last.value or (low.value == last.value and not is_closed):
            merged.append(piece)
        elif (high.value, high.is_closed) > (last.value, last.is_closed):
            merged[-1] = Piece(merged[-1].low, high)
    return Region(tuple(merged))


def unite(regions: list[Region]) -> Region:
    """The union of the regions."""
    pieces = [piece for region in regions for piece in region.pieces]
    variables = [region.variable for region in regions if region.variable is not None]
    return dataclasses.replace(normalised(pieces), variable=variables[0] if variables else None)


def intersect(left: Region, right: Region) -> Region:
    """The intersection of both regions."""
    if left.pieces == LINE.pieces:
        return right if right.variable else dataclasses.replace(right, variable=left.variable)
    if right.pieces == LINE.pieces:
        return left
    pieces = []
    for a in left.pieces:
        for b in right.pieces:
            low, high = _inner_end(a.low, b.low, 1), _inner_end(a.high, b.high, -1)
            is_point = low.value == high.value and low.is_closed and high.is_closed
            if is_point or not low.value >= high.value:
                pieces.append(Piece(low, high))
    return dataclasses.replace(normalised(pieces), variable=left.variable or right.variable)


def _inner_end(a: End, b: End, sign: int) -> End:
    """The larger of two ends, or the smaller for sign = -1.

    A symbolic end can only be compared with an infinite one; else raises NotARegion.
    """
    if math.isinf(a.value) or sign * b.value > sign * a.value:
        return b
    if math.isinf(b.value) or sign * a.value > sign * b.value:
        return a
    if a.value == b.value:
        return a._replace(is_closed=a.is_closed and b.is_closed)
    raise NotARegion


def complement(region: Region) -> Region:
    """The complement in the real line."""
    if not region.is_numeric:
        raise NotARegion
    outside = LINE
    for low, high in region.pieces:
        sides = []
        if low != LOWEST:
            sides.append(Piece(LOWEST, low._replace(is_closed=not low.is_closed)))
        if high != HIGHEST:
            sides.append(Piece(high._replace(is_closed=not high.is_closed), HIGHEST))
        outside = intersect(outside, Region(tuple(sides)))
    return outside


def equal_regions(left: Region, right: Region, equal: Callable[[Node, Node], bool]) -> bool:
    """Same pieces in any order, with the same kinds of ends? `equal` compares the ends."""
    if len(left.pieces) != len(right.pieces):
        return False
    remaining = list(right.pieces)
    for piece in left.pieces:
        match = next((other for other in remaining if _same_piece(piece, other, equal)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _same_piece(left: Piece, right: Piece, equal: Callable[[Node, Node], bool]) -> bool:
    ends = list(zip(left, right, strict=True))
    for a, b in ends:
        is_infinite = math.isinf(a.value) or math.isinf(b.value)
        if a.is_closed != b.is_closed or (is_infinite and a.value != b.value):
            return False
        if abs(a.value - b.value) > 1e-2 * max(1.0, abs(a.value)):
            return False
    return all(a.node == b.node or equal(a.node, b.node) for a, b in ends)
