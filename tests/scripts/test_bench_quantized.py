"""What a quantized base changes, measured: a smoke run on the tiny model."""

from __future__ import annotations

import importlib.util

import pytest
from benchmarks import quantized

from rl_lora.nn.quantized import _library


def test_without_bitsandbytes_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _library.cache_clear()
    assert quantized.main(["--model", "tiny-noisy", "--rounds", "1"]) == 2
    assert "pip install 'rl-lora[quant]'" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_the_table_has_all_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert quantized.main(["--model", "tiny-noisy", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1,020 tokens" in printed
    assert all(kind in printed for kind in ("unquantized", "int8", "nf4"))
