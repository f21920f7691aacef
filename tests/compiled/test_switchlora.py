"""SwitchLoRA's compiled step reproduces the authors' run and follows the reference."""

import pytest
import torch
from support.switchlora_layers import with_interval
from support.switchlora_runs import RANK, check_golden_trajectory, check_whole_run

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_golden_trajectory_is_reproduced():
    check_golden_trajectory(compile_step=True)


def test_thirty_steps_of_a_whole_model_follow_the_rules_written_out_vector_by_vector():
    torch.set_default_dtype(torch.float64)
    try:
        config = with_interval(4.3, rank=RANK, decay="exponential", decay_ratio=0.9, freeze_steps=2)
        check_whole_run(config, compile_step=True, num_steps=30)
    finally:
        torch.set_default_dtype(torch.float32)
