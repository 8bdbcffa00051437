"""Which symbols of an answer may stand for others of the gold: bound ones and parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rewards.equality.answer_shape import are_constants, are_families, runs_through
from rewards.parsing.nodes import Node, symbols
from rewards.rules import GradingRules

_PARAMETERS = frozenset("kKnNmltsjCcpq")


def renamings(
    gold: Node,
    answer: Node,
    gold_bound: frozenset[str],
    answer_bound: frozenset[str],
    rules: GradingRules,
) -> Iterator[dict[str, str]]:
    """Ways to rename the answer's bound symbols and parameters to the gold's."""
    is_option = gold.kind == "sym" and gold.name.upper() in tuple("ABCDE")
    if not rules.rename_bound or (gold.kind == "sym" and not is_option):
        return
    ours = sorted(symbols(gold) - symbols(answer))
    theirs = sorted(symbols(answer) - symbols(gold))
    if not 0 < len(theirs) == len(ours) <= 3:
        return
    is_shared = are_families(gold, answer)
    are_tuples = runs_through(gold, ours) and runs_through(answer, theirs)
    for order in itertools.permutations(ours):
        pairs = list(zip(theirs, order, strict=True))
        if all(
            rules.rename_free
            or a.lower() == b.lower()
            or (a in answer_bound and (b in gold_bound or b in _PARAMETERS or is_shared))
            or (b in gold_bound and a in _PARAMETERS)
            or (gold.kind in ("rel", "add", "mul") and are_constants(a, b))
            or (is_shared and a in _PARAMETERS and b in _PARAMETERS)
            or (are_tuples and len(pairs) == 1 and a in _PARAMETERS and len(b) == 1)
            or (are_tuples and len(pairs) == 1 and b in _PARAMETERS and len(a) == 1)
            for a, b in pairs
        ):
            yield dict(pairs)
