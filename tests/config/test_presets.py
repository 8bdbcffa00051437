"""Named sets of [algorithm] settings: what they are, and that what is given wins."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from rl_lora.commands.plan_tables import settings_table
from rl_lora.config import AlgorithmSection, RunConfig, load_config, parse_config
from rl_lora.config.algorithm import load_algorithm
from rl_lora.config.presets import PRESETS
from rl_lora.errors import UserError


def algorithm(*overrides: str) -> AlgorithmSection:
    return load_config(None, [f"algorithm.{one}" for one in overrides]).algorithm


def test_every_preset_has_a_name_in_the_settings_and_can_be_loaded() -> None:
    names = get_args(AlgorithmSection.model_fields["preset"].annotation)
    assert set(names) == {"none", *PRESETS}
    for name in PRESETS:
        found = algorithm(f"preset={name}")
        assert (found.preset, found.loss) == (name, PRESETS[name]["loss"])
        load_algorithm(found)


def test_the_papers_settings() -> None:
    dapo, dr_grpo = algorithm("preset=dapo"), algorithm("preset=dr_grpo")
    assert (dapo.advantage, dapo.loss, dapo.denominator) == ("grpo", "ppo", "tokens")
    assert dapo.options == {"clip_low": 0.2, "clip_high": 0.28}  # clip-higher
    assert (dr_grpo.advantage, dr_grpo.denominator) == ("group_mean", "max_tokens")
    assert algorithm("preset=gspo").denominator == "sequences"


def test_the_article_is_the_default() -> None:
    preset = algorithm("preset=lora_without_regret").model_dump(exclude={"preset"})
    assert preset == AlgorithmSection().model_dump(exclude={"preset"})


def test_what_is_given_wins_and_a_conflict_is_no_error() -> None:
    found = algorithm("preset=dapo", "clip_high=0.4", "denominator=max_tokens")
    assert found.options == {"clip_low": 0.2, "clip_high": 0.4}
    assert (found.denominator, found.advantage) == ("max_tokens", "grpo")
    # Another loss does not get the options of the preset's.
    other = algorithm("preset=dapo", "loss=truncated_importance_sampling", "ratio_cap=3")
    assert (other.options, other.advantage) == ({"ratio_cap": 3}, "grpo")


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"algorithm.preset = 'dpo': Input should be 'none', 'lora"):
        algorithm("preset=dpo")


def test_settings_are_shown_and_recorded_resolved() -> None:
    config = load_config(None, ["algorithm.preset=dr_grpo", "algorithm.clip_high=0.3"])
    console = Console(file=io.StringIO(), width=120)
    console.print(settings_table(config, RunConfig()))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for key, value in [("loss", "'ppo'"), ("denominator", "'max_tokens'")]:
        assert any(f"* algorithm.{key}" in line and value in line for line in shown.splitlines())
    assert "{'clip_low': 0.2, 'clip_high': 0.3}" in shown
    # A record is read again as it was.
    assert parse_config(json.loads(config.model_dump_json())) == config


def test_a_preset_in_a_file_is_overridden_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[algorithm]\npreset = "gspo"\n')
    config = load_config(path, ["algorithm.preset=cispo"])
    assert (config.algorithm.loss, config.algorithm.denominator) == ("cispo", "tokens")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kl=loss", "kl_weight=1", "kl_estimator=k1"], "has a gradient whose mean is zero"),
        (["kl=reward", "kl_weight=1", "kl_estimator=k3"], "does not give the gradient of the KL"),
        (["kl_estimator=k2"], "has no effect with algorithm.kl='none'"),
    ],
)
def test_an_estimator_without_a_gradient_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        algorithm(*overrides)
