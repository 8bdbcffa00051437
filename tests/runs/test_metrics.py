"""Step statistics by hand; the run log on disk, on resume, under hostile text; trackers."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_lora.errors import UserError
from rl_lora.evaluation.scores import key_part
from rl_lora.runs.log import RunLog, pick_transcripts
from rl_lora.runs.metrics import (
    PhaseTimer,
    memory_metrics,
    rollout_metrics,
    speed_metrics,
)
from rl_lora.storage import jsonl
from rl_lora.types import RolloutGroup
from tests.helpers.fakes import make_group, make_prompt, make_rollout

HOSTILE = "\x00\x1b[2J\x1b]0;title\x07\ud800\u2028\x85\r\n\x9b31m[bold]\u202e"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


# --- rollout_metrics ------------------------------------------------------------------------------


def test_rollout_metrics_by_hand() -> None:
    groups = [
        make_group([1.0, 1.0], "a/0", source="a", lengths_G=[2, 4]),  # solved by all, tied
        make_group([0.0, 0.0], "a/1", source="a", lengths_G=[6, 8]),  # by none, tied
        make_group([1.0, 0.0], "b/0", source="data/b.jsonl", lengths_G=[10, 0]),  # mixed
        make_group([0.1, 0.0], "b/1", source="data/b.jsonl", lengths_G=[12, 6]),  # by none, no tie
    ]
    result = rollout_metrics(groups)
    expected = {
        "rollouts/num": 8,
        "rollouts/prompt_tokens": 12,
        "rollouts/completion_tokens": 48,
        "reward/mean": 3.1 / 8,
        "reward/correct_mean": 3 / 8,
        "reward/format_mean": 0.0,
        "reward/std_in_group": (0 + 0 + 0.5 + 0.05) / 4,
        "reward/mean/a": 0.5,
        "reward/mean/data_b.jsonl": 1.1 / 4,
        "groups/num": 4,
        "groups/solved_all": 1,
        "groups/solved_all_rate": 0.25,
        "groups/solved_none": 2,
        "groups/solved_none_rate": 0.5,
        "groups/mixed": 1,
        "groups/mixed_rate": 0.25,
        "groups/tied": 2,
        "groups/tied_rate": 0.5,
        "cot/tokens_mean": 6.0,
        # Sorted lengths 0 2 4 6 6 8 10 12: places 0.7, 3.5 and 6.3, interpolated.
        "cot/tokens_p10": 1.4,
        "cot/tokens_p50": 6.0,
        "cot/tokens_p90": 10.6,
        "cot/tokens_max": 12,
        "cot/truncated_rate": 0.0,
        "cot/tokens_correct_mean": 16 / 3,
        "cot/tokens_wrong_mean": 32 / 5,
        "score/ok": 8,
    }
    assert result == pytest.approx(expected)
    assert result.keys() == expected.keys()


def test_rates_of_format_truncation_and_status() -> None:
    group = RolloutGroup(
        make_prompt(),
        (
            make_rollout(1.1, has_format=True),
            make_rollout(0.1, has_format=True, is_truncated=True),
            make_rollout(0.0, status="no_answer", is_truncated=True),
            make_rollout(0.0, status="timeout", is_truncated=True),
        ),
    )
    result = rollout_metrics([group])
    assert result["reward/format_mean"] == 0.5
    assert result["cot/truncated_rate"] == 0.75
    assert {key: value for key, value in result.items() if key.startswith("score/")} == {
        "score/no_answer": 1,
        "score/ok": 2,
        "score/timeout": 1,
    }


def test_numbers_that_do_not_exist_have_no_key() -> None:
    assert "cot/tokens_correct_mean" not in rollout_metrics([make_group([0.0, 0.0])])
    assert "cot/tokens_wrong_mean" not in rollout_metrics([make_group([1.0, 1.0])])


def test_correctness_and_not_the_reward_makes_a_group_solved() -> None:
    group = RolloutGroup(
        make_prompt(), (make_rollout(0.9, correct=True), make_rollout(0.2, correct=True))
    )
    result = rollout_metrics([group])
    assert (result["groups/solved_all"], result["groups/tied"]) == (1, 0)


@pytest.mark.parametrize("groups", [[], [make_group([])]])
def test_a_step_without_rollouts_is_a_mistake(groups: list[RolloutGroup]) -> None:
    with pytest.raises(ValueError, match="at least one group"):
        rollout_metrics(groups)


def test_key_part_leaves_no_slash_or_control_character() -> None:
    assert key_part("reasoning_gym:chain_sum") == "reasoning_gym:chain_sum"
    assert key_part("../data/gsm8k/test.jsonl") == "data_gsm8k_test.jsonl"
    assert key_part("a\x1b[31m\nb") == "a_31m_b"
    assert key_part("///") == "unnamed"


# --- seconds, speed, memory -----------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tells clock[0]."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_phase_timer_adds_up_by_step_and_in_total(clock: list[float]) -> None:
    timer = PhaseTimer()
    with timer.phase("sample"):
        clock[0] += 2
    with timer.phase("learn"):
        clock[0] += 3
    with timer.phase("sample"):
        clock[0] += 4
    clock[0] += 0.5  # between phases
    assert timer.take() == {"time/sample_s": 6, "time/learn_s": 3, "time/step_s": 9.5}

    def die() -> None:
        clock[0] += 1
        raise RuntimeError("engine")

    with pytest.raises(RuntimeError, match="engine"), timer.phase("sample"):
        die()
    assert timer.take() == {"time/sample_s": 1, "time/step_s": 1}
    assert timer.total_s == {"sample": 7, "learn": 3}


def test_speed_from_counts_and_seconds() -> None:
    numbers = {"rollouts/completion_tokens": 300.0, "time/sample_s": 2.0}
    assert speed_metrics(numbers) == {"speed/sample_tokens_per_s": 150.0}
    numbers |= {"learn/tokens": 500.0, "time/learn_s": 4.0}
    assert speed_metrics(numbers)["speed/learn_tokens_per_s"] == 125.0
    assert speed_metrics({"rollouts/completion_tokens": 300.0, "time/sample_s": 0.0}) == {}


def test_memory_is_this_processs() -> None:
    held = bytearray(300_000_000)
    held[:] = b"\x01" * len(held)
    assert 300 < memory_metrics()["memory/peak_resident_mb"] < 100_000


# --- the run log ----------------------------------------------------------------------------------


def test_metrics_are_on_disk_line_by_line(tmp_path: Path) -> None:
    with RunLog(tmp_path / "runs" / "q") as log:
        log.write(0, {"eval/accuracy": 0.1})
        log.write(1, {"reward/mean": 0.25, "loss/policy": float("nan"), "ratio/max": float("inf")})
        # Read while the log is open: nothing waits in a buffer.
        assert lines_of(tmp_path / "runs" / "q" / "metrics.jsonl") == [
            {"step": 0, "eval/accuracy": 0.1},
            {"step": 1, "reward/mean": 0.25, "loss/policy": None, "ratio/max": None},
        ]
    log.close()


def test_numbers_of_numpy_and_torch(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": torch.tensor(0.25),
        "d": 7,
    }
    with RunLog(tmp_path) as log:
        log.write(0, numbers)
    assert lines_of(tmp_path / "metrics.jsonl") == [
        {"step": 0, "a": 0.5, "b": 3.0, "c": 0.25, "d": 7}
    ]


def test_one_line_a_step(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write(3, {})
        for step in (3, 2):
            with pytest.raises(ValueError, match=f"step {step} is not after step 3"):
                log.write(step, {})


def test_resume_cuts_the_steps_that_are_run_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, (), 1) as log:
        for step in range(4):
            log.write(step, {"reward/mean": 0.1})
            log.transcripts(step, [make_group([1.0])])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/me')  # the kill's half line
    with RunLog(tmp_path, (), 1, resume_step=2) as log:
        with pytest.raises(ValueError, match="not after step 2"):
            log.write(2, {})
        log.write(3, {"reward/mean": 0.9})
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert lines_of(tmp_path / "metrics.jsonl")[-1]["reward/mean"] == 0.9
    assert [line["step"] for line in lines_of(tmp_path / "transcripts.jsonl")] == [0, 1, 2]


def test_resume_at_minus_one_starts_over(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write(0, {})
    with RunLog(tmp_path, resume_step=-1) as log:
        log.write(0, {"reward/mean": 0.5})
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 0, "reward/mean": 0.5}]


def test_a_new_run_does_not_write_into_an_older_one(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write(0, {})
    with pytest.raises(UserError, match=r"metrics\.jsonl holds an older run: add --resume"):
        RunLog(tmp_path)
    with RunLog(tmp_path, metrics_file="warm_start.jsonl") as log:
        log.write(0, {"sft/loss": 1.0})
    assert lines_of(tmp_path / "warm_start.jsonl") == [{"step": 0, "sft/loss": 1.0}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for damage in ("nonsense", "3", ""):
        path.write_text(f'{{"step": 0}}\n{damage}\n{{"step": 1}}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not a JSON object"):
            RunLog(tmp_path, resume_step=1)
    path.write_text('{"step": 0}\n{"reward/mean": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 has no step"):
        RunLog(tmp_path, resume_step=1)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be written .*set run\.output_dir"):
        RunLog(tmp_path / "runs" / "q")


def test_half_a_line_is_left_out_wherever_the_kill_came(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = jsonl.to_line({"step": 0, "text": HOSTILE}) + jsonl.to_line({"step": 1, "x": 0.5})
    first = whole.index("\n") + 1
    for length in range(first, len(whole)):
        path.write_text(whole[:length])
        assert [record["step"] for record in jsonl.read_lines(path)] == [0]
        assert jsonl.cut_after(path, 9) == 0
        assert path.read_text() == whole[:first]
    path.write_text(whole)
    assert jsonl.cut_after(path, 9) == 1
    assert path.read_text() == whole


# --- transcripts ----------------------------------------------------------------------------------


def test_a_transcript_holds_the_rollout_and_hostile_text_breaks_no_line(tmp_path: Path) -> None:
    group = RolloutGroup(
        make_prompt("a/0", reference=HOSTILE, question=HOSTILE),
        (make_rollout(0.5, text=HOSTILE, num_tokens=9, is_truncated=True, adapter_version=4),),
    )
    with RunLog(tmp_path, (), 8) as log:
        log.transcripts(5, [group])
    text = (tmp_path / "transcripts.jsonl").read_text(encoding="ascii")
    assert text.count("\n") == len(text.splitlines()) == 1
    assert not any(ord(character) < 32 for character in text.removesuffix("\n"))
    stored = HOSTILE.replace("\ud800", "\\ud800")  # a lone surrogate is no character
    assert json.loads(text) == {
        "step": 5,
        "prompt_id": "a/0",
        "source": "sum",
        "question": stored,
        "reference": stored,
        "completion": stored,
        "reward": 0.5,
        "correct": False,
        "has_format": False,
        "status": "ok",
        "answer": stored,
        "tokens": 9,
        "truncated": True,
        "adapter_version": 4,
    }


def test_no_transcripts_no_file(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.transcripts(1, [make_group([1.0])])
    assert not (tmp_path / "transcripts.jsonl").exists()


def picked(rewards_N_G: list[list[float]], num: int) -> list[tuple[str, float]]:
    groups = [make_group(rewards_G, f"p{n}") for n, rewards_G in enumerate(rewards_N_G)]
    return [(g.prompt.prompt_id, r.score.reward) for g, r in pick_transcripts(groups, num)]


def test_transcripts_show_correct_and_wrong_of_many_prompts() -> None:
    # One correct among many wrong is shown; wrong ones come from different prompts.
    assert picked([[0, 0, 1], [0, 0, 0], [0, 0, 0]], 3) == [("p0", 0), ("p0", 1), ("p1", 0)]
    assert picked([[1, 1], [1, 1], [1, 0]], 4) == [("p0", 1), ("p1", 1), ("p2", 1), ("p2", 0)]
    assert picked([[1, 1], [1, 1]], 3) == [("p0", 1), ("p0", 1), ("p1", 1)]
    assert picked([[0, 0]], 8) == [("p0", 0), ("p0", 0)]
    assert picked([[0, 1]], 1) == [("p0", 1)]
    assert picked([[0, 1]], 0) == []


# --- trackers -------------------------------------------------------------------------------------


def tensorboard_points(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, round(event.value, 6)) for event in accumulator.Scalars(tag)]


def test_tensorboard_gets_the_numbers_and_forgets_steps_run_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, ("tensorboard",)) as log:
        for step in range(4):
            log.write(step, {"reward/mean": 0.1})
    with RunLog(tmp_path, ("tensorboard",), resume_step=1) as log:
        log.write(2, {"reward/mean": 0.9})
    points = tensorboard_points(tmp_path / "tensorboard", "reward/mean")
    assert points == [(0, 0.1), (1, 0.1), (2, 0.9)]


class FakeTracker(types.ModuleType):
    """Stands for wandb and trackio: keeps what it gets."""

    class Error(Exception):
        pass

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.inits: list[dict[str, Any]] = []
        self.lines: list[tuple[dict[str, Any], int | None]] = []
        self.num_finished = 0

    def init(self, **options: Any) -> "FakeTracker":
        self.inits.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """The axis is wandb's affair."""

    def log(self, line: dict[str, Any], step: int | None = None) -> None:
        self.lines.append((line, step))

    def finish(self) -> None:
        self.num_finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    with RunLog(tmp_path / "q", (name,), config={"lora": {"rank": 1}}) as log:
        log.write(0, {"reward/mean": 0.1})
        log.write(1, {"reward/mean": 0.2})
    with RunLog(tmp_path / "q", (name,), resume_step=0) as log:
        log.write(1, {"reward/mean": 0.3})
    first, second = fake.inits
    assert (first["project"], first["name"]) == ("rl-lora", "q")
    assert first["config"] == {"lora": {"rank": 1}}
    assert second["resume"] == "allow"
    assert first.get("id") == second.get("id")
    assert [line["reward/mean"] for line, _ in fake.lines] == [0.1, 0.2, 0.3]
    assert [line.get("step", step) for line, step in fake.lines] == [0, 1, 1]
    assert fake.num_finished == 2


def test_wandbs_own_error_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker("wandb")

    def refuse(**_: Any) -> FakeTracker:
        raise fake.Error("no API key configured")

    monkeypatch.setattr(fake, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"no API key configured.*WANDB_MODE=offline"):
        RunLog(tmp_path, ("wandb",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install '?rl-lora\\[{name}\\]"):
        RunLog(tmp_path / "q", (name,))
    assert not (tmp_path / "q").exists()


@pytest.mark.slow
def test_real_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb", reason="needs the extra rl-lora[wandb]")
    for resume_step in (None, 0):
        with RunLog(tmp_path, ("wandb",), resume_step=resume_step) as log:
            log.write(0 if resume_step is None else 1, {"reward/mean": 0.1})
    wandb.teardown()  # its service writes on in the background until then
    run_id = (tmp_path / "wandb_id").read_text()
    records = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert records
    assert all(b"reward/mean" in path.read_bytes() for path in records)


@pytest.mark.slow
def test_real_trackio_works_locally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="needs the extra rl-lora[trackio]")
    with RunLog(tmp_path / "q", ("trackio",)) as log:
        log.write(0, {"reward/mean": 0.1})
    assert list((tmp_path / "trackio").glob("rl-lora*.db"))
