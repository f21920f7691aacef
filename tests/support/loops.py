"""Training loops as users write them: those of docs/LIBRARY.md, and one with a small LLaMA."""

import os
import re
import subprocess
import sys
from pathlib import Path

import tomli
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from switchtitan import apply

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "LIBRARY.md").read_text()
EXAMPLES = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE)
"""Each begins with a docstring."""
VOCABULARY, NUM_STEPS = 64, 40
SWITCHING = {
    "rank": 6,
    "interval": 6,
    "freeze_steps": 2,
    "decay": "constant",
    "num_steps": NUM_STEPS,
}
"""Every layer switches a vector of each factor in every step."""


def build_llama(seed=0, **keys):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **keys))


def draw_tokens(step, rows=4):
    """The batch of a step, [rows, 16]."""
    return torch.randint(VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(step))


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def start_loop(model=None, name="switchlora", optimizer="adamw", **keys):
    """A model with a method applied, the method, and its optimizer."""
    model = build_llama() if model is None else model
    method = apply(model, name, **(SWITCHING | keys if name == "switchlora" else keys))
    return model, method, method.optimizer(optimizer, lr=1e-2, betas=(0.9, 0.95))


def run_loop(model, optimizer, steps, scheduler=None):
    """Trains on the batches of these steps; returns the losses."""
    losses = []
    for step in steps:
        loss = loss_of(model, draw_tokens(step % 3))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def num_switched(optimizer):
    return optimizer.metrics()["switch/vectors_switched_total"]


def missing_packages():
    """The packages of the extra `train` that transformers does not install either."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["train"]]
    packages = {name.replace("-", "_") for name in names}
    return sorted(packages - {"tokenizers", "huggingface_hub", "filelock"})


def run_example(start, folder, changes=(), ranks=1):
    """Runs the example whose docstring starts so, as it stands but for `changes`, where the
    trainer's packages are missing; returns what it printed."""
    (code,) = (code for code in EXAMPLES if code.startswith(f'"""{start}'))
    for given, changed in changes:
        assert given in code
        code = code.replace(given, changed)
    (folder / "example.py").write_text(code)
    block = f"import sys\nsys.modules.update(dict.fromkeys({missing_packages()}))\n"
    (folder / "sitecustomize.py").write_text(block)
    command = [sys.executable, "example.py"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command[1:1] = launcher
    environ = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
