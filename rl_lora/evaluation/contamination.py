"""Which benchmarks were public before the base model's release, and may be in its training data.

A model's training data ends before its release: a later benchmark cannot be in it, an earlier one
may be. The release date is that of the model's family, recognised by name; `model.released` gives
it for other models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date
from typing import NamedTuple

from rl_lora.config import ModelSection


class Family(NamedTuple):
    """A family of base models."""

    name: str
    pattern: str  # searched in the lower-cased last part of the model's name
    released: date
    source: str


# The first match counts, so narrower patterns come first.
FAMILIES: tuple[Family, ...] = (
    Family(
        "SmolLM3", r"smollm-?3", date(2025, 7, 8), "its announcement, huggingface.co/blog/smollm3"
    ),
    Family("SmolLM2", r"smollm-?2", date(2024, 10, 31), "its repositories on the hub"),
    Family("DeepSeek-R1 distilled", r"deepseek-r1-distill", date(2025, 1, 20), "arXiv 2501.12948"),
    Family("Qwen3 of July 2025", r"qwen-?3-.*2507", date(2025, 7, 21), "its model cards"),
    Family("Qwen3", r"qwen-?3(?![.\d])", date(2025, 4, 29), "arXiv 2505.09388"),
    Family("Qwen2.5", r"qwen-?2\.5", date(2024, 9, 19), "arXiv 2412.15115"),
    Family("Qwen2", r"qwen-?2(?![.\d])", date(2024, 6, 7), "arXiv 2407.10671"),
    Family("Llama 3.3", r"llama-?3\.3", date(2024, 12, 6), "its model card"),
    Family("Llama 3.2", r"llama-?3\.2", date(2024, 9, 25), "its model card"),
    Family("Llama 3.1", r"llama-?3\.1", date(2024, 7, 23), "its model card, arXiv 2407.21783"),
    Family("Llama 3", r"llama-?3(?![.\d])", date(2024, 4, 18), "its model card"),
    Family("Gemma 3", r"gemma-?3(?![.\dn])", date(2025, 3, 12), "arXiv 2503.19786"),
    Family("Gemma 2", r"gemma-?2(?![.\d])", date(2024, 6, 27), "arXiv 2408.00118"),
    Family("OLMo 2", r"olmo-?2", date(2024, 11, 26), "arXiv 2501.00656"),
)

# Data sets other than AIME: first publication.
PUBLISHED = {
    "gsm8k": date(2021, 10, 27),  # arXiv 2110.14168
    "math": date(2021, 3, 5),  # arXiv 2103.03874
    "svamp": date(2021, 3, 12),  # arXiv 2103.07191
}


def contamination_notes(model: ModelSection, sources: Iterable[str]) -> tuple[str, ...]:
    """One line for each benchmark whose date is known; none for generated and custom problems.

    Args:
        model: its name and, if set, `released`.
        sources: names of data sets, as in `Prompt.source`.
    """
    release, notes = release_date(model), []
    for title, public in filter(None, map(publication_date, sorted(set(sources)))):
        if release is None:
            notes.append(
                f"{title}: unknown whether it precedes the base model's release; set "
                "model.released = YYYY-MM-DD"
            )
            continue
        is_before = public < release[0]
        notes.append(
            f"{title} {'precedes' if is_before else 'comes after'} the base model's release "
            f"({release[0]}; {release[1]}): its problems {'may be' if is_before else 'are not'} in "
            "the training data"
        )
    return tuple(notes)


def publication_date(source: str) -> tuple[str, date] | None:
    """(title, the day by which all of it was public) of a data set, by its name.

    AIME takes place between the end of January and the middle of February.
    """
    name = source.lower()
    if match := re.search(r"aime[ _-]?(?:20)?(\d\d)(?!\d)", name):
        year = 2000 + int(match[1])
        return f"AIME {year}", date(year, 2, 28)
    if re.search(r"(?<![a-z])aime(?![a-z])", name):
        return "AIME 1983-2023", date(2023, 2, 28)
    for part, published in PUBLISHED.items():
        if re.search(rf"(?<![a-z]){part}(?![a-z])", name):
            return source, published
    return None


def release_date(model: ModelSection) -> tuple[date, str] | None:
    """(date, source) of the base model's release; None: unknown."""
    if model.released is not None:
        return model.released, "model.released"
    name = model.name.rstrip("/").rpartition("/")[2].lower()
    for family in FAMILIES:
        if re.search(family.pattern, name):
            return family.released, f"{family.name}, {family.source}"
    return None
