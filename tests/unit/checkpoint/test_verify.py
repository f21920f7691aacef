"""Every damage to a file of a checkpoint is detected, and the checkpoint before it is found."""

import random
import shutil

import pytest
import torch
from support.checkpoints import refused

from switchtitan.checkpoint.find import find_latest
from switchtitan.checkpoint.verify import check_contents, tiles

FILES = ("metadata.json", "metadata.json.sha256", "tensors.json", "__0_0.distcp", ".metadata")
DAMAGES = {
    "truncated": lambda data: data[:-1],
    "halved": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "grown": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "last page zeroed": lambda data: data[:-64] + bytes(min(64, len(data))),
    "space added": lambda data: data + b" ",
    "deleted": lambda data: None,
}


@pytest.fixture
def saved(make_checkpointer, tensors, folder):
    """Two checkpoints; the newer one is to be damaged."""
    checkpointer = make_checkpointer(keep_latest=0)
    for step in (1, 2):
        tensors["optimizer.step"] += 1
        checkpointer.save(step, tensors, {"tokens_seen": 100 * step})
    assert {file.name for file in (folder / "step-000000002").iterdir()} == set(FILES)
    return folder


def check_found(newer):
    with refused(str(newer)):
        check_contents(newer)
    assert find_latest(newer.parent) == newer.with_name("step-000000001")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_detected(saved, name):
    file = saved / "step-000000002" / name
    before = file.read_bytes()
    for damage, change in DAMAGES.items():
        after = change(before)
        assert after != before, damage
        if after is None:
            file.unlink()
        else:
            file.write_bytes(after)
        check_found(file.parent)
    file.write_bytes(before)
    assert check_contents(file.parent).step == 2


@pytest.mark.parametrize("name", FILES)
def test_a_single_flipped_bit_is_detected(saved, name):
    """150 bits of each file."""
    file = saved / "step-000000002" / name
    data = file.read_bytes()
    bits = range(8 * len(data))
    for bit in random.Random(0).sample(bits, min(150, len(bits))):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with refused():
            check_contents(file.parent)
    file.write_bytes(data)
    check_contents(file.parent)


def test_a_file_of_another_checkpoint_is_detected(saved):
    for name in ("metadata.json", "metadata.json.sha256", "__0_0.distcp"):
        older, newer = (saved / f"step-00000000{step}" / name for step in (1, 2))
        before = newer.read_bytes()
        assert older.read_bytes() != before
        shutil.copy(older, newer)
        check_found(newer.parent)
        newer.write_bytes(before)


def test_a_whole_checkpoint_under_the_name_of_another_step_is_detected(saved):
    newer = saved / "step-000000002"
    shutil.rmtree(newer)
    shutil.copytree(saved / "step-000000001", newer)
    with refused("step 1", "step-000000001"):
        check_contents(newer)


# The pieces of a tensor.


def counts_are_one(shape, boxes):
    """The reference: counts per element."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in boxes:
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        if any(end > length for end, length in zip(ends, shape, strict=True)):
            return False
        counts[tuple(map(slice, offsets, ends))] += 1
    return bool((counts == 1).all())


def divided(source, offsets, sizes, times):
    """Random boxes that tile one."""
    dims = [dim for dim, size in enumerate(sizes) if size > 1]
    if not times or not dims:
        return [(offsets, sizes)]
    dim = source.choice(dims)
    at = source.randrange(1, sizes[dim])
    second = [offset + at * (i == dim) for i, offset in enumerate(offsets)]
    first_sizes = [at if i == dim else size for i, size in enumerate(sizes)]
    rest = [size - at if i == dim else size for i, size in enumerate(sizes)]
    return [
        *divided(source, offsets, first_sizes, times - 1),
        *divided(source, second, rest, times - 1),
    ]


def moved(source, boxes):
    """The same number of elements, one box elsewhere."""
    index = source.randrange(len(boxes))
    offsets, sizes = boxes[index]
    offsets = [max(0, offset + source.choice((-1, 0, 1))) for offset in offsets]
    return [*boxes[:index], (offsets, sizes), *boxes[index + 1 :]]


def test_boxes_tile_a_shape_if_and_only_if_each_element_is_in_one_of_them():
    source, found = random.Random(0), {True: 0, False: 0}
    for _ in range(600):
        shape = [source.randrange(1, 7) for _ in range(source.randrange(1, 4))]
        boxes = divided(source, [0] * len(shape), shape, source.randrange(4))
        if source.random() < 0.6:
            boxes = moved(source, boxes)
        expected = counts_are_one(shape, boxes)
        assert tiles(shape, boxes) == expected, (shape, boxes)
        found[expected] += 1
    assert min(found.values()) > 50


@pytest.mark.parametrize(
    ("shape", "boxes", "expected"),
    [
        ([], [([], [])], True),
        ([], [], False),
        ([], [([], []), ([], [])], False),
        ([5, 7], [], False),
        ([0, 7], [], True),
        ([0, 7], [([0, 0], [0, 7])], True),
        ([0, 7], [([0, 0], [1, 7])], False),
        # A rank without rows.
        ([5, 7], [([0, 0], [5, 7]), ([5, 0], [0, 7])], True),
        ([5, 7], [([0, 0], [5, 7, 1])], False),
        ([5, 7], [([-1, 0], [6, 7])], False),
        # Every element twice, and as many elements negative.
        ([4], [([0], [4]), ([0], [4])], False),
        ([4], [([0], [3]), ([2], [1])], False),
        # A crafted file could be divided in any number of dimensions; each doubles the corners.
        ([2] * 40, [([0] * 40, [1] * 40), ([1] * 40, [1] * 40)], False),
        ([2] * 40, [([0] * 40, [2] * 40)], True),
    ],
)
def test_edges_of_tiles(shape, boxes, expected):
    assert tiles(shape, boxes) is expected
