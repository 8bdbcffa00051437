"""tests/test_cuda.py on the device."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import Any

from gpu_stages.run import ROOT
from gpu_stages.stages import CheckFailedError, Context


def cuda_tests(context: Context) -> dict[str, Any]:
    """Counts passed tests; any failure fails the stage, with pytest's report in the log."""
    report = context.work / "cuda-tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "tests/test_cuda.py"]
    environment = os.environ | {"RL_LORA_TEST_DEVICE": context.device.type}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if not report.is_file():
        raise CheckFailedError(f"pytest wrote no report (exit code {code})")
    figures = counts(report.read_text(encoding="utf-8"))
    if code or not figures["passed"]:
        raise CheckFailedError(f"tests/test_cuda.py: {figures}", figures)
    return figures


def counts(report: str) -> dict[str, Any]:
    """The number passed and skipped, and the names of those that failed, from a JUnit report."""
    cases = list(ET.fromstring(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": [str(case.get("name")) for case in failed],
        "skipped": len(skipped),
    }
