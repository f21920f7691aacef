"""A wheel installed outside the checkout has the commands and configurations, and trains and
exports."""

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OVERRIDES = """
    --data.max_bytes 1000000 --data.vocab_size 300 --data.seq_len 64
    --training.steps 4 --training.global_batch_size 4 --training.dtype float32
    --lr_schedule.warmup_steps 1 --evaluation.interval 2 --evaluation.tokens 1024
    --compile.blocks false --compile.loss false --compile.optimizer false --profiler.enabled false
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the wheel installed in `env/`, on top of this interpreter's environment."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("switchtitan", "train_configs"):
        shutil.copytree(
            REPOSITORY / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(wheel, check=True, capture_output=True, text=True)
    shutil.rmtree(source)
    python = folder / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    # Folders named in a .pth file do not load their own .pth files, which excludes an editable
    # installation.
    found = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(found.stdout.strip()) / "dependencies.pth").write_text(
        "\n".join(site.getsitepackages()) + "\n"
    )
    (file,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", file], check=True
    )
    return folder


def run(folder, *command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [folder / "env" / "bin" / "switchtitan", *command],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_installed_quickstart_trains_exports_and_draws(folder):
    run(folder, "train", *OVERRIDES.split())
    output = folder / "outputs" / "llama_quickstart_switchlora"
    assert json.loads((output / "results.json").read_text())["step"] == 4
    exported = run(folder, "export", "--checkpoint", str(output), "--folder", "exported")
    assert "folder      exported" in exported.stdout
    assert (folder / "exported" / "model.safetensors").is_file()
    run(folder, "plot", "run", str(output), "--output", "curves.png")
    assert (folder / "curves.png").stat().st_size > 1000
    run(folder, "report", str(output), "--output", "report.html")
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "class Chart" in page


def test_an_installed_configuration_is_found_by_its_name(folder):
    given = "train_configs/llama_60m_lora.toml"
    done = run(folder, "train", "--config", given, "--help")
    shipped = folder.glob("env/lib/*/site-packages/switchtitan/train_configs/llama_60m_lora.toml")
    assert done.stderr == f"{given}: using {next(shipped)}, which is installed with switchtitan\n"
    assert "--method.rank" in done.stdout


def test_every_file_of_the_reports_page_is_installed(folder):
    (installed,) = folder.glob("env/lib/*/site-packages/switchtitan/report/page")
    names = {file.name for file in (REPOSITORY / "switchtitan" / "report" / "page").iterdir()}
    assert {file.name for file in installed.iterdir()} == names >= {"page.html", "style.css"}


def test_every_configuration_is_installed(folder):
    (installed,) = folder.glob("env/lib/*/site-packages/switchtitan/train_configs")
    shipped = REPOSITORY / "train_configs"
    names = sorted(str(file.relative_to(shipped)) for file in shipped.rglob("*.toml"))
    assert sorted(str(file.relative_to(installed)) for file in installed.rglob("*.toml")) == names
