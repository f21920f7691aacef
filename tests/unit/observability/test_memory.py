import torch

from switchtitan.observability import peak_memory_gib


def test_peak_of_the_process_grows_with_allocations():
    before = peak_memory_gib(torch.device("cpu"))
    assert 0.01 < before < 1000
    block = torch.ones(int(before * 2**30) // 4 + 2**24)
    # At least the block; at most the block and the earlier peak, with a margin for the allocator.
    assert before < peak_memory_gib(torch.device("cpu")) < 2 * before + 0.2
    del block
