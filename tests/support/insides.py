"""Reaches inside the product, where no public name shows what ranks do."""

from switchtitan.distributed import initial
from switchtitan.training import output


def draw_in_small_blocks(largest, num_blocks):
    """Draws initial values in several blocks even of tiny tensors, in this process."""
    initial._LARGEST_BLOCK, initial._NUM_BLOCKS = largest, num_blocks


def wait_for_shared_folders(seconds):
    """Sets how long a rank waits, in this process, to see a folder that another has made."""
    output._VISIBLE_WITHIN_S = seconds


def wait_for_owners(seconds):
    """Sets how long a run waits, in this process, for another one to leave its folder."""
    output._ENDS_WITHIN_S = seconds
