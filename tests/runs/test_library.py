"""Loops of other people: each example of docs/LIBRARY.md, and the trainer's own numbers."""

from functools import partial
from itertools import islice

import pytest
import torch
from support.loops import run_example
from support.tiny import ready_trainer, tiny_config
from torch.nn.utils import clip_grad_norm_

from switchtitan import apply
from switchtitan.distributed.fsdp import materialize
from switchtitan.models import plain_model
from switchtitan.optim.lr_schedule import build_lr_schedule

RUNS = {
    "switchlora": ("switchlora", []),
    "drawn candidates": ("switchlora", ["--method.candidates", "constant"]),
    "factors by muon": ("switchlora", ["--optimizer.name", "muon"]),
    **{name: (name, []) for name in ("relora", "galore", "full_rank")},
}


@pytest.mark.parametrize("kind", RUNS)
def test_an_own_loop_has_the_losses_of_the_trainer(kind, tmp_path):
    """The same LLaMA, data, seed and keys: bitwise, since it is the same code."""
    name, words = RUNS[kind]
    config = tiny_config(tmp_path, name, *words, "--training.steps", "60")
    stepper = ready_trainer(config).stepper
    expected = [stepper.step().loss.item() for _ in range(60)]
    stepper.close()

    model, seed = plain_model(config.model), config.job.seed
    materialize(model, torch.device("cpu"), seed)
    keys = config.method.model_dump(exclude_unset=True, exclude={"name"})
    method = apply(model, name, num_steps=60, seed=seed, **keys)
    optimizer = method.optimizer(**config.optimizer.model_dump(exclude_unset=True))
    schedule = build_lr_schedule(config.lr_schedule, 60)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    batches = ready_trainer(config).stepper.batches
    losses = []
    for micro_batches in islice(batches, 60):
        divisor, total = sum(batch.targets.numel() for batch in micro_batches), torch.zeros(())
        for batch in micro_batches:
            apply_head = partial(stepper.loss, targets=batch.targets, divisor=divisor)
            loss = model(batch.tokens, batch.document_ids, apply_head)
            loss.backward()
            total += loss.detach()
        clip_grad_norm_(model.parameters(), config.training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total.item())
    batches.close()
    assert losses == expected
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
    ("start", "ranks", "folder"),
    [
        ("transformers.Trainer", 1, "switchlora_trainer/plain"),
        ("FSDP2 and torch's", 2, "switchlora_fsdp2/plain"),
        ("A PEFT adapter", 1, "adapter/base"),
    ],
)
def test_examples_run_as_they_stand(start, ranks, folder, tmp_path):
    """transformers loads what they wrote, without a missing or unexpected weight."""
    from transformers import LlamaForCausalLM

    run_example(start, tmp_path, ranks=ranks)
    found = tmp_path / "outputs" / folder
    _, report = LlamaForCausalLM.from_pretrained(found, output_loading_info=True)
    assert not any(report.values()), report


def test_accelerate_s_state_resumes_bitwise(tmp_path):
    rest = """
def rest():
    for batch in list(loader)[:4]:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([tensor.flatten().float() for tensor in model.state_dict().values()])


once = rest()
accelerator.load_state("outputs/switchlora_accelerate")
print(torch.equal(once, rest()))
"""
    run_example("accelerate", tmp_path)
    comment = "# load_state resumes bitwise\n"
    assert run_example("accelerate", tmp_path, [(f"  {comment}", f"\n{rest}")]) == "True\n"


def test_a_trainer_of_transformers_resumes_bitwise(tmp_path):
    saved = """torch.save([model.state_dict(), optimizer.state_dict()["state"]], "state.pt")
model.save_pretrained"""
    changes = [("model = L", "torch.manual_seed(0)\nmodel = L"), ("model.save_pretrained", saved)]
    resumed = ("trainer.train()", "trainer.train('outputs/switchlora_trainer/checkpoint-10')")
    states = []
    for more in ([], [resumed]):
        run_example("transformers.Trainer", tmp_path, [*changes, *more])
        states.append(torch.load(tmp_path / "state.pt", weights_only=True))
    assert states[0][1][0]["switch.step"] == 20
    torch.testing.assert_close(*states, atol=0, rtol=0)
