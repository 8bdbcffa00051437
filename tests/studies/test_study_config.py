"""A study's cells: products, one cell for one job, settings that are checked before any run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_lora.config import parse_as
from rl_lora.errors import UserError
from rl_lora.studies.config import Condition, StudyConfig, cells_of, load_study, products

STUDY = """
[study]
name = "s"
arm = "sft"
seeds = [0, 1]
[job.model]
name = "tiny-fast"
[job.data]
train = "generated:products"
[[grid]]
lora.rank = [1, 8]
optim.lr = [1e-3, 1e-2]
[[grid]]
lora.mode = "full"
lora.rank = [1, 8]
optim.lr = 1e-4
"""


def write(path: Path, text: str) -> Path:
    file = path / "study.toml"
    file.write_text(text)
    return file


def test_products_of_nested_lists() -> None:
    grid = {"lora": {"rank": [1, 8]}, "optim": {"lr": 0.1}}
    assert list(products(grid)) == [
        {"lora.rank": 1, "optim.lr": 0.1},
        {"lora.rank": 8, "optim.lr": 0.1},
    ]
    assert list(products({})) == [{}]


def test_full_fine_tuning_has_no_rank(tmp_path: Path) -> None:
    cells = cells_of(load_study(write(tmp_path, STUDY)))
    assert len(cells) == 2 * 2 * 2 + 2  # full fine-tuning of rank 1 and of rank 8 is one condition
    assert len({cell.key for cell in cells}) == len(cells)
    full = [cell for cell in cells if cell.config.lora.mode == "full"]
    assert {cell.condition for cell in full} == {Condition("full", 0, "all", False, 32)}
    assert [cell.config.run.seed for cell in full] == [0, 1]
    assert {cell.condition for cell in cells} == {
        Condition("lora", 1, "all", False, 32),
        Condition("lora", 8, "all", False, 32),
        Condition("full", 0, "all", False, 32),
    }


def test_cells_of_a_cost_class_differ_only_in_rate_and_seed(tmp_path: Path) -> None:
    cells = cells_of(load_study(write(tmp_path, STUDY)))
    assert len({cell.cost_class for cell in cells}) == 3
    moved = cells[0].with_rate(0.5)
    assert moved.key != cells[0].key
    assert moved.cost_class == cells[0].cost_class
    assert moved.config.optim.lr == 0.5


def test_variants_are_conditions_and_leave_the_keys_of_older_cells(tmp_path: Path) -> None:
    file = write(tmp_path, STUDY)
    (cell, *_) = cells_of(load_study(file))
    assert {"variant", "lora_plus_ratio"}.isdisjoint(
        cell._settings()["lora"].keys() | cell._settings()["optim"].keys()
    )
    # Full fine-tuning has neither: its cells are the same in both studies.
    plus = cells_of(load_study(file, ["job.optim.lora_plus_ratio=16", "job.lora.variant=dora"]))
    old = {c.key for c in cells_of(load_study(file))}
    assert [c.key in old for c in plus] == [c.config.lora.mode == "full" for c in plus]
    assert plus[0].condition == cell.condition._replace(variant="dora", lora_plus_ratio=16)


def test_the_folder_is_no_part_of_a_cells_key(tmp_path: Path) -> None:
    one = cells_of(load_study(write(tmp_path, STUDY)))
    other = cells_of(load_study(write(tmp_path, STUDY), ["job.run.output_dir=elsewhere"]))
    assert [cell.key for cell in one] == [cell.key for cell in other]
    longer = cells_of(load_study(write(tmp_path, STUDY), ["job.run.num_steps=7"]))
    assert not {cell.key for cell in one} & {cell.key for cell in longer}


def test_where_a_cell_runs_is_no_part_of_its_key_but_of_its_cost(tmp_path: Path) -> None:
    file = write(tmp_path, STUDY)
    single, shared = load_study(file), load_study(file, ["study.processes_per_cell=4"])
    pairs = list(zip(cells_of(single), cells_of(shared), strict=True))
    assert {(one.num_processes, four.num_processes) for one, four in pairs} == {(1, 4)}
    for one, four in pairs:
        assert one.key == four.key
        assert one.cost_class != four.cost_class
        assert four.with_rate(0.5).num_processes == 4
    sharded = load_study(file, ["job.model.shard=true"])
    assert [cell.key for cell in cells_of(sharded)] == [one.key for one, _ in pairs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("lora.rank = [1, 8]\noptim", "lora.rnk = 1\noptim"), r"cell lora\.rnk=1.*'rank'"),
        (("optim.lr = 1e-4", "optim.lr = -1.0"), r"cell lora\.mode=full.*optim\.lr"),
        (('arm = "sft"', 'arm = "dpo"'), r"study\.arm"),
        (("seeds = [0, 1]", "seeds = []"), "at least one seed"),
        (("[study]", "[studdy]"), "did you mean 'study'"),
        (
            ("[study]", "[study]\nprocesses_per_cell = 33"),
            r"cell lora\.rank=1.*processes_per_cell = 33 is more than sft\.batch_size = 32",
        ),
    ],
)
def test_bad_studies_are_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_study(write(tmp_path, STUDY.replace(*change, 1)))
    assert "\n" not in str(caught.value)


def test_a_study_without_a_grid_is_one_job_over_its_seeds() -> None:
    study = parse_as(StudyConfig, {"study": {"seeds": [3, 4]}, "job": {"data": "gsm8k"}})
    assert [cell.config.run.seed for cell in cells_of(study)] == [3, 4]


CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("study_*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_studies_are_named_after_their_files_and_sweep_every_condition(path: Path) -> None:
    study = load_study(path)
    assert f"study_{study.study.name}" == path.stem
    cells = cells_of(study)
    # Fewer where machine time forbids five (docs/what-we-found.md).
    fewer = {"study_real_rl_rank": 2, "study_rl_variants": 3, "study_sft_variants": 3}
    assert len(study.study.seeds) >= fewer.get(path.stem, 5)
    rates: dict[object, set[float]] = {}
    for cell in cells:
        rates.setdefault(cell.condition, set()).add(cell.config.optim.lr)
    assert all(len(some) >= 3 for some in rates.values())


def test_layers_of_the_study_have_equal_parameters() -> None:
    from rl_lora.models.shapes import build_on_meta, known_config
    from rl_lora.planning.counts import parameter_counts

    shape = known_config("tiny-fast")
    assert shape is not None
    model = build_on_meta(shape)
    cells = cells_of(load_study(next(path for path in CONFIGS if path.stem == "study_sft_layers")))
    counts = {
        (cell.config.lora.layers, cell.config.lora.rank): parameter_counts(
            model, cell.config.lora
        ).trainable
        for cell in cells
    }
    assert counts["attention", 24] == counts["mlp", 16] == 24_576
