"""Kernels of a switch and of a loss on fake CUDA."""

import pytest
from support.fake_cuda import checks
from support.fake_cuda.process import needs_compiler, run_check

pytestmark = needs_compiler
NUM_LAYERS = 24 * 7
MOST_OTHER_KERNELS = 60
NUM_CHUNKS = 16
# Rows of 32 000 and 32 104 numbers in bf16 are multiples of 16 bytes already.
ALIGNED_ROWS = {32100: 32128, 32000: 32000, 32104: 32104}


@pytest.fixture(scope="module")
def found():
    return run_check(checks.kernels_of_first_rank)


@pytest.mark.parametrize("name", checks.SWITCHES)
def test_a_switch_of_350m_on_8_ranks_takes_few_kernels(found, name):
    """One fold for each of its layers, and others whose number does not grow with them."""
    counts = found["switches"][name]
    assert counts["addmm_"] == NUM_LAYERS, counts
    assert sum(counts.values()) <= NUM_LAYERS + MOST_OTHER_KERNELS, counts


def test_a_chunk_of_the_loss_takes_three_products_and_aligned_rows(found):
    """It adds its gradient of the head in one kernel."""
    for (kernels, strides), vocabulary in zip(found["losses"], checks.VOCABULARIES, strict=True):
        assert kernels["addmm"] == NUM_CHUNKS, kernels
        assert kernels["mm"] == 2 * NUM_CHUNKS, kernels
        assert strides == [(ALIGNED_ROWS[vocabulary], 1)] * NUM_CHUNKS
