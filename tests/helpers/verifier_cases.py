"""Authored cases for the verifier: tables in cases/*.txt, mostly of `gold | answer` lines."""

from __future__ import annotations

from pathlib import Path


def _table(name: str) -> str:
    path = Path(__file__).parent / "cases" / f"{name}.txt"
    return path.read_text(encoding="utf-8")


EQUAL = _table("equal")
UNEQUAL = _table("unequal")
TRICKS = _table("tricks")  # wrong only in this order: the second must not be accepted for the first
OPEN = _table("open")  # equal, by the kinds of tricks that `SHUT` tries
SHUT = _table("shut")  # unequal
GOLDS = _table("golds").splitlines()  # no change of `mutations` leaves the value of one the same


def pairs(table: str) -> list[tuple[str, str]]:
    """(gold, answer) of each line."""
    rows = []
    for line in table.strip().splitlines():
        gold, answer = line.split(" | ", 1)
        rows.append((gold, answer))
    return rows
