"""The command line as a user meets it: every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from rl_lora import cli
from rl_lora.adapters.files import save_adapter
from rl_lora.config import ModelSection, load_config
from rl_lora.config.sft import load_sft_config
from rl_lora.models.resolve import resolve_model
from rl_lora.storage.jsonl import read_lines
from rl_lora.studies.config import load_study
from tests.helpers.tiny_models import make_policy, random_llama, shake

ROOT = Path(__file__).resolve().parents[1]
SMOKE = str(ROOT / "configs" / "smoke.toml")
SHORT = ["run.num_steps=1", "data.held_out=4", "sampling.num_prompts=2", "sampling.max_tokens=16"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    capsys.readouterr()  # what the test's own preparations printed
    assert cli.main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("rl-lora: error: ")
    return lines[0]


def module_of(command: str) -> ModuleType:
    return import_module(f"rl_lora.commands.{cli.COMMANDS[command][0]}")


def smoke(tmp_path: Path, *overrides: str) -> list[str]:
    return ["train", SMOKE, *SHORT, f"run.output_dir={tmp_path}", "--quiet", *overrides]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, object]]:
    return [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(count)]


@pytest.fixture
def model_with_tokenizer(tmp_path: Path) -> Path:
    """A random Llama of another shape than tiny-fast, with tiny-fast's tokenizer."""
    path = random_llama(tmp_path / "model")
    AutoTokenizer.from_pretrained(resolve_model(ModelSection(name="tiny-fast"))).save_pretrained(
        path
    )
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnk=8", "unknown key 'lora.rnk'; did you mean 'rank'?"),
        ("trainer.x=1", "unknown key 'trainer'"),
        ("lora.rank=0", "lora.rank = 0: Input should be greater than or equal to 1"),
        ("sampling.temperature=0", "sampling.temperature = 0: Input should be greater than 0"),
        ("sampling.num_samples=1", "set it to 2 or more"),
        ("algorithm.loss=gspo", "algorithm.denominator='sequences'"),
        ("eval={num_samples=4}", "set eval.temperature"),
        ("nonsense", "is not of the form section.key=value"),
        ("reward.name=maths", "unknown reward 'maths': did you mean 'math'?"),
        ("reward.policy=gsm9k", "gsm9k"),
        ("data=nowhere.jsonl", "nowhere.jsonl"),
        ("model.name=./nowhere", "model directory ./nowhere does not exist"),
        ("model.device=cuda:7", "model.device='cuda:7' is not usable here"),
        ("warm_start.num_steps=1", None),
    ],
)
def test_bad_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str | None
) -> None:
    if message is None:  # a control: the same command without a mistake runs
        assert cli.main(smoke(tmp_path, override)) == 0
    else:
        assert message in refused(capsys, *smoke(tmp_path, override))


def test_missing_config_and_bad_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(capsys, "train", str(tmp_path / "no.toml"))
    (tmp_path / "bad.toml").write_text("[run\n")
    assert "is not valid TOML" in refused(capsys, "train", str(tmp_path / "bad.toml"))


def test_bad_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl" in refused(capsys, *smoke(tmp_path, f"data={empty}"))
    unanswered = write_rows(tmp_path / "unanswered.jsonl", [{"question": "What is 1 + 1?"}])
    assert "answer" in refused(capsys, *smoke(tmp_path, f"data={unanswered}"))
    nulls = write_rows(tmp_path / "nulls.jsonl", [{"question": "1 + 1", "answer": None}] * 3)
    assert "answer" in refused(capsys, *smoke(tmp_path, f"data={nulls}"))
    long = [*sums(20), {"question": "1 " * 3000, "answer": "#### 1"}]
    path = write_rows(tmp_path / "long.jsonl", long)
    line = refused(capsys, *smoke(tmp_path, f"data={path}", "data.max_prompt_tokens=100000"))
    assert "tokens" in line
    assert "context" in line


def test_a_model_directory_without_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = random_llama(tmp_path / "model")
    assert "no tokenizer" in refused(capsys, *smoke(tmp_path, f"model.name={path}"))


def test_an_adapter_of_another_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_with_tokenizer: Path
) -> None:
    adapter = save_adapter(
        make_policy(model_with_tokenizer), tmp_path / "adapters", version=1, run_name="other"
    )
    options = [*SHORT, f"run.output_dir={tmp_path}", "--adapter", str(adapter.path)]
    line = refused(capsys, "eval", SMOKE, *options)
    assert str(model_with_tokenizer) in line
    assert "tiny-noisy" in line
    assert "holds neither adapter_model.safetensors" in refused(
        capsys, "eval", SMOKE, *SHORT, f"run.output_dir={tmp_path}", "--adapter", str(tmp_path)
    )


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", SMOKE, f"run.output_dir={tmp_path / 'file'}")
    assert "cannot be written" in line
    assert "set run.output_dir" in line


def test_without_vllm_the_error_names_the_extra(tmp_path: Path) -> None:
    """In its own process, where vLLM cannot be imported."""
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from rl_lora.cli import main\n"
        f"sys.exit(main({smoke(tmp_path, 'sampling.backend=vllm')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "vLLM is not installed" in line
    assert "[cpu]" in line
    assert "sampling.backend=torch" in line


def test_train_then_eval_the_run_any_adapter_and_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(smoke(tmp_path)) == 0
    run = tmp_path / "smoke"
    assert cli.main(["eval", str(run), "--name", "own"]) == 0
    assert cli.main(["eval", str(run), "--name", "base", "--adapter", "none"]) == 0
    rows = write_rows(tmp_path / "evaluation.jsonl", sums(6))
    assert cli.main(["eval", str(run), "--name", "other", f"data.eval={rows}"]) == 0
    own, base, other = (
        json.loads((run / "eval" / f"{name}.json").read_text()) for name in ("own", "base", "other")
    )
    assert (own["adapter_version"], base["adapter_version"]) == (1, -1)
    assert own["total"]["num_problems"] == 4
    assert other["total"]["num_problems"] == 6
    assert len(read_lines(run / "eval" / "other.jsonl.gz")) == 6
    assert "accuracy" in capsys.readouterr().out


def test_dry_run_prints_the_plan_and_loads_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", SMOKE, "--dry-run", f"run.output_dir={tmp_path}"]) == 0
    assert "lora.rank" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m-instruct" in out
    assert "tiny" in out


def test_the_console_command_is_installed_and_quick_to_help() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "rl_lora.cli", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("train", "eval", "compare", "status", "grade", "export", "models"):
        assert command in done.stdout


EXAMPLES = sorted(
    {
        *cli.EXAMPLES,
        *(line for name in cli.COMMANDS for line in module_of(name).EXAMPLES),
    }
)


LOADERS = {"train": load_config, "sft": load_sft_config, "study": load_study}


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_in_the_help_are_valid_commands(line: str) -> None:
    words = shlex.split(line)
    command, *rest = words[words.index("rl-lora") + 1 :]
    arguments = cli._parse([command, *rest])
    assert callable(arguments.command)
    if command in LOADERS:
        LOADERS[command](arguments.config, arguments.overrides)


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train", "; run the same command with --resume to continue from the last checkpoint"),
        ("eval", "; run the same command again to continue where it stopped"),  # has no --resume
        ("models", ""),
    ],
)
def test_advice_after_an_interrupt_is_one_that_the_command_takes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    advice: str,
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(module_of(command), "run", interrupted)
    assert cli.main([command, SMOKE]) == 130
    assert capsys.readouterr().err == f"rl-lora: interrupted{advice}\n"
    if "--resume" in advice:
        assert cli._parse([command, SMOKE, "--resume"]).resume


def write_fitting_adapter(folder: Path, **lora: object) -> Path:
    """A random adapter of tiny-noisy."""
    path = resolve_model(ModelSection(name="tiny-noisy"))
    policy = make_policy(path, **lora)
    shake(policy, seed=7, size=0.05)
    policy.base_name = "tiny-noisy"
    return save_adapter(policy, folder, version=1, run_name="other").path


def test_a_paired_evaluation_its_comparison_and_grading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(smoke(tmp_path)) == 0
    run = tmp_path / "smoke"
    rows = write_rows(tmp_path / "evaluation.jsonl", sums(6))
    other = write_fitting_adapter(tmp_path / "other", rank=3, alpha=8.0, layers="mlp")
    options = [f"data.eval={rows}", "eval.temperature=1.0", "eval.num_samples=2", "--name", "pair"]
    for against in ("base", str(other)):
        command = ["eval", str(run), *options, "--against", against]
        assert cli.main([*command, *(["--overwrite"] if against != "base" else [])]) == 0
    out = capsys.readouterr().out
    assert "McNemar" in out
    first, second = (run / "eval" / f"{name}.jsonl.gz" for name in ("pair-against", "pair"))
    paired = json.loads((run / "paired" / "pair.json").read_text())
    assert paired["has_common_seeds"] is True
    assert paired["total"]["num_problems"] == 6
    saved = tmp_path / "comparison.json"
    assert cli.main(["compare", str(first), str(second), "--json", str(saved)]) == 0
    again = json.loads(saved.read_text())
    assert again["total"] == paired["total"]
    assert cli.main(["grade", str(second)]) == 0
    assert "0 of 12 verdicts changed" in capsys.readouterr().out
    assert not list((run / "eval").glob(".*_adapter"))  # the fitted copies are gone


def test_an_evaluation_is_resumed_refused_or_started_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "evaluation.jsonl", sums(4))
    command = ["eval", SMOKE, *SHORT, f"run.output_dir={tmp_path}", f"data.eval={rows}"]
    assert cli.main(command) == 0
    file = tmp_path / "smoke" / "eval" / "evaluation.jsonl.gz"
    before = file.read_bytes()
    assert cli.main(command) == 0
    assert file.read_bytes() == before  # complete: nothing is sampled again
    line = refused(capsys, *command, "eval.max_tokens=8")
    assert "max_tokens = 16, not 8" in line
    assert "--overwrite" in line
    assert cli.main([*command, "eval.max_tokens=8", "--overwrite"]) == 0
    assert read_lines(file)[0]["evaluation"]["max_tokens"] == 8
    more = write_rows(tmp_path / "more.jsonl", sums(5))
    command = ["eval", SMOKE, *SHORT, f"run.output_dir={tmp_path}", f"data.eval={more}"]
    assert cli.main([*command, "--name", "more"]) == 0
    line = refused(capsys, "compare", str(file), str(file.with_name("more.json")))
    assert "are not of the same problems" in line


def test_best_without_an_evaluation_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(smoke(tmp_path)) == 0
    assert cli.main(["eval", str(tmp_path / "smoke"), "--adapter", "best"]) == 0
    assert cli.main(["status", str(tmp_path / "smoke")]) == 0
    assert "finished  step 1 of 1" in capsys.readouterr().out
    (tmp_path / "smoke" / "best").rename(tmp_path / "elsewhere")
    line = refused(capsys, "eval", str(tmp_path / "smoke"), "--adapter", "best")
    assert "has no best adapter yet" in line


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    code = (
        "import sys; from rl_lora import cli; from rl_lora.commands import status; "
        "status.run = lambda a: print('x' * 10**7) or 0; "
        "sys.exit(cli.main(['status', '.']))"
    )
    result = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | head -c 1; echo " ${{PIPESTATUS[0]}}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "x 0\n"
    assert result.stderr == ""


def test_of_several_processes_only_rank_0_runs_what_is_not_divided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What launchers put into the environment; no process is started, and none is waited for."""
    plan = ["train", SMOKE, "--dry-run", f"run.output_dir={tmp_path}"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    for command in (["models"], plan, ["status", str(tmp_path / "nowhere")]):
        assert cli.main(command) == 0
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "only rank 0 runs this command, and this process is rank 2" in captured.err
        assert len(captured.err.splitlines()) == 1
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process of its node says it, or has the result
    assert cli.main(["models"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["models"]) == 0
    assert "smollm2-135m-instruct" in capsys.readouterr().out
    assert "start it in one process, without the launcher" in refused(
        capsys, "study", "study_rl_rank", f"study.output_dir={tmp_path}"
    )
    divided = [name for name in cli.COMMANDS if getattr(module_of(name), "IS_DIVIDED", False)]
    assert divided == ["train", "sft", "eval", "pass-rates"]
