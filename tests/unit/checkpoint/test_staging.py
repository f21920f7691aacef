import torch

from switchtitan.checkpoint.staging import HostCopies, own_share, staging_options


def test_copies_of_cuda_tensors_are_page_locked_and_queued():
    options = staging_options("cuda")
    assert options.use_pinned_memory
    assert options.use_non_blocking_copy
    assert not options.use_async_staging
    assert not options.use_shared_memory


def test_copies_of_host_tensors_need_no_cuda():
    options = staging_options("cpu")
    assert not options.use_pinned_memory
    assert not options.use_non_blocking_copy


def test_copies_reuse_their_memory_and_not_that_of_the_tensors(tensors):
    copy_to_host = HostCopies()
    first = copy_to_host(tensors)
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    for name, tensor in tensors.items():
        assert torch.equal(first[name], tensor)
        assert tensor.numel() == 0 or addresses[name] != tensor.data_ptr()
        tensor.fill_(9)
        assert tensor.numel() == 0 or not torch.equal(first[name], tensor)
    second = copy_to_host(tensors)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == addresses


def test_a_part_of_a_storage_needs_memory_of_its_own_size():
    matrices = torch.arange(24.0).view(8, 3)
    some = {"second": matrices[1], "seventh": matrices[6]}
    copy_to_host = HostCopies()
    copies = copy_to_host(some)
    assert [copy.untyped_storage().nbytes() for copy in copies.values()] == [12, 12]
    addresses = {name: copy.data_ptr() for name, copy in copies.items()}
    assert torch.equal(copies["seventh"], torch.arange(18.0, 21.0))
    matrices += 1
    assert torch.equal(copies["seventh"], torch.arange(18.0, 21.0))
    again = copy_to_host(some)
    assert {name: copy.data_ptr() for name, copy in again.items()} == addresses
    assert torch.equal(again["seventh"], torch.arange(19.0, 22.0))
    whole = copy_to_host({str(i): matrix for i, matrix in enumerate(matrices)})
    assert len({copy.untyped_storage()._cdata for copy in whole.values()}) == 1


def test_a_single_process_saves_everything(tensors):
    assert own_share(tensors) == tensors
