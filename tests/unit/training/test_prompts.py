"""Prompts are continued at each evaluation, shown, and change nothing in the training."""

import json
import re

import pytest
import torch
from support.tiny import full_tensors, tiny_config, tiny_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from switchtitan.cli import generate
from switchtitan.errors import ConfigError

PROMPTS = ["def main(", "größe"]
KEYS = ("--evaluation.prompts", json.dumps(PROMPTS), "--evaluation.prompt_tokens", "6")
FEW_STEPS = ("--training.steps", "4", "--evaluation.interval", "2", "--checkpoint.interval", "2")


def trained(folder, *overrides):
    """Trains to the end; returns all tensors of its checkpoint."""
    trainer = tiny_trainer(folder, "switchlora", *FEW_STEPS, *overrides)
    trainer.train()
    return full_tensors(trainer)


@pytest.fixture(scope="module")
def with_prompts(corpora):
    return trained(corpora / "prompts", *KEYS, "--metrics.tensorboard", "true")


@pytest.fixture(scope="module")
def run(corpora, with_prompts):
    return corpora / "prompts" / "run"


def logged(run):
    """The lines about continuations, as (number, step, prompt, text)."""
    log = (run / "train.log").read_text()
    lines = re.findall(r"continuation (\d+) at step (\d+): ('.*?') -> ('.*'|\".*\")$", log, re.M)
    return [(int(n), int(step), eval(prompt), eval(text)) for n, step, prompt, text in lines]


def test_every_evaluation_continues_every_prompt(run):
    found = logged(run)
    assert [line[:3] for line in found] == [
        (number, step, prompt)
        for step in (0, 2, 4)
        for number, prompt in enumerate(PROMPTS, start=1)
    ]
    assert len({line[3] for line in found}) > 2  # they change with the weights


def test_tensorboard_shows_the_texts(run):
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for number, prompt in enumerate(PROMPTS, start=1):
        shown = events.Tensors(f"continuations/{number}/text_summary")
        texts = [event.tensor_proto.string_val[0].decode() for event in shown]
        expected = [
            "\n".join(f"    {line}" for line in (prompt + text).split("\n"))
            for n, _, _, text in logged(run)
            if n == number
        ]
        assert [event.step for event in shown] == [0, 2, 4]
        assert texts == expected


def test_the_text_is_that_of_generate_for_the_checkpoint(run, tmp_path):
    for number, step, prompt, text in logged(run)[-2:]:
        checkpoint = run / "checkpoints" / f"step-{step:09d}"
        options = ("--temperature", "0", "--max-new-tokens", "6", "--json", tmp_path / "result")
        generate.main([*map(str, (checkpoint, "--prompt", prompt, *options))])
        assert json.loads((tmp_path / "result").read_text())["text"] == text, number


def test_training_is_bitwise_the_same_with_and_without_prompts(corpora, with_prompts):
    without = trained(corpora / "no-prompts")
    assert without.keys() == with_prompts.keys()
    assert all(torch.equal(without[name], with_prompts[name]) for name in without)
    # Shows that the check can fail.
    other = trained(corpora / "other-seed", "--job.seed", "1")
    assert not all(torch.equal(other[name], with_prompts[name]) for name in without)


def test_without_prompts_nothing_is_built(corpora):
    trainer = tiny_trainer(corpora / "no-prompts-built", "full_rank")
    trainer.close()
    assert trainer.evaluators.prompts is None


def test_mistakes_name_the_key(corpora):
    folder = corpora / "prompts-mistakes"
    with pytest.raises(ConfigError, match="prompt_tokens has no effect without prompts"):
        tiny_config(folder, "full_rank", "--evaluation.prompt_tokens", "4")
    with pytest.raises(ConfigError, match=r"prompts\[1\]: its 5 tokens and prompt_tokens = 13"):
        tiny_trainer(
            folder,
            "full_rank",
            *("--evaluation.prompts", '["", "x = 1"]', "--evaluation.prompt_tokens", "13"),
        )
