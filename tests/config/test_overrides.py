"""Settings on the command line, by the type of their field."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rl_lora.config import RunConfig, load_config
from rl_lora.config.overrides import apply_overrides, parse_value
from rl_lora.config.sft import load_sft_config
from rl_lora.errors import UserError
from rl_lora.studies.config import load_study

TYPED = ["2026-11-26", "2026", "71e2", "true", "false", "0x10", "1_000", "inf", "nan", "1.0", "-1"]


def value_of(*overrides: str) -> Any:
    """What the first override's key is in the settings."""
    value: Any = load_config(None, list(overrides))
    for part in overrides[0].partition("=")[0].split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("text", TYPED)
@pytest.mark.parametrize("key", ["model.revision", "model.name", "data.system", "data.few_shot"])
def test_text_is_taken_where_the_field_is_text(key: str, text: str) -> None:
    assert value_of(f"{key}={text}") == text
    assert value_of(f'{key}="{text}"') == text
    assert value_of(f"{key}='{text}'") == text


@pytest.mark.parametrize("text", [one for one in TYPED if one != "-1"])
def test_run_names(text: str) -> None:
    assert value_of(f"run.name={text}") == text


CASES: list[tuple[str, Any]] = [
    ("algorithm.kl=none", "none"),
    ("run.name=none", "none"),
    ("model.revision=none", None),
    ('model.revision="none"', "none"),
    ("eval.max_tokens=None", None),
    ("sampling.stop=zzz", ("zzz",)),
    ("sampling.stop=2026", ("2026",)),
    ("sampling.stop=none", ("none",)),
    ('sampling.stop="a, b"', ("a, b",)),
    ("sampling.stop=a, b", ("a, b",)),
    ("sampling.stop=[2026, 71e2, true]", ("2026", "71e2", "true")),
    ("sampling.stop=[<|end|>]", ("<|end|>",)),
    ("sampling.stop=[a, 'b, c', \"\\n\", d]", ("a", "b, c", "\n", "d")),
    ('sampling.stop=["a, b", "]"]', ("a, b", "]")),
    ("sampling.stop=[]", ()),
    ("sampling.stop=", ()),
    ("sampling.stop={}", ("{}",)),
    ("run.loggers=[tensorboard]", ("tensorboard",)),
    ("run.loggers=tensorboard", ("tensorboard",)),
    ("optim.lr=1e-3", 1e-3),
    ("optim.lr=.001", 1e-3),
    ("optim.betas=[0.8, 0.9]", (0.8, 0.9)),
    ("run.seed=007", 7),
    ("lora.lm_head=True", True),
    ("model.released=2024-07-01", date(2024, 7, 1)),
]


@pytest.mark.parametrize(("override", "expected"), CASES)
def test_values_by_the_fields_type(override: str, expected: Any) -> None:
    assert value_of(override) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=2026"], [{"name": "2026"}]),
        (["data=true"], [{"name": "true"}]),
        (["data.train=2026.jsonl"], [{"name": "2026.jsonl"}]),
        (["data.train=[a.jsonl, 2026]"], [{"name": "a.jsonl"}, {"name": "2026"}]),
        (
            ['data.train=["a", {name="b", num_rows=3}]'],
            [{"name": "a"}, {"name": "b", "num_rows": 3}],
        ),
        (['data.train={name="b", num_rows=3}'], [{"name": "b", "num_rows": 3}]),
        (["data=a", "data.train.answer=x.y"], [{"name": "a", "answer": "x.y"}]),
        (["data.train.answer=7", "data=a"], [{"name": "a", "answer": "7"}]),
        (["data.train.name=7", "data.train.num_rows=7"], [{"name": "7", "num_rows": 7}]),
        (["data=a", "data.train.options.n=7"], [{"name": "a", "options": {"n": 7}}]),
    ],
)
def test_sources_and_their_keys(overrides: list[str], expected: list[dict[str, Any]]) -> None:
    train = load_config(None, overrides).data.train
    assert [source.model_dump(exclude_unset=True) for source in train] == expected


def test_a_key_of_one_source_reaches_into_the_files_list(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[data]\nheld_out = 3\ntrain = [{name = "a", num_rows = 9}]\n')
    data = load_config(tmp_path / "c.toml", ["data.train.answer=gold"]).data
    assert data.train[0].model_dump(exclude_unset=True) == {
        "name": "a",
        "num_rows": 9,
        "answer": "gold",
    }
    assert data.held_out == 3
    with pytest.raises(UserError, match="'train' is a list of several; set it in a TOML file"):
        load_config(None, ["data.train=[a, b]", "data.train.answer=gold"])


def test_supervised_jobs_and_studies_have_their_own_fields(tmp_path: Path) -> None:
    assert load_sft_config(None, ["run.name=2026", "data=7"]).run.name == "2026"
    (tmp_path / "s.toml").write_text('[job]\ndata = "gsm8k"\n[[grid]]\nlora.rank = [1, 2]\n')
    overrides = ["study.name=71e2", "job.model.revision=1234567", "job.run.num_steps=3"]
    study = load_study(tmp_path / "s.toml", overrides)
    assert study.study.name == "71e2"
    assert study.job["model"] == {"revision": "1234567"}
    assert study.job["run"] == {"num_steps": 3}
    arm = ["study.arm=sft", "job.data.learn_on=last"]
    assert load_study(tmp_path / "s.toml", arm).job["data"]["learn_on"] == "last"


def test_more_than_a_value_is_text() -> None:
    assert parse_value("1\nother = 2", int) == "1\nother = 2"
    assert parse_value("[" * 3000, int) == "[" * 3000
    assert parse_value("x", Any) == "x"
    assert parse_value("7", Any) == 7


def fields_of(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= fields_of(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = kind
    return found


@pytest.mark.parametrize("key", [key for key, kind in fields_of(RunConfig).items() if kind is str])
def test_no_text_field_is_left_out(key: str) -> None:
    for text in TYPED:
        node: Any = apply_overrides({}, [f"{key}={text}"], RunConfig)
        for part in key.split("."):
            node = node[part]
        assert node == text
