"""Records bounds of a step on GPUs for docs/measurements/GPU.md; compares measured steps with them.

    python scripts/gpu_bounds.py record [NAME ...]

compiles the steps of some of `TABLES` (default: all), without a GPU, and writes
docs/measurements/gpu_bounds_NAME.json and the tables of the page. A row takes one to three minutes
on two cores.

    python scripts/gpu_bounds.py compare FILE ...

prints what `switchtitan benchmark step --json FILE` measured next to the bounds of its card."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import generate_docs

from switchtitan.distributed.gpus import CARDS
from switchtitan.job.config import parse_unchecked
from switchtitan.models.llama.config import SIZES
from switchtitan.observability.environment import commit

NUM_SEQUENCES = 72
"""In a micro-batch: as published for 350M, and fits in 80 GB at all sizes. A step has one."""
MAIN_ROWS = {
    "full rank": "",
    "SwitchLoRA": "method.name=switchlora,method.rank={rank}",
    "LoRA": "method.name=lora,method.rank={rank}",
}
"""Name -> keys that differ from the size's file. A rank is hidden/4 and hidden/8."""
ALL_ROWS = MAIN_ROWS | {
    "ReLoRA, dropout 0.1": (
        "method.name=relora,method.rank={rank},method.reset_interval=5000,method.dropout=0.1"
    ),
    "GaLore": "method.name=galore,method.rank={rank}",
    "Fira": "method.name=fira,method.rank={rank}",
    "APOLLO": "method.name=apollo,method.rank={rank}",
    "APOLLO-Mini": "method.name=apollo,method.rank=1,method.scaling=tensor",
    "SLTrain": "method.name=sltrain,method.rank={rank}",
    "W = B A": "method.name=low_rank,method.rank={rank}",
    "CoLA": "model.name=cola,model.size={size},model.rank={rank}",
    "Muon": "optimizer.name=muon",
    "8-bit AdamW": "optimizer.name=adamw8bit",
    "SCALE": "optimizer.name=scale",
}
_GENTLE = (
    "method.name=switchlora,method.rank={rank},method.candidates=constant,method.decay=constant,"
    "method.switches_per_vector=9.4,method.freeze_steps=0,method.reset_moments=momentum,"
)
MUON_ROWS = {
    "Muon": "optimizer.name=muon",
    "full rank, smallest state": "optimizer.name=muon8bit,training.trained_dtype=bfloat16",
    "SwitchLoRA, gentle, Muon": f"{_GENTLE}optimizer.name=muon",
    "SwitchLoRA, gentle, Muon, int16": f"{_GENTLE}optimizer.name=muon,training.frozen_dtype=int16",
    "SwitchLoRA, smallest state": (
        f"{_GENTLE}optimizer.name=muon8bit,training.frozen_dtype=int16,"
        "training.trained_dtype=bfloat16"
    ),
}
TABLES = {
    "60m_1": ALL_ROWS,
    "130m_1": MAIN_ROWS,
    "350m_1": MAIN_ROWS | MUON_ROWS,
    "350m_8": MAIN_ROWS,
    "1b_8": MAIN_ROWS,
    "7b_8": MAIN_ROWS,
}
"""SIZE_RANKS -> rows."""


def main(argv: Sequence[str]) -> None:
    """Records bounds, or compares measured steps with them."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_bounds.py", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="compile steps; write records and tables")
    recording.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}")
    comparing = commands.add_parser("compare", help="print measured steps next to their bounds")
    comparing.add_argument("files", nargs="+", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    folder = generate_docs.MEASUREMENTS
    if options.command == "record":
        commit_before = commit()  # the first record changes a file of the checkout
        for name in options.names or TABLES:
            record = record_of(name)
            record["environment"]["commit"] = commit_before
            text = json.dumps(record, indent=1)
            (folder / f"gpu_bounds_{name}.json").write_text(f"{text}\n")
        generate_docs.main([])
    else:
        records = [json.loads(file.read_text()) for file in folder.glob("gpu_bounds_*.json")]
        for file in options.files:
            print("\n".join(compared(json.loads(file.read_text()), records)))


def record_of(name: str) -> dict[str, Any]:
    """Compiles the steps of a table, and returns their launches, bounds and estimated peaks.

    Launches, bytes and operations are those compiled for the H100.
    """
    size, num_ranks = name.split("_")
    names = sides_of(name)
    sides = [
        *names,
        f"--training.local_batch_size={NUM_SEQUENCES}",
        f"--training.global_batch_size={NUM_SEQUENCES * int(num_ranks)}",
    ]
    archs = ("--arch", "sm_80", "sm_90")
    gpu = result_of("benchmark", "gpu", *sides, "--num-ranks", num_ranks, *archs)
    estimates = result_of("estimate", *sides, "--world-size", num_ranks)["estimates"]
    config = parse_unchecked(["--config", f"llama_{size}.toml"])
    rows = {}
    for side, row in names.items():
        total = gpu["steps"][side]["sm_90"]["total"]
        rows[side] = {
            "name": row,
            **{key: total[key] for key in ("num_launches", "num_bytes", "num_flops")},
            "bounds_s": gpu["steps"][side]["bounds_s"],
            "peak": estimates[side]["memory"]["peak"],
        }
    return {
        "command": f"python scripts/gpu_bounds.py record {name}",
        "environment": gpu["environment"],
        "size": size,
        "num_ranks": int(num_ranks),
        "num_sequences": NUM_SEQUENCES,
        "seq_len": config.data.seq_len,
        "recomputation": config.activation_checkpoint.mode,
        "rows": rows,
    }


def sides_of(name: str) -> dict[str, str]:
    """Returns the rows of a table: `FILE[:key=value,...]` -> its name on the page."""
    size, _ = name.split("_")
    sides = {}
    for row, keys in TABLES[name].items():
        for rank in (SIZES[size].hidden_size // 4, SIZES[size].hidden_size // 8):
            side = f"llama_{size}.toml:{keys.format(rank=rank, size=size)}".removesuffix(":")
            sides[side] = f"{row}, rank {rank}" if "{rank}" in keys else row
    return sides


def result_of(*words: str) -> Any:
    """Runs a command of switchtitan, and returns what `--json` writes."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "switchtitan", *words, "--json", file.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text())


def compared(measured: dict[str, Any], records: Iterable[dict[str, Any]]) -> list[str]:
    """Returns lines of measured steps, and the bounds of the same steps on their card.

    Args:
        measured: what `benchmark step --json` writes.
        records: of `record_of`. A step is the same by configuration, ranks and number of tokens.
    """
    device, num_ranks = measured["environment"]["device"], measured["num_ranks"]
    card = next((name for name, card in CARDS.items() if card.device_name == device), None)
    records = [record for record in records if record["num_ranks"] == num_ranks]
    commits = {record["environment"]["commit"] for record in records}
    known = f"bounds of commit {', '.join(commits)}" if card else "no bound for this card"
    lines = [
        f"{device}, ranks: {num_ranks}; {known}",
        "   ms/step     bound     ratio    tokens/s",
    ]
    bounds_s = {
        (side, num_ranks * record["num_sequences"] * record["seq_len"]): row["bounds_s"]
        for record in records
        for side, row in record["rows"].items()
    }
    for side, step in measured["steps"].items():
        num_tokens = round(step["step_s"] * step["tokens_per_s"])
        bound_s = bounds_s.get((side, num_tokens), {}).get(card)
        cells = f"{'-':>10}{'-':>10}"
        if bound_s:
            cells = f"{1e3 * bound_s:10.2f}{step['step_s'] / bound_s:10.2f}"
        lines.append(f"{1e3 * step['step_s']:10.2f}{cells}{step['tokens_per_s']:12.0f}  {side}")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
