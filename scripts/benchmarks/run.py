"""Runs arms in turn and computes ratios of what they report."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.growth import PHASES
from benchmarks.workload import PATH, ROOT, Size

PEAKS_ALIKE = 1.2  # largest ratio of two processors' peaks that pass for one kind
LOSS_ALLOWED = 0.15
HIGHER_IS_WORSE = {"memory_vs_trl", "lora_vs_full_flops", "lora_vs_full_time"}


class Arm:
    """A child process that answers commands; its standard error goes to a log file."""

    def __init__(self, name: str, size: Size, logs: Path) -> None:
        self.name = name
        self.log = logs / f"bench_{name}.log"
        options = [f"{key}={value}" for key, value in asdict(size).items()]
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": PATH}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.arm", name, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        self.built = self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        """The arm's answer to a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("end\n")
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-5:])
            raise SystemExit(f"benchmark: arm {self.name} ended early; {self.log}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def arms(names: list[str], size: Size, logs: Path) -> Iterator[dict[str, Arm]]:
    """The arms, started one after another so that none disturbs another's start."""
    with contextlib.ExitStack() as stack:
        made = {}
        for name in names:
            made[name] = Arm(name, size, logs)
            stack.callback(made[name].close)
        yield made


def has_trl() -> bool:
    """Whether TRL is installed."""
    return importlib.util.find_spec("trl") is not None


def in_turn(arms_by_name: dict[str, Arm], commands: dict[str, str], rounds: int) -> Any:
    """{arm: [answers]}: one warm-up and then `rounds` answers each, taking turns."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in arms_by_name}
    for round_number in range(rounds + 1):
        for name, arm in arms_by_name.items():
            answer = arm.ask(commands[name])
            print(f"  {name:8} {_short(answer)}", file=sys.stderr, flush=True)
            if round_number:
                answers[name].append(answer)
    return answers


Ratios = dict[str, list[float]]


def measure(size: Size, rounds: int, logs: Path, only: str | None = None) -> dict[str, Any]:
    """All figures of one run: {"ratios": {...}, "spread": {...}, "answers": {...}, ...}.

    Each part is also written to the folder of the logs as soon as it is done. only: a name of
    PARTS, to measure nothing else.
    """
    ratios: Ratios = {}
    answers: dict[str, Any] = {}
    for name in [only] if only else PARTS:
        found, answered = PARTS[name](size, rounds, logs)
        ratios, answers = ratios | found, answers | answered
        text = json.dumps({"ratios": ratios, "answers": answers}, indent=2)
        (logs / "bench_step.partial.json").write_text(text + "\n", encoding="utf-8")
    return {
        "size": asdict(size),
        "speeds": speeds(size, answers),
        "ratios": {name: round(median(values), 4) for name, values in ratios.items()},
        "spread": {
            name: [round(min(values), 4), round(max(values), 4)] for name, values in ratios.items()
        },
        "peak_gflops": peak_gflops(answers),
        "answers": answers,
    }


def peak_gflops(answers: dict[str, Any]) -> float | None:
    """What a large product reaches, measured next to the learner; None if that was not measured."""
    if "learner" not in answers:
        return None
    return round(median(answer["peak_gflops"] for answer in answers["learner"]), 1)


def speeds(size: Size, answers: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Learning by arm, the median of its rounds: completion tokens per second, MFU (the needed
    FLOP/s as a share of the matmul peak) and the share of the roofline.

    Needed operations and the bound are the workload's for every arm, with a prompt once for its
    completions: what an arm computes beyond that counts as time. The learner's arm measures both;
    without it there are no speeds.
    """
    if "learner" not in answers:
        return {}
    needed = {
        key: median(answer[key] for answer in answers["learner"])
        for key in ("needed_gflop", "peak_gflops", "bound_s")
    }
    found: dict[str, dict[str, float]] = {}
    for name in ("learner", "ours", "trl"):
        if name in answers:
            seconds = median(answer["learn"] for answer in answers[name])
            found[name] = {
                "tokens_per_s": round(sum(size.lengths()) / seconds),
                "mfu": round(needed["needed_gflop"] / seconds / needed["peak_gflops"], 4),
                "roofline": round(needed["bound_s"] / seconds, 4),
            }
    return found


def measure_steps(size: Size, rounds: int, logs: Path) -> tuple[Ratios, dict[str, Any]]:
    """Whole steps, ours and TRL's in turn."""
    ratios: Ratios = {}
    names = ["ours", *(["trl"] if has_trl() else [])]
    with arms(names, size, logs) as made:
        answers = in_turn(made, dict.fromkeys(names, "step"), rounds)
    if "trl" in answers:
        pairs = list(zip(answers["trl"], answers["ours"], strict=True))
        ratios["step_vs_trl"] = [trl["step"] / ours["step"] for trl, ours in pairs]
        ratios["learn_vs_trl"] = [trl["learn"] / ours["learn"] for trl, ours in pairs]
        ratios["memory_vs_trl"] = [_peak(ours) / _peak(trl) for trl, ours in pairs]
    return ratios, answers


def measure_sampling(size: Size, rounds: int, logs: Path) -> tuple[Ratios, dict[str, Any]]:
    """Sampling with the adapter and without, in turn in the same engine."""
    with arms(["ours"], size, logs) as made:
        both = in_turn(made, {"ours": "sample_both"}, rounds)["ours"]
    ratios = {"sampling_lora_vs_base": [answer["base"] / answer["lora"] for answer in both]}
    return ratios, {"sample_both": both}


def measure_learners(size: Size, rounds: int, logs: Path) -> tuple[Ratios, dict[str, Any]]:
    """The learning phase of the adapter and of full fine-tuning, in turn."""
    ratios: Ratios = {}
    names = ["learner", "full"]
    with arms(names, size, logs) as made:
        learned = in_turn(made, dict.fromkeys(names, "learn"), rounds)
        flops = {name: made[name].ask("count") for name in names}
    ratios["learner_share_of_peak"] = [
        a["needed_gflop"] / a["learn"] / a["peak_gflops"] for a in learned["learner"]
    ]
    ratios["lora_vs_full_time"] = [
        a["learn"] / b["learn"] for a, b in zip(learned["learner"], learned["full"], strict=True)
    ]
    ratios["lora_vs_full_flops"] = [flops["learner"]["products"] / flops["full"]["products"]]
    return ratios, {**learned, "flops": flops}


PARTS = {"steps": measure_steps, "sampling": measure_sampling, "learners": measure_learners}


def sweep(
    sizes: list[Size], rounds: int, logs: Path, *, has_steps: bool = False
) -> list[dict[str, Any]]:
    """The learning phase, adapter and full, at several sizes; has_steps: also whole steps."""
    rows = []
    for size in sizes:
        print(f"sweep: {asdict(size)}", file=sys.stderr, flush=True)
        with arms(["learner", "full"], size, logs) as made:
            learned = in_turn(made, dict.fromkeys(made, "learn"), rounds)
            flops = {name: made[name].ask("count") for name in made}
        row = {**asdict(size), **learning_row(learned, flops)}
        if has_steps:
            with arms(["ours"], size, logs) as made:
                row |= phase_row(in_turn(made, {"ours": "step"}, rounds)["ours"])
        rows.append(row)
    return rows


Answers = list[dict[str, Any]]


def learning_row(learned: dict[str, Answers], flops: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Per arm: median seconds, highest memory peak, and FLOPs of the matrix products.

    Products are counted per token on one microbatch and multiplied by the step's tokens.
    """
    row: dict[str, float] = {"tokens": learned["learner"][0]["computed_tokens"]}
    for name, answers in learned.items():
        per_token = flops[name]["products_per_token"]
        row |= {
            f"{name}_s": median(a["learn"] for a in answers),
            f"{name}_gflop": per_token * row["tokens"] / 1e9,
            f"{name}_mflop_per_token": per_token / 1e6,
            f"{name}_formula_mflop_per_token": flops[name]["formula_per_token"] / 1e6,
            f"{name}_memory_mb": max(a["memory"] for a in answers),
        }
    return row


def phase_row(answers: Answers) -> dict[str, float]:
    """Median seconds and highest memory peak of each phase of a whole step."""
    row: dict[str, float] = {}
    for phase in PHASES:
        row[f"step_{phase}_s"] = median(a[phase] for a in answers)
        row[f"step_{phase}_memory_mb"] = max(a[f"memory_{phase}"] for a in answers)
    return row


def comparable(result: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
    """Of the baseline's ratios those that this processor should reach: a share of the peak only if
    the two peaks are alike, since what is not products does not grow with it."""
    expected = dict(baseline["ratios"])
    here, there = result["peak_gflops"], baseline["peak_gflops"]
    if here is not None and not 1 / PEAKS_ALIKE < here / there < PEAKS_ALIKE:
        del expected["learner_share_of_peak"]
    return expected


def compare(ratios: dict[str, float], baseline: dict[str, float]) -> list[str]:
    """One line for each ratio that is over 15 % worse than the baseline, or was not measured.

    Ratios to TRL may be missing where TRL is not installed.
    """
    lines = []
    for name, was in baseline.items():
        if name not in ratios:
            if has_trl() or not name.endswith("_vs_trl"):
                lines.append(f"{name}: not measured, baseline {was:g}")
            continue
        now = ratios[name]
        loss = now / was - 1 if name in HIGHER_IS_WORSE else was / now - 1
        if loss > LOSS_ALLOWED:
            lines.append(f"{name}: {now:g}, baseline {was:g}: {loss:.0%} worse")
    return lines


def _peak(answer: dict[str, Any]) -> float:
    return float(max(value for key, value in answer.items() if key.startswith("memory_")))


def _short(answer: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in answer.items() if isinstance(v, int | float))
