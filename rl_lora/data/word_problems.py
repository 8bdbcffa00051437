"""Short arithmetic word problems with worked solutions, made from templates.

A story is a start, moves that change a running total, and a question. There are also a few
two-person stories (comparisons, 'how many at first'). Solutions have one sum per line.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# fmt: off
NAMES = (
    "Ada", "Ben", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira",
    "Leo", "Maya", "Nico", "Olga", "Paul", "Rosa", "Sam", "Tara", "Umar", "Vera", "Will", "Yara",
    "Zoe",
)
THINGS = (
    "apples", "pencils", "marbles", "stickers", "shells", "coins", "cards", "cookies", "stamps",
    "beads",
)
WARES = ("lamps", "books", "toys", "cups", "hats", "chairs", "bikes", "plates")
# fmt: on


@dataclass(frozen=True, slots=True)
class Theme:
    """Sentences about one kind of total: {name}, {other} people; {thing}; {n} {a} {b} {k} numbers.

    `groups` and the moves `add_groups` and `subtract_groups` stand for a times b, one more sum.
    """

    things: tuple[str, ...]
    start: tuple[str, ...]
    groups: tuple[str, ...]
    moves: dict[str, tuple[str, ...]]
    question: tuple[str, ...]


THEMES: tuple[Theme, ...] = (
    Theme(
        THINGS,
        (
            "{name} has {n} {thing}.",
            "there are {n} {thing} in {name}'s bag.",
            "{name} starts the day with {n} {thing}.",
        ),
        (
            "{name} has {a} boxes with {b} {thing} in each.",
            "{name} fills {a} bags with {b} {thing} each.",
        ),
        {
            "add": (
                "{other} gives {name} {n} more {thing}.",
                "{name} finds {n} more.",
                "{name} gets {n} more {thing} from {other}.",
            ),
            "subtract": (
                "{name} gives {n} to {other}.",
                "{name} loses {n} of them.",
                "{other} takes {n} of the {thing}.",
            ),
            "multiply": ("a week later {name} has {k} times as many.",),
            "divide": ("{name} splits them into {k} equal shares and keeps only one share.",),
            "add_groups": ("{name} gets {a} more bags with {b} {thing} in each.",),
            "subtract_groups": ("{name} gives {b} {thing} to each of {a} friends.",),
        },
        ("how many {thing} does {name} have now?", "how many {thing} does {name} have in the end?"),
    ),
    Theme(
        ("dollars",),
        ("{name} has {n} dollars.", "{name} has saved {n} dollars."),
        (
            "{name} works {a} hours for {b} dollars an hour.",
            "{name} sells {a} toys for {b} dollars each.",
        ),
        {
            "add": (
                "{name} earns {n} dollars.",
                "{other} gives {name} {n} dollars.",
                "{name} finds {n} dollars in a coat.",
            ),
            "subtract": (
                "{name} spends {n} dollars on a gift.",
                "{name} lends {other} {n} dollars.",
                "{name} pays {n} dollars for lunch.",
            ),
            "multiply": ("the savings grow to {k} times as much.",),
            "divide": ("{name} splits the money into {k} equal parts and keeps only one part.",),
            "add_groups": ("{name} washes {a} cars for {b} dollars each.",),
            "subtract_groups": ("{name} buys {a} tickets for {b} dollars each.",),
        },
        ("how many dollars does {name} have now?", "how many dollars are left?"),
    ),
    Theme(
        ("people",),
        ("a bus leaves with {n} people.", "there are {n} people on a train."),
        (
            "{a} vans with {b} people each arrive at the ferry, and all go on board.",
            "a train has {a} cars with {b} people in each.",
        ),
        {
            "add": ("{n} people get on.", "at the next stop {n} more people come in."),
            "subtract": ("{n} people get off.", "at the next stop {n} people leave."),
            "multiply": ("at the market there are suddenly {k} times as many people on board.",),
            "divide": ("they form {k} equal groups, and only one group stays on board.",),
            "add_groups": ("{a} families of {b} people get on.",),
            "subtract_groups": ("{a} groups of {b} people get off.",),
        },
        ("how many people are on board now?", "how many people are still on board?"),
    ),
    Theme(
        WARES,
        ("a shop has {n} {thing}.", "there are {n} {thing} on the shelves of a shop."),
        (
            "a shop gets {a} crates of {b} {thing}.",
            "a shop has {a} shelves with {b} {thing} on each.",
        ),
        {
            "add": ("a truck brings {n} more {thing}.", "the shop orders {n} more."),
            "subtract": ("{n} {thing} are sold.", "{name} buys {n} of them.", "{n} of them break."),
            "multiply": ("before the holidays the shop has {k} times as many.",),
            "divide": ("they go to {k} shops in equal parts, and one part stays here.",),
            "add_groups": ("a truck brings {a} more crates of {b} {thing}.",),
            "subtract_groups": ("{a} customers buy {b} {thing} each.",),
        },
        ("how many {thing} does the shop have now?", "how many {thing} are left in the shop?"),
    ),
    Theme(
        ("points",),
        ("{name} scores {n} points in the first round.", "{name} begins a game with {n} points."),
        ("{name} wins {a} rounds for {b} points each.",),
        {
            "add": ("the next round brings {n} more points.", "{name} wins {n} points."),
            "subtract": ("a mistake costs {n} points.", "{name} loses {n} points to {other}."),
            "multiply": ("a bonus card makes it {k} times as many points.",),
            "divide": ("a bad card leaves {name} with the score divided by {k}.",),
            "add_groups": ("{name} hits {a} targets for {b} points each.",),
            "subtract_groups": ("{a} mistakes cost {b} points each.",),
        },
        ("how many points does {name} have now?", "what is {name}'s score?"),
    ),
    Theme(
        ("liters",),
        ("a tank holds {n} liters of water.", "{name} fills a tank with {n} liters of water."),
        ("{name} pours {a} buckets of {b} liters into an empty tank.",),
        {
            "add": ("rain adds {n} liters.", "{name} pours in {n} more liters."),
            "subtract": ("{n} liters leak out.", "{name} uses {n} liters for the garden."),
            "multiply": ("after the storm the tank holds {k} times as much.",),
            "divide": ("in the heat only one of {k} equal parts stays in the tank.",),
            "add_groups": ("{name} adds {a} buckets of {b} liters.",),
            "subtract_groups": ("{name} waters {a} trees with {b} liters each.",),
        },
        ("how many liters are in the tank now?", "how many liters does the tank hold in the end?"),
    ),
)

LINKS = ("", "", "then ", "after that, ", "later, ")


def make_story(
    rng: random.Random,
    num_steps: int,
    operations: Collection[str],
    max_number: int,
    max_factor: int,
) -> tuple[str, int, list[str]]:
    """(question, answer, sums) of a story that takes exactly num_steps sums.

    Totals are never negative, divisions are exact, and a story has at most one product so that
    numbers stay small.

    Args:
        rng: the story's randomness.
        num_steps: number of sums, at least 1.
        operations: of add, subtract, multiply, divide; at least one of the first two.
        max_number: largest number added, subtracted or started with.
        max_factor: largest number multiplied or divided by.
    """
    missing = [sign for sign, one in (("+", "add"), ("-", "subtract")) if one not in operations]
    specials = [
        (story, sums)
        for story, sums in SPECIALS.items()
        if len(sums) == num_steps and not any(sign in " ".join(sums) for sign in missing)
    ]
    if specials and rng.random() < 0.25:
        return _special(rng, max_number, *rng.choice(specials))
    return _Story(rng, operations, max_number, max_factor).tell(num_steps)


class _Story:
    """A story in the making: the running total and the sentences so far."""

    def __init__(
        self, rng: random.Random, operations: Collection[str], max_number: int, max_factor: int
    ) -> None:
        self.rng = rng
        self.operations = operations
        self.max_number = max_number
        self.max_factor = max_factor
        self.has_product = "multiply" not in operations
        self.theme = rng.choice(THEMES)
        name, other = rng.sample(NAMES, 2)
        self.words = {"name": name, "other": other, "thing": rng.choice(self.theme.things)}
        self.total = 0
        self.sentences: list[str] = []
        self.sums: list[str] = []

    def tell(self, num_steps: int) -> tuple[str, int, list[str]]:
        self._start(num_steps)
        while len(self.sums) < num_steps:
            self._move(num_steps - len(self.sums))
        self._say(self.theme.question)
        return " ".join(self.sentences), self.total, self.sums

    def _start(self, num_steps: int) -> None:
        if not self.has_product and self.rng.random() < 0.35:
            a, b = self._factors()
            self.total = self._product(a, b)
            self._say(self.theme.groups, a=a, b=b)
        else:
            self.total = self.rng.randint(2, self.max_number)
            self._say(self.theme.start, n=self.total)

    def _move(self, steps_left: int) -> None:
        choices = [kind for kind in ("add", "subtract") if kind in self.operations] * 3
        if not self.has_product:
            choices.append("multiply")
            if steps_left >= 2:
                choices += [kind for kind in ("add", "subtract") if kind in self.operations]
        if "divide" in self.operations:
            choices.append("divide")
        self._apply(self.rng.choice(choices), steps_left)

    def _apply(self, kind: str, steps_left: int) -> None:
        rng, total = self.rng, self.total
        if kind == "multiply":
            factor = rng.randint(2, self.max_factor)
            self.has_product = True
            self._change(kind, "*", factor, k=factor)
        elif kind == "divide":
            divisors = [k for k in range(2, self.max_factor + 1) if total > 0 and total % k == 0]
            if divisors:
                factor = rng.choice(divisors)
                self._change(kind, "/", factor, k=factor)
            else:
                self._apply("add" if "add" in self.operations else "subtract", steps_left)
        elif not self.has_product and steps_left >= 2 and rng.random() < 0.3:
            self._grouped(kind)
        elif kind == "add" or (total < 1 and "add" in self.operations):
            number = rng.randint(2, self.max_number)
            self._change("add", "+", number, n=number)
        else:
            number = rng.randint(min(2, total), min(total, self.max_number))
            self._change("subtract", "-", number, n=number)

    def _grouped(self, kind: str) -> None:
        a, b = self._factors()
        if kind == "subtract" and a * b > self.total:
            kind = "add"
        if kind not in self.operations:  # only subtraction, and the product is too large
            a, b = 1, self.total
        sign = "+" if kind == "add" else "-"
        self._change(f"{kind}_groups", sign, self._product(a, b), a=a, b=b)

    def _factors(self) -> tuple[int, int]:
        return self.rng.randint(2, self.max_factor), self.rng.randint(2, self.max_factor)

    def _product(self, a: int, b: int) -> int:
        self.has_product = True
        self.sums.append(f"{a} * {b} = {a * b}")
        return a * b

    def _change(self, template: str, sign: str, number: int, **numbers: int) -> None:
        before = self.total
        results = {"+": before + number, "-": before - number, "*": before * number}
        self.total = before // number if sign == "/" else results[sign]
        self.sums.append(f"{before} {sign} {number} = {self.total}")
        self._say(self.theme.moves[template], link=self.rng.choice(LINKS), **numbers)

    def _say(self, templates: tuple[str, ...], link: str = "", **numbers: int) -> None:
        sentence = link + self.rng.choice(templates).format(**self.words, **numbers)
        self.sentences.append(sentence[0].upper() + sentence[1:])


# --- two-person stories ---------------------------------------------------------------------------

# Story about two numbers -> its sums; c is the result so far. Where there is a difference, b >= a.
SPECIALS = {
    "{name} has {b} {thing} and {other} has {a}. "
    "How many more {thing} does {name} have than {other}?": ("b - a",),
    "{name} gave {a} {thing} to {other} and has {b} left. "
    "How many {thing} did {name} have at first?": ("b + a",),
    "{name} has {a} {thing}. {other} has {b} more than {name}. "
    "How many {thing} do they have together?": ("a + b", "a + c"),
    "{name} has {b} {thing}. {other} has {a} fewer than {name}. "
    "How many {thing} do they have together?": ("b - a", "b + c"),
}


def _special(
    rng: random.Random, max_number: int, story: str, sums: Sequence[str]
) -> tuple[str, int, list[str]]:
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    drawn = [rng.randint(2, max_number), rng.randint(2, max_number)]
    a, b = sorted(drawn) if "-" in sums[0] else drawn
    numbers, lines = {"a": a, "b": b}, []
    for first, sign, second in map(str.split, sums):
        x, y = numbers[first], numbers[second]
        numbers["c"] = x + y if sign == "+" else x - y
        lines.append(f"{x} {sign} {y} = {numbers['c']}")
    question = story.format(name=name, other=other, thing=thing, a=a, b=b)
    return question, numbers["c"], lines
