"""Vectors that move least are switched first, each as often as in a ring, and not while frozen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.switchlora_layers import flat, least_moving
from support.tiny import tiny_config

from switchtitan.errors import ConfigError
from switchtitan.methods.switchlora import order
from switchtitan.methods.switchlora.order import LeastMovingOrder, RingOrder, least_first
from switchtitan.methods.switchlora.schedule import (
    SwitchCounts,
    SwitchSchedule,
)

CPU = torch.device("cpu")
NUM_LAYERS = 5
# (rank, interval, freeze_steps): often and seldom; a window of one vector and of many; the most
# switches that are accepted.
SETTINGS = [(4, 4, 1), (4, 40, 5), (6, 4, 0), (8, 20, 5), (10, 9.3, 2), (16, 106, 0), (24, 16, 4)]


def plans_of(switch_order, config, num_steps, movement_of, measured=None):
    """Yields the switches of each step, planned a step ahead, as the optimizer plans them."""
    num_candidates = np.array([config.rank + 3, 40, 41, 50, 64])
    schedule = SwitchSchedule(config, num_steps, NUM_LAYERS)
    counts = SwitchCounts(NUM_LAYERS, config.freeze_steps)

    def plan():
        limited = counts.limited(
            schedule.requested(counts.step), config.rank, num_candidates, switch_order.window
        )
        return limited, [
            switch_order.plan(
                layer, int(counts.num_switched[layer]), int(limited[layer]), num_candidates[layer]
            )
            for layer in np.flatnonzero(limited)
        ]

    planned = plan()
    for step in range(num_steps):
        limited, switches = planned
        due = switch_order.due(counts.num_switched)
        counts.advance(limited)
        if len(due):
            switch_order.measure(due, step, movement_of(step))
            if measured is not None:
                measured.append((step, due.tolist()))
        switch_order.advance(step, counts.num_switched, switches)
        planned = plan()
        yield switches


def random_movement(config):
    generator = torch.Generator().manual_seed(config.rank)
    return lambda step: torch.rand(2, NUM_LAYERS, config.rank, generator=generator)


class Rules:
    """What a run of switches must keep, with a counter for every vector."""

    def __init__(self, config):
        self.config = config
        self.frozen = np.zeros((2, NUM_LAYERS, config.rank), dtype=int)
        self.switched = [[[] for _ in range(NUM_LAYERS)] for _ in range(2)]

    def check(self, switches):
        for switch in switches:
            both = [flat(spans) for spans in switch.vectors]
            assert len(both[0]) == len(both[1]) == len(flat(switch.slots_in)) == switch.num_vectors
            assert not set(both[0]) & set(both[1]), "a vector and its counterpart in one step"
            for factor, vectors in enumerate(both):
                assert not self.frozen[factor, switch.layer, vectors].any(), "frozen"
                self.switched[factor][switch.layer] += vectors
        for switch in switches:
            for factor, vectors in enumerate(map(flat, switch.vectors)):
                self.frozen[1 - factor, switch.layer, vectors] = self.config.freeze_steps
        self.frozen = np.maximum(self.frozen - 1, 0)

    def check_all(self, plans):
        for switches in plans:
            self.check(switches)

    def check_laps(self):
        rank, num_laps = self.config.rank, []
        for of_layer in [vectors for factor in self.switched for vectors in factor]:
            laps = [of_layer[start : start + rank] for start in range(0, len(of_layer), rank)]
            assert all(sorted(lap) == list(range(rank)) for lap in laps[:-1])
            assert len(set(laps[-1])) == len(laps[-1])
            num_laps.append(len(laps) - 1)
        return num_laps


@pytest.mark.parametrize("reset_moments", ["momentum", "both", "none"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_vector_is_switched_once_a_lap_and_none_while_frozen(setting, reset_moments):
    config = least_moving(*setting, reset_moments=reset_moments)
    num_steps = int(6 * config.interval)
    rules, changed = Rules(config), LeastMovingOrder(config, num_steps, NUM_LAYERS, 0.9, CPU)
    rules.check_all(plans_of(changed, config, num_steps, random_movement(config)))
    assert min(rules.check_laps()) >= 3
    # As many as in a ring, in another order.
    ring = Rules(config)
    ring.check_all(plans_of(RingOrder(config.rank), config, num_steps, None))
    assert [[len(of) for of in factor] for factor in rules.switched] == [
        [len(of) for of in factor] for factor in ring.switched
    ]
    assert rules.switched != ring.switched


@pytest.mark.parametrize(
    ("setting", "problem"), [((24, 16, 4), "frozen"), ((10, 4.3, 0), "one step")]
)
def test_the_rules_find_counterparts_that_are_switched_too_early(monkeypatch, setting, problem):
    config = least_moving(*setting)
    changed = LeastMovingOrder(config, 200, NUM_LAYERS, 0.9, CPU)
    # As if any vector of the next half might come first.
    monkeypatch.setattr(order, "least_first", lambda values, _: least_first(values, config.rank))
    rules = Rules(config)
    plans = list(plans_of(changed, config, 200, random_movement(config)))
    with pytest.raises(AssertionError, match=problem):
        rules.check_all(plans)


@pytest.mark.parametrize(("rank", "interval"), sorted({setting[:2] for setting in SETTINGS}))
def test_vectors_that_move_equally_are_switched_in_ring_order(rank, interval):
    # With a reset or a freeze, those with no gradient since would be last.
    config = least_moving(rank, interval, 0, reset_moments="none")
    num_steps = int(5 * config.interval)
    orders = LeastMovingOrder(config, num_steps, NUM_LAYERS, 0.9, CPU), RingOrder(config.rank)

    def equal(step):
        # |m| / |g| of equal gradients.
        return torch.full((2, NUM_LAYERS, rank), 1 - 0.9**step, dtype=torch.float64)

    changed, ring = (
        [
            [(*map(flat, switch.vectors), switch.slots_in, switch.slots_out) for switch in switches]
            for switches in plans_of(each, config, num_steps, equal)
        ]
        for each in orders
    )
    assert changed == ring


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting[1] >= 8])
def test_a_measurement_is_read_two_steps_later_and_once_a_half(setting):
    config = least_moving(*setting)
    num_steps = int(6 * config.interval)
    changed = LeastMovingOrder(config, num_steps, NUM_LAYERS, 0.9, CPU)
    measured, read = [], []
    copies = changed._read
    changed._read = lambda: (read.append(len(steps)), copies())
    steps = []
    for switches in plans_of(changed, config, num_steps, random_movement(config), measured):
        steps.append(switches)
    # `read` has the step's number: reads are at the end of a step, which is appended later.
    assert [step + 2 for step, _ in measured][: len(read)] == read
    for layer in range(NUM_LAYERS):
        halves = sum(flat_count(step, layer) for step in steps) / (config.rank / 2)
        assert 0 <= sum(layer in layers for _, layers in measured) - int(halves) <= 1
    # Layers of the same number of switches share measurements.
    assert len(measured) <= 2 * (6 * 2 + 1)


def flat_count(switches, layer):
    return sum(switch.num_vectors for switch in switches if switch.layer == layer)


def test_least_first_sorts_as_far_as_entries_may_move():
    generator = np.random.default_rng(0)
    for num_places in (1, 2, 5, 9):
        for most_earlier in range(num_places + 1):
            values = generator.integers(0, 4, (30, num_places)).astype(float)
            order_of = least_first(values, most_earlier)
            for row, places in zip(values, order_of, strict=True):
                assert sorted(places) == list(range(num_places))
                assert max(place - now for now, place in enumerate(places)) <= most_earlier
                left = list(range(num_places))
                for now, place in enumerate(places):
                    allowed = [of for of in left if of <= now + most_earlier]
                    assert place == min(allowed, key=lambda of: (row[of], of))
                    left.remove(place)
    values = generator.random((7, 9))
    np.testing.assert_array_equal(least_first(values, 9), values.argsort(axis=1))
    np.testing.assert_array_equal(least_first(values, 0), np.tile(np.arange(9), (7, 1)))


def test_more_switches_per_step_than_measured_for_keep_the_order_of_the_last_half():
    """As when a run resumes with other [training] steps."""
    config = least_moving(8, 24, 0)
    seldom = LeastMovingOrder(config, 400, NUM_LAYERS, 0.9, CPU)
    seldom._lead = 0
    rules = Rules(config)
    rules.check_all(plans_of(seldom, config, 200, random_movement(config)))
    assert min(rules.check_laps()) >= 3


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (("--method.rank", "5"), "order = 'least_moving' needs an even rank of at least 4, not 5"),
        (("--method.rank", "2"), "order = 'least_moving' needs an even rank of at least 4, not 2"),
        (
            ("--method.interval", "7"),
            "interval = 7: order = 'least_moving' needs at least 4 and 4 * freeze_steps = 8",
        ),
        (
            ("--method.interval", "3", "--method.freeze_steps", "0"),
            "interval = 3: order = 'least_moving' needs at least 4 and 4 * freeze_steps = 0",
        ),
        (
            ("--method.switches_per_vector", "6"),
            "would switch a vector every 6.67 steps at its start, but rank = 6 and "
            "freeze_steps = 2 need at least 8",
        ),
    ],
)
def test_settings_that_leave_no_choice_are_refused(tmp_path: Path, keys, problem):
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, "switchlora", "--method.order", "least_moving", *keys)
    assert problem in str(caught.value)
    fitting = ("--method.order", "least_moving", "--method.interval", "8")
    assert tiny_config(tmp_path, "switchlora", *fitting).method.order == "least_moving"
