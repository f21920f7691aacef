"""Observers of fake CUDA find what is planted, and nothing else; kernels of a switch and a loss."""

import pytest
from support.fake_cuda import checks, kernel_checks
from support.fake_cuda.process import needs_compiler, run_check
from support.fake_cuda.steps import Observed

pytestmark = needs_compiler
LINEARS_PER_BLOCK = 7
NUM_LARGE_LAYERS = 24 * LINEARS_PER_BLOCK
MOST_OTHER_KERNELS = 60
NUM_CHUNKS = 16
# Rows of 32 000 and 32 104 numbers in bf16 are multiples of 16 bytes already.
ALIGNED_ROWS = {32100: 32128, 32000: 32000, 32104: 32104}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_check(checks.plants_and_kernels, str(tmp_path_factory.mktemp("plants")))


@pytest.mark.parametrize("name", kernel_checks.LARGE_SWITCHES)
def test_a_switch_of_350m_on_8_ranks_takes_few_kernels(found, name):
    counts = found["switches"][name]
    assert counts["addmm_"] == NUM_LARGE_LAYERS, counts
    assert not any("slow" in operation for operation in counts), counts
    assert sum(counts.values()) <= NUM_LARGE_LAYERS + MOST_OTHER_KERNELS, counts


@pytest.mark.parametrize("name", kernel_checks.SWITCHES)
def test_only_folds_grow_with_the_number_of_layers(found, name):
    num_others = []
    for num_blocks in kernel_checks.DEPTHS:
        counts = found["switches"][f"{name}, {num_blocks}"]
        assert counts["addmm_"] == num_blocks * LINEARS_PER_BLOCK, counts
        assert not any("slow" in operation for operation in counts), counts
        num_others.append(sum(counts.values()) - counts["addmm_"])
    shallow, deep = num_others
    # A launch takes 64 pairs of tensors or 110 tensors; a layer adds at most 12 pairs and 4
    # tensors.
    assert 0 <= deep - shallow <= 2 * LINEARS_PER_BLOCK / 4
    assert deep <= MOST_OTHER_KERNELS, counts


def test_a_chunk_of_the_loss_takes_three_products_and_aligned_rows(found):
    """It adds its gradient of the head in one kernel."""
    for (kernels, strides), vocabulary in zip(found["losses"], checks.VOCABULARIES, strict=True):
        assert kernels["addmm"] == NUM_CHUNKS, kernels
        assert kernels["mm"] == 2 * NUM_CHUNKS, kernels
        assert strides == [[ALIGNED_ROWS[vocabulary], 1]] * NUM_CHUNKS


@pytest.mark.parametrize("kind", ["copies", "reads", "background copies", "collectives"])
def test_mistakes_are_found_and_nothing_else(found, kind):
    plants = found["plants"][kind]
    assert {name: findings for name, findings in plants["right"].items() if findings} == {}
    assert [name for name, findings in plants["wrong"].items() if not findings] == []


def test_streams_that_do_not_wait_are_found_in_a_step(found):
    right, wrong = (Observed(*step) for step in found["plants"]["steps"])
    assert right.copies == right.reads == right.waits == right.races == []
    assert wrong.races
