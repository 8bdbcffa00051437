"""Which benchmarks precede a base model, by names and dates."""

from __future__ import annotations

from datetime import date

import pytest

from rl_lora.config import ModelSection
from rl_lora.evaluation.contamination import (
    FAMILIES,
    contamination_notes,
    publication_date,
    release_date,
)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen/Qwen3-8B-Base", "Qwen3"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3 of July 2025"),
        ("Qwen/Qwen2.5-Math-7B", "Qwen2.5"),
        ("Qwen/Qwen2-1.5B", "Qwen2"),
        ("meta-llama/Llama-3.1-8B", "Llama 3.1"),
        ("meta-llama/Meta-Llama-3-8B", "Llama 3"),
        ("meta-llama/Llama-3.2-1B", "Llama 3.2"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1 distilled"),
        ("smollm2-135m-instruct", "SmolLM2"),
        ("HuggingFaceTB/SmolLM3-3B", "SmolLM3"),
        ("/models/qwen3-8b/", "Qwen3"),
    ],
)
def test_the_family_by_name(name: str, family: str) -> None:
    released = release_date(ModelSection(name=name))
    assert released is not None
    assert released[1].startswith(f"{family}, ")
    assert released[0] == next(one.released for one in FAMILIES if one.name == family)


@pytest.mark.parametrize("name", ["tiny-fast", "Qwen/Qwen3.5-9B", "llama", "my/own-model"])
def test_an_unknown_name_has_no_date_unless_the_config_says_it(name: str) -> None:
    assert release_date(ModelSection(name=name)) is None
    dated = ModelSection(name=name, released=date(2024, 5, 1))
    assert release_date(dated) == (date(2024, 5, 1), "model.released")


@pytest.mark.parametrize(
    ("source", "title", "year"),
    [
        ("aime24", "AIME 2024", 2024),
        ("AIME_2025", "AIME 2025", 2025),
        ("aime-26", "AIME 2026", 2026),
        ("aime", "AIME 1983-2023", 2023),
        ("gsm8k", "gsm8k", 2021),
        ("math", "math", 2021),
    ],
)
def test_the_day_by_which_a_benchmark_was_public(source: str, title: str, year: int) -> None:
    found = publication_date(source)
    assert found is not None
    assert (found[0], found[1].year) == (title, year)


@pytest.mark.parametrize("source", ["chain_sum", "mine", "aimeless", "aftermath"])
def test_own_and_generated_problems_have_no_date(source: str) -> None:
    assert publication_date(source) is None


def test_the_notes_of_qwen3() -> None:
    # Released on 2025-04-29: after AIME 2025 of February, before AIME 2026.
    notes = contamination_notes(
        ModelSection(name="Qwen/Qwen3-8B-Base"), ["aime26", "aime25", "aime25", "chain_sum"]
    )
    assert len(notes) == 2
    assert notes[0].startswith("AIME 2025 precedes the base model's release (2025-04-29; Qwen3,")
    assert notes[0].endswith("its problems may be in the training data")
    assert notes[1].startswith("AIME 2026 comes after the base model's release")
    (unknown,) = contamination_notes(ModelSection(name="tiny-fast"), ["aime24"])
    assert "unknown whether it precedes the base model's release; set model.released" in unknown
