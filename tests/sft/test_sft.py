"""The supervised arm: rows of every format, the loss of the completion only, kills, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rl_lora.adapters.files import load_tensors
from rl_lora.batches import pack_samples
from rl_lora.cli import main
from rl_lora.config import ModelSection, parse_as
from rl_lora.config.sft import SftConfig, SftDataSection, load_sft_config
from rl_lora.data.chats import parse_chats
from rl_lora.data.messages import Message
from rl_lora.errors import UserError
from rl_lora.models.resolve import load_tokenizer, resolve_model
from rl_lora.sft.data import load_sft, step_indices
from rl_lora.sft.held_out_loss import mean_with_interval, sequence_nll
from rl_lora.sft.train import curve_steps, fine_tune
from rl_lora.types import TrainSample
from tests.helpers.kills import kill_9_at_line
from tests.helpers.tiny_models import make_policy, random_llama, shake

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "sft_tiny.toml"
SHORT = ["run.num_steps=4", "data.held_out=20", "sft.batch_size=4", "run.checkpoint_every=1"]
MACHINE_KEYS = ("time/", "speed/", "memory/")


def tiny(folder: Path, *overrides: str) -> SftConfig:
    return load_sft_config(TINY, [*SHORT, f"run.output_dir={folder}", *overrides])


def metrics_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE_KEYS)} for row in rows]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_model(ModelSection(name="tiny-fast")))


# --- rows -----------------------------------------------------------------------------------------


ASKED, ANSWERED = Message("user", "What is 4 + 3?"), Message("assistant", "7")


@pytest.mark.parametrize(
    "raw",
    [
        {
            "messages": [
                {"role": "user", "content": "What is 4 + 3?"},
                {"role": "assistant", "content": "7"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "What is 4 + 3?"},
                {"from": "gpt", "value": "7"},
            ]
        },
        {"prompt": "What is 4 + 3?", "completion": "7"},
        {
            "prompt": [{"role": "user", "content": "What is 4 + 3?"}],
            "completion": [{"role": "assistant", "content": "7"}],
        },
        {"instruction": "What is 4 + 3?", "input": "", "output": "7"},
        {"instruction": "What is 4 + 3?", "response": "7"},
    ],
)  # fmt: skip
def test_every_layout_gives_the_same_chat(raw: dict[str, Any]) -> None:
    (chat,) = parse_chats([raw], "x", "")
    assert chat.messages == (ASKED, ANSWERED)
    assert chat.answers == [1]


def test_the_input_stands_under_its_instruction() -> None:
    (chat,) = parse_chats([{"instruction": "Add.", "input": "4, 3", "output": "7"}], "x", "")
    assert chat.messages[0].content == "Add.\n\n4, 3"


def test_problems_end_in_the_asked_format() -> None:
    rows = [{"question": "What is 4 + 3?", "answer": "4 + 3 = 7\n#### 7"}]
    (chat,) = parse_chats(rows, "x", "Box it: \\boxed{}.")
    assert chat.messages[0].content == "What is 4 + 3?\nBox it: \\boxed{}."
    assert chat.messages[1].content == "4 + 3 = 7\n\\boxed{7}"


def test_columns_can_be_named() -> None:
    (chat,) = parse_chats([{"q": "What is 4 + 3?", "a": "7"}], "x", "", "q", "a")
    assert chat.messages == (ASKED, ANSWERED)
    with pytest.raises(UserError, match=r"no column 'b'.*its columns: a, q"):
        parse_chats([{"q": "", "a": ""}], "x", "", "q", "b")
    with pytest.raises(UserError, match="set both keys"):
        parse_chats([{"q": "", "a": ""}], "x", "", "q")
    with pytest.raises(UserError, match=r"its columns \(a, q\) are not those of chats"):
        parse_chats([{"q": "", "a": ""}], "x", "")


def test_rows_without_an_answer_have_nothing_to_learn() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"messages": [{"role": "assistant", "content": "unasked"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]},
        {"messages": " "},
    ]
    assert [chat.answers for chat in parse_chats(rows, "x", "")] == [[], [], [], []]


def write_chats(path: Path, count: int, turns: int = 1) -> Path:
    rows = []
    for number in range(count):
        messages = []
        for turn in range(turns):
            messages += [
                {"role": "user", "content": f"What is {number} + {turn}?"},
                {"role": "assistant", "content": f"{number + turn}"},
            ]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_chat_is_one_sequence_an_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_chats(tmp_path / "chats.jsonl", 10, turns=2)
    data = SftDataSection(train=str(path), held_out=3)  # type: ignore[arg-type]
    sets = load_sft(data, tokenizer, 1024, seed=0)
    assert (len(sets.train), len(sets.test)) == (14, 6)
    texts = [tokenizer.decode(list(one.completion_ids)) for one in sets.train]
    assert all(text.endswith("<|end|>") for text in texts)
    prompts = [tokenizer.decode(list(one.prompt_ids)) for one in sets.train]
    assert prompts[1].count("<|user|>") == 2
    assert prompts[1].endswith("<|assistant|>")
    last = load_sft(data.model_copy(update={"learn_on": "last"}), tokenizer, 1024, seed=0)
    assert len(last.train) == 7


def test_base_template_needs_no_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 2, turns=2)
    data = SftDataSection(train=str(chats), held_out=1, template="base", system="Be brief.")  # type: ignore[arg-type]
    _, last = load_sft(data, tokenizer, 1024, seed=0).train
    number = tokenizer.decode(list(last.prompt_ids)).partition("What is ")[2][0]
    assert tokenizer.decode(list(last.prompt_ids), skip_special_tokens=True) == (
        f"System: Be brief.\n\nUser: What is {number} + 0?\n\nAssistant: {number}\n\n"
        f"User: What is {number} + 1?\n\nAssistant:"
    )


def test_long_completions_are_cut_and_long_prompts_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "1" * 5, "completion": f"{n}" * 40} for n in range(8)]
    rows += [{"prompt": "2" * 60, "completion": "3"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SftDataSection(train=str(path), eval=str(path), max_tokens=20)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no training sequence is left"):
        load_sft(data, tokenizer, 1024, seed=0)  # all of them are in the test
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "5", "completion": "6"}) + "\n")
    data = SftDataSection(train=str(path), eval=str(other), max_tokens=20)  # type: ignore[arg-type]
    sets = load_sft(data, tokenizer, 1024, seed=0)
    assert [len(s.prompt_ids) + len(s.completion_ids) for s in sets.train] == [20] * 8
    assert "8 cut at data.max_tokens, 1 dropped, prompt too long" in sets.notes[-1]


@pytest.mark.parametrize(
    "name",
    ["GPTeacher/codegen-instruct.json", "LLaMA-Factory/alpaca_en_demo.json",
     "LLaMA-Factory/kto_en_demo.json"],
)  # fmt: skip
def test_real_files_load(shared_dir: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    path = shared_dir / "data" / "sft" / name
    train = ({"name": str(path), "num_rows": 60},)
    data = SftDataSection(train=train, held_out=10)  # type: ignore[arg-type]
    sets = load_sft(data, tokenizer, 4096, seed=0)
    assert len(sets.train) >= 50
    assert sets.num_train_tokens > 1000


def test_epochs_are_shuffled_and_every_row_comes_once_in_each() -> None:
    steps = [step_indices(step, 4, 10, seed=0) for step in range(1, 6)]  # 20 rows: 2 epochs
    flat = [index for indices in steps for index in indices]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert step_indices(3, 4, 10, seed=1) != steps[2]


def test_tests_are_at_equal_ratios_and_on_the_last_step() -> None:
    assert curve_steps(1024, 5) == [4, 16, 64, 256, 1024]
    assert curve_steps(3, 10) == [1, 2, 3]
    assert curve_steps(10, 1, every=4) == [4, 8, 10]
    assert curve_steps(0, 10) == []


# --- the loss -------------------------------------------------------------------------------------


def test_the_test_loss_is_that_of_transformers_on_only_the_completion(tmp_path: Path) -> None:
    path = random_llama(tmp_path)
    policy = make_policy(path, rank=2)
    samples = [
        TrainSample((1, 5, 9), (7, 8, 2), (0.0,) * 3, 1.0, 0),
        TrainSample((1, 4), (11, 2), (0.0,) * 2, 1.0, 0),
    ]
    nlls, counts = sequence_nll(policy, samples, microbatch_tokens=64)
    model = AutoModelForCausalLM.from_pretrained(path)
    expected = []
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
        labels = ids.clone()
        labels[:, : len(sample.prompt_ids)] = -100
        with torch.no_grad():
            expected.append(float(model(input_ids=ids, labels=labels).loss))
    got = {count: nll / count for nll, count in zip(nlls, counts, strict=True)}
    assert got[3] == pytest.approx(expected[0], abs=1e-5)
    assert got[2] == pytest.approx(expected[1], abs=1e-5)


def test_a_step_moves_the_policy_only_by_the_completions_gradient(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path), rank=2)
    shake(policy)
    sample = TrainSample((1, 5, 9), (7, 2), (0.0,) * 2, 1.0, 0)
    ((batch,),) = pack_samples([sample], microbatch_tokens=64)
    assert batch.target_ids_C.tolist() == [7, 2]
    assert batch.weights_C.tolist() == [0.5, 0.5]


def test_interval_of_the_mean_by_hand() -> None:
    # Sums 3 and 5 nats over 1 and 3 tokens: 8 / 4 = 2; residuals 1 and -1; 2 / 1 * 2 = 4: 2 / 4.
    loss = mean_with_interval([3.0, 5.0], [1, 3])
    assert loss["test/nll"] == 2.0
    assert loss["test/nll_high"] == pytest.approx(2 + 1.959964 * 0.5)
    assert loss["test/nll_low"] == pytest.approx(2 - 1.959964 * 0.5)
    assert loss["test/tokens"] == 4.0
    assert mean_with_interval([3.0], [2])["test/nll_high"] == float("inf")
    # Sequences whose nats are proportional to their tokens leave no doubt.
    assert mean_with_interval([2.0, 4.0], [1, 2])["test/nll_high"] == pytest.approx(2.0)


# --- the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_loss_falls_and_the_records_are_there(tmp_path: Path, mode: str) -> None:
    rate = 3e-3 if mode == "lora" else 1e-3
    overrides = ["run.num_steps=30", f"lora.mode={mode}", f"optim.lr={rate}"]
    outcome = fine_tune(tiny(tmp_path, *overrides), quiet=True)
    assert outcome.after < outcome.before - 1
    rows = metrics_of(outcome.folder)
    assert [row["step"] for row in rows] == list(range(31))
    tests = [row["step"] for row in rows if "test/nll" in row]
    assert tests == [0, *curve_steps(30, 10)]
    assert all(row["test/nll_low"] < row["test/nll"] < row["test/nll_high"]
               for row in rows if "test/nll" in row)  # fmt: skip
    assert load_tensors(outcome.folder / "adapter")
    assert json.loads((outcome.folder / "run.json").read_text())["trainable_parameters"] > 0


def test_a_broken_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    fine_tune(tiny(tmp_path, "run.name=whole"), quiet=True)
    # sft.num_tests=2 of 4 steps: tests at steps 2 and 4; of 2 steps at 1 and 2: take every step.
    fine_tune(tiny(tmp_path, "run.name=broken", "run.num_steps=2"), quiet=True)
    fine_tune(tiny(tmp_path, "run.name=broken"), resume=True, quiet=True)
    whole, broken = (load_tensors(tmp_path / name / "adapter") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    first, second = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "broken")
    assert [row.get("sft/loss") for row in first] == [row.get("sft/loss") for row in second]
    with pytest.raises(UserError, match=r"optim\.lr=0\.003, this one has 0\.1"):
        fine_tune(tiny(tmp_path, "run.name=broken", "optim.lr=0.1"), resume=True, quiet=True)
    with pytest.raises(UserError, match="holds an older run"):
        fine_tune(tiny(tmp_path, "run.name=broken"), quiet=True)


@pytest.mark.slow
@pytest.mark.long
def test_kill_9_at_any_moment_and_resume_give_the_same_run(tmp_path: Path) -> None:
    long = ["run.num_steps=40"]
    fine_tune(tiny(tmp_path, "run.name=whole", *long), quiet=True)
    command = [sys.executable, "-m", "rl_lora.cli", "sft", str(TINY), "--resume", *SHORT, *long]
    command += [f"run.output_dir={tmp_path}", "run.name=killed"]
    for wanted in (3, 17):
        kill_9_at_line(command, tmp_path / "killed" / "metrics.jsonl", wanted, ROOT)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


def test_data_by_path_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_chats(tmp_path / "chats.jsonl", 60)
    arguments = ["sft", str(TINY), *SHORT, f"run.output_dir={tmp_path}", f"data={path}"]
    assert main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "completion tokens to learn" in out
    assert "Memory plan" in out
    assert main([*arguments, "--quiet"]) == 0
    assert (tmp_path / "sft_tiny" / "adapter").is_dir()
    assert main([*arguments, "data=nowhere.jsonl", "run.name=x"]) == 2
    assert "data file or folder nowhere.jsonl does not exist" in capsys.readouterr().err


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown key 'sft\.batchsize'; did you mean 'batch_size'"):
        parse_as(SftConfig, {"sft": {"batchsize": 3}})
    with pytest.raises(UserError, match=r"unknown key 'sampling'"):
        parse_as(SftConfig, {"sampling": {}})


@pytest.mark.parametrize("name", ["sft_tulu3_llama31_8b", "sft_openthoughts3_llama31_8b"])
def test_gpu_jobs_can_be_planned_here(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", str(ROOT / "configs" / f"{name}.toml"), "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "8,030,261,248" in out
    assert "peak" in out
    assert "MORE" not in out
