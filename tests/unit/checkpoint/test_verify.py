"""Pieces tile a shape if and only if each element is in one of them, as counting elements says."""

import random
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from switchtitan.checkpoint import verify
from switchtitan.checkpoint.verify import Box, tiles


def counts_are_one(shape: list[int], boxes: list[Box]) -> bool:
    """The reference: counts per element."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in boxes:
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        if any(end > length for end, length in zip(ends, shape, strict=True)):
            return False
        counts[tuple(map(slice, offsets, ends))] += 1
    return bool((counts == 1).all())


def divided(source: random.Random, offsets: list[int], sizes: list[int], times: int) -> list[Box]:
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


def moved(source: random.Random, boxes: list[Box]) -> list[Box]:
    """The same number of elements, one box elsewhere."""
    index = source.randrange(len(boxes))
    offsets, sizes = boxes[index]
    offsets = [max(0, offset + source.choice((-1, 0, 1))) for offset in offsets]
    return [*boxes[:index], (offsets, sizes), *boxes[index + 1 :]]


def check_as_reference(tiles: Callable[[list[int], list[Box]], bool]) -> None:
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


def test_boxes_tile_a_shape_as_counting_says() -> None:
    check_as_reference(tiles)


def test_a_check_by_numbers_of_elements_alone_is_found() -> None:
    """The check above can fail."""

    def by_number(shape: list[int], boxes: list[Box]) -> bool:
        is_inside = all(verify._is_inside(shape, box) for box in boxes)
        sizes = [torch.Size(sizes).numel() for _, sizes in boxes]
        return is_inside and sum(sizes) == torch.Size(shape).numel()

    with pytest.raises(AssertionError, match=r"\[\("):
        check_as_reference(by_number)


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
    ],
)
def test_edges(shape: list[int], boxes: list[Box], expected: bool) -> None:
    assert tiles(shape, boxes) is expected


def test_a_shape_divided_in_more_dimensions_than_a_run_does_is_refused() -> None:
    """A crafted file could have any number, and each doubles the corners."""
    num_dims = 40
    half = [([0] * num_dims, [1] * num_dims), ([1] * num_dims, [1] * num_dims)]
    assert not tiles([2] * num_dims, half)
    assert tiles([2] * num_dims, [([0] * num_dims, [2] * num_dims)])


def test_many_pieces_of_a_large_tensor_take_little_time() -> None:
    rows, ranks = 11008, 512
    ends = [rows * rank // ranks for rank in range(ranks + 1)]
    boxes = [([a, 0], [b - a, 4096]) for a, b in pairwise(ends)]
    start = time.process_time()
    assert tiles([rows, 4096], boxes)
    # Per-element counts of 45 million elements would take several times as long.
    assert time.process_time() - start < 0.1
