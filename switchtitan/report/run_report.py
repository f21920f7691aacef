"""The contents of a report of runs, for its page's code."""

import math
from collections.abc import Mapping, Sequence

from switchtitan.regions import OUTSIDE_STEP, STEP
from switchtitan.report.charts import Lines, draw_metrics, metrics_of, num_curves_of
from switchtitan.report.points import MAX_POINTS, Line, points_of_curve
from switchtitan.report.run_files import RankProfile, RunRecord
from switchtitan.report.run_summary import summary_table, tokens_per_step
from switchtitan.report.spectrum_charts import rank_tables, spectrum_charts
from switchtitan.report.tables import Column, cell, number_cell, table

Contents = dict[str, object]
_IDENTITY_KEYS = ("job.name", "job.output_dir")
"""Keys that differ in any two runs, and are the run's name in a report."""
_HOW_TO_USE = (
    "Drag to zoom, double click to reset. A click on a name hides it, Shift-click shows it alone."
)
_REGIONS = ("data", "forward", "backward", "reduce", "clip", "update", "switch")
_MAX_ADDED_REGIONS = 8
"""Regions of methods that are shown, at most."""


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


def curve_sections(
    runs: Mapping[int, Lines], title: str = "Curves", note: str = ""
) -> list[Contents | None]:
    """Returns the sections with charts over training: main ones, switches, and all others."""
    metrics = metrics_of(runs.values())
    # Other metrics may be hundreds, e.g. those of each layer. They leave half of the points.
    first = num_curves_of([*metrics["main"], *metrics["switches"]], runs.values())
    others = num_curves_of([*metrics["times"], *metrics["others"]], runs.values())
    points_of_first = points_of_curve(first, MAX_POINTS // 2)
    points_of_others = points_of_curve(others, MAX_POINTS // 2)
    drawn = {
        "main": draw_metrics(metrics["main"], runs, points_of_first),
        "switches": draw_metrics(metrics["switches"], runs, points_of_first),
        "times": draw_metrics(metrics["times"], runs, points_of_others),
        "others": draw_metrics(metrics["others"], runs, points_of_others),
    }
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
    times: Contents = {
        "id": "times",
        "title": f"Time of a step by region ({len(drawn['times'])})",
        "isFolded": True,
        "charts": drawn["times"],
    }
    more: Contents = {
        "id": "others",
        "title": f"More curves ({len(drawn['others'])})",
        "isFolded": True,
        "charts": drawn["others"],
    }
    return [
        main,
        switches if drawn["switches"] else None,
        times if drawn["times"] else None,
        more if drawn["others"] else None,
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
    found = {name for profile in profiles.values() for name in profile.regions}
    added = sorted(found - {*_REGIONS, *OUTSIDE_STEP, STEP})[:_MAX_ADDED_REGIONS]
    names = [name for name in (*_REGIONS, *added, STEP) if name in found]
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
