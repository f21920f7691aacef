"""Ranks that all have a GPU, or none, start; others are refused, whatever order they arrive in."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import torch.distributed as dist

from switchtitan.distributed.world import check_devices_alike
from switchtitan.errors import EnvironmentMismatchError

NUM_RANKS, NUM_STARTS = 8, 100
TIMEOUT = timedelta(seconds=20)


def errors_of_ranks(devices, num_starts):
    """What each start's ranks are told; one thread for each; all leave a barrier together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("localhost", port, wait_for_workers=False) for _ in devices]
    barrier = Barrier(len(devices))

    def start(rank):
        errors = []
        for number in range(num_starts):
            store = dist.PrefixStore(str(number), stores[rank])
            barrier.wait()
            try:
                check_devices_alike(store, devices[rank], len(devices), TIMEOUT)
            except EnvironmentMismatchError as error:
                errors.append(str(error))
        return errors

    with ThreadPoolExecutor(len(devices)) as ranks:
        errors = list(ranks.map(start, range(len(devices))))
    del server
    return errors


def test_ranks_that_arrive_together_with_a_gpu_each_are_never_refused():
    assert errors_of_ranks(["cuda"] * NUM_RANKS, NUM_STARTS) == [[]] * NUM_RANKS


def test_ranks_without_a_gpu_are_not_refused():
    assert errors_of_ranks(["cpu"] * NUM_RANKS, 3) == [[]] * NUM_RANKS


def test_every_rank_is_told_how_many_have_a_gpu_if_some_have_none():
    errors = errors_of_ranks(["cuda"] * 3 + ["cpu"] * 5, NUM_STARTS)
    assert {len(of_rank) for of_rank in errors} == {NUM_STARTS}
    assert all(error.startswith("3 of 8 ranks") for of_rank in errors for error in of_rank)
