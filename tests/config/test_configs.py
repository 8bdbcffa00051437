"""Every shipped config parses, names data and models that exist, and can be planned offline; bad
settings end in one line that names the key and the fix."""

from __future__ import annotations

import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rewards import load_reward
from rl_lora.commands.plan import print_plan
from rl_lora.config import (
    RunConfig,
    SourceSection,
    load_config,
    parse_config,
    with_present_names,
)
from rl_lora.config.checks import MIN_TEMPERATURE, unbounded_staleness
from rl_lora.config.sft import load_sft_config
from rl_lora.data.generators import generated_rows
from rl_lora.data.sources import LOADERS
from rl_lora.errors import UserError
from rl_lora.studies.config import load_study

OTHER_ROOTS = ("sft_", "study_")  # settings of other commands, with their own tests
CONFIGS = [
    path
    for path in sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))
    if not path.stem.startswith(OTHER_ROOTS)
]
BY_NAME = {path.stem: path for path in CONFIGS}
GPU_CONFIGS = [path for path in CONFIGS if path.stem.endswith(("_8b", "_a3b"))]

# What makes a job that job is said even where it happens to be the default.
ALWAYS_SAID = {"sampling.num_prompts", "sampling.num_samples", "sampling.max_tokens", "optim.lr"}

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def test_the_five_jobs_and_the_evaluation_are_shipped() -> None:
    expected = {"quickstart", "smoke", "gsm8k_llama31_8b", "math_llama31_8b", "deepmath_qwen3_8b"}
    assert expected | {"eval_deepmath_qwen3_8b"} <= set(BY_NAME)


def test_every_file_of_the_folder_parses_by_its_command() -> None:
    parsers = {"sft": load_sft_config, "study": load_study}
    for path in sorted(CONFIGS[0].parent.glob("*.toml")):
        parsers.get(path.stem.partition("_")[0], load_config)(path)


def test_the_evaluation_is_deepmaths_protocol() -> None:
    config = load_config(BY_NAME["eval_deepmath_qwen3_8b"])
    evaluation = config.eval
    assert (evaluation.temperature, evaluation.top_p, evaluation.num_samples) == (0.6, 0.95, 16)
    assert (evaluation.max_tokens or config.sampling.max_tokens) == 8192
    assert [source.name for source in config.data.eval][:3] == ["aime24", "aime25", "aime26"]


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.stem)
def test_a_gpu_gets_the_evaluation_in_large_chunks(path: Path) -> None:
    assert load_config(path).eval.chunk_samples >= 1024


@each_config
def test_config_parses_and_is_named_after_its_file(path: Path) -> None:
    assert load_config(path).run.name == path.stem


@each_config
def test_config_holds_only_departures_from_the_defaults(path: Path) -> None:
    default = RunConfig()
    config = load_config(path)
    same = [
        f"{section}.{key}"
        for section, keys in tomllib.loads(path.read_text()).items()
        for key in keys
        if getattr(getattr(config, section), key) == getattr(getattr(default, section), key)
        and f"{section}.{key}" not in ALWAYS_SAID
    ]
    assert same == []


@each_config
def test_data_of_a_config_exists(path: Path) -> None:
    data = load_config(path).data
    for source in (*data.train, *data.eval):
        check_source(source)


def check_source(source: SourceSection) -> None:
    kind, _, name = source.name.partition(":")
    if kind == "generated":
        row = next(generated_rows(name, source.options, source.seed))
        assert row.question
        assert row.solution
        assert row.reference
    else:
        assert source.name in LOADERS


@each_config
def test_reward_of_a_config_exists(path: Path) -> None:
    section = load_config(path).reward
    reward = load_reward(section.name, rules=section.policy, num_workers=1, timeout_s=1.0)
    reward.close()


@each_config
def test_config_can_be_planned_without_weights_and_network(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    console = Console(file=io.StringIO(), width=120)
    print_plan(load_config(path), console=console)
    assert isinstance(console.file, io.StringIO)
    assert "Memory plan" in console.file.getvalue()


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.stem)
def test_every_number_of_the_articles_runs_names_its_source(path: Path) -> None:
    numbers = [
        line
        for line in path.read_text().splitlines()
        if re.match(r"\w+ = \[?[\d.]", line) and not re.search(r"\[(O|T|R|ours)\]", line)
    ]
    assert numbers == []


def test_the_articles_numbers() -> None:
    gsm8k, math, deepmath = (
        load_config(BY_NAME[name])
        for name in ("gsm8k_llama31_8b", "math_llama31_8b", "deepmath_qwen3_8b")
    )
    for config in (gsm8k, math, deepmath):
        assert config.lora.alpha == 32.0
        assert config.lora.layers == "all"
        assert config.algorithm.advantage == "group_mean"
        assert config.algorithm.loss == "importance_sampling"
        assert config.optim.schedule == "constant"
        assert config.optim.betas == (0.9, 0.95)
        assert config.sampling.temperature == 1.0
    shapes = [
        (c.sampling.num_prompts, c.sampling.num_samples, c.sampling.max_tokens)
        for c in (gsm8k, math, deepmath)
    ]
    assert shapes == [(128, 16, 256), (64, 32, 512), (64, 16, 8192)]


# --- overrides ------------------------------------------------------------------------------------


def test_override_has_the_last_word() -> None:
    config = load_config(BY_NAME["smoke"], ["lora.rank=8", "run.name=other", "optim.lr=1e-3"])
    assert config.lora.rank == 8
    assert config.run.name == "other"
    assert config.optim.lr == 1e-3
    assert config.sampling.num_samples == load_config(BY_NAME["smoke"]).sampling.num_samples


def test_data_override_replaces_the_sources_and_keeps_the_rest() -> None:
    config = load_config(BY_NAME["gsm8k_llama31_8b"], ["data=../problems/my file.jsonl"])
    assert [source.name for source in config.data.train] == ["../problems/my file.jsonl"]
    assert config.data.eval == ()
    assert config.data.template == "base"


def test_list_and_none_overrides() -> None:
    overrides = ['run.loggers=["wandb"]', "eval.max_tokens=none", "data.eval=[]"]
    config = load_config(BY_NAME["smoke"], overrides)
    assert config.run.loggers == ("wandb",)
    assert config.eval.max_tokens is None


@pytest.mark.parametrize("override", ["lora.rank", "=8", "lora.rank 8", ""])
def test_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"not of the form section\.key=value"):
        load_config(BY_NAME["smoke"], [override])


def test_override_into_a_value_is_refused() -> None:
    with pytest.raises(UserError, match="'rank' is a value, not a section"):
        load_config(BY_NAME["smoke"], ["lora.rank=1", "lora.rank.deep=2"])


# --- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"lora": {"rnk": 1}}, "config: unknown key 'lora.rnk'; did you mean 'rank'?"),
        ({"lorra": {"rank": 1}}, "config: unknown key 'lorra'; did you mean 'lora'?"),
        (
            {"data": {"train": [{"name": "gsm8k", "spilt": "train"}]}},
            "config: unknown key 'data.train.0.spilt'; did you mean 'split'?",
        ),
    ],
)
def test_unknown_key_names_the_nearest(raw: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("lora", "rank", 0),
        ("lora", "rank", 513),
        ("lora", "rank", "one"),
        ("lora", "alpha", 0),
        ("lora", "layers", "some"),
        ("lora", "mode", "qlora"),
        ("sampling", "temperature", 0),
        ("sampling", "temperature", -1),
        ("sampling", "max_tokens", 0),
        ("sampling", "num_prompts", 0),
        ("sampling", "backend", "sglang"),
        ("optim", "lr", 0),
        ("optim", "grad_clip", 0),
        ("optim", "schedule", "magic"),
        ("run", "num_steps", -1),
        ("run", "name", "../elsewhere"),
        ("run", "name", ""),
        ("data", "held_out", 0),
        ("data", "template", "none"),
        ("reward", "num_workers", 0),
        ("algorithm", "loss", "dpo"),
        ("algorithm", "advantage", "gae"),
        ("algorithm", "clip_low", 2),
        ("model", "dtype", "int4"),
        ("eval", "top_p", 0),
    ],
)
def test_bad_value_is_one_line_naming_key_and_value(section: str, key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({section: {key: value}})
    message = str(caught.value)
    assert message.startswith(f"config: {section}.{key}")
    assert repr(value) in message or str(value) in message
    assert "\n" not in message


def test_unknown_logger_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"run\.loggers\.0 = 'mlflow'.*'tensorboard', 'wandb'"):
        parse_config({"run": {"loggers": ["mlflow"]}})


def test_one_sample_a_prompt_gives_no_advantage() -> None:
    with pytest.raises(UserError, match=r"sampling\.num_samples=1 .*; set it to 2 or more"):
        parse_config({"sampling": {"num_samples": 1}})


def test_kl_without_weight_has_no_effect() -> None:
    with pytest.raises(UserError, match=r"set algorithm\.kl_weight"):
        parse_config({"algorithm": {"kl": "loss"}})


@pytest.mark.parametrize(
    ("backend", "section", "value", "fix"),
    [
        ("vllm", "sampling", 0.005, 'set 0.01 or more, or set sampling.backend="torch"'),
        ("vllm", "eval", 0.009, 'set 0 (greedy) or 0.01 or more, or set sampling.backend="torch"'),
        ("vllm", "sampling", 1e-9, "set 0.01 or more"),  # too low for torch as well
        ("torch", "sampling", 1e-40, "set 1e-06 or more"),
        ("torch", "eval", 1e-7, "set 0 (greedy) or 1e-06 or more"),
    ],
)
def test_temperatures_that_a_back_end_refuses_are_refused_here_with_a_fix_that_works(
    backend: str, section: str, value: float, fix: str
) -> None:
    raw: dict[str, Any] = {"sampling": {"backend": backend}, "eval": {}}
    raw[section]["temperature"] = value
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    assert f"{section}.temperature={value:g} is below the minimum of the {backend} sampler" in str(
        caught.value
    )
    assert str(caught.value).endswith(f"; {fix}")
    raw[section]["temperature"] = MIN_TEMPERATURE[backend]
    assert getattr(parse_config(raw), section).temperature == MIN_TEMPERATURE[backend]
    if "torch" in fix:
        raw["sampling"]["backend"] = "torch"
        raw[section]["temperature"] = value
        assert getattr(parse_config(raw), section).temperature == value


@pytest.mark.parametrize(
    ("backend", "lora", "fix"),
    [
        ("vllm", {"variant": "dora"}, {"backend": "torch", "max_staleness": 0}),
        ("vllm", {"variant": "pissa", "rank": 300}, {"backend": "torch", "max_staleness": 0}),
        ("torch", {"variant": "dora"}, {"max_staleness": 0}),  # not backend="vllm"
        ("torch", {}, {"backend": "vllm"}),
    ],
)
def test_advice_on_staleness_and_variants_does_not_go_round_in_circles(
    backend: str, lora: dict[str, Any], fix: dict[str, Any]
) -> None:
    raw: dict[str, Any] = {"lora": lora, "sampling": {"backend": backend, "max_staleness": 1}}
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    named = str(caught.value).rpartition("set ")[2]
    for key, value in fix.items():
        assert f"sampling.{key}={json.dumps(value)}" in named
    assert ("vllm" in named) == (fix.get("backend") == "vllm")
    raw["sampling"] |= fix
    parse_config(raw)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("exam_deepmath_qwen3_8b", "eval_deepmath_qwen3_8b"), ("study_sft_ranks", "study_sft_rank")],
)
def test_a_renamed_or_mistyped_config_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{hint}'"):
        load_config(Path(f"configs/{name}.toml"))


@pytest.mark.parametrize("key", ["lora.alpha", "optim.lr"])
def test_numbers_beyond_float32_are_refused(key: str) -> None:
    with pytest.raises(UserError, match="less than or equal to 1"):
        load_config(None, [f"{key}=1e300"])


def test_missing_file_names_the_shipped_configs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope\.toml does not exist; .* smoke, "):
        load_config(tmp_path / "nope.toml")


def test_a_shipped_config_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("smoke")) == load_config(BY_NAME["smoke"])
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_config(Path("quickstrt"))
    with pytest.raises(UserError, match=r"did you mean 'examples/dapo'\?"):
        load_config(Path("examples/dap"))
    with pytest.raises(UserError, match="other/smoke does not exist"):
        load_config(Path("other/smoke"))
    Path("smoke").write_text("run.num_steps = 7")  # the user's own file comes first
    assert load_config(Path("smoke")).run.num_steps == 7


@pytest.mark.parametrize("content", [b"[lora\nrank = 1", b"rank = = 1", b"\xff\xfe"])
def test_broken_toml_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().lora.rank = 2  # type: ignore[misc]


@pytest.mark.parametrize("overrides", [["sampling.overlap=true"], ["sampling.overlap=false"]])
def test_a_retired_setting_names_the_present_one(overrides: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert str(caught.value) == (
        "config: unknown key 'sampling.overlap'; set sampling.max_staleness instead: 1 for "
        "overlap=true, 0 for false"
    )


def test_the_record_of_an_earlier_release_has_the_present_names() -> None:
    old: dict[str, Any] = {"sampling": {"overlap": True, "num_prompts": 4}, "optim": {"lr": 1e-3}}
    new = {"sampling": {"max_staleness": 1, "num_prompts": 4}, "optim": {"lr": 1e-3}}
    assert with_present_names(old) == new == with_present_names(new)
    assert old["sampling"]["overlap"]  # as it was
    assert with_present_names({"sampling": {"overlap": False}})["sampling"] == {"max_staleness": 0}
    parse_config(new)


@pytest.mark.parametrize(
    ("max_staleness", "algorithm", "is_warned"),
    [
        (2, {}, True),
        (1, {}, False),
        (2, {"loss": "truncated_importance_sampling"}, False),
        (2, {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.28}, False),
        (3, {"mask": "token"}, False),
    ],
)
def test_unbounded_ratios_of_old_samples_are_warned_of(
    max_staleness: int, algorithm: dict[str, Any], is_warned: bool
) -> None:
    """The advice is followed in the other cases."""
    sampling = {"max_staleness": max_staleness}
    config = parse_config({"sampling": sampling, "algorithm": algorithm})
    warning = unbounded_staleness(config.algorithm, config.sampling)
    assert (warning is not None) == is_warned
    if warning is not None:
        assert warning.startswith(f"sampling.max_staleness={max_staleness}: ")
