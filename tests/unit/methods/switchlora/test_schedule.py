"""Switch counts match their expectation; the ring matches a model that stores every slot."""

from collections import deque

import numpy as np
import pytest
from support.switchlora_layers import flat, with_interval
from support.switchlora_reference import switch_rate

from switchtitan.methods.switchlora.plan import Plan, SwitchLoraConfig

DECAYS = ("exponential", "sigmoid", "constant")


def all_requests(config, num_steps, num_layers):
    """[steps, layers]"""
    plan = Plan(config, num_steps, np.full(num_layers, 2 * config.rank))
    requests = []
    for _ in range(num_steps):
        requests.append(plan.requested())
        plan.advance([])
    return np.array(requests)


@pytest.mark.parametrize(
    ("rank", "num_per_step"),
    [(rank, number) for rank in (7, 11, 20, 128) for number in (1, 2, 3, 5) if number <= rank // 2],
)
def test_whole_numbers_are_met_in_every_step(rank, num_per_step):
    # 7 / (7 / 3) and the like are not integers in floating point
    config = SwitchLoraConfig(
        rank=rank, interval=rank / num_per_step, decay="constant", freeze_steps=0
    )
    assert (all_requests(config, 700, 31) == num_per_step).all()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("num_layers", [14, 56])
def test_layers_take_turns(decay, num_layers):
    """All layers together switch nearly evenly.

    Independent draws would deviate by 3 sqrt(layers) / 2, which is 5.6 and 11.
    """
    config, num_steps = SwitchLoraConfig(rank=24, decay=decay, decay_ratio=0.3), 1000
    requests = all_requests(config, num_steps, num_layers)
    mean = [
        num_layers * 24 * switch_rate(config, step, num_steps) / 40 for step in range(num_steps)
    ]
    # Twice the discrepancy of the golden-ratio sequence, which grows like log(layers).
    # Measured: 1.9 and 2.2.
    assert np.abs(requests.sum(1) - mean).max() < 2.5


@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_is_asked_for_after_the_schedule(decay):
    config = SwitchLoraConfig(rank=90, interval=20, decay=decay, decay_ratio=1)
    plan = Plan(config, 30, np.full(3, 180))
    for plan.step in range(40):
        assert plan.requested().any() == (plan.step < 30)


def switches_of_vectors(config, num_steps, num_layers):
    """The switches of each vector of A in a run, within the limits, [layers, rank]."""
    plan = Plan(config, num_steps, np.full(num_layers, 10 * config.rank))
    for _ in range(num_steps):
        plan.advance(plan.next())
    vectors = np.arange(config.rank)
    return (plan.num_switched[:, None] + config.rank - 1 - vectors) // config.rank


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("rank", "freeze_steps"), [(6, 0), (7, 0), (7, 3), (16, 5)])
def test_each_vector_is_switched_as_often_as_asked_in_a_run_of_any_length(
    decay, rank, freeze_steps
):
    generator = np.random.default_rng(rank)
    keys = {"decay": decay, "decay_ratio": 0.3, "freeze_steps": freeze_steps}
    num_checked = 0
    for num_steps in (1, 13, 371):
        for wanted in (0.4, 3.0, 9.4, *generator.uniform(0.01, 20, 2)):
            config = SwitchLoraConfig(rank=rank, switches_per_vector=wanted, **keys)
            if config.check_length(num_steps):
                continue  # too many for so few steps
            found = switches_of_vectors(config, num_steps, 11)
            assert np.abs(found - wanted).max() < 1, (num_steps, wanted)
            num_checked += 1
    assert num_checked > 2


@pytest.mark.parametrize("rank", [2, 3, 12])
@pytest.mark.parametrize("freeze_steps", [0, 1, 5])
def test_an_interval_is_refused_if_switches_would_be_dropped(rank, freeze_steps):
    keys = {"rank": rank, "decay": "constant", "freeze_steps": freeze_steps}
    (problem,) = with_interval(0.01, **keys).check_length(500)
    least = float(problem.partition("need at least ")[2].partition(",")[0])
    config = SwitchLoraConfig(interval=least, **keys)
    assert config.check_length(500) == []
    assert np.abs(switches_of_vectors(config, 500, 11) - 500 / least).max() < 1
    # It refuses no more than that.
    below = with_interval(0.97 * least, **keys)
    assert len(below.check_length(500)) == 1
    assert (switches_of_vectors(below, 500, 11) < 500 / below.interval - 1).all()


class Ring:
    """Queues of the vectors of a factor, of the candidates in them, and of those that wait."""

    def __init__(self, rank, num_candidates, first_vector):
        self.vectors = deque((first_vector + i) % rank for i in range(rank))
        self.in_use = deque(range(num_candidates - rank, num_candidates))
        self.waiting = deque(range(num_candidates - rank))
        self.rest = [0] * rank

    def switch(self, count):
        """(vectors, candidates taken in, candidates put back), each a list in order."""
        queues = (self.vectors, self.waiting, self.in_use)
        vectors, taken, put_back = ([queue.popleft() for _ in range(count)] for queue in queues)
        self.vectors += vectors
        self.in_use += taken
        self.waiting += put_back
        return vectors, taken, put_back


@pytest.mark.parametrize(
    ("rank", "num_candidates", "freeze_steps", "most_asked"),
    [(2, 3, 1, 2), (5, 6, 2, 3), (6, 13, 0, 4), (7, 40, 3, 3), (8, 17, 5, 2), (13, 19, 4, 5)],
)
def test_ring_pointers_agree_with_a_queue_of_candidates(
    rank, num_candidates, freeze_steps, most_asked
):
    generator = np.random.default_rng(rank)
    config = SwitchLoraConfig(rank=rank, freeze_steps=freeze_steps)
    plan = Plan(config, 300, np.array([num_candidates]))
    side_a, side_b = Ring(rank, num_candidates, 0), Ring(rank, num_candidates, rank // 2)
    for _ in range(300):
        asked, num_frozen = generator.integers(0, most_asked + 1, 1), sum(map(bool, side_a.rest))
        count = int(plan.limited(asked)[0])
        # As many as are not frozen and have a candidate that waits.
        assert count == min(asked[0], rank // 2 - num_frozen, num_candidates - rank)
        switch = plan.switch(0, count)
        plan.advance([switch])
        of_a, of_b = map(flat, switch.vectors)
        slots_in, slots_out = flat(switch.slots_in), flat(switch.slots_out)
        assert switch.num_vectors == count == len(of_b) == len(slots_in) == len(slots_out)
        assert side_a.switch(count) == (of_a, slots_in, slots_out)
        assert side_b.switch(count) == (of_b, slots_in, slots_out)

        assert not set(of_a) & set(of_b)
        assert not set(slots_in) & set(slots_out)
        assert not any(side_a.rest[vector] for vector in of_a), "a frozen vector of A is switched"
        assert not any(side_b.rest[vector] for vector in of_b), "a frozen vector of B is switched"
        for resting, counterparts in ((side_a, of_b), (side_b, of_a)):
            assert not any(resting.rest[vector] for vector in counterparts), (
                "frozen again while frozen"
            )
            for vector in counterparts:
                resting.rest[vector] = freeze_steps
        is_frozen = plan.is_frozen()[:, 0].tolist()
        assert is_frozen == [[left > 0 for left in side.rest] for side in (side_a, side_b)]
        for resting in (side_a, side_b):
            resting.rest = [max(0, left - 1) for left in resting.rest]
    # Each side went round all candidates several times.
    assert plan.num_switched[0] > 3 * num_candidates
