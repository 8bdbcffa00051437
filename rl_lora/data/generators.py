"""Generated problems with worked solutions: sums, products, word problems, and codes to memorize.

`chain_sum` and `products` take their expressions from reasoning-gym's generators; word problems are
made from templates here. Row k of a seed is always the same problem, whatever the number of rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from rl_lora.config import Section
from rl_lora.data.row_formats import DataRow
from rl_lora.data.word_problems import make_story
from rl_lora.errors import UserError, nearest
from rl_lora.seeds import mix_seed

MAX_SEED = 2**31 - 1
SomeOptions = TypeVar("SomeOptions", bound=Section)
OPERATIONS = ("add", "subtract", "multiply", "divide")


class ChainSumOptions(Section):
    """`generated:chain_sum`: 37 + 45 - 12. Difficulty: number of terms, digits of each."""

    min_terms: int = Field(2, ge=2, le=20)
    max_terms: int = Field(3, ge=2, le=20)
    min_digits: int = Field(1, ge=1, le=12)
    max_digits: int = Field(2, ge=1, le=12)
    allow_negation: bool = False  # negative terms, too

    @model_validator(mode="after")
    def _ordered(self) -> ChainSumOptions:
        return _check_order(self, "terms", "digits")


class ProductOptions(Section):
    """`generated:products`: 7 * 12. Difficulty: number of factors, digits of each."""

    min_terms: int = Field(2, ge=2, le=6)
    max_terms: int = Field(2, ge=2, le=6)
    min_digits: int = Field(1, ge=1, le=6)
    max_digits: int = Field(2, ge=1, le=6)

    @model_validator(mode="after")
    def _ordered(self) -> ProductOptions:
        return _check_order(self, "terms", "digits")


class StoryOptions(Section):
    """`generated:word_problems`: a short story. Difficulty: number of sums, size of numbers."""

    min_steps: int = Field(1, ge=1, le=8)  # sums to compute
    max_steps: int = Field(3, ge=1, le=8)
    max_number: int = Field(20, ge=3, le=10_000)  # largest number added or subtracted
    max_factor: int = Field(5, ge=2, le=100)  # largest number multiplied or divided by
    operations: tuple[str, ...] = ("add", "subtract", "multiply")  # and "divide"

    @model_validator(mode="after")
    def _consistent(self) -> StoryOptions:
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise ValueError(f"operation {operation!r}; {nearest(operation, OPERATIONS)}")
        if not {"add", "subtract"} & set(self.operations):
            raise ValueError("operations need 'add' or 'subtract'")
        return _check_order(self, "steps")


def _check_order(options: SomeOptions, *names: str) -> SomeOptions:
    for name in names:
        low, high = getattr(options, f"min_{name}"), getattr(options, f"max_{name}")
        if low > high:
            raise ValueError(f"min_{name}={low} is above max_{name}={high}")
    return options


def _chain_sums(options: Section, seed: int) -> Iterator[DataRow]:
    for entry in reasoning_gym_entries("chain_sum", options.model_dump(), seed):
        yield _expression_row(entry)


def _products(options: Section, seed: int) -> Iterator[DataRow]:
    for entry in reasoning_gym_entries("products", options.model_dump(), seed):
        yield _expression_row(entry)


def _expression_row(entry: dict[str, Any]) -> DataRow:
    expression = entry["metadata"]["expression"]
    sums = chain_steps(expression)
    return DataRow(f"What is {expression}?", entry["answer"], "\n".join(sums))


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


def _stories(options: Section, seed: int) -> Iterator[DataRow]:
    assert isinstance(options, StoryOptions)
    row = 0
    while True:
        rng = random.Random(mix_seed("story", seed, row))
        num_steps = rng.randint(options.min_steps, options.max_steps)
        question, answer, sums = make_story(
            rng, num_steps, options.operations, options.max_number, options.max_factor
        )
        yield DataRow(question, str(answer), "\n".join(sums))
        row += 1


class CodeOptions(Section):
    """`generated:codes`: items with random codes, to be memorized.

    The information content is num_items x num_digits x log2(10) bits, whatever the number of rows:
    a supervised data set for measuring capacity. The codes depend on `world`, not on the seed.
    """

    num_items: int = Field(500, ge=1, le=100_000)
    num_digits: int = Field(4, ge=1, le=12)
    world: int = 0  # seed of the codes


_CODE_QUESTIONS = (
    "What is the code of item {}?",
    "Which code has item {}?",
    "Item {}: what is its code?",
    "Code of item {}?",
)


def _codes(options: Section, seed: int) -> Iterator[DataRow]:
    assert isinstance(options, CodeOptions)
    row = 0
    while True:
        rng = random.Random(mix_seed("codes", seed, row))
        item = rng.randrange(options.num_items)
        secret = random.Random(mix_seed("code", options.world, item))
        code = "".join(secret.choice("0123456789") for _ in range(options.num_digits))
        question = rng.choice(_CODE_QUESTIONS).format(item)
        yield DataRow(question, code, f"\\boxed{{{code}}}")
        row += 1


@dataclass(frozen=True, slots=True)
class Generator:
    """A generated set: its options, and a function (options, seed) -> endless rows."""

    options: type[Section]
    rows: Callable[[Section, int], Iterator[DataRow]]


GENERATORS: dict[str, Generator] = {
    "chain_sum": Generator(ChainSumOptions, _chain_sums),
    "products": Generator(ProductOptions, _products),
    "word_problems": Generator(StoryOptions, _stories),
    "codes": Generator(CodeOptions, _codes),
}


def generated_rows(name: str, options: dict[str, Any], seed: int) -> Iterator[DataRow]:
    """The endless rows of `generated:name`.

    Raises:
        UserError: unknown name or option, or an option out of its range.
    """
    if name not in GENERATORS:
        raise UserError(f"data set 'generated:{name}' is unknown; {nearest(name, GENERATORS)}")
    generator = GENERATORS[name]
    try:
        parsed = generator.options.model_validate(options)
    except ValidationError as error:
        raise UserError(_explain(name, generator.options, error)) from error
    return generator.rows(parsed, seed)


def _explain(name: str, section: type[Section], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"generated:{name} has no option {key!r}; {nearest(key, section.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    where = f"option {key} = {first['input']!r}: " if key else ""
    return f"generated:{name}: {where}{message}"


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
    return _entries(dataset)


def _entries(dataset: Any) -> Iterator[dict[str, Any]]:
    row = 0
    while True:
        yield dataset[row]
        row += 1
