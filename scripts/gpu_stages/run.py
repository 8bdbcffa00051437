"""Runs stages one after the other, each in its own process with a time limit.

Whatever a stage does (fail, hang, get killed by the system), its line is written and the next one
runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_stages.stages import Context, Stage
from gpu_stages.turns import FOLDER_VARIABLE, wait_until_ready

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "results.jsonl"


def run_stages(
    stages: Sequence[Stage],
    context: Context,
    limit_s: Callable[[Stage], float],
    *,
    total_s: float = math.inf,
    on_line: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row per stage, in order; each goes to out/results.jsonl as soon as it is known.

    A stage gets limit_s(stage) seconds, or what is left of total_s; with nothing left, it is late.
    A row: stage, status (passed, failed, hung, killed, late), seconds, device, card, versions,
    figures (also those that a stage kept before it failed) and error.
    """
    rows = []
    end = time.monotonic() + total_s
    for stage in stages:
        limit = min(limit_s(stage), end - time.monotonic())
        if limit > 0:
            on_line(f"{stage.name}: at most {limit:.4g} s, log in {_log(stage, context)}")
            row = run_stage(stage, context, limit)
        else:
            row = {"stage": stage.name, "status": "late", "seconds": 0.0}
            row |= {
                "device": str(context.device),
                "error": f"the {total_s:g} s were used up before it",
            }
        _record(row, context, on_line)
        rows.append(row)
    return rows


def run_together(
    stages: Sequence[Stage],
    context: Context,
    ready_s: float,
    total_s: float,
    *,
    on_line: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row per stage, as `run_stages`, of stages that start side by side (`turns`).

    Turns begin after ready_s seconds at the latest; until then those end that take none. All end
    after total_s.
    """
    turns = context.work.resolve() / "turns"
    shutil.rmtree(turns, ignore_errors=True)
    turns.mkdir(parents=True)
    variables = {FOLDER_VARIABLE: str(turns)}
    ended: set[str] = set()
    started: list[subprocess.Popen[bytes]] = []

    def run(stage: Stage) -> dict[str, Any]:
        limit = total_s if stage.takes_turns else min(ready_s, total_s)
        row = run_stage(stage, context, limit, variables, started.append)
        _record(row, context, on_line)
        ended.add(_result(stage, context).name)
        return row

    with ThreadPoolExecutor(len(stages)) as pool:
        try:
            rows = pool.map(run, stages)
            names = {_result(stage, context).name for stage in stages}
            late = wait_until_ready(turns, names, ended, ready_s)
            on_line(f"turns begin; not ready: {', '.join(sorted(late)) or 'none'}")
            return list(rows)
        except BaseException:  # also a signal: the threads would wait for their stages to end
            for process in started:
                if process.poll() is None:
                    _end(process)
            raise


def _record(row: dict[str, Any], context: Context, on_line: Callable[[str], None]) -> None:
    context.out.mkdir(parents=True, exist_ok=True)
    with (context.out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    on_line(f"{row['stage']}: {row['status']}, {row['seconds']} s {row.get('error', '')}")


def run_stage(
    stage: Stage,
    context: Context,
    limit_s: float,
    variables: Mapping[str, str] | None = None,
    on_start: Callable[[subprocess.Popen[bytes]], None] = lambda process: None,
) -> dict[str, Any]:
    """The stage's row, however its process ends; variables: more of its environment; on_start: is
    given the process."""
    for folder in (context.out, context.work):
        folder.mkdir(parents=True, exist_ok=True)
    result = _result(stage, context)
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu_stages.child", stage.function, str(result)]
    command += [str(context.device), str(context.out.resolve()), str(context.work.resolve())]
    command += [str(path.resolve()) for path in context.gguf]
    started = time.monotonic()
    with _log(stage, context).open("wb") as log:
        # Its own session, so that whatever the stage starts ends with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(context.work) | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        on_start(process)
        try:
            code: int | None = process.wait(None if math.isinf(limit_s) else limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    row = {"stage": stage.name, "status": "", "seconds": round(time.monotonic() - started, 1)}
    written = _read(result)
    is_finished = written.pop("finished", False)
    row |= {"device": str(context.device)} | written
    row["status"], error = _verdict(code, limit_s, row, _last_line(_log(stage, context)))
    if row["status"] == "passed" and not is_finished:
        row["status"], error = "failed", "it ended without a result"
    return row | ({"error": error} if error else {})


def environment(work: Path) -> dict[str, str]:
    """A stage's environment: no network, caches where `caches` looks, our packages on the path."""
    caches = work.resolve() / "caches"
    path = os.pathsep.join(
        p for p in (str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")) if p
    )
    return os.environ | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: stage, status, seconds, and the figures or the error."""
    lines = []
    for row in rows:
        text = row.get("error") or "  ".join(_pairs(row.get("figures", {})))
        lines.append(f"{row['stage']:20} {row['status']:7} {row['seconds']:6.1f} s  {text}")
    return "\n".join(lines)


def _pairs(figures: dict[str, Any], prefix: str = "") -> list[str]:
    pairs = []
    for name, value in figures.items():
        if isinstance(value, dict):
            pairs += _pairs(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            pairs.append(f"{prefix}{name}={value:.4g}")
        else:
            pairs.append(f"{prefix}{name}={value}")
    return pairs


def _verdict(
    code: int | None, limit_s: float, row: dict[str, Any], last_line: str
) -> tuple[str, str]:
    """(status, error) from the exit code (None: timed out) and what the stage wrote."""
    if code is None:
        return "hung", f"still running after {limit_s:.4g} s; last line: {last_line}"
    if code < 0:
        return "killed", f"by {signal.Signals(-code).name}; last line: {last_line}"
    if code > 0:
        return "failed", row.get("error") or last_line or f"exit code {code}"
    return "passed", ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the stage and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(stage: Stage, context: Context) -> Path:
    return context.work / f"{stage.name}.result.json"


def _log(stage: Stage, context: Context) -> Path:
    return context.out / f"{stage.name}.log"


def _read(result: Path) -> dict[str, Any]:
    """What the stage wrote; empty if it wrote nothing."""
    return json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
