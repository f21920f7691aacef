"""The table of a report that sums up its runs, one per line."""

from collections.abc import Sequence

from switchtitan.observability.console import format_count, format_duration
from switchtitan.report.run_files import RunRecord
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


def summary_table(records: Sequence[RunRecord]) -> dict[str, object]:
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
        Column("val. bits/byte"): [
            number_cell(of.validation_bits_per_byte if of else None, ".4f") for of in results
        ],
        Column("test bits/byte"): [
            number_cell(of.test_bits_per_byte if of else None, ".4f") for of in results
        ],
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
    for title in ("test loss", "val. bits/byte", "test bits/byte"):
        if all(of["text"] == UNKNOWN for of in columns[Column(title)]):
            del columns[Column(title)]
    return table("Summary", columns, list(range(len(records))))


def tokens_per_step(record: RunRecord) -> float | None:
    """Returns the tokens of a step, which a run never changes; None if they are not known."""
    if record.results is not None and record.results.tokens_seen and record.results.step:
        return record.results.tokens_seen / record.results.step
    steps, tokens = record.curves.get("data/tokens_seen", ([], []))
    return tokens[-1] / steps[-1] if steps and steps[-1] and tokens[-1] > 0 else None


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
