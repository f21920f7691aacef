"""On CUDA a chunk of the loss adds its gradient of the head in one kernel; rows are aligned."""

import pytest
from support.fake_cuda import checks
from support.fake_cuda.process import needs_compiler, run_check

pytestmark = needs_compiler

NUM_CHUNKS = 16


@pytest.mark.parametrize(("vocabulary", "row"), [(32100, 32128), (32000, 32000), (32104, 32104)])
def test_a_chunk_takes_three_products_and_aligned_rows(vocabulary: int, row: int) -> None:
    """36 864 tokens, as in a micro-batch of the published run. Rows of 32 000 and 32 104 numbers in
    bf16 are multiples of 16 bytes already."""
    kernels, strides = run_check(checks.kernels_of_loss, 36864, 1024, vocabulary)
    assert kernels["addmm"] == NUM_CHUNKS, kernels
    assert kernels["mm"] == 2 * NUM_CHUNKS, kernels
    assert strides == [[row, 1]] * NUM_CHUNKS
