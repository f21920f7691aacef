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
    clock.now += 20
    values = throughput.measure(20)
    assert values == pytest.approx(
        {
            "throughput/tokens_per_s": 300,  # 10 steps of 600 tokens in 20 s
            "throughput/tflop_per_s_per_device": 0.6,  # 300 tokens/s of 4e9 on 2 devices
            "throughput/mfu": 0.2,
        }
    )


def test_no_mfu_for_an_unknown_peak():
    clock = Clock()
    throughput = make(clock, peak_flops_per_s=None)
    clock.now += 1
    assert "throughput/mfu" not in throughput.measure(11)


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
    throughput = make(clock)
    clock.now += 5
    throughput.measure(11)
    assert throughput.mean_tokens_per_s == pytest.approx(120)
