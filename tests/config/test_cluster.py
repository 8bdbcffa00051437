"""The job files for clusters start what they say: run by bash, with stand-ins for the cluster's own
commands, and read by accelerate's parser. The Dockerfile copies what its build needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from accelerate.commands.launch import launch_command_parser

from rl_lora.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs" / "cluster"
SLURM, SKYPILOT = CLUSTER / "slurm.sh", CLUSTER / "skypilot.yaml"


@pytest.fixture
def path_of_commands(tmp_path: Path) -> Path:
    """A folder with srun, scontrol and accelerate; the last one writes down its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "scontrol": 'test "$*" = "show hostnames $SLURM_JOB_NODELIST" && printf "a\\nb\\nc\\nd\\n"',
        "srun": 'while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=2 "$@"',
        "accelerate": f'printf "%s\\n" "$@" END >>{tmp_path}/launches\nexit ${{CODE:-0}}',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def launched(
    command: list[str], folder: Path, cwd: Path = ROOT, **environment: str
) -> tuple[int, list[Namespace]]:
    """The exit code of a script, and what accelerate makes of the launches in it."""
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(command, env={"PATH": path, **environment}, check=False, cwd=cwd)
    text = (folder.parent / "launches").read_text()
    launches = [one.strip("\n").split("\n") for one in text.split("END\n")[:-1]]
    assert all(arguments[0] == "launch" for arguments in launches)
    parser = launch_command_parser()
    return done.returncode, [parser.parse_args(arguments[1:]) for arguments in launches]


@pytest.mark.parametrize("num_nodes", [1, 4])
def test_the_slurm_job_launches_all_gpus_of_its_nodes(
    num_nodes: int, path_of_commands: Path
) -> None:
    code, (launch,) = launched(
        ["bash", str(SLURM), "deepmath_qwen3_8b", "run.output_dir=/shared/my runs"],
        path_of_commands,
        SLURM_JOB_NUM_NODES=str(num_nodes),
        SLURM_GPUS_ON_NODE="8",
        SLURM_CPUS_PER_TASK="64",
        SLURM_JOB_ID="1234567",
        SLURM_JOB_NODELIST="node[1-4]",
    )
    assert code == 0
    assert (launch.num_machines, launch.num_processes) == (num_nodes, 8 * num_nodes)
    assert (launch.machine_rank, launch.main_process_ip) == (2, "a")
    assert 20_000 <= launch.main_process_port < 40_000
    assert launch.multi_gpu
    assert launch.max_restarts == 0  # the script itself starts all nodes again
    assert (launch.mixed_precision, launch.dynamo_backend) == ("no", "no")
    assert launch.module
    assert launch.training_script == "rl_lora"
    # An argument with a space stays one.
    assert launch.training_script_args == [
        "train",
        "deepmath_qwen3_8b",
        "run.output_dir=/shared/my runs",
        "--resume",
    ]


def test_the_ray_job_starts_a_head_without_gpus_workers_and_one_learner(
    path_of_commands: Path, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    stand_ins = {
        "srun": f'while [[ $1 == --* ]]; do echo "$1" >>{calls}; shift; done; "$@"',
        "ray": f'echo "ray $*" >>{calls}',
        "rl-lora": f'printf "%s\\n" rl-lora "$@" >>{calls}',
        "od": "echo aa bb",
    }
    for name, text in stand_ins.items():
        (path_of_commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (path_of_commands / name).chmod(0o755)
    more = {"SLURM_JOB_NUM_NODES": "4", "PATH": f"{path_of_commands}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", str(CLUSTER / "ray.sh"), "deepmath_qwen3_8b", "run.output_dir=/shared/my runs"],
        env=ONE_NODE | more,
        check=True,
    )
    lines = calls.read_text().splitlines()
    (head,) = [line for line in lines if line.startswith("ray start --head")]
    assert "--num-gpus=0" in head
    assert "--exclude=a" in lines
    assert "--nodes=3" in lines
    learner = lines[lines.index("rl-lora") :]
    assert learner[:5] == [
        "rl-lora",
        "train",
        "deepmath_qwen3_8b",
        "run.output_dir=/shared/my runs",
        "resources.ray_address=a:20001",
    ]


ONE_NODE = {
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "node1",
}


def test_a_mistake_is_not_repeated_by_the_slurm_job(path_of_commands: Path) -> None:
    command = ["bash", str(SLURM), "smoke"]
    code, launches = launched(command, path_of_commands, CODE="3", **ONE_NODE)
    assert code == 3
    assert len(launches) == 1


def test_a_failure_after_hours_is_repeated_by_the_slurm_job(
    path_of_commands: Path, tmp_path: Path
) -> None:
    # bash counts on from what SECONDS is set to: each launch takes an hour, without waiting.
    text, script = SLURM.read_text(), tmp_path / "slurm.sh"
    fails = 'run "$@" || code=$?'
    assert text.count(fails) == 1
    hours = 'run "$@" || { code=$?; SECONDS=$((SECONDS + 3600)); }'
    script.write_text(text.replace(fails, hours))
    command = ["bash", str(script), "smoke"]
    code, launches = launched(command, path_of_commands, CODE="3", **ONE_NODE)
    assert code == 3
    assert len(launches) == 4
    assert len({launch.main_process_port for launch in launches}) == 4  # none still in use


NOTICED = """
trap 'exit 143' TERM
echo $$ >{folder}/launcher
kill -USR1 "$(<{folder}/script)"
while true; do sleep 0.01; done
"""


@pytest.mark.parametrize("when", ["after scancel", "during scancel"])
def test_slurms_notice_ends_all_processes_and_the_job_is_queued_again(
    path_of_commands: Path, tmp_path: Path, when: str
) -> None:
    """The notice comes while the job runs, which ends by SIGTERM and not by itself."""
    end = 'kill "$launcher"'
    if when == "during scancel":
        end += '; while kill -0 "$launcher"; do sleep 0.01; done 2>/dev/null'
    scripts = {
        "scancel": f'echo "scancel $*" >>{tmp_path}/calls; launcher=$(<{tmp_path}/launcher); {end}',
        "scontrol": f'test "$1" = show && echo node1 || echo "scontrol $*" >>{tmp_path}/calls',
    }
    for name, text in scripts.items():
        (path_of_commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (path_of_commands / name).chmod(0o755)
    with (path_of_commands / "accelerate").open("a") as file:
        file.write(NOTICED.format(folder=tmp_path))
    text = (path_of_commands / "accelerate").read_text().replace("exit ${CODE:-0}\n", "")
    (path_of_commands / "accelerate").write_text(text)
    command = [
        "bash",
        "-c",
        f'echo $$ >{tmp_path}/script; exec bash "$@"',
        "-",
        str(SLURM),
        "smoke",
    ]
    code, launches = launched(command, path_of_commands, **ONE_NODE)
    assert code == 143
    assert len(launches) == 1  # in the job's next turn there is another
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["scancel --signal=TERM 1", "scontrol requeue 1"]


def test_the_slurm_header_asks_for_one_launcher_and_eight_gpus_a_node() -> None:
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SLURM.read_text(), re.M))
    assert header["ntasks-per-node"] == "1"
    assert header["gpus-per-node"] == "8"
    assert header["nodes"] == "1"
    assert header["signal"] == "B:USR1@120"  # only to this script, which has a trap for it


@pytest.mark.parametrize("num_nodes", [1, 4])
def test_the_skypilot_task_launches_all_gpus_of_its_nodes(
    num_nodes: int, path_of_commands: Path, tmp_path: Path
) -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["setup"].strip() == "make EXTRA=gpu"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(path_of_commands / "accelerate", tmp_path / ".venv" / "bin")
    code, (launch,) = launched(
        ["bash", "-c", task["run"]],
        path_of_commands,
        tmp_path,
        **task["envs"],
        SKYPILOT_NUM_NODES=str(num_nodes),
        SKYPILOT_NUM_GPUS_PER_NODE="8",
        SKYPILOT_NODE_RANK="0",
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2\n10.0.0.3\n10.0.0.4",
    )
    assert code == 0
    assert (launch.num_machines, launch.num_processes) == (num_nodes, 8 * num_nodes)
    assert launch.main_process_ip == (None if num_nodes == 1 else "10.0.0.1")
    assert launch.max_restarts == (3 if num_nodes == 1 else 0)
    assert launch.training_script_args[2] == "run.output_dir=runs"
    load_config(Path(launch.training_script_args[1]))


@pytest.mark.parametrize("path", [SLURM, SKYPILOT, ROOT / "Dockerfile"], ids=lambda p: p.name)
def test_the_configs_that_the_files_name_exist(path: Path) -> None:
    names = re.findall(r"(?:slurm\.sh|CONFIG=|CONFIG: |rl_lora train) ?(\w+_8b)", path.read_text())
    assert names
    for name in names:
        load_config(Path(name))


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, continued lines joined."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    ]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]


def test_the_image_has_what_its_build_needs(tmp_path: Path) -> None:
    steps = instructions()
    assert {name for name, _ in steps} == {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}
    assert steps[0] == ("FROM", "python:3.12-slim-bookworm")
    shown = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M))
    for name, arguments in steps:
        if name != "COPY":
            continue
        *sources, target = arguments.split()
        assert set(sources) <= shown  # else the daemon would not be given them
        for source in sources:
            if (ROOT / source).is_dir():
                assert sources == [target]
                shutil.copytree(ROOT / source, tmp_path / target)
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    # make knows how to build the environment from these files, and setuptools the package.
    (command,) = re.findall(r" make (\S+)$", "\n".join(text for _, text in steps), re.M)
    done = subprocess.run(
        ["make", "-n", command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "requirements/gpu.lock" in done.stdout
    code = (
        "import setuptools, sys; sys.argv = ['setup.py', '-q', 'egg_info', '--egg-base', '.'];"
        "exec(open('setup.py').read())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    files = (tmp_path / "rl_lora.egg-info" / "SOURCES.txt").read_text().splitlines()
    for package in ("rl_lora/train.py", "rewards/load.py", "configs/smoke.toml"):
        assert package in files
