"""On CUDA a chunk of the loss adds its gradient of the head in one kernel; rows are aligned."""

from support.fake_cuda import checks
from support.fake_cuda.process import needs_compiler, run_check

pytestmark = needs_compiler

NUM_CHUNKS = 16


ROWS = {32100: 32128, 32000: 32000, 32104: 32104}
"""Vocabulary -> the logits of a row, with padding."""


def test_a_chunk_takes_three_products_and_aligned_rows() -> None:
    """36 864 tokens, as in a micro-batch of the published run. Rows of 32 000 and 32 104 numbers in
    bf16 are multiples of 16 bytes already."""
    found = run_check(checks.kernels_of_losses, 36864, 1024, list(ROWS))
    for (kernels, strides), row in zip(found, ROWS.values(), strict=True):
        assert kernels["addmm"] == NUM_CHUNKS, kernels
        assert kernels["mm"] == 2 * NUM_CHUNKS, kernels
        assert strides == [[row, 1]] * NUM_CHUNKS
