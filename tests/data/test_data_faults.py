"""Hubs out of reach and rows of 10 MB; other faults of data: test_data_files, test_inputs, ..."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from rl_lora.config import DataSection, ModelSection, SourceSection
from rl_lora.data.sources import load_source
from rl_lora.errors import UserError
from rl_lora.models.resolve import resolve_model
from rl_lora.prompts import load_prompt_sets
from tests.data.test_sources import write_jsonl
from tests.helpers.tiny_models import random_llama
from tests.test_prompts import word_tokenizer

pytestmark = pytest.mark.faults
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """owner/model as the hub's client caches it; the hub is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    model_dir = random_llama(repository / "snapshots" / COMMIT)
    word_tokenizer().save_pretrained(model_dir)
    return model_dir


def test_a_cached_model_is_used_and_said_where_the_hub_is_out_of_reach(
    cached_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve_model(ModelSection(name="owner/model")) == cached_model
    (line,) = caplog.messages
    assert line == (
        "model hub id 'owner/model': the hub cannot be reached; the cached copy "
        f"{cached_model} is used"
    )


def test_half_a_cached_model_is_refused(cached_model: Path) -> None:
    """The client keeps a list of a commit's files, and one of them has not arrived."""
    names = ("config.json", "model.safetensors", "merges.txt")
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    listing = cached_model.parents[1] / "trees" / f"{COMMIT}.json"
    listing.parent.mkdir()
    listing.write_text(json.dumps({"format_version": 1, "files": files}))
    with pytest.raises(UserError, match="the cached copy is incomplete; give a local"):
        resolve_model(ModelSection(name="owner/model"))


def test_a_cached_data_set_is_used_and_said_where_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "made")
    )
    made = next(p for p in (tmp_path / "made" / "json").glob("default*/*/*") if p.is_dir())
    folder = tmp_path / "cache" / "owner___sums" / "default" / "0.0.0" / "abc"
    shutil.copytree(made, folder)
    (folder / "json-train.arrow").rename(folder / "sums-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    names = {"dataset_name": "sums", "config_name": "default"}
    (folder / "dataset_info.json").write_text(json.dumps(info | names))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load.logger.propagate", True)
    loaded = load_source(SourceSection(name="owner/sums"), "train")
    assert [row.reference for row in loaded.rows] == ["2"]
    assert "Using the latest cached version of the dataset since owner/sums" in caplog.text


MEGABYTE = "x 1 " * 250_000


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": MEGABYTE, "answer": "1"}, "has 500007 tokens, and the model's context"),
        ({"question": "q 1 ?", "answer": 10 * MEGABYTE}, ""),
        ({"question": "q 1 ?", "answer": "1", "note": 10 * MEGABYTE}, ""),
    ],
)
def test_a_row_of_megabytes_is_read_or_refused_in_a_short_line(
    tmp_path: Path, row: dict[str, str], told: str
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "a 1 ?", "answer": "1"}, row])
    data = DataSection(train=str(tmp_path / "rows.jsonl"), template="base", held_out=1)  # type: ignore[arg-type]
    if not told:
        sets = load_prompt_sets(data, word_tokenizer(), 100, 10, seed=0)
        assert len(sets.train) + len(sets.eval) == 2
        return
    with pytest.raises(UserError, match=told) as caught:
        load_prompt_sets(data, word_tokenizer(), 100, 10, seed=0)
    assert len(str(caught.value)) < 300
