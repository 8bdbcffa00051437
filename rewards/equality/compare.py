"""Typed comparison of two parsed answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rewards.equality import answer_shape as shape
from rewards.equality import relations
from rewards.equality.congruences import equal_congruences
from rewards.equality.exact import Undecided
from rewards.equality.line import NotARegion, equal_regions
from rewards.equality.matrices import reduce_matrices
from rewards.equality.pieces import is_piecewise, same_pieces
from rewards.equality.quantities import equal_quantities
from rewards.equality.real_sets import to_region
from rewards.equality.scalars import equal_scalars
from rewards.equality.text_answers import equal_texts
from rewards.parsing.names import is_equation
from rewards.parsing.nodes import (
    GOLDEN_RATIO,
    SCALAR_KINDS,
    LimitExceeded,
    Node,
    divide,
    number_node,
)
from rewards.parsing.parser import Parsed
from rewards.rules import GradingRules

MAX_COMPARISONS = 2000
MAX_DISTINCT = 32  # items of a set that are compared pair by pair
_REGION_KINDS = frozenset({"union", "inter", "minus", "builder"})
_GOLDEN = Node("sym", name="\\phi")


class Comparison:
    """Compares one gold with one answer. `last_resort` decides scalars that are still undecided."""

    def __init__(
        self,
        rules: GradingRules,
        last_resort: Callable[[Node, Node], bool] | None = None,
    ) -> None:
        self.rules = rules
        self.last_resort = last_resort
        self.num_comparisons = 0

    def compare(self, gold: Parsed, answer: Parsed) -> bool:
        """Is the answer equal to the gold, also without labels or with other symbols?

        Raises Undecided, Contradiction, LimitExceeded and ParseError.
        """
        left, right = reduce_matrices(gold.node), reduce_matrices(answer.node)
        if self.equal(left, right):
            return True
        if shape.names_clash(left, right) and not self.rules.rename_free:
            return False
        if self.rules.accept_labels:
            left, right = shape.unlabelled(left), shape.unlabelled(right)
        # k is an integer if the answer says so, or if it solves for an unknown.
        is_family = self.rules.rename_bound and (
            bool(gold.bound | answer.bound) or "rel" in (gold.node.kind, answer.node.kind)
        )
        for names in shape.renamings(left, right, gold.bound, answer.bound, self.rules):
            renamed = right.rename(names)
            if self.equal(left, renamed):
                return True
            if is_family and shape.same_family(left, renamed):
                return True
        return is_family and shape.same_family(left, right)

    def equal(self, gold: Node, answer: Node) -> bool:
        """Is the answer equal to the gold? Symmetric except for rounding and open tasks."""
        self.num_comparisons += 1
        if self.num_comparisons > MAX_COMPARISONS:
            raise LimitExceeded
        if gold == answer:
            return True
        kinds = {gold.kind, answer.kind}
        if "unit" in kinds:
            if "text" in kinds:
                return equal_texts(gold, answer)
            is_strict = self.rules.units == "strict"
            return equal_quantities(gold, answer, self.equal, is_strict=is_strict)
        if "label" in kinds:
            if shape.names_clash(gold, answer):
                return False
            return self.equal(*(n.args[0] if n.kind == "label" else n for n in (gold, answer)))
        are_residues = kinds == {"open"} and gold.name == answer.name == "mod"
        is_single = "list" not in kinds and not gold.has("pm") and not answer.has("pm")
        if are_residues or ("congruence" in kinds and is_single):
            return equal_congruences(gold, answer, self.equal)
        if kinds == {"rel", "list"}:
            gold, answer = shape.by_coordinates(gold), shape.by_coordinates(answer)
            kinds = {gold.kind, answer.kind}
        if "rel" in kinds:
            return self._equal_relations(gold, answer)
        if "raw" in kinds:
            return False
        if "text" in kinds:
            return equal_texts(gold, answer)
        if "mul" in kinds and kinds & {"seq", "list"} and self._equal_points(gold, answer):
            return True
        if Node("sym", name="\\mathbb{R}") in (gold, answer):
            return self._equal_regions(gold, answer)
        are_reals = shape.is_set_of_reals(gold) or shape.is_set_of_reals(answer)
        if kinds & _REGION_KINDS or (are_reals and "list" not in kinds):
            return self._equal_regions(gold, answer)
        if are_reals:
            regions = self._try_regions(gold, answer)
            if regions is not None:
                return regions
        if "list" in kinds:
            formulas = self._equal_formulas(gold, answer)
            if formulas is not None:
                return formulas
        if is_piecewise(gold) or is_piecewise(answer):
            return self._equal_pieces(gold, answer)
        if kinds & {"list", "set"} or gold.has("pm") or answer.has("pm"):
            return self._equal_collections(gold, answer)
        if kinds & {"seq", "matrix"}:
            return self._equal_sequences(gold, answer)
        if kinds == {"base"}:
            return gold.args == answer.args and gold.name == answer.name
        if "base" in kinds:
            return False
        if "ratio" in kinds:
            return self._equal_ratios(gold, answer)
        return self._equal_scalars(gold, answer)

    def _equal_points(self, gold: Node, answer: Node) -> bool:
        """The point P(2, 3) and (2, 3); the options ABD and A, B, D."""
        left, right = shape.item_value(gold), shape.item_value(answer)
        if left.kind == right.kind:
            return self.equal(left, right)
        letters = [shape.option_letters(item) for item in (gold, answer)]
        return letters[0] is not None and letters[0] == letters[1]

    def _equal_formulas(self, gold: Node, answer: Node) -> bool | None:
        """Compare formulas with a domain, which one side may omit. None if neither has one."""
        left, gold_conditions = shape.split_conditions(gold)
        right, answer_conditions = shape.split_conditions(answer)
        if not gold_conditions and not answer_conditions:
            return None
        if (
            gold_conditions
            and answer_conditions
            and not self._same_multiset(gold_conditions, answer_conditions)
        ):
            return False
        return self.equal(left, right)

    def _equal_pieces(self, gold: Node, answer: Node) -> bool:
        if gold.kind == answer.kind and self._equal_collections(gold, answer):
            return True
        try:
            return same_pieces(gold, answer)
        except Undecided:
            return False

    def _equal_scalars(self, gold: Node, answer: Node) -> bool:
        if equal_texts(gold, answer) and gold.kind != answer.kind:
            return False
        try:
            if equal_scalars(gold, answer, self.rules):
                return True
            if gold.symbols() ^ answer.symbols() != {_GOLDEN.name}:
                return False
            gold, answer = (side.substitute(_GOLDEN, GOLDEN_RATIO) for side in (gold, answer))
            return equal_scalars(gold, answer, self.rules)
        except Undecided:
            if self.last_resort is None:
                raise
            return self.last_resort(gold, answer)

    def _equal_ratios(self, gold: Node, answer: Node) -> bool:
        for one, other in ((gold, answer), (answer, gold)):
            if one.kind == "ratio" and other.kind != "ratio" and len(one.args) == 2:
                quotient = divide(*one.args)
                pair = (quotient, other) if one is gold else (other, quotient)
                return self._equal_scalars(*pair)
        parts = [
            item.args if item.kind == "ratio" else (item, number_node(1)) for item in (gold, answer)
        ]
        if len(parts[0]) != len(parts[1]):
            return False
        zero = number_node(0)
        if zero in parts[0][1:] or zero in parts[1][1:]:
            return gold == answer  # 12:00 is a time
        return all(
            self._equal_scalars(divide(a, parts[0][-1]), divide(b, parts[1][-1]))
            for a, b in zip(parts[0][:-1], parts[1][:-1], strict=True)
        )

    def _equal_relations(self, gold: Node, answer: Node) -> bool:
        if is_equation(gold) or is_equation(answer):
            return self._equal_equations(gold, answer)
        for one, other in ((gold, answer), (answer, gold)):
            is_order = len(one.args) > 2 and all(item.kind == "sym" for item in one.args)
            if (
                one.kind == "rel"
                and is_order
                and other.kind in ("list", "seq")
                and relations.ascending(one)
            ):
                return self._in_order(one.args, other.args)  # b < a < d
        if gold.kind == answer.kind == "rel":
            if self._same_chain(gold, answer):
                return True
            if relations.same_inequality(gold, answer):
                return True
        forms = [n.kind == "rel" and ("in" if n.name == "in" else "<") for n in (gold, answer)]
        if not self.rules.relations_as_sets and forms[0] != forms[1]:
            return False
        if gold.kind == "rel" and gold.name == "in" and answer.kind != "rel":
            return self.equal(gold.args[1], answer)
        if answer.kind == "rel" and answer.name == "in" and gold.kind != "rel":
            return self.equal(gold, answer.args[1])
        return self._equal_regions(gold, answer)

    def _same_chain(self, gold: Node, answer: Node) -> bool:
        left, right = relations.ascending(gold), relations.ascending(answer)
        if left is None or right is None:
            if gold.name != answer.name:
                return False
            if self._in_order(gold.args, answer.args):
                return True
            is_two_way = gold.name in ("!=", "===", "perp")
            return is_two_way and self._in_order(gold.args, answer.args[::-1])
        return left[1] == right[1] and self._in_order(left[0], right[0])

    def _equal_equations(self, gold: Node, answer: Node) -> bool:
        left = relations.unwrap(gold, self.equal, is_trusted=True) if is_equation(gold) else None
        right = (
            relations.unwrap(answer, self.equal, is_trusted=False) if is_equation(answer) else None
        )
        if left is not None and right is not None:
            if left[0].kind == right[0].kind == "call" or self.rules.rename_free:
                left, right = relations.bind_arguments(*left), relations.bind_arguments(*right)
            are_compatible = self.rules.rename_free or relations.compatible_names(left[0], right[0])
            if are_compatible and self.equal(left[1], right[1]):
                return True
        if gold.kind == answer.kind == "rel" and len(gold.args) == len(answer.args) == 2:
            return (
                is_equation(gold) and is_equation(answer) and relations.same_equation(gold, answer)
            )
        if not self.rules.accept_labels:
            return False
        if left is not None and answer.kind != "rel":
            return self.equal(left[1], answer)
        if right is not None and gold.kind != "rel":
            return self.equal(gold, right[1])
        # Only the gold may be unsolved: an answer that restates an equation is not a solution.
        if answer.kind not in SCALAR_KINDS or not is_equation(gold):
            return False
        sides = relations.solution_of(gold, answer)
        return sides is not None and self._equal_scalars(*sides)

    def _try_regions(self, gold: Node, answer: Node) -> bool | None:
        try:
            left, right = to_region(gold), to_region(answer)
        except NotARegion:
            return None
        if left.variable is not None and right.variable is not None:
            if left.variable != right.variable:
                return False
        return equal_regions(left, right, self._equal_scalars)

    def _equal_regions(self, gold: Node, answer: Node) -> bool:
        verdict = self._try_regions(gold, answer)
        if verdict is not None:
            return verdict
        if gold.kind == answer.kind and gold.name == answer.name:
            return len(gold.args) == len(answer.args) and self._in_order(gold.args, answer.args)
        return False

    def _in_order(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        return len(gold) == len(answer) and all(map(self.equal, gold, answer))

    def _equal_sequences(self, gold: Node, answer: Node) -> bool:
        for one, other in ((gold, answer), (answer, gold)):
            if one.kind == "matrix" and other.kind == "seq":
                if other.name == "[]" and all(row.name == "[]" for row in other.args):
                    rows = [[row.args for row in side.args] for side in (gold, answer)]
                    return len(rows[0]) == len(rows[1]) and all(map(self._in_order, *rows))
                cells = [cell for row in one.args for cell in row.args]
                is_vector = len(one.args) == 1 or len(one.args[0].args) == 1
                if not is_vector or len(cells) != len(other.args):
                    return False
                pair = (cells, other.args) if one is gold else (other.args, cells)
                return self._in_order(*pair)
        if gold.kind != answer.kind:
            return False
        if len(gold.args) == 2 and {gold.name, answer.name} == {"()", "[]"}:
            return False  # an open interval or a point is not the closed interval
        return self._in_order(gold.args, answer.args)

    def _equal_collections(self, gold: Node, answer: Node) -> bool:
        if shape.names_clash(gold, answer) and not self.rules.rename_free:
            return False
        if gold.kind == answer.kind == "list" and "or" in (gold.name, answer.name):
            if gold.name != answer.name and all(
                item.kind in ("text", "sym") for item in (*gold.args, *answer.args)
            ):
                return False  # "Alice and Bob" is not "Alice or Bob"
        left, right = shape.items_of(gold), shape.items_of(answer)
        is_set = "set" in (gold.kind, answer.kind)
        for one, other in ((gold, answer), (answer, gold)):
            if one.kind == "seq" and other.kind == "list" and not one.has("pm"):
                if one.name == "()" and shape.is_coordinates(other):
                    return self._in_order(
                        [shape.item_value(item) for item in gold.args],
                        [shape.item_value(item) for item in answer.args],
                    )
        by_name = shape.match_names(left, right)
        if by_name is not None:
            return all(self.equal(shape.item_value(a), shape.item_value(b)) for a, b in by_name)
        left, right = (
            [shape.item_value(item) for item in left],
            [shape.item_value(item) for item in right],
        )
        left, right = shape.expand_all(left), shape.expand_all(right)
        if is_set or all(item.kind == "seq" for item in (*left, *right)):
            left, right = self._distinct(left), self._distinct(right)
        if len(left) != len(right):
            return False
        if len(left) == 1:
            if is_set and gold.kind == answer.kind:
                return self._same_member(left[0], right[0])
            return self.equal(left[0], right[0])
        if self.rules.list_order == "gold" and gold.kind == answer.kind == "list":
            return self._in_order(left, right)
        return self._same_multiset(left, right)

    def _same_member(self, left: Node, right: Node) -> bool:
        """Are items of a collection equal? There, {1} is not 1."""
        return (left.kind == "set") == (right.kind == "set") and self.equal(left, right)

    def _same_multiset(self, left: list[Node], right: list[Node]) -> bool:
        left, remaining = shape.without_common(left, right)
        undecided: Undecided | None = None
        for item in left:
            for index, other in enumerate(remaining):
                try:
                    if self._same_member(item, other):
                        del remaining[index]
                        break
                except Undecided as error:
                    undecided = error
            else:
                if undecided is not None:
                    raise undecided
                return False
        return True

    def _distinct(self, items: list[Node]) -> list[Node]:
        kept: list[Node] = []
        items = shape.without_repeats(items)
        if len(items) > MAX_DISTINCT:
            return items
        for item in items:
            if not any(self._same_member(item, other) for other in kept):
                kept.append(item)
        return kept
