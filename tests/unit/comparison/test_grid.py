"""A declared comparison: what its file may say, its runs, and the choice of values key by key."""

import math
import re
from pathlib import Path

import pytest
from support.declared_comparison import GRID, write_grid

from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.plan import check_plan, first_run, plan_run, report_runs
from switchtitan.comparison.runs import config_sha256
from switchtitan.comparison.tuning import tune
from switchtitan.errors import ConfigError

ROOT = Path(__file__).parents[3]
COMPARISONS = ROOT / "train_configs" / "comparisons"
LR, OTHER, DECAY = "optimizer.lr", "optimizer.other_lr", "optimizer.weight_decay"
SET_THIN = 'set.method = {{ name = "lora", rank = 4 }}\n'
OF_THIN = 'learning_rate_of = "thin"'
THREE_AXES = f'axes = ["{LR}", "{OTHER}", "{DECAY}"]'
TUNE_OTHER = f'tune."{OTHER}" = [1e-3, 2e-3, 4e-3]'
TUNE_DECAY = f'tune."{DECAY}" = [0.0, 0.1]'


def declare(folder, grid=GRID, changes=None):
    return load_comparison(write_grid(folder, grid, changes))


def with_axes(axes, dense, thin=""):
    """The comparison with more keys to tune in the two rows that choose."""
    grid = GRID.replace("[[rows]]", f"{axes}\n[[rows]]", 1)
    for rates, keys in (("[1e-3, 2e-3, 4e-3]", dense), ("[1e-2, 2e-2, 4e-2]", thin)):
        grid = grid.replace(f"learning_rates = {rates}", f"learning_rates = {rates}\n{keys}")
    return grid


def with_top(line):
    return GRID.replace('baseline = "dense"', f'baseline = "dense"\n{line}')


def with_thin(keys):
    """The comparison with more keys in `set` of row thin."""
    return GRID.replace(SET_THIN, f"{SET_THIN}{keys}\n")


# ---- What a file may say


def test_the_values_of_several_keys_are_declared_by_row(tmp_path):
    start = f'start."{DECAY}" = 0.1'
    dense = f"{TUNE_OTHER}\n{TUNE_DECAY}"
    comparison = declare(tmp_path, with_axes(THREE_AXES, f"{dense}\n{start}", TUNE_OTHER))
    assert comparison.config == tmp_path / "base.toml"
    first, thin, balanced = comparison.rows
    rates = (1e-3, 2e-3, 4e-3)
    assert first.values == {LR: rates, OTHER: rates, DECAY: (0.0, 0.1)}
    assert first.start_values == {LR: 2e-3, OTHER: 2e-3, DECAY: 0.1}
    assert set(thin.values) == {LR, OTHER}
    assert balanced.values == {}
    assert comparison.tuned_row(balanced) == thin
    # Of two values, the lower one is the middle.
    without_start = declare(tmp_path, with_axes(THREE_AXES, dense, TUNE_OTHER)).rows[0]
    assert without_start.start_values[DECAY] == 0.0
    # Learning rates are another name for their axis.
    by_key = GRID.replace("learning_rates = [1e-3", f'tune."{LR}" = [1e-3')
    assert declare(tmp_path, by_key).rows[0].values == declare(tmp_path).rows[0].values


def test_a_row_may_give_its_rate_and_a_comparison_may_tune_nothing(tmp_path):
    fixed = re.sub("learning_rate.* = .*", "set.optimizer = {{ lr = '1e-2' }}", GRID)
    comparison = declare(tmp_path, fixed)
    check_plan(comparison)
    assert [row.values for row in comparison.rows] == [{}, {}, {}]
    run = plan_run(comparison, comparison.row("dense"), {}, 2)
    # In quotes it is read as on the command line.
    assert run.config().optimizer.lr == 1e-2
    assert (run.tuned, run.name, run.folder.name) == ((), "dense seed 2", "seed-2")


def test_a_row_may_give_one_key_and_choose_another(tmp_path):
    grid = with_axes(f'axes = ["{LR}", "{OTHER}"]', TUNE_OTHER)
    given = SET_THIN + "set.optimizer = {{ other_lr = 5e-3 }}\n"
    comparison = declare(tmp_path, grid.replace(SET_THIN, given))
    check_plan(comparison)
    run = plan_run(comparison, comparison.row("thin"), {LR: 1e-2}, 1)
    assert run.folder.name == "lr-0.01-seed-1"
    assert run.config().optimizer.other_lr == 5e-3


def test_files_of_finished_runs_are_relative_to_the_comparison(tmp_path):
    comparison = declare(tmp_path, with_top('finished_runs = ["a/runs.csv", "b.csv"]'))
    assert comparison.finished_runs == (tmp_path / "a" / "runs.csv", tmp_path / "b.csv")


@pytest.mark.parametrize(
    "file",
    [file for file in sorted(COMPARISONS.glob("*.toml")) if "[[rows]]" in file.read_text()],
    ids=lambda file: file.stem,
)
def test_the_shipped_comparisons_are_valid(file):
    comparison = load_comparison(file)
    assert len(comparison.report_seeds) >= 3
    check_plan(comparison)


def test_folders_of_shipped_comparisons_keep_their_names():
    comparison = load_comparison(COMPARISONS / "rank_16.toml")
    run = plan_run(comparison, comparison.row("lora-r16"), {LR: 5e-3}, 1)
    folder = "outputs/comparisons/llama_1m_pystdlib/runs/lora-r16/lr-0.005-seed-1"
    assert str(run.folder) == folder
    assert run.arguments[-2:] == ("--job.output_dir", folder)


EVALUATION = "[evaluation]\ntest_tokens = 160\ninterval = 20"
COMPILED = {"[compile]": "[compile]\noptimizer = true"}


@pytest.mark.parametrize(
    ("given", "changed", "fragments"),
    [
        ("report_seeds = [2, 3]", "report_seeds = [1, 2]", ("selection_seed = 1",)),
        ("report_seeds = [2, 3]", "report_seeds = [2, 2]", ("report_seeds = [2, 2]",)),
        ("[1e-2, 2e-2, 4e-2]", "[1e-2, 2e-2, 4e-2, 8e-2]", ("dense has 3", "thin has 4")),
        ("[1e-2, 2e-2, 4e-2]", "[1e-2, 2e-2]", ("[0.01, 0.02]", "at least 3")),
        ("[1e-2, 2e-2, 4e-2]", "[4e-2, 2e-2, 1e-2]", ("[0.04, 0.02, 0.01]", "increasing")),
        ('baseline = "dense"', 'baseline = "dens"', ("baseline = 'dens'", "dense, thin")),
        ('baseline = "dense"', 'baseline = "dense"\nseeds = 3', ("seeds = 3", "unknown")),
        ('baseline = "dense"', 'baseline = "dense"\ndiffer_in = ["data"]', ("differ_in[0]",)),
        ('baseline = "dense"', f'baseline = "dense"\naxes = ["{LR}", "{OTHER}"]', ("axes", OTHER)),
        ('baseline = "dense"', f'baseline = "dense"\naxes = ["{LR}", "training.steps"]',
         ("axes", "'training.steps'")),
        ('name = "thin"', 'name = "dense"', ("two have the name", "'dense'")),
        ('name = "thin"', 'name = "th/in"', ("rows[1].name", "th/in")),
        (OF_THIN, "", ("thin-balanced", "no learning rate")),
        (OF_THIN, f"{OF_THIN}\nset.optimizer = {{{{ lr = 1e-2 }}}}", ("set.optimizer.lr",)),
        (OF_THIN, f"{OF_THIN}\nlearning_rates = [1e-2, 2e-2, 4e-2]", ("learning_rates and",)),
        (OF_THIN, OF_THIN.replace("thin", "thin-balanced"), ("'thin-balanced'", "chooses")),
        ('name = "dense"\n', 'name = "dense"\nset.optimizer = {{ lr = 1e-2 }}\n', ("dense", LR)),
    ],
)  # fmt: skip
def test_an_unfair_or_invalid_grid_is_refused(tmp_path, given, changed, fragments):
    assert GRID.count(given) == 1
    check_refused(lambda: declare(tmp_path, GRID.replace(given, changed)), fragments)


BOTH = f"{TUNE_OTHER}\n{TUNE_DECAY}"


@pytest.mark.parametrize(
    ("axes", "dense", "thin", "fragments"),
    [
        (THREE_AXES, BOTH, TUNE_OTHER.replace(", 4e-3", ", 4e-3, 8e-3"), (OTHER, "thin has 4")),
        (THREE_AXES, BOTH.replace("0.0, ", ""), "", (DECAY, "at least 2")),
        (THREE_AXES, BOTH.replace("1e-3, ", ""), "", (OTHER, "at least 3")),
        (THREE_AXES, BOTH.replace("0.1", "inf"), "", (DECAY, "finite")),
        (THREE_AXES, BOTH.replace("0.1", "true"), "", ("tune", "valid number")),
        (THREE_AXES, f'{BOTH}\nstart."{DECAY}" = 0.2', "", ("start", f"{DECAY} = 0.2")),
        (THREE_AXES, BOTH, f'start."{DECAY}" = 0.1', ("start", DECAY)),
        ("", TUNE_OTHER, "", ("rows.dense", OTHER)),
        ("", f'tune."{LR}" = [1e-3, 2e-3, 4e-3]', "", ("learning_rates", f"'{LR}'")),
    ],
)
def test_axes_that_are_unfair_or_do_not_fit_the_rows_are_refused(
    tmp_path, axes, dense, thin, fragments
):
    check_refused(lambda: declare(tmp_path, with_axes(axes, dense, thin)), fragments)


@pytest.mark.parametrize(
    ("grid", "changes", "fragments"),
    [
        (GRID, {"test_tokens = 160": ""}, ("[evaluation] test_tokens",)),
        (GRID, {EVALUATION: EVALUATION.replace("20", "99")}, ("interval = 99",)),
        (GRID, {"tensorboard = true": "tensorboard = false"}, ("tensorboard = false",)),
        (GRID, {'dtype = "float32"': 'dtype = "auto"'}, ('dtype = "auto"',)),
        (with_thin("set.model = {{ hidden_size = 24 }}"), {}, ("row thin: [model]", "differ_in")),
        (with_thin("set.training = {{ max_grad_norm = 0.5 }}"), {}, ("row thin: [training]",)),
        (with_thin("set.data = {{ seq_len = 8 }}"), {}, ("row thin: [data]",)),
        (with_thin("set.lr_schedule = {{ warmup_steps = 2 }}"), {}, ("thin: [lr_schedule]",)),
        (with_thin("set.job = {{ seed = 3 }}"), {}, ("row thin", "set.job.seed")),
        (with_thin("set.optimizer = {{ lr = true }}").replace(
            "learning_rates = [1e-2, 2e-2, 4e-2]\n", "").replace(OF_THIN, "learning_rate_of = "
            '"dense"'), {}, ("row thin", "--optimizer.lr true")),
        (GRID.replace("rank = 4 }}", "rnk = 4 }}", 1), {}, ("row thin", "--method.rnk 4")),
        (GRID.replace("set.method", 'set.optimizer = {{ name = "scale" }}\nset.method', 1),
         COMPILED, ("[compile] optimizer = true",)),
        (with_axes(THREE_AXES, BOTH.replace("0.0, 0.1", "-0.1, 0.0"), TUNE_OTHER), {},
         ("row dense", "weight_decay -0.1")),
        (with_axes(f'axes = ["{LR}", "{DECAY}"]', TUNE_DECAY, TUNE_DECAY).replace(
            SET_THIN, SET_THIN + "set.optimizer = {{ weight_decay = 0.1 }}\n"), {},
         ("row thin", f"set.{DECAY}")),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_trained_alike_or_reported_is_refused_before_any_run(
    tmp_path, grid, changes, fragments
):
    comparison = declare(tmp_path, grid, changes)
    check_refused(lambda: check_plan(comparison), fragments)


def test_a_file_without_rows_is_refused(tmp_path):
    check_refused(lambda: load_comparison(tmp_path / "grid.toml"), ("grid.toml", "[[rows]]"))
    training = COMPARISONS.parent / "llama_350m_lora.toml"
    check_refused(lambda: load_comparison(training), (training.name, "[[rows]]"))
    second_row = GRID.index("[[rows]]", GRID.index("[[rows]]") + 1)
    check_refused(lambda: declare(tmp_path, GRID[:second_row]), ("rows", "at least 2 items"))


def check_refused(action, fragments):
    with pytest.raises(ConfigError) as caught:
        action()
    for fragment in fragments:
        assert fragment in str(caught.value)


# ---- The runs


def test_tuned_keys_are_keys_of_the_runs_configuration(tmp_path):
    axes = f'axes = ["{LR}", "{DECAY}"]'
    comparison = declare(tmp_path, with_axes(axes, TUNE_DECAY, TUNE_DECAY))
    check_plan(comparison)
    chosen = {"dense": {LR: 2e-3, DECAY: 0.1}, "thin": {LR: 1e-2, DECAY: 0.0}}
    dense, thin, balanced = report_runs(comparison, chosen)[:3]
    for run, lr, weight_decay in ((dense, 2e-3, 0.1), (thin, 1e-2, 0.0), (balanced, 1e-2, 0.0)):
        optimizer = run.config().optimizer
        assert (optimizer.lr, optimizer.weight_decay) == (lr, weight_decay)
    assert dense.name == "dense lr 0.002 weight_decay 0.1 seed 2"
    assert dense.folder.name == "lr-0.002-weight_decay-0.1-seed-2"


@pytest.mark.parametrize(
    ("section", "keys", "top"),
    [
        ("optimizer", 'name = "muon", momentum = 0.9', ""),
        ("training", "steps = 20", 'differ_in = ["training"]'),
        ("model", "hidden_size = 24", 'differ_in = ["model"]'),
        ("compile", "optimizer = true", ""),
    ],
)
def test_rows_may_differ_in_these_sections_or_where_it_is_declared(tmp_path, section, keys, top):
    grid = with_thin(f"set.{section} = {{{{ {keys} }}}}").replace("[[rows]]", f"{top}\n[[rows]]", 1)
    if section == "optimizer":
        grid = grid.replace(SET_THIN, 'set.method = {{ name = "full_rank" }}\n')
    comparison = declare(tmp_path, grid)
    check_plan(comparison)
    thin, dense = (
        getattr(first_run(comparison, comparison.row(name)).config(), section).model_dump()
        for name in ("thin", "dense")
    )
    (key, value), *_ = (part.split(" = ") for part in keys.split(", "))
    assert str(thin[key]).lower() == value.strip('"')
    assert thin[key] != dense[key]


def test_every_row_of_another_length_must_be_reportable(tmp_path):
    grid = with_thin("set.training = {{ steps = 5 }}")
    grid = grid.replace("[[rows]]", 'differ_in = ["training"]\n[[rows]]', 1)
    check_refused(lambda: check_plan(declare(tmp_path, grid)), ("row thin", "steps = 5"))


def test_the_checksum_of_a_configuration_ignores_names_folders_and_defaults_only(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    here, elsewhere = declare(tmp_path / "a"), declare(tmp_path / "b")

    def config_of(comparison, row, rate, seed):
        return plan_run(comparison, comparison.row(row), {LR: rate}, seed).config()

    config, same = (config_of(each, "thin", 1e-2, 1) for each in (here, elsewhere))
    assert config != same
    assert config_sha256(config) == config_sha256(same)
    rows = (("thin", 1e-2, 2), ("thin", 2e-2, 1), ("thin-balanced", 1e-2, 1), ("dense", 1e-2, 1))
    others = [config_of(here, *row) for row in rows]
    assert len({config_sha256(other) for other in (config, *others)}) == 5

    class LaterMetrics(type(config.metrics)):
        added: int = 3

    def with_added(value):
        metrics = LaterMetrics(**config.metrics.model_dump(), added=value)
        return config_sha256(config.model_copy(update={"metrics": metrics}))

    # A later version with one more key has the same checksums.
    assert with_added(3) == config_sha256(config)
    assert with_added(4) != config_sha256(config)


# ---- The choice of values


TUNED = with_axes(THREE_AXES, f'{BOTH}\nstart."{DECAY}" = 0.1', TUNE_OTHER)
BEST = {"dense": {LR: 2e-3, OTHER: 2e-3, DECAY: 0.1}, "thin": {LR: 2e-2, OTHER: 2e-3}}


def distance(best):
    """A loss that grows with the distance of each key to its best value."""

    def loss(run):
        return 2.0 + sum(
            abs(value - best[run.row][key])
            if key == DECAY
            else abs(math.log(value / best[run.row][key]))
            for key, value in run.tuned
        )

    return loss


class Trained:
    """Runs that were trained, and their losses."""

    def __init__(self, comparison, loss):
        self.comparison, self.loss, self.losses = comparison, loss, {}

    def tuning(self):
        return tune(self.comparison, self.losses.get)

    def train(self):
        """Trains what is due until nothing is; returns the runs of each call."""
        stages = []
        while due := self.tuning().due:
            assert not self.losses.keys() & set(due), "no run is trained twice"
            assert self.tuning().chosen == {}
            stages.append(list(due))
            self.losses |= {run: self.loss(run) for run in due}
        return stages


def values(runs, row):
    return [tuple(value for _, value in run.tuned) for run in runs if run.row == row]


def test_each_key_is_tried_with_the_others_at_their_best_so_far(tmp_path):
    best = {"dense": {LR: 2e-3, OTHER: 2e-3, DECAY: 0.0}, "thin": BEST["thin"]}
    trained = Trained(declare(tmp_path, TUNED), distance(best))
    first = trained.tuning()
    of_lr, of_other, of_decay = trained.train()
    # The others start at their middle value, or where `start` says.
    assert values(of_lr, "dense") == [(2e-3, 2e-3, 0.1), (1e-3, 2e-3, 0.1), (4e-3, 2e-3, 0.1)]
    assert values(of_lr, "thin") == [(2e-2, 2e-3), (1e-2, 2e-3), (4e-2, 2e-3)]
    # The run at the best value so far is known already.
    assert values(of_other, "dense") == [(2e-3, 1e-3, 0.1), (2e-3, 4e-3, 0.1)]
    assert values(of_other, "thin") == [(2e-2, 1e-3), (2e-2, 4e-3)]
    assert values(of_decay, "dense") == [(2e-3, 2e-3, 0.0)]
    assert values(of_decay, "thin") == []
    assert {run.seed for run in trained.losses} == {1}
    assert len(first.runs) + first.num_later == len(trained.losses) == 6 + 4 + 1
    tuning = trained.tuning()
    assert tuning.chosen == best
    # It depends on nothing but the losses.
    backwards = dict(reversed(list(trained.losses.items())))
    assert tune(trained.comparison, backwards.get) == tuning
    # A row that uses the values of another one takes all of them.
    runs = report_runs(trained.comparison, tuning.chosen)
    assert values(runs, "thin-balanced") == values(runs, "thin") == [(2e-2, 2e-3)] * 2


def test_a_best_learning_rate_at_the_edge_is_told_and_another_keys_is_not(tmp_path):
    best = {"dense": {LR: 1.0, OTHER: 2e-3, DECAY: 0.0}, "thin": BEST["thin"]}
    trained = Trained(declare(tmp_path, TUNED), distance(best))
    trained.train()
    dense = {of.key: of for of in trained.tuning().tried["dense"]}
    assert (dense[LR].best, dense[LR].is_at_edge) == (4e-3, True)
    assert (dense[OTHER].best, dense[OTHER].is_at_edge) == (2e-3, False)
    # The lowest weight decay is the best one.
    assert (dense[DECAY].best, dense[DECAY].is_at_edge) == (0.0, False)


def test_a_repeated_key_is_tried_again_with_the_others_at_their_best(tmp_path):
    def loss(run):
        tuned = dict(run.tuned)
        if run.row == "thin":
            return distance(BEST)(run)
        # The lower the other rate, the higher the best learning rate.
        best_lr = 4e-6 / tuned[OTHER]
        return abs(math.log(tuned[LR] / best_lr)) + abs(math.log(tuned[OTHER] / 1e-3)) * 2

    chosen = []
    for axes in (THREE_AXES, THREE_AXES.replace("]", f', "{LR}"]')):
        trained = Trained(declare(tmp_path, TUNED.replace(THREE_AXES, axes)), loss)
        trained.train()
        chosen.append(trained.tuning().chosen["dense"])
    assert [(of[LR], of[OTHER]) for of in chosen] == [(2e-3, 1e-3), (4e-3, 1e-3)]
    assert [of.key for of in trained.tuning().tried["dense"]] == [LR, OTHER, DECAY, LR]


def test_nothing_is_chosen_from_an_unfinished_axis_or_a_diverged_run(tmp_path):
    comparison = declare(tmp_path, TUNED)
    trained = Trained(comparison, distance(BEST))
    first = trained.tuning().due
    trained.losses |= {run: trained.loss(run) for run in first[:-1]}
    assert (trained.tuning().due, trained.tuning().chosen) == (first[-1:], {})
    diverging = Trained(
        comparison, lambda run: math.inf if run.value(LR) == 2e-3 else distance(BEST)(run)
    )
    diverging.train()
    assert diverging.tuning().chosen["dense"][LR] in (1e-3, 4e-3)
