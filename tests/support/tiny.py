"""A small training run: a LLaMA of about ten thousand weights on a slice of the embedded corpus."""

import os
import re

import torch

from switchtitan.distributed.world import start_world
from switchtitan.job.config import parse_arguments
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.training.build import build_trainer

COMPILED = ("--compile.blocks", "true", "--compile.loss", "true", "--compile.optimizer", "true")
MINI = "_mini"
METHOD_KEYS = {
    # 20 steps are between two updates of the basis.
    "apollo": "rank = 6\nupdate_interval = 7",
    "apollo_mini": 'rank = 1\nupdate_interval = 7\nscaling = "tensor"',
    "fira": "rank = 6\nupdate_interval = 7",
    "full_rank": "",
    "galore": "rank = 6\nupdate_interval = 7",
    "lora": "rank = 6\nalpha = 1",
    "low_rank": "rank = 6",
    # Resets after 9, 18, 27 and 36 steps; step 20 is inside a learning rate warmup.
    "relora": "rank = 6\nalpha = 1\nreset_interval = 9\nrestart_warmup_steps = 4",
    "sltrain": "rank = 6\ndensity = 0.1",
    # Every layer switches 6 / 5 vectors of each factor per step.
    "switchlora": 'rank = 6\ninterval = 5\nfreeze_steps = 2\ndecay = "constant"',
}

TINY = """
[job]
name = "tiny"
output_dir = "{folder}/run"
[model]
name = "llama"
size = "9m"
hidden_size = 20
intermediate_size = 28
num_layers = 2
num_heads = 2
num_kv_heads = 1
vocab_size = 271
[method]
name = "{method}"
{method_keys}
[optimizer]
name = "adamw"
lr = 1e-2
[lr_schedule]
warmup_steps = 3
[data]
dataset = "pystdlib"
cache_dir = "{folder}/../corpora"
max_bytes = 200000
vocab_size = 270
seq_len = 16
num_workers = 0
[training]
steps = 40
global_batch_size = 8
local_batch_size = 2
dtype = "float32"
[parallelism]
[compile]
[activation_checkpoint]
[checkpoint]
interval = 20
async_save = false
[evaluation]
interval = 20
tokens = 160
[metrics]
interval = 1
tensorboard = false
[profiler]
"""


def tiny_toml(folder, method, changes=None):
    """The file of a tiny run in `folder`; `changes`: parts of it -> their replacements."""
    name, keys = method.removesuffix(MINI), METHOD_KEYS[method]
    text = TINY.format(folder=folder, method=name, method_keys=keys)
    for given, changed in (changes or {}).items():
        assert given in text, given
        text = text.replace(given, changed)
    return text


def write_continued_config(folder, model_folder, method="switchlora"):
    """Writes the file of a tiny run in `folder` that continues a model of Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"[checkpoint]\n": f"[checkpoint]\ninitial_weights = '{model_folder}'\n"}
    model = f"[model]\nfrom_folder = '{model_folder}'\n"
    text = re.sub(
        r"\[model\].*(?=\[method\])", model, tiny_toml(folder, method, weights), flags=re.S
    )
    file = folder / f"{method}-{os.getpid()}.toml"
    file.write_text(text)
    return file


def tiny_config(folder, method, *overrides, num_ranks=1):
    """The configuration of a tiny run in `folder`; `overrides` as on the command line."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{method}-{os.getpid()}.toml"
    file.write_text(tiny_toml(folder, method))
    return parse_arguments(["--config", str(file), *overrides], num_ranks)


def model_on_meta(config):
    """The model of a run, with the layers of its method."""
    with torch.device("meta"):
        model = MODELS.build(config.model)
    METHODS.build(config.method, config.training.steps, config.job.seed).prepare_model(model)
    return model


def tiny_trainer(folder, method, *overrides, num_ranks=1):
    """A tiny run on the ranks of this process group, ready to train."""
    return ready_trainer(tiny_config(folder, method, *overrides, num_ranks=num_ranks))


def ready_trainer(config):
    """A run on the ranks of this process group, ready to train."""
    torch.set_num_threads(1)
    return build_trainer(config, start_world(config.parallelism))


def train_steps(trainer, num_steps):
    """Runs `num_steps` steps; returns the mean loss over all ranks of each."""
    stepper, world = trainer.stepper, trainer.stepper.world
    return [(world.sum(stepper.step().loss) / world.size).item() for _ in range(num_steps)]


def record_reports(trainer):
    """Returns a dictionary that gets what the run reports, by step and tag."""
    reported, report = {}, trainer.reporter.report

    def record(step, values):
        reported.setdefault(step, {}).update(values)
        report(step, values)

    trainer.reporter.report = record
    return reported


def full_tensors(trainer):
    """Copies of all tensors of a checkpoint, as full tensors; collective."""
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in trainer.tensors().items()
    }
