"""The tiny model: its tokenizer, its training, and that it answers."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rl_lora.config import DataSection, ModelSection
from rl_lora.data.generators import GENERATORS, generated_rows
from rl_lora.models.resolve import check_model_dir, context_length, load_tokenizer, resolve_model
from rl_lora.models.tiny import (
    RECIPES,
    TinyRecipe,
    make_tiny_model,
    noisy_solution,
    train_tokenizer,
)
from rl_lora.prompts import load_prompt_sets
from tests.helpers.fakes import render_text

SOURCES = tuple(s.model_copy(update={"num_rows": 60}) for s in RECIPES["tiny-fast"].sources)
QUICK = dataclasses.replace(RECIPES["tiny-fast"], sources=SOURCES, num_steps=2, num_eval=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(QUICK)


@pytest.mark.parametrize(
    "text", ["What is 71 - 30?", "naïve 日本 \x00 🙂", "\\boxed{-52}\n", " 7  8", "<|user|>"]
)
def test_no_text_is_unknown(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_every_digit_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    digits = {
        token
        for token in tokenizer.get_vocab()
        if any(character in token for character in "0123456789")
    }
    assert digits == set("0123456789")
    for name in GENERATORS:
        for row in islice(generated_rows(name, {}, 0), 30):
            tokens = tokenizer.tokenize(row.question)
            assert sum(token in digits for token in tokens) == sum(map(str.isdigit, row.question))


def test_chat_template_opens_the_assistants_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    text = render_text("Hi?", DataSection(system="Be brief.", instruction=""), tokenizer)
    assert text == "<|system|>Be brief.<|end|><|user|>Hi?<|end|><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_tokenizer_is_the_same_every_time(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(QUICK)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_recipes_key_changes_with_it() -> None:
    recipes = (QUICK, *RECIPES.values())
    assert len({recipe.key() for recipe in recipes}) == len(recipes)
    assert dataclasses.replace(QUICK, seed=1).key() != QUICK.key()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_shapes_suit_vllm(recipe: TinyRecipe) -> None:
    assert recipe.head_dim % 32 == 0
    assert recipe.hidden_size % recipe.head_dim == 0
    assert recipe.vocab_size % 64 == 0


def test_a_seed_makes_the_same_model_and_leaves_the_global_generator(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_tiny_model(tmp_path / "a", QUICK)
    assert torch.equal(torch.rand(3), expected)
    make_tiny_model(tmp_path / "b", QUICK)
    make_tiny_model(tmp_path / "c", dataclasses.replace(QUICK, seed=1))
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])


def test_made_directory_is_a_whole_model(tmp_path: Path) -> None:
    accuracy = make_tiny_model(tmp_path, QUICK)
    check_model_dir(tmp_path)
    facts = json.loads((tmp_path / "pretraining.json").read_text())
    assert facts["accuracy"] == accuracy
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tokenizer.chat_template
    assert len(tokenizer) <= model.config.vocab_size
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert context_length(model.config) == QUICK.context_length


def test_tiny_fast_answers_in_the_format_and_gets_a_part_right() -> None:
    path = resolve_model(ModelSection(name="tiny-fast"))
    facts = json.loads((path / "pretraining.json").read_text())
    assert 0.15 <= facts["accuracy"] <= 0.65  # 0.3; machines sum in different orders
    tokenizer = load_tokenizer(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    source = {
        "name": "generated:chain_sum",
        "num_rows": 40,
        "seed": 7,
        "options": {"max_digits": 1},
    }
    prompts = load_prompt_sets(DataSection(eval=source), tokenizer, 1024, 64, 0).eval
    num_correct = num_boxed = 0
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        out = model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        text = tokenizer.decode(out)
        num_boxed += text.endswith("}<|end|>") and "\\boxed{" in text
        num_correct += text.endswith(f"\\boxed{{{prompt.reference}}}<|end|>")
    assert num_boxed >= 36
    assert num_correct >= 10


@pytest.mark.slow
def test_tiny_gets_a_part_right() -> None:
    path = resolve_model(ModelSection(name="tiny"))
    facts = json.loads((path / "pretraining.json").read_text())
    assert 0.2 <= facts["accuracy"] <= 0.5


def test_noise_makes_sums_wrong_and_what_follows_uses_them() -> None:
    solution = "7 + 5 = 12\n12 - 2 = 10\n\\boxed{10}"
    assert noisy_solution(solution, 0.0, random.Random(0)) == solution
    for seed in range(20):
        first, second, box = noisy_solution(solution, 1.0, random.Random(seed)).splitlines()
        total = int(first.removeprefix("7 + 5 = "))
        assert 1 <= abs(total - 12) <= 3
        end = int(second.removeprefix(f"{total} - 2 = "))
        assert 1 <= abs(end - (total - 2)) <= 3
        assert box == f"\\boxed{{{end}}}"


def test_noise_is_part_of_the_key_and_no_noise_is_not() -> None:
    plain = RECIPES["tiny-fast"]
    assert dataclasses.replace(plain, noise=0.3).key() != plain.key()
    assert dataclasses.replace(plain, noise=0.3, num_copies=2).key() != (
        dataclasses.replace(plain, noise=0.3).key()
    )


def test_codes_are_one_world_for_every_seed() -> None:
    def codes(seed: int) -> dict[str, set[str | None]]:
        found: dict[str, set[str | None]] = {}
        for row in islice(generated_rows("codes", {"num_items": 20}, seed), 400):
            item = "".join(character for character in row.question if character.isdigit())
            found.setdefault(item, set()).add(row.reference)
            assert row.solution == f"\\boxed{{{row.reference}}}"
        return found

    assert codes(0) == codes(1)  # rows differ, what is to be known does not
    assert len(codes(0)) == 20
    assert all(len(answers) == 1 for answers in codes(0).values())
