import pytest
import torch

from switchtitan.checkpoint.staging import HostCopies, own_share


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
    # 12 bytes, which end at a multiple of 16, and 12 more.
    assert {copy.untyped_storage().nbytes() for copy in copies.values()} == {16 + 12}
    addresses = {name: copy.data_ptr() for name, copy in copies.items()}
    assert torch.equal(copies["seventh"], torch.arange(18.0, 21.0))
    matrices += 1
    assert torch.equal(copies["seventh"], torch.arange(18.0, 21.0))
    again = copy_to_host(some)
    assert {name: copy.data_ptr() for name, copy in again.items()} == addresses
    assert torch.equal(again["seventh"], torch.arange(19.0, 22.0))


def test_copies_of_all_dtypes_are_aligned():
    dtypes = (torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.uint8, torch.float64)
    tensors = {str(dtype): torch.arange(7).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "column": torch.arange(15.0).view(5, 3)[:, 1:2]}
    copies = HostCopies()(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor), name
        assert copies[name].dtype == tensor.dtype
        assert copies[name].data_ptr() % 16 == 0, name


def test_memory_follows_the_tensors():
    copy_to_host = HostCopies()
    first = copy_to_host({"a": torch.arange(5.0)})
    # Such as optimizer state that does not exist before the first step.
    more = copy_to_host({"a": torch.arange(5.0) + 1, "b": torch.arange(4)})
    assert torch.equal(more["a"], torch.arange(1.0, 6.0))
    assert torch.equal(more["b"], torch.arange(4))
    # A save in progress may still read them.
    assert torch.equal(first["a"], torch.arange(5.0))
    other_dtype = copy_to_host({"a": torch.arange(5), "b": torch.arange(4)})
    assert torch.equal(other_dtype["a"], torch.arange(5))


def test_copies_are_not_differentiated():
    weight = torch.nn.Parameter(torch.ones(3))
    assert not HostCopies()({"weight": weight})["weight"].requires_grad


@pytest.mark.gpu
def test_copies_of_a_gpu_s_tensors_are_page_locked_while_they_are_used():
    matrices = torch.arange(4 * 32 * 5461.0, device="cuda").view(4, 32, 5461)
    copy_to_host = HostCopies()
    for _ in range(2):
        copies = copy_to_host({"first": matrices[0], "last": matrices[3], "host": torch.ones(3)})
        assert torch.equal(copies["last"], matrices[3].cpu())
        assert copies["first"].untyped_storage().nbytes() == 2 * matrices[0].nbytes
        assert copies["first"].is_pinned()
        assert not copies["host"].is_pinned()
        matrices += 1
    del copy_to_host
    assert not copies["first"].is_pinned()


def test_a_single_process_saves_everything(tensors):
    assert own_share(tensors) == tensors
