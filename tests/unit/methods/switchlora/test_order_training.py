"""Training with the vectors that move least switched first: gradients decide, nothing is lost when
a run resumes, and switches keep the layers' outputs."""

import numpy as np
import pytest
import torch
from support.switchlora_layers import (
    build_layer,
    build_optimizer,
    effective_weight,
    flat,
    least_moving,
    relative_change,
)
from support.tiny import full_tensors, tiny_config, tiny_trainer, train_steps

from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import stop_world
from switchtitan.methods import METHODS
from switchtitan.methods.switchlora import order
from switchtitan.methods.switchlora.order import least_first
from switchtitan.methods.switchlora.schedule import FACTOR_A, FACTOR_B
from switchtitan.models import MODELS
from switchtitan.optim import AdamWConfig
from switchtitan.optim.muon import MuonConfig

SHAPES = [(31, 29), (23, 40)]  # (out, in)
RANK = 8
# 8 vectors in 24 steps: a half of a lap takes 12 steps.
RUN = least_moving(RANK, 24, 2, reset_moments="momentum")
ADAMW = AdamWConfig(lr=1e-2, betas=(0.8, 0.9))


def build(config=RUN, num_steps=400, dtype=torch.float64, optimizer=ADAMW):
    layers = [build_layer(*shape, RANK, 1 / RANK, dtype, seed) for seed, shape in enumerate(SHAPES)]
    return layers, build_optimizer(config, optimizer, layers, num_steps)


def set_random_gradients(layers, step, planted=None):
    """Gradients with a mean of 0.5; zero for the rows of `planted`, by (factor, layer)."""
    generator = torch.Generator().manual_seed(step)
    for index, layer in enumerate(layers):
        for factor, parameter in ((FACTOR_A, layer.lora_a), (FACTOR_B, layer.lora_b)):
            draws = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (draws + 0.5).to(parameter.dtype)
            parameter.grad[(planted or {}).get((factor, index), [])] = 0


def switched_vectors(optimizer):
    """The vectors that the next step switches, by (factor, layer)."""
    _, switches = optimizer._next or optimizer._plan()
    return {
        (factor, switch.layer): flat(switch.vectors[factor])
        for switch in switches
        for factor in (FACTOR_A, FACTOR_B)
    }


def run(layers, optimizer, steps, planted=None):
    """Returns the vectors in the order of their switches, by (factor, layer)."""
    switched = {}
    for step in steps:
        for key, vectors in switched_vectors(optimizer).items():
            switched.setdefault(key, []).extend(vectors)
        set_random_gradients(layers, step, planted)
        optimizer.step()
    return switched


# In a ring they are second or third in the second half. The fourth could not come first.
PLANTED = {(FACTOR_A, 0): [6], (FACTOR_A, 1): [5, 6], (FACTOR_B, 0): [2], (FACTOR_B, 1): [1, 2]}


def first_of_second_half(config):
    layers, optimizer = build(config)
    switched = run(layers, optimizer, range(24), PLANTED)
    half = RANK // 2
    return {key: switched[key][half : half + len(rows)] for key, rows in PLANTED.items()}


def test_vectors_without_gradient_are_switched_first_in_the_next_half():
    config = least_moving(RANK, 24, 0)
    found = first_of_second_half(config)
    assert {key: sorted(vectors) for key, vectors in found.items()} == PLANTED
    ring = first_of_second_half(config.model_copy(update={"order": "ring"}))
    assert ring == {
        (FACTOR_A, 0): [4],
        (FACTOR_A, 1): [4, 5],
        (FACTOR_B, 0): [0],
        (FACTOR_B, 1): [0, 1],
    }


def test_vectors_whose_gradients_cancel_out_come_before_those_whose_gradients_agree(monkeypatch):
    """Whenever their first moments were reset."""
    values = []
    monkeypatch.setattr(
        order, "least_first", lambda of, most: (values.append(of), least_first(of, most))[1]
    )
    layers, optimizer = build()
    for step in range(80):
        set_random_gradients(layers, 0)
        for layer in layers:
            for parameter in (layer.lora_a, layer.lora_b):
                parameter.grad[::2] *= (-1) ** step
        optimizer.step()
    # Runs of equal gradients have |m| = |g|, after any number of steps since a reset.
    seen = np.concatenate(values[4:]).ravel()
    known = seen[seen < order._MOVING]
    assert len(known) > 0.7 * len(seen)
    agreeing = np.abs(known - 1) < 1e-9
    assert 0.3 < agreeing.mean() < 0.7
    # Alternating ones approach (1 - beta) / (1 + beta) = 0.11; one gradient always agrees.
    assert np.median(known[~agreeing]) < 0.2


RESETS = [
    (reset_moments, freeze_steps)
    for reset_moments in ("counterpart", "momentum", "rescaled", "both", "none")
    for freeze_steps in (0, 3)
]


@pytest.mark.parametrize(("reset_moments", "freeze_steps"), RESETS)
def test_equal_gradients_move_equally_with_every_reset(monkeypatch, reset_moments, freeze_steps):
    values = []
    monkeypatch.setattr(
        order, "least_first", lambda of, most: (values.append(of), least_first(of, most))[1]
    )
    config = least_moving(RANK, 24, freeze_steps, reset_moments=reset_moments)
    check_equal_movements(values, *build(config), tolerance=1e-9)


def test_equal_gradients_move_equally_with_muon(monkeypatch):
    values = []
    monkeypatch.setattr(
        order, "least_first", lambda of, most: (values.append(of), least_first(of, most))[1]
    )
    run = build(dtype=torch.float32, optimizer=MuonConfig(lr=1e-2))
    # Norms in fp32.
    check_equal_movements(values, *run, tolerance=1e-5)


def check_equal_movements(values, layers, optimizer, tolerance):
    for _ in range(80):
        set_random_gradients(layers, 0)
        optimizer.step()
    seen = np.concatenate(values).ravel()
    known = seen[seen < order._MOVING]
    np.testing.assert_allclose(known, 1, rtol=0, atol=tolerance)
    assert len(known) > 0.5 * len(seen)


def test_a_switch_in_another_order_keeps_the_effective_weight():
    layers, optimizer = build(dtype=torch.float32)
    orders = set()
    for step in range(120):
        set_random_gradients(layers, step)
        before = [effective_weight(layer) for layer in layers]
        optimizer.switch()
        for layer, weight in zip(layers, before, strict=True):
            # The fp32 bound of a switch in ring order.
            assert relative_change(effective_weight(layer), weight) <= 1e-7
        optimizer.update()
        orders.add(tuple(optimizer.state_dict()["switch.order"].flatten().tolist()))
    assert len(orders) > 8, "the order has not changed"


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "config", [RUN, least_moving(RANK, 24, 3, reset_moments="none")], ids=["momentum", "none"]
)
def test_a_run_resumes_bitwise_from_every_step_of_a_half(config):
    straight, optimizer = build(config)
    run(straight, optimizer, range(70))
    expected = {str(n): layer.state_dict() for n, layer in enumerate(straight)}
    state = optimizer.state_dict()
    num_pending = num_decided = 0
    for stop in range(24, 50):
        layers, first = build(config)
        run(layers, first, range(stop))
        num_pending += bool(first._order._measurements)
        saved = copies(first.state_dict())
        num_decided += bool((saved["switch.next_order"] >= 0).any())
        resumed, second = build(config)
        for new, old in zip(resumed, layers, strict=True):
            new.load_state_dict(old.state_dict())
        second.load_state_dict(saved)
        run(resumed, second, range(stop, 70))
        for n, layer in enumerate(resumed):
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, expected[str(n)][name]), (stop, name)
        again = second.state_dict()
        assert again.keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(again[name], tensor), (stop, name)
    assert num_pending >= 2, "never stopped between a measurement and its use"
    assert num_decided > num_pending


def test_a_resumed_run_that_forgets_its_order_is_another_run():
    """The negative control of resuming."""
    layers, first = build()
    run(layers, first, range(40))
    saved = copies(first.state_dict())
    saved["switch.order"] = torch.arange(RANK).repeat(2, 1)
    resumed, second = build()
    for new, old in zip(resumed, layers, strict=True):
        new.load_state_dict(old.state_dict())
    second.load_state_dict(saved)
    run(resumed, second, range(40, 70))
    run(layers, first, range(40, 70))
    assert not torch.equal(layers[0].lora_a, resumed[0].lora_a)


def test_saving_changes_nothing():
    saving, optimizer = build()
    for step in range(70):
        run(saving, optimizer, [step])
        optimizer.state_dict()
    straight, other = build()
    run(straight, other, range(70))
    assert all(
        torch.equal(one.lora_a, two.lora_a) for one, two in zip(saving, straight, strict=True)
    )


def test_a_ring_s_state_has_no_order():
    _, optimizer = build(RUN.model_copy(update={"order": "ring"}))
    ring = set(optimizer.state_dict())
    _, optimizer = build()
    assert set(optimizer.state_dict()) - ring == {
        "switch.order",
        "switch.next_order",
        "switch.last_switched",
    }
    assert "switch.order" in optimizer.replicated()
    _, kept = build(RUN.model_copy(update={"reset_moments": "none"}))
    assert set(kept.state_dict()) - set(optimizer.state_dict()) == {"switch.kept_weights"}


KEYS = ("--method.order", "least_moving", "--method.interval", "8")
WHERE = {
    "stored": (),
    "host": ("--method.candidates_device", "host"),
    "constant": ("--method.candidates", "constant"),
    "kept moments": ("--method.reset_moments", "none"),
}
NUM_STEPS, SAVED_STEP = 22, 14


@pytest.fixture(scope="module")
def straight(corpora):
    """Losses, final tensors, dense weights and logits of a run without a save, by `WHERE`."""

    def train(where):
        trainer = tiny_trainer(corpora / f"order-{where}", "switchlora", *KEYS, *WHERE[where])
        losses = train_steps(trainer, NUM_STEPS)
        model = trainer.stepper.model
        parameters = gather_on_main(model.named_parameters(), is_main=True)
        run = losses, full_tensors(trainer), parameters, logits(model)
        trainer.stepper.close()
        stop_world()
        return run

    return {where: train(where) for where in WHERE}


@torch.no_grad()
def logits(model):
    tokens = torch.randint(0, 271, (2, 16), generator=torch.Generator().manual_seed(0))
    return model(tokens, torch.zeros_like(tokens, dtype=torch.int32)).clone()


@pytest.mark.parametrize("where", WHERE)
def test_a_run_resumes_bitwise_from_a_checkpoint(corpora, straight, where):
    expected, tensors, *_ = straight[where]
    losses = []
    for num_steps in (SAVED_STEP, NUM_STEPS - SAVED_STEP):
        trainer = tiny_trainer(corpora / f"order-again-{where}", "switchlora", *KEYS, *WHERE[where])
        assert trainer.stepper.state.step == len(losses)
        losses += train_steps(trainer, num_steps)
        again = full_tensors(trainer)
        trainer.save()
        trainer.checkpointer.finish()
        trainer.stepper.close()
        stop_world()
    assert losses == expected
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name


def test_candidates_on_the_host_give_the_same_run(straight):
    assert straight["host"][0] == straight["stored"][0] != straight["constant"][0]


@pytest.mark.parametrize("where", ["stored", "constant"])
def test_the_dense_export_computes_the_same_logits(tmp_path, straight, where):
    *_, parameters, trained = straight[where]
    config = tiny_config(tmp_path, "switchlora", *KEYS, *WHERE[where])
    plain = MODELS.build(config.model)
    built = METHODS.build(config.method, config.training.steps, config.job.seed)
    plain.load_state_dict(built.dense_weights(parameters), strict=True)
    # (W + s B A) x against W x + s B (A x): fp32 rounding errors of 6e-8 through two blocks.
    torch.testing.assert_close(logits(plain), trained, rtol=1e-5, atol=1e-5)
