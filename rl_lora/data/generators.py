"""Generated problems with worked solutions: sums, products, word problems, and codes to memorize.

`chain_sum` and `products` take their expressions from reasoning-gym's generators; word problems are
made from templates here. Row k of a seed is always the same problem, whatever the number of rows.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, Literal

from pydantic import Field, model_validator

from rl_lora.config import Section, parse_as
from rl_lora.data.row_formats import DataRow
from rl_lora.data.word_problems import make_story
from rl_lora.errors import UserError, nearest
from rl_lora.seeds import mix_seed

MAX_SEED = 2**31 - 1
Operation = Literal["add", "subtract", "multiply", "divide"]


class _Options(Section):
    """Options of a generator; min_x is at most max_x."""

    @model_validator(mode="after")
    def _ordered(self) -> _Options:
        for low in (name for name in type(self).model_fields if name.startswith("min_")):
            high = low.replace("min_", "max_")
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}"
                )
        return self


class ChainSumOptions(_Options):
    """`generated:chain_sum`: 37 + 45 - 12. Difficulty: number of terms, digits of each."""

    min_terms: int = Field(2, ge=2, le=20)
    max_terms: int = Field(3, ge=2, le=20)
    min_digits: int = Field(1, ge=1, le=12)
    max_digits: int = Field(2, ge=1, le=12)
    allow_negation: bool = False  # negative terms, too


class ProductOptions(_Options):
    """`generated:products`: 7 * 12. Difficulty: number of factors, digits of each."""

    min_terms: int = Field(2, ge=2, le=6)
    max_terms: int = Field(2, ge=2, le=6)
    min_digits: int = Field(1, ge=1, le=6)
    max_digits: int = Field(2, ge=1, le=6)


class StoryOptions(_Options):
    """`generated:word_problems`: a short story. Difficulty: number of sums, size of numbers."""

    min_steps: int = Field(1, ge=1, le=8)  # sums to compute
    max_steps: int = Field(3, ge=1, le=8)
    max_number: int = Field(20, ge=3, le=10_000)  # largest number added or subtracted
    max_factor: int = Field(5, ge=2, le=100)  # largest number multiplied or divided by
    operations: tuple[Operation, ...] = ("add", "subtract", "multiply")

    @model_validator(mode="after")
    def _reachable(self) -> StoryOptions:
        if not {"add", "subtract"} & set(self.operations):
            raise ValueError("operations need 'add' or 'subtract'")
        return self


class CodeOptions(_Options):
    """`generated:codes`: items with random codes, to be memorized.

    The information content is num_items x num_digits x log2(10) bits, whatever the number of rows:
    a supervised data set for measuring capacity. The codes depend on `world`, not on the seed.
    """

    num_items: int = Field(500, ge=1, le=100_000)
    num_digits: int = Field(4, ge=1, le=12)
    world: int = 0  # seed of the codes


def _expressions(name: str, options: _Options, seed: int) -> Iterator[DataRow]:
    for entry in reasoning_gym_entries(name, options.model_dump(), seed):
        expression = entry["metadata"]["expression"]
        steps = "\n".join(chain_steps(expression))
        yield DataRow(f"What is {expression}?", entry["answer"], steps)


def chain_steps(expression: str) -> list[str]:
    """The sums of a chain, left to right: '7 + 5 - 2' -> ['7 + 5 = 12', '12 - 2 = 10'].

    The chain has either only + and -, or only *, so left to right is the correct order.
    """
    first, *rest = expression.split(" ")
    total, steps = int(first), []
    for sign, text in zip(rest[::2], rest[1::2], strict=True):
        number = int(text)
        result = {"+": total + number, "-": total - number, "*": total * number}[sign]
        steps.append(f"{total} {sign} {number} = {result}")
        total = result
    return steps


def _stories(options: StoryOptions, seed: int) -> Iterator[DataRow]:
    for row in count():
        rng = random.Random(mix_seed("story", seed, row))
        num_steps = rng.randint(options.min_steps, options.max_steps)
        question, answer, sums = make_story(
            rng, num_steps, options.operations, options.max_number, options.max_factor
        )
        yield DataRow(question, str(answer), "\n".join(sums))


_CODE_QUESTIONS = (
    "What is the code of item {}?",
    "Which code has item {}?",
    "Item {}: what is its code?",
    "Code of item {}?",
)


def _codes(options: CodeOptions, seed: int) -> Iterator[DataRow]:
    for row in count():
        rng = random.Random(mix_seed("codes", seed, row))
        item = rng.randrange(options.num_items)
        secret = random.Random(mix_seed("code", options.world, item))
        code = "".join(secret.choice("0123456789") for _ in range(options.num_digits))
        yield DataRow(rng.choice(_CODE_QUESTIONS).format(item), code, f"\\boxed{{{code}}}")


# name -> (its options, a function (options, seed) -> endless rows)
GENERATORS: dict[str, tuple[type[_Options], Callable[[Any, int], Iterator[DataRow]]]] = {
    "chain_sum": (ChainSumOptions, partial(_expressions, "chain_sum")),
    "products": (ProductOptions, partial(_expressions, "products")),
    "word_problems": (StoryOptions, _stories),
    "codes": (CodeOptions, _codes),
}


def generated_rows(name: str, options: dict[str, Any], seed: int) -> Iterator[DataRow]:
    """The endless rows of `generated:name`.

    Raises:
        UserError: unknown name or option, or an option out of its range.
    """
    if name not in GENERATORS:
        raise UserError(f"data set 'generated:{name}' is unknown; {nearest(name, GENERATORS)}")
    section, rows = GENERATORS[name]
    return rows(parse_as(section, options, f"generated:{name}"), seed)


def reasoning_gym_rows(name: str, options: dict[str, Any], seed: int) -> Iterator[DataRow]:
    """The endless rows of `reasoning_gym:name`, without worked solutions.

    Raises:
        UserError: unknown name or option, or an option that the generator refuses.
    """
    for entry in reasoning_gym_entries(name, options, seed):
        answer = entry["answer"]
        yield DataRow(str(entry["question"]).strip(), None if answer is None else str(answer))


def reasoning_gym_entries(
    name: str, options: dict[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    """Endless entries of a reasoning-gym generator: question, answer, metadata."""
    with warnings.catch_warnings():
        # Python reports dubious syntax of a module when it is imported for the very first time.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise UserError(f"data set 'reasoning_gym:{name}' is unknown; {nearest(name, DATASETS)}")
    known = set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"}
    for option in options:
        if option not in known:
            raise UserError(
                f"reasoning_gym:{name} has no option {option!r}; {nearest(option, known)}"
            )
    # reasoning-gym makes row k of seed s from s + k: seeds 0 and 1 would share all rows but one.
    mixed = mix_seed("reasoning_gym", name, seed) % MAX_SEED
    try:
        dataset = reasoning_gym.create_dataset(name, **options, seed=mixed, size=MAX_SEED)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"reasoning_gym:{name} refuses its options: {error}") from error
    return (dataset[row] for row in count())
