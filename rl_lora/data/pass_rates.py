"""Files of pass rates: written by `rl-lora pass-rates`, read by `data.pass_rates`.

Each line is a training prompt, as it was sampled::

    {"prompt_id": "gsm8k/17", "question": "...", "num_correct": 3, "num_samples": 8}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rl_lora.config import DataSection
from rl_lora.data.collect import Item
from rl_lora.errors import UserError
from rl_lora.storage import jsonl


@dataclass(frozen=True, slots=True)
class PassRate:
    """A line of the file.

    Example: PassRate(prompt_id="gsm8k/17", question="...", num_correct=3, num_samples=8)
    """

    prompt_id: str
    question: str
    num_correct: int
    num_samples: int


_LINES = TypeAdapter(PassRate)


def write_pass_rates(path: Path, found: Sequence[PassRate]) -> None:
    """Writes the file, atomically."""
    lines = [jsonl.to_line(_LINES.dump_python(one)) for one in found]
    jsonl.write_text_atomically(path, "".join(lines))


def read_pass_rates(name: str, items: Sequence[Item]) -> dict[str, float]:
    """The pass rates of a job's training prompts, by prompt id; without those that it lacks.

    Raises:
        UserError: no such file, a damaged line, one of another question, or none of these prompts.
    """
    path, rates = Path(name).expanduser(), dict[str, float]()
    if not path.is_file():
        raise UserError(
            f"data.pass_rates: {path} does not exist; make it with `rl-lora pass-rates`"
        )
    questions = {item.prompt_id: item.row.question for item in items}
    for number, line in jsonl.read_values(path):
        where = f"data.pass_rates: line {number} of {path}"
        try:
            one = _LINES.validate_python(line)
        except ValidationError as error:
            reason = error.errors()[0]
            key = ".".join(map(str, reason["loc"]))
            raise UserError(f"{where} is not a pass rate: {key}: {reason['msg']}") from error
        if not 0 <= one.num_correct <= one.num_samples > 0:
            raise UserError(f"{where} has {one.num_correct} correct of {one.num_samples} samples")
        if one.prompt_id not in questions:
            continue
        if jsonl.storable(questions[one.prompt_id]) != one.question:
            raise UserError(
                f"{where} has another question for {one.prompt_id}: the data have changed since; "
                "make the file again with `rl-lora pass-rates`"
            )
        rates[one.prompt_id] = one.num_correct / one.num_samples
    if not rates:
        raise UserError(
            f"data.pass_rates: {path} has none of the training prompts; make it with `rl-lora "
            "pass-rates` and this job's data.train"
        )
    return rates


def within(
    items: Sequence[Item], rates: dict[str, float], data: DataSection
) -> tuple[list[Item], list[str]]:
    """The items between data.min_pass_rate and data.max_pass_rate, or without a rate; and a line on
    how many are left out, if there are bounds.

    Raises:
        UserError: no item is left.
    """
    low = 0.0 if data.min_pass_rate is None else data.min_pass_rate
    high = 1.0 if data.max_pass_rate is None else data.max_pass_rate
    kept = [item for item in items if low <= rates.get(item.prompt_id, low) <= high]
    if not rates or (low, high) == (0.0, 1.0):
        return kept, []
    if not kept:
        raise UserError(
            f"no training prompt has a pass rate from {low:g} to {high:g}; lower "
            "data.min_pass_rate, or raise data.max_pass_rate"
        )
    note = f"pass rates from {low:g} to {high:g}: {len(kept)} of {len(items)} training prompts"
    if num_unrated := sum(item.prompt_id not in rates for item in kept):
        note += f", {num_unrated} of them without one"
    return kept, [note]
