import pytest

from switchtitan.observability import Throughput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, **arguments) -> Throughput:
    defaults = {
        "tokens_per_step": 600,
        "flops_per_token": 4e9,
        "num_devices": 2,
        "peak_flops_per_s": 3e12,
        "num_steps": 110,
        "start_step": 10,
    }
    return Throughput(**{**defaults, **arguments}, clock=clock)


def test_speed_is_tokens_over_time():
    clock = Clock()
    throughput = make(clock)
    clock.now += 99
    assert throughput.measure(11) == {}, "it includes compilation"
    clock.now += 20
    values = throughput.measure(21)
    assert values == pytest.approx(
        {
            "throughput/tokens_per_s": 300,  # 10 steps of 600 tokens in 20 s
            "throughput/tflop_per_s_per_device": 0.6,  # 300 tokens/s of 4e9 on 2 devices
            "throughput/mfu": 0.2,
            "throughput/eta_s": 89 * 2,
        }
    )


def test_no_mfu_for_an_unknown_peak():
    clock = Clock()
    throughput = make(clock, peak_flops_per_s=None)
    for step in (11, 12):
        clock.now += 1
        values = throughput.measure(step)
    assert "throughput/mfu" not in values


@pytest.mark.parametrize("compile_s", [0, 60, 600])
@pytest.mark.parametrize("evaluate_s", [0, 5])
def test_the_first_time_left_is_within_a_third_of_the_truth(compile_s, evaluate_s):
    """Steps of 1 s, the first also compiles; an evaluation after every 25th step."""
    clock = Clock()
    throughput = make(clock, start_step=0, num_steps=200)
    shown = {}
    for step in range(1, 201):
        clock.now += 1 + (compile_s if step == 1 else 0)
        if step == 1 or step % 10 == 0:
            shown[step] = clock.now, throughput.measure(step).get("throughput/eta_s")
        if step % 25 == 0:
            with throughput.excluded():
                clock.now += evaluate_s
    assert shown.pop(1)[1] is None
    for step, (now, time_left_s) in shown.items():
        # The last evaluations weigh much in the last steps: 1 s for each evaluation that is left.
        assert time_left_s == pytest.approx(clock.now - now, rel=0.3, abs=2 * evaluate_s), step


def test_a_slow_start_is_forgotten():
    """Ten slow steps after the first one, e.g. while files are read for the first time."""
    clock = Clock()
    throughput = make(clock, start_step=0, num_steps=1000)
    for step in range(1, 61):
        clock.now += 30 if step == 1 else 5 if step <= 11 else 1
        values = throughput.measure(step)
    assert values["throughput/eta_s"] == pytest.approx(940)
    # Periodic work is not: a step of 11 s in every ten.
    for step in range(61, 401):
        clock.now += 11 if step % 10 == 0 else 1
        values = throughput.measure(step)
    assert values["throughput/eta_s"] == pytest.approx(600 * 2, rel=0.05)


def test_excluded_time_counts_for_the_time_left_only():
    clock = Clock()
    throughput = make(clock)
    clock.now += 50  # compilation
    throughput.measure(20)
    clock.now += 10
    with throughput.excluded():
        clock.now += 20
    values = throughput.measure(30)
    assert values["throughput/tokens_per_s"] == pytest.approx(600)
    assert values["throughput/eta_s"] == pytest.approx(80 * 3)
    assert throughput.mean_tokens_per_s == pytest.approx(600)
    assert throughput.wall_time_s == pytest.approx(80)
    clock.now += 20
    assert throughput.measure(40)["throughput/tokens_per_s"] == pytest.approx(300)
    assert throughput.mean_tokens_per_s == pytest.approx(400)  # 20 steps in 30 s


def test_mean_of_a_single_window_is_that_window():
    clock = Clock()
    throughput = make(clock, num_steps=11)
    clock.now += 5
    values = throughput.measure(11)
    assert values["throughput/tokens_per_s"] == throughput.mean_tokens_per_s == pytest.approx(120)
    assert values["throughput/eta_s"] == 0
