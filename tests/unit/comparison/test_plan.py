"""The runs of a comparison: what rows may differ in, and how tuned keys reach the command line."""

import pytest
from support.declared_comparison import GRID, write_grid

from switchtitan.comparison.config import ComparisonConfig, load_comparison
from switchtitan.comparison.plan import check_plan, first_run, plan_run, report_runs
from switchtitan.comparison.results import config_sha256
from switchtitan.comparison.tuning import tune
from switchtitan.errors import ConfigError

AXES = 'axes = ["optimizer.lr", "optimizer.weight_decay"]\n[[rows]]'
DECAY = 'tune."optimizer.weight_decay" = [0.0, 0.1]'
ROW = 'set.method = {{ name = "lora", rank = 4 }}\n'


def declare(folder, grid: str = GRID) -> ComparisonConfig:
    return load_comparison(write_grid(folder, grid))


def with_decay(grid: str = GRID, values: str = DECAY) -> str:
    """The comparison with an axis of weight decay in the rows that choose learning rates."""
    grid = grid.replace("[[rows]]", AXES, 1)
    for rates in ("[1e-3, 2e-3, 4e-3]", "[1e-2, 2e-2, 4e-2]"):
        grid = grid.replace(f"learning_rates = {rates}", f"learning_rates = {rates}\n{values}")
    return grid


def test_tuned_keys_are_keys_of_the_runs_configuration(tmp_path):
    comparison = declare(tmp_path, with_decay())
    check_plan(comparison)
    chosen = {"dense": {"optimizer.lr": 2e-3, "optimizer.weight_decay": 0.1}}
    chosen["thin"] = {"optimizer.lr": 1e-2, "optimizer.weight_decay": 0.0}
    dense, thin, balanced = report_runs(comparison, chosen)[:3]
    for run, lr, weight_decay in ((dense, 2e-3, 0.1), (thin, 1e-2, 0.0), (balanced, 1e-2, 0.0)):
        optimizer = run.config().optimizer
        assert (optimizer.lr, optimizer.weight_decay) == (lr, weight_decay)
    assert dense.name == "dense lr 0.002 weight_decay 0.1 seed 2"


def test_rows_may_differ_in_the_optimizer_and_its_keys(tmp_path):
    keys = 'set.optimizer = {{ name = "muon", momentum = 0.9 }}'
    comparison = declare(
        tmp_path,
        GRID.replace(ROW, ROW.replace("lora", "full_rank").replace(", rank = 4", "") + keys + "\n"),
    )
    check_plan(comparison)
    optimizer = first_run(comparison, comparison.row("thin")).config().optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.lr) == ("muon", 0.9, 1e-2)
    assert first_run(comparison, comparison.row("dense")).config().optimizer.name == "adamw"


@pytest.mark.parametrize("section", ["training", "data", "lr_schedule", "evaluation", "model"])
def test_rows_may_differ_in_no_other_section(tmp_path, section):
    key = {
        "training": "max_grad_norm = 0.5",
        "data": "seq_len = 8",
        "lr_schedule": "warmup_steps = 2",
        "evaluation": "tokens = 320",
        "model": "hidden_size = 24",
    }[section]
    comparison = declare(tmp_path, GRID.replace(ROW, f"{ROW}set.{section} = {{{{ {key} }}}}\n"))
    message = rf"row thin: \[{section}\] differs from dense's; rows may differ only in \[method\]"
    with pytest.raises(ConfigError, match=message) as error:
        check_plan(comparison)
    can_be_allowed = f'or allow it with differ_in = ["{section}"]' in str(error.value)
    assert can_be_allowed == (section in ("training", "model"))


@pytest.mark.parametrize(
    ("section", "key"), [("training", "steps = 20"), ("model", "hidden_size = 24")]
)
def test_rows_may_differ_in_declared_sections(tmp_path, section, key):
    grid = GRID.replace(ROW, f"{ROW}set.{section} = {{{{ {key} }}}}\n")
    declared = grid.replace("[[rows]]", f'differ_in = ["{section}"]\n[[rows]]', 1)
    comparison = declare(tmp_path, declared)
    check_plan(comparison)
    thin, dense = (
        first_run(comparison, comparison.row(name)).config().model_dump()[section]
        for name in ("thin", "dense")
    )
    name, value = key.split(" = ")
    assert thin[name] == int(value) != dense[name]
    other = {"training": "model", "model": "training"}[section]
    with pytest.raises(ConfigError, match=rf"row thin: \[{section}\] differs"):
        check_plan(declare(tmp_path, declared.replace(f'["{section}"]', f'["{other}"]')))


def test_every_row_of_another_length_must_be_reportable(tmp_path):
    grid = GRID.replace(ROW, f"{ROW}set.training = {{{{ steps = 5 }}}}\n")
    with pytest.raises(ConfigError, match=r"row thin: \[training\] steps = 5: expected at least 8"):
        check_plan(
            declare(tmp_path, grid.replace("[[rows]]", 'differ_in = ["training"]\n[[rows]]', 1))
        )


def test_a_row_with_given_values_is_reported_with_them(tmp_path):
    given = f"{ROW}set.optimizer = {{{{ lr = 3e-2, weight_decay = 0.1 }}}}\n"
    grid = with_decay().replace("learning_rates = [1e-2, 2e-2, 4e-2]\n" + DECAY + "\n", "", 1)
    grid = grid.replace(ROW, given).replace(
        'learning_rate_of = "thin"', 'learning_rate_of = "dense"'
    )
    comparison = declare(tmp_path, grid)
    check_plan(comparison)
    tuning = tune(comparison, lambda run: None)
    assert {run.row for run in tuning.runs} == {"dense"}
    chosen = {"dense": {"optimizer.lr": 2e-3, "optimizer.weight_decay": 0.0}}
    runs = [run for run in report_runs(comparison, chosen) if run.row == "thin"]
    assert [run.name for run in runs] == [
        "thin lr 0.03 weight_decay 0.1 seed 2",
        "thin lr 0.03 weight_decay 0.1 seed 3",
    ]
    optimizer = runs[0].config().optimizer
    assert (optimizer.lr, optimizer.weight_decay) == (3e-2, 0.1)


def test_a_value_that_fits_no_configuration_is_refused_before_any_run(tmp_path):
    comparison = declare(tmp_path, with_decay(values=DECAY.replace("0.0, ", "-0.1, 0.0, ")))
    with pytest.raises(ConfigError, match=r"weight_decay = -0.1: expected a number >= 0"):
        check_plan(comparison)


def test_a_row_may_not_set_what_it_tunes(tmp_path):
    grid = with_decay().replace(ROW, ROW + "set.optimizer = {{ weight_decay = 0.1 }}\n")
    with pytest.raises(ConfigError, match=r"row thin: set.optimizer.weight_decay has no effect"):
        check_plan(declare(tmp_path, grid))


def test_the_checksum_of_a_configuration_ignores_names_and_folders_only(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    values = {"optimizer.lr": 1e-2}
    here, elsewhere = declare(tmp_path / "a"), declare(tmp_path / "b")
    run = plan_run(here, here.row("thin"), values, 1)
    same = plan_run(elsewhere, elsewhere.row("thin"), values, 1)
    assert run.config() != same.config()
    assert config_sha256(run.config()) == config_sha256(same.config())
    others = [
        plan_run(here, here.row("thin"), values, 2),
        plan_run(here, here.row("thin"), {"optimizer.lr": 2e-2}, 1),
        plan_run(here, here.row("thin-balanced"), values, 1),
        plan_run(here, here.row("dense"), values, 1),
    ]
    digests = {config_sha256(other.config()) for other in (run, *others)}
    assert len(digests) == 5


def test_a_key_at_its_default_does_not_change_the_checksum(tmp_path):
    """A later version with one more key has the same checksums."""
    comparison = declare(tmp_path)
    config = plan_run(comparison, comparison.row("thin"), {"optimizer.lr": 1e-2}, 1).config()
    digest = config_sha256(config)

    class LaterMetrics(type(config.metrics)):
        added: int = 3

    def with_added(value):
        metrics = LaterMetrics(**config.metrics.model_dump(), added=value)
        return config_sha256(config.model_copy(update={"metrics": metrics}))

    assert with_added(3) == digest
    assert with_added(4) != digest
