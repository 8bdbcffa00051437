"""The learning-rate rule on numbers worked out by hand, and the command that prints it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3MoeConfig

from rl_lora.cli import main
from rl_lora.commands.lr import family_of, full_rate
from rl_lora.errors import UserError


def test_at_the_reference_width_the_rule_is_its_constants() -> None:
    assert full_rate("llama", 2000) == full_rate("qwen", 2000) == 5e-5


@pytest.mark.parametrize(
    ("family", "hidden", "full"),
    [
        # (2000 / 4096)^0.781 = exp(0.781 * (7.600902 - 8.317766)) = exp(-0.559871) = 0.571283
        ("llama", 4096, 5e-5 * 0.571283),
        # exp(0.0775 * -0.716864) = exp(-0.0555570) = 0.945958
        ("qwen", 4096, 5e-5 * 0.945958),
        # exp(0.781 * (7.600902 - 9.010913)) = exp(-1.101219) = 0.332466
        ("llama", 8192, 5e-5 * 0.332466),
    ],
)
def test_rates_by_hand(family: str, hidden: int, full: float) -> None:
    assert full_rate(family, hidden) == pytest.approx(full, rel=1e-5)


def test_a_family_without_a_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"only for llama and qwen, not for 'mistral'.*--family"):
        full_rate("mistral", 4096)


def test_families_are_read_from_the_config() -> None:
    families = [family_of(c()) for c in (LlamaConfig, Qwen2Config, Qwen3MoeConfig, MistralConfig)]
    assert families == ["llama", "qwen", "qwen", "mistral"]


def test_the_command_reads_a_known_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lr", "meta-llama/Llama-3.1-8B"]) == 0
    out = capsys.readouterr().out
    assert "width 4096, family llama (exponent 0.781)" in out
    for rate in ("2.86e-04", "4.28e-04", "2.86e-05"):
        assert rate in out
    assert "upper bound" in out
    assert "warning" not in out


def test_the_command_reads_a_directory_with_nothing_but_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "mistral", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["lr", str(tmp_path)]) == 2
    assert "not for 'mistral'" in capsys.readouterr().err
    assert main(["lr", str(tmp_path), "--family", "qwen"]) == 0
    out = capsys.readouterr().out
    assert "width 64, family qwen" in out
    assert "warning: width 64 is outside 2048 to 8192" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a model, or give both --hidden and --family"),
        (["--hidden", "0", "--family", "llama"], "--hidden 0"),
        (["--hidden", "64", "--family", "gpt"], "not for 'gpt'"),
        (["/nowhere/model"], "'/nowhere/model'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lr", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_width_and_family_do_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lr", "--hidden", "2000", "--family", "llama"]) == 0
    out = capsys.readouterr().out
    for rate in ("5.00e-04", "7.50e-04", "5.00e-05"):  # 10 and 15 times the last
        assert rate in out
