"""When resets happen and how the learning rate recovers."""

from switchtitan.methods.relora import ResetSchedule


def run(schedule: ResetSchedule, num_steps: int) -> tuple[list[float], list[int]]:
    """The factors of `num_steps` steps, and the numbers of steps after which there was a reset."""
    factors, resets = [], []
    for step in range(1, num_steps + 1):
        factors.append(schedule.lr_factor())
        if schedule.advance():
            resets.append(step)
    return factors, resets


def test_resets_follow_every_interval_but_not_the_last_step():
    assert run(ResetSchedule(5, 2, 20), 20)[1] == [5, 10, 15]
    assert run(ResetSchedule(5, 2, 21), 21)[1] == [5, 10, 15, 20]
    assert run(ResetSchedule(5, 2, 5), 5)[1] == []


def test_the_learning_rate_rises_linearly_from_zero_at_a_reset():
    factors, _ = run(ResetSchedule(6, 4, 13), 13)
    assert factors == [1] * 6 + [0.25, 0.5, 0.75, 1, 1, 1] + [0.25]


def test_no_warmup_leaves_the_learning_rate_alone():
    assert run(ResetSchedule(3, 0, 10), 10)[0] == [1] * 10


def test_a_run_that_is_made_longer_has_no_reset_where_it_first_ended():
    first = ResetSchedule(4, 3, 8)
    assert run(first, 8)[1] == [4]
    longer = ResetSchedule(4, 3, 16)
    longer.load_state_dict(first.state_dict())
    factors, resets = run(longer, 8)
    assert factors[:4] == [1] * 4
    assert resets == [4]
    assert longer.num_resets == 2


def test_a_restored_schedule_continues_in_the_middle_of_a_warmup():
    straight = ResetSchedule(6, 4, 30)
    run(straight, 8)
    restored = ResetSchedule(6, 4, 30)
    restored.load_state_dict(straight.state_dict())
    assert run(restored, 20) == run(straight, 20)
