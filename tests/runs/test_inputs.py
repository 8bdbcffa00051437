"""Base model and data changed between a run and its resumption or evaluation; runs that moved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rl_lora.cli import main
from rl_lora.config import ModelSection, load_config
from rl_lora.errors import UserError
from rl_lora.evaluation.evaluate import set_aside
from rl_lora.models.resolve import resolve_model
from rl_lora.runs.inputs import (
    absolute_model,
    absolute_source,
    base_inputs,
    check_base,
    prompt_inputs,
)
from rl_lora.runs.record import with_absolute_paths
from tests.helpers.fakes import make_prompt
from tests.helpers.tiny_models import make_policy, random_llama
from tests.sft.test_sft import TINY
from tests.test_train import SMOKE, metrics_of

pytestmark = pytest.mark.faults

SMALL = ["run.num_steps=1", "data.held_out=4", "sampling.num_prompts=2", "sampling.max_tokens=12"]
SMALL += ["sampling.num_samples=2", "run.loggers=[]"]
SFT_SMALL = ["run.num_steps=1", "data.held_out=4", "sft.batch_size=2"]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)


def write_rows(path: Path, count: int = 12, **change: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"}
        for n in range(count)
    ]
    for place, row in change.items():
        rows[int(place.removeprefix("row"))] |= row
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def copy_model(folder: Path) -> Path:
    target = folder / "model"
    shutil.copytree(resolve_model(ModelSection(name="tiny-fast")), target)
    return target


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_one_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in sorted(tensors) if "down_proj" in name)
    tensors[name][0, 0] += 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    text = path.read_text()
    assert "'<|end|>'" in text
    path.write_text(text.replace("'<|end|>'", "' <|end|>'"))


# What is changed, and what the line says of it.
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a weight": (lambda f: change_one_weight(f / "model"), "the weights in .* differ"),
    "the rotary base": (
        lambda f: edit_json(f / "model" / "config.json", rope_theta=12345.0, rope_scaling=None),
        "the configuration in .* differs",
    ),
    "the chat template": (
        lambda f: change_template(f / "model"),
        r"data\.train has changed .*: its (rendered prompts|rows) differ",
    ),
    "a row less": (
        lambda f: write_rows(f / "rows.jsonl", 11),
        r"data\.train.*: 8 rows then, 7 now",
    ),
    "an answer": (
        lambda f: write_rows(
            f / "rows.jsonl",
            row0={"answer": "0 + 1 = 7\n#### 7"},
            row5={"answer": "5 + 1 = 9\n#### 9"},
        ),
        r"data\.(train|eval).*: its answers differ",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of each arm on its own model and rows: RUNS/rl and RUNS/sft."""
    folder = tmp_path_factory.mktemp("runs")
    copy_model(folder)
    write_rows(folder / "rows.jsonl")
    assert main(["train", str(SMOKE), *SMALL, *of(folder, "rl"), "--quiet"]) == 0
    assert main(["sft", str(TINY), *SFT_SMALL, *of(folder, "sft"), "--quiet"]) == 0
    return folder


def of(folder: Path, name: str) -> list[str]:
    return [
        f"run.output_dir={folder}",
        f"run.name={name}",
        f"model.name={folder / 'model'}",
        f"data={folder / 'rows.jsonl'}",
    ]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("arm", ["rl", "sft"])
def test_a_run_does_not_resume_from_another_base_or_other_data(
    runs: Path, capsys: pytest.CaptureFixture[str], arm: str, change: str
) -> None:
    """In place, as the paths are part of the job; what was changed is put back afterwards."""
    edit, message = CHANGES[change]
    kept = runs.with_name("kept")
    shutil.copytree(runs, kept)
    try:
        capsys.readouterr()
        edit(runs)
        command = ["train", str(SMOKE), *SMALL] if arm == "rl" else ["sft", str(TINY), *SFT_SMALL]
        command += [*of(runs, arm), "run.num_steps=2", "--resume", "--quiet"]
        line = refused(capsys, *command)
        assert_says(line, message)
        assert "--accept-changed-data" in line
        assert len(metrics_of(runs / arm)) == (1 if arm == "rl" else 2)
        if arm == "rl" and "train" not in message:
            assert_says(refused(capsys, "eval", str(runs / "rl")), message)
        assert main([*command, "--accept-changed-data"]) == 0
        assert [row["step"] for row in metrics_of(runs / arm)][-1] == 2
        # From now on these are the run's own.
        assert main([*command, "run.num_steps=3"]) == 0
    finally:
        shutil.rmtree(runs)
        kept.rename(runs)


def assert_says(line: str, message: str) -> None:
    assert re.search(message, line), line


def test_an_evaluation_of_other_problems_is_not_compared_with_the_old_ones(runs: Path) -> None:
    kept = runs.with_name("kept")
    shutil.copytree(runs, kept)
    try:
        write_rows(runs / "rows.jsonl", 30)
        command = ["train", str(SMOKE), *SMALL, *of(runs, "rl"), "run.num_steps=2", "--resume"]
        assert main([*command, "--accept-changed-data", "--quiet"]) == 0
        assert not (runs / "rl" / "eval" / "step_000000.json").exists()
        assert (runs / "rl" / "eval_until_000001" / "step_000000.json").is_file()
        assert (runs / "rl" / "eval" / "step_000002.json").is_file()
    finally:
        shutil.rmtree(runs)
        kept.rename(runs)


def test_what_is_set_aside_is_kept(tmp_path: Path) -> None:
    """Twice at one step: the first resumption was killed before its first checkpoint."""
    for text in ("old", "newer", "newest"):
        (tmp_path / "eval").mkdir()
        (tmp_path / "eval" / "x").write_text(text)
        set_aside(tmp_path / "eval", 3)
    set_aside(tmp_path / "eval", 3)  # there is none
    found = {path.name: (path / "x").read_text() for path in tmp_path.iterdir()}
    assert found == {
        "eval_until_000003": "old",
        "eval_until_000003_2": "newer",
        "eval_until_000003_3": "newest",
    }


def test_an_evaluation_compares_what_its_overrides_leave(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "other.jsonl", 5)
    run = str(runs / "rl")
    assert main(["eval", run, "--name", "own"]) == 0
    assert main(["eval", run, "--name", "other", f"data.eval={tmp_path / 'other.jsonl'}"]) == 0
    assert main(["eval", run, "--name", "seed", "run.seed=3"]) == 0  # other rows are held out
    assert "supervised run" in refused(capsys, "eval", str(runs / "sft"))


# --- hashes ---------------------------------------------------------------------------------------


def test_hashes_do_not_run_together() -> None:
    one = [make_prompt(question="a", reference="bc"), make_prompt(question="d", reference="e")]
    two = [make_prompt(question="ad", reference="b"), make_prompt(question="", reference="ce")]
    first, second = prompt_inputs(one), prompt_inputs(two)
    assert first["questions"] != second["questions"]
    assert first["answers"] != second["answers"]
    assert first["prompts"] == second["prompts"]
    assert prompt_inputs(one[::-1])["questions"] != first["questions"]
    assert prompt_inputs([make_prompt(question="\udc80")])["rows"] == 1  # a lone surrogate


def test_the_base_of_full_fine_tuning_has_a_fingerprint_of_its_weights(tmp_path: Path) -> None:
    first = base_inputs(make_policy(random_llama(tmp_path / "a"), mode="full"))
    second = base_inputs(make_policy(random_llama(tmp_path / "b", seed=1), mode="full"))
    assert first["config"] == second["config"]
    with pytest.raises(UserError, match="the weights in"):
        check_base(first, {**second, "name": first["name"]}, tmp_path)
    check_base({**first, "dtype": "bfloat16"}, second, tmp_path)  # not comparable
    renamed = random_llama(tmp_path / "c")
    edit_json(renamed / "config.json", _name_or_path="other", transformers_version="9")
    check_base(first, base_inputs(make_policy(renamed, mode="full")), tmp_path)


# --- from another folder --------------------------------------------------------------------------


def test_what_stays_and_what_becomes_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "held_out", "tiny-fast", "model"):
        Path(name).mkdir()
    assert absolute_source("rows") == str(tmp_path / "rows")
    assert absolute_source("./rows") == str(tmp_path / "rows")
    for name in ("held_out", "gsm8k", "openai/gsm8k", "generated:chain_sum", "nowhere.jsonl"):
        assert absolute_source(name) == name
    assert absolute_model("model") == str(tmp_path / "model")
    for name in ("tiny-fast", "Qwen/Qwen3-8B-Base", "./nowhere"):
        assert absolute_model(name) == name
    config = load_config(SMOKE, ["data=rows", "data.eval=['rows', 'held_out']", "model.name=model"])
    moved = with_absolute_paths(config)
    assert [source.name for source in moved.data.eval] == [str(tmp_path / "rows"), "held_out"]
    assert moved.model.name == str(tmp_path / "model")
    assert with_absolute_paths(moved) == moved


def test_a_run_made_with_relative_paths_is_read_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    copy_model(here)
    write_rows(here / "rows.jsonl")
    monkeypatch.chdir(here)
    relative = ["model.name=./model", "data=rows.jsonl", "run.output_dir=out", "run.name=r"]
    assert main(["train", str(SMOKE), *SMALL, *relative, "--quiet"]) == 0
    assert main(["sft", str(TINY), *SFT_SMALL, *relative, "run.name=s", "--quiet"]) == 0
    monkeypatch.chdir(elsewhere)
    run = here / "out" / "r"
    assert main(["eval", str(run), "--name", "again"]) == 0
    absolute = [f"model.name={here / 'model'}", f"data={here / 'rows.jsonl'}"]
    absolute += [f"run.output_dir={here / 'out'}", "run.name=r", "run.num_steps=2"]
    assert main(["train", str(SMOKE), *SMALL, *absolute, "--resume", "--quiet"]) == 0
    ids = torch.tensor([[1, 5, 9, 33, 2, 7]])
    for adapter in (run / "adapter", here / "out" / "s" / "adapter"):
        settings = json.loads((adapter / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(here / "model")
        by_peft = AutoPeftModelForCausalLM.from_pretrained(adapter)
        merged = elsewhere / adapter.parent.name
        assert main(["export", str(adapter), "--merged", str(merged)]) == 0
        ours = AutoModelForCausalLM.from_pretrained(merged)
        with torch.no_grad():
            difference = (by_peft(ids).logits - ours(ids).logits).abs().max()
        assert float(difference) < 1e-4
        card = (merged / "README.md").read_text()
        is_sft = adapter.parent.name == "s"
        assert ("fine-tuned" in card) == is_sft
        assert ("reinforcement learning" in card) != is_sft


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B-Base"),
        ("gpt2", "gpt2"),  # of the hub's first days: no owner
        ("tiny-fast", None),  # ours, which PEFT does not know
        ("smollm2-135m-instruct", None),
    ],
)
def test_an_adapter_names_its_base_as_peft_finds_it(
    tmp_path: Path, name: str, expected: str | None
) -> None:
    from rl_lora.adapters.files import save_adapter

    policy = make_policy(random_llama(tmp_path / "base"))
    policy.base_name, policy.base_revision = name, "v2"
    path = save_adapter(policy, tmp_path / "adapters", version=1, run_name="x").path
    settings = json.loads((path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == (expected or str(tmp_path / "base"))
    assert settings["revision"] == "v2"
    assert json.loads((path / "rl_lora.json").read_text())["base_model"] == name
