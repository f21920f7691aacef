"""The contents of a report of runs, for its page's code."""

import math
from collections.abc import Mapping, Sequence

from switchtitan.observability.console import format_count, format_duration
from switchtitan.regions import STEP
from switchtitan.report.charts import Lines, draw_metrics, metrics_of, num_curves_of
from switchtitan.report.points import Line
from switchtitan.report.run_files import RankProfile, RunRecord
from switchtitan.report.spectrum_charts import rank_tables, spectrum_charts
from switchtitan.report.tables import (
    UNKNOWN,
    Cell,
    Column,
    cell,
    mark_lowest,
    number_cell,
    table,
    text_cell,
)

Contents = dict[str, object]
_IDENTITY_KEYS = ("job.name", "job.output_dir")
"""Keys that differ in any two runs, and are the run's name in a report."""
_HOW_TO_USE = (
    "Drag to zoom, double click to reset. A click on a name hides it, Shift-click shows it alone."
)
_REGIONS = ("data", "forward", "backward", "reduce", "clip", "update", "switch", STEP)


def run_report(runs: Mapping[str, RunRecord]) -> Contents:
    """Returns the contents of a report of runs, by name."""
    names, records = list(runs), list(runs.values())
    notes = [f"{name}: {note}" for name, record in runs.items() for note in record.notes]
    return {
        "title": names[0] if len(names) == 1 else f"{len(names)} runs",
        "subtitle": str(records[0].folder) if len(names) == 1 else ", ".join(names[:8]),
        "notes": notes,
        "series": [
            {
                "name": name,
                "folder": str(record.folder),
                "tokensPerStep": tokens_per_step(record),
            }
            for name, record in runs.items()
        ],
        "sections": [
            section
            for section in (
                {"id": "summary", "title": "Summary", "tables": [summary_table(records)]},
                *curve_sections({place: _lines(of) for place, of in enumerate(records)}),
                _spectrum_section(records),
                _profile_section(records),
                _config_section(names, records),
            )
            if section is not None
        ],
    }


def tokens_per_step(record: RunRecord) -> float | None:
    """Returns the tokens of a step, which a run never changes; None if they are not known."""
    if record.results is not None and record.results.tokens_seen and record.results.step:
        return record.results.tokens_seen / record.results.step
    steps, tokens = record.curves.get("data/tokens_seen", ([], []))
    return tokens[-1] / steps[-1] if steps and steps[-1] and tokens[-1] > 0 else None


def summary_table(records: Sequence[RunRecord]) -> Contents:
    """Returns one line per run. What `results.json` does not say is taken from the curves."""
    results = [record.results for record in records]
    columns = {
        Column("method", is_text=True): [text_cell(_method(record)) for record in records],
        Column("parameters", "trainable and frozen"): [_parameters(record) for record in records],
        Column("steps"): [_steps(record) for record in records],
        Column("tokens"): [_tokens(record) for record in records],
        Column("final val. loss"): [_final_loss(record) for record in records],
        Column("best val. loss"): [_best_loss(record) for record in records],
        Column("test loss"): [number_cell(of.test_loss if of else None, ".4f") for of in results],
        Column("tokens/s"): [_speed(record) for record in records],
        Column("peak memory", "GiB, of the main rank"): [_memory(record) for record in records],
        Column("wall time", "of the run's last process"): [
            cell(None)
            if of is None or of.wall_time_s is None
            else cell(format_duration(of.wall_time_s), of.wall_time_s, f"{of.wall_time_s:.1f} s")
            for of in results
        ],
        Column("dtype", is_text=True): [
            text_cell((of and of.compute_dtype) or _config_text(record, "training.dtype"))
            for of, record in zip(results, records, strict=True)
        ],
        Column("device", is_text=True): [text_cell(_device(record)) for record in records],
        Column("commit", is_text=True): [
            cell(
                of.commit[:10] if of and of.commit else None,
                of.commit if of else None,
                (of and of.commit) or "",
            )
            for of in results
        ],
    }
    for title in ("final val. loss", "best val. loss", "test loss"):
        mark_lowest(columns[Column(title)])
    if all(of["text"] == UNKNOWN for of in columns[Column("test loss")]):
        del columns[Column("test loss")]
    return table("Summary", columns, list(range(len(records))))


def curve_sections(
    runs: Mapping[int, Lines], title: str = "Curves", note: str = ""
) -> list[Contents | None]:
    """Returns the sections with charts over training: main ones, switches, and all others."""
    metrics = metrics_of(runs.values())
    num_curves = num_curves_of(runs.values())
    drawn = {name: draw_metrics(of, runs, num_curves) for name, of in metrics.items()}
    if not any(drawn.values()):
        return []
    main: Contents = {
        "id": "curves",
        "title": title,
        "hasToolbar": True,
        "note": f"{note} {_HOW_TO_USE}".strip(),
        "charts": drawn["main"],
    }
    switches: Contents = {
        "id": "switches",
        "title": "Switches",
        "charts": drawn["switches"],
        "bars": [_coverage(runs)] if "switch/candidate_coverage" in metrics["switches"] else [],
    }
    others: Contents = {
        "id": "others",
        "title": f"More curves ({len(drawn['others'])})",
        "isFolded": True,
        "charts": drawn["others"],
    }
    return [
        main,
        switches if drawn["switches"] else None,
        others if drawn["others"] else None,
    ]


def _lines(record: RunRecord) -> Lines:
    return {name: Line(*curve) for name, curve in record.curves.items()}


def _coverage(runs: Mapping[int, Lines]) -> Contents:
    shares = {
        place: curves["switch/candidate_coverage"].y[-1]
        for place, curves in runs.items()
        if "switch/candidate_coverage" in curves
    }
    return {
        "title": "Candidates that have been in use by the last step",
        "max": 1.0,
        "rows": [
            {
                "series": place,
                "text": f"{share:.1%}",
                "parts": [{"value": share, "colour": place, "name": f"{share:.1%}"}],
            }
            for place, share in shares.items()
            if math.isfinite(share)
        ],
    }


def _spectrum_section(records: Sequence[RunRecord]) -> Contents | None:
    measured = {place: of.spectra for place, of in enumerate(records) if of.spectra}
    if not measured:
        return None
    return {
        "id": "spectra",
        "title": "Spectra of the weights' change",
        "note": "Singular values of what training changed since step 0, at the last measurement, "
        "and their effective rank.",
        "charts": spectrum_charts(measured),
        "folded": [rank_tables(measured)],
    }


def _profile_section(records: Sequence[RunRecord]) -> Contents | None:
    profiles = {place: of.profile[0] for place, of in enumerate(records) if of.profile}
    if not profiles:
        return None
    on_device = {place: _is_on_device(profile) for place, profile in profiles.items()}
    names = [
        name for name in _REGIONS if any(name in profile.regions for profile in profiles.values())
    ]
    times = {
        place: {
            name: region.device_ms if on_device[place] else region.host_ms
            for name, region in profile.regions.items()
            if name in names
        }
        for place, profile in profiles.items()
    }
    rows = [
        {
            "series": place,
            "text": f"{sum(of.values()):.1f} ms",
            "parts": [
                {"value": of[name], "colour": colour, "name": f"{_label(name)} {of[name]:.2f} ms"}
                for colour, name in enumerate(names)
                if of.get(name, 0) > 0
            ],
        }
        for place, of in times.items()
    ]
    bars = {
        "title": "Time of a step by region",
        "legend": [_label(name) for name in names],
        "max": max(sum(of.values()) for of in times.values()) or 1.0,
        "rows": rows,
    }
    return {
        "id": "profile",
        "title": "Profile",
        "note": "Means over the traced steps of the first traced rank: the device's time on a GPU, "
        "otherwise the host's.",
        "bars": [bars],
        "folded": [_operations(records[place], place) for place in profiles],
    }


def _label(region: str) -> str:
    return "other" if region == STEP else region


def _is_on_device(profile: RankProfile) -> bool:
    return any(region.device_ms > 0 for region in profile.regions.values())


def _operations(record: RunRecord, place: int) -> Contents:
    profile = record.profile[0]
    operations = profile.operations[:20]
    return table(
        f"Operations of {record.folder.resolve().name}, rank {profile.rank}",
        {
            Column("calls"): [cell(str(of.num_calls), of.num_calls) for of in operations],
            Column("self time, ms"): [number_cell(of.self_ms, ".2f") for of in operations],
            Column("share"): [cell(f"{of.share:.1%}", of.share) for of in operations],
        },
        [place] * len(operations),
        [of.name[:120] for of in operations],
        rows_title="operation",
    )


def _config_section(names: Sequence[str], records: Sequence[RunRecord]) -> Contents | None:
    known = [(name, of.config) for name, of in zip(names, records, strict=True) if of.config]
    if not known:
        return None
    keys = list(dict.fromkeys(key for _, config in known for key in config))
    # A section's keys stay together, though runs have different ones.
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    keys.sort(key=lambda key: sections.index(key.partition(".")[0]))
    values = {
        key: [config.get(key) for _, config in known] for key in keys if key not in _IDENTITY_KEYS
    }
    return {
        "id": "configuration",
        "title": "Configuration" if len(known) == 1 else "Configurations: keys that differ",
        "note": "Without names and folders of the runs." if len(known) > 1 else None,
        "config": {
            "names": [name for name, _ in known],
            "differing": [[key, of] for key, of in values.items() if len(set(of)) > 1],
            "same": [[key, of[0]] for key, of in values.items() if len(set(of)) == 1],
        },
    }


def _config_text(record: RunRecord, key: str) -> str | None:
    value = record.config.get(key)
    return None if value is None else value.strip('"')


def _method(record: RunRecord) -> str | None:
    name, rank = _config_text(record, "method.name"), _config_text(record, "method.rank")
    return f"{name}, rank {rank}" if name and rank else name


def _parameters(record: RunRecord) -> Cell:
    sizes = record.results and record.results.num_parameters
    if not sizes:
        return cell(None)
    total = sizes.trainable + sizes.frozen
    hint = f"{sizes.trainable} trainable, {sizes.frozen} frozen, {sizes.buffers} in buffers"
    frozen = f", {format_count(sizes.trainable)} train" if sizes.frozen else ""
    return cell(f"{format_count(total)}{frozen}", total, hint)


def _steps(record: RunRecord) -> Cell:
    step = max((steps[-1] for steps, _ in record.curves.values() if steps), default=0)
    if record.results is not None:
        note = " (diverged)" if record.results.diverged else ""
        return cell(f"{record.results.step}{note}", record.results.step)
    of = _config_text(record, "training.steps")
    return cell(f"{step} of {of}" if of else str(step), step, "not finished")


def _tokens(record: RunRecord) -> Cell:
    tokens: float | None = record.results.tokens_seen if record.results else None
    if tokens is None:
        tokens = _last(record, "data/tokens_seen")
    return cell(None) if tokens is None else cell(format_count(tokens), tokens, f"{tokens:.0f}")


def _final_loss(record: RunRecord) -> Cell:
    loss = record.results.validation_loss if record.results else None
    return number_cell(_last(record, "loss/validation") if loss is None else loss, ".4f")


def _best_loss(record: RunRecord) -> Cell:
    steps, losses = record.curves.get("loss/validation", ([], []))
    finite = [(loss, step) for loss, step in zip(losses, steps, strict=True) if loss == loss]
    if not finite:
        return cell(None)
    loss, step = min(finite)
    return number_cell(loss, ".4f", hint=f"at step {step}")


def _speed(record: RunRecord) -> Cell:
    speed = record.results.tokens_per_s if record.results else None
    if speed is None:
        speed = _last(record, "throughput/tokens_per_s")
    return cell(None) if speed is None else cell(format_count(speed), speed, f"{speed:.1f}")


def _memory(record: RunRecord) -> Cell:
    memory = record.results.peak_memory_gib if record.results else None
    if memory is None:
        memory = _last(record, "memory/peak_gib")
    return cell(None) if memory is None else cell(f"{memory:.2f} GiB", memory)


def _device(record: RunRecord) -> str | None:
    results = record.results
    if results is None or results.device is None:
        return None
    return f"{results.num_ranks or 1} x {results.device}"


def _last(record: RunRecord, metric: str) -> float | None:
    values = record.curves.get(metric, ([], []))[1]
    return values[-1] if values else None
