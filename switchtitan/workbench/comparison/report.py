"""The report of a comparison: Markdown tables, and a CSV file of its runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from switchtitan.files import write_atomically
from switchtitan.workbench.comparison.comparison import RUNS_FILE, State, best_value
from switchtitan.workbench.comparison.config import RowConfig, is_rate
from switchtitan.workbench.comparison.runs import RunResult, short_name, write_csv
from switchtitan.workbench.comparison.statistics import Difference, adjusted, difference, verdict

UNKNOWN = "-"
_LEGEND = (
    "(edge): the best learning rate is the lowest or the highest one tried. Bits per byte: nats of "
    "all tokens / (ln 2 x UTF-8 bytes of their text). Effective rank: exp of the entropy of the "
    "normalized singular values of a layer's change since step 0, averaged over layers. State: all "
    "that a checkpoint contains. Peak: peak GPU memory. Tokens/s include evaluations and switches. "
    "State, peak and tokens/s are medians over seeds. A value's validation loss is that with the "
    "other keys as chosen before, inf if the run diverged; the best value is bold."
)


def write_report(folder: Path, state: State) -> None:
    """Writes `report.md` and `runs.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / RUNS_FILE, state.finished)
    write_atomically(folder / "report.md", markdown(state))


def markdown(state: State) -> str:
    """Returns the report as Markdown."""
    config, lines = state.config, table(state)
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    titles = {row.name: row.label or row.name for row in config.rows}
    parts = [
        f"# {config.name}",
        f"{len(state.finished)} of {config.num_runs} runs are finished.",
        *_facts([result for result in state.finished.values() if not result.diverged]),
        f"{', '.join(map(short_name, config.axes))}: given, or chosen by the validation loss after "
        f"the last step, with seed {config.selection_seed}. Losses are on the test split: mean ± "
        f"standard deviation over seeds {', '.join(map(str, config.report_seeds))}. Differences to "
        f"{config.baseline} are taken seed by seed, with 95 % intervals (Student's t). p is "
        "adjusted by Holm's method over the rows of the table. A row differs if p is below 0.05; "
        "no difference is shown if the interval holds zero.",
        "\n".join(
            f"| {' | '.join(cells)} |" for cells in [lines[0], rule, *map(dict.values, lines)]
        ),
        _LEGEND,
    ]
    for key, losses in state.tried:
        listed = [f"- {titles[row]}: {_tried(by_value)}" for row, by_value in losses.items()]
        if listed:
            parts += [f"## Validation loss by {short_name(key)}", "\n".join(listed)]
    return "\n\n".join(parts) + "\n"


def table(state: State) -> list[dict[str, str]]:
    """Returns the lines of the table: a cell by column for each row."""
    losses = {
        row.name: {run.seed: result.test_loss for run, result in state.reported(row.name).items()}
        for row in state.config.rows
    }
    baseline = losses.pop(state.config.baseline)
    differences = {
        row: of for row, by_seed in losses.items() if (of := difference(by_seed, baseline))
    }
    p_values = adjusted({row: of.p for row, of in differences.items()})
    return [
        _line(state, row, differences.get(row.name), p_values.get(row.name))
        for row in state.config.rows
    ]


def _line(state: State, row: RowConfig, of: Difference | None, p: float | None) -> dict[str, str]:
    results = list(state.reported(row.name).values())
    on_gpu = [result for result in results if result.device != "CPU"]
    tokens = {"M tokens": _median(results, "tokens", 2, 1e-6)} if state.config.differ_in else {}
    return {
        "": row.label or row.name,
        **{short_name(key): _value(state, row.name, key) for key in state.config.axes},
        **tokens,
        "test loss": _mean(results, "test_loss", 4),
        "test bits/byte": _mean(results, "test_bits_per_byte", 4),
        "validation loss": _mean(results, "validation_loss", 4),
        f"loss - {state.config.baseline}'s": UNKNOWN if of is None else of.text("+.4f"),
        "p": UNKNOWN if p is None else f"{p:.2g}",
        "verdict": UNKNOWN if of is None or of.p is None or p is None else verdict(of.p, p),
        "effective rank": _mean(results, "effective_rank", 1),
        "trainable, M": _median(results, "num_trainable", 3, 1e-6),
        "state, MiB": _median(results, "state_gib", 1, 1024),
        # On a CPU only the peak of the whole process is known.
        "peak, GiB": _median(on_gpu, "peak_gib", 2),
        "tokens/s": _median(results, "tokens_per_s", 0),
    }


def _value(state: State, row: str, key: str) -> str:
    value = state.chosen.get(row, {}).get(key)
    if value is None:
        return UNKNOWN
    last = [losses[row] for tried, losses in state.tried if tried == key and row in losses][-1:]
    is_at_edge = is_rate(key) and any(value in (min(losses), max(losses)) for losses in last)
    return f"{value:g}{' (edge)' if is_at_edge else ''}"


def _mean(results: Sequence[RunResult], figure: str, digits: int) -> str:
    """Mean and standard deviation over seeds."""
    if any(result.diverged for result in results):
        return "diverged"
    values = _known(results, figure)
    if len(values) > 1:
        return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"
    return f"{values[0]:.{digits}f} (1 run)" if values else UNKNOWN


def _median(results: Sequence[RunResult], figure: str, digits: int, factor: float = 1.0) -> str:
    values = _known([result for result in results if not result.diverged], figure)
    return f"{median(values) * factor:.{digits}f}" if values else UNKNOWN


def _known(results: Sequence[RunResult], figure: str) -> list[float]:
    return [value for result in results if (value := getattr(result, figure)) is not None]


def _tried(losses: Mapping[float, float]) -> str:
    best = best_value(losses)
    cells = {value: f"{value:g}: {loss:.4f}" for value, loss in sorted(losses.items())}
    return ", ".join((cells | {best: f"**{cells[best]}**"}).values())


def _facts(results: Sequence[RunResult]) -> Iterator[str]:
    """Yields a sentence about tokens, corpus, versions and hardware of runs, if there are any."""

    def distinct(figure: str) -> str:
        return " and ".join(sorted({str(getattr(of, figure) or "unknown") for of in results}))

    if results:
        yield (
            f"{distinct('tokens')} tokens per run of corpus {distinct('corpus')} (fingerprint "
            f"{distinct('corpus_fingerprint')}), torch {distinct('torch')}, {distinct('device')}, "
            f"CPU capability {distinct('cpu_capability')}, {distinct('num_threads')} thread(s), "
            f"commit {distinct('commit')}."
        )
