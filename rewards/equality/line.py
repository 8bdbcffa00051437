"""The algebra of subsets of the real line: unions of pieces with open or closed ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rewards.equality.exact import Undecided
from rewards.equality.numeric import FLOATS, is_real, value_of
from rewards.parsing.nodes import INFINITY, Node, negative, symbols

MAX_PIECES = 64
End = tuple[Node, bool, float]  # the end of a piece, is it closed, its value


class NotARegion(Exception):
    """The answer does not describe a subset of the real line."""


class Piece(NamedTuple):
    """From `low` to `high`. `low_value` and `high_value` are their values, NaN if symbolic."""

    low: Node
    is_low_closed: bool
    high: Node
    is_high_closed: bool
    low_value: float
    high_value: float


@dataclass(frozen=True)
class Region:
    """A union of pieces; `variable` is the unknown in it, None if the answer does not name one."""

    pieces: tuple[Piece, ...]
    variable: Node | None = None

    @property
    def is_numeric(self) -> bool:
        return not any(math.isnan(p.low_value) or math.isnan(p.high_value) for p in self.pieces)


MINUS_INFINITY = negative(INFINITY)
LINE = Region((Piece(MINUS_INFINITY, False, INFINITY, False, -math.inf, math.inf),))


def order_of(node: Node) -> float:
    """The real value of a number; NaN if it has symbols. Raises NotARegion if it is not real."""
    if node == INFINITY:
        return math.inf
    if node == MINUS_INFINITY:
        return -math.inf
    if symbols(node):
        return math.nan
    try:
        value = value_of(node, {}, FLOATS)
    except Undecided:
        raise NotARegion from None
    if not is_real(value):
        raise NotARegion
    return float(getattr(value, "real", value))


def make_piece(low: Node, is_low_closed: bool, high: Node, is_high_closed: bool) -> Piece:
    """A piece with its values. Raises NotARegion if its ends are the wrong way round."""
    low_value, high_value = order_of(low), order_of(high)
    if low_value > high_value:
        raise NotARegion
    is_low_closed = is_low_closed and not math.isinf(low_value)
    is_high_closed = is_high_closed and not math.isinf(high_value)
    return Piece(low, is_low_closed, high, is_high_closed, low_value, high_value)


def normalised(pieces: list[Piece]) -> Region:
    """Sort pieces and merge those that touch; with symbolic ends they stay as they are."""
    region = Region(tuple(pieces))
    if not region.is_numeric:
        return region
    if len(pieces) > MAX_PIECES:
        raise NotARegion
    merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.low_value, not p.is_low_closed)):
        last = merged[-1] if merged else None
        if last is not None and (
            piece.low_value < last.high_value
            or (piece.low_value == last.high_value and (piece.is_low_closed or last.is_high_closed))
        ):
            if (piece.high_value, piece.is_high_closed) > (last.high_value, last.is_high_closed):
                merged[-1] = last._replace(
                    high=piece.high,
                    high_value=piece.high_value,
                    is_high_closed=piece.is_high_closed,
                )
        else:
            merged.append(piece)
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
            piece = _meet(a, b)
            if piece is not None:
                pieces.append(piece)
    return dataclasses.replace(normalised(pieces), variable=left.variable or right.variable)


def _meet(a: Piece, b: Piece) -> Piece | None:
    """The intersection of two pieces; None if it is empty."""
    low, is_low_closed, low_value = _inner_end(
        (a.low, a.is_low_closed, a.low_value), (b.low, b.is_low_closed, b.low_value), 1
    )
    high, is_high_closed, high_value = _inner_end(
        (a.high, a.is_high_closed, a.high_value), (b.high, b.is_high_closed, b.high_value), -1
    )
    if low_value > high_value:
        return None
    if low_value == high_value and not (is_low_closed and is_high_closed):
        return None
    return Piece(low, is_low_closed, high, is_high_closed, low_value, high_value)


def _inner_end(a: End, b: End, sign: int) -> End:
    """The larger of two ends, or the smaller for sign = -1.

    A symbolic end can only be compared with an infinite one; else raises NotARegion.
    """
    if math.isinf(a[2]) or sign * b[2] > sign * a[2]:
        return b
    if math.isinf(b[2]) or sign * a[2] > sign * b[2]:
        return a
    if a[2] == b[2]:
        return a[0], a[1] and b[1], a[2]
    raise NotARegion


def complement(region: Region) -> Region:
    """The complement in the real line."""
    if not region.is_numeric:
        raise NotARegion
    pieces = []
    low, is_low_closed, low_value = MINUS_INFINITY, False, -math.inf
    for piece in region.pieces:
        is_point_gap = piece.low_value == low_value
        if piece.low_value > low_value or (is_point_gap and is_low_closed):
            is_closed = not piece.is_low_closed and not math.isinf(piece.low_value)
            if piece.low_value > -math.inf:
                pieces.append(
                    Piece(low, is_low_closed, piece.low, is_closed, low_value, piece.low_value)
                )
        low, low_value = piece.high, piece.high_value
        is_low_closed = not piece.is_high_closed
    if low_value < math.inf:
        pieces.append(Piece(low, is_low_closed, INFINITY, False, low_value, math.inf))
    return Region(tuple(pieces))


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
    if (left.is_low_closed, left.is_high_closed) != (right.is_low_closed, right.is_high_closed):
        return False
    for a, b in ((left.low_value, right.low_value), (left.high_value, right.high_value)):
        if (math.isinf(a) or math.isinf(b)) and a != b:
            return False
        if abs(a - b) > 1e-2 * max(1.0, abs(a)):
            return False
    ends = ((left.low, right.low), (left.high, right.high))
    return all(a == b or equal(a, b) for a, b in ends)
