"""Reaches inside the product, where no public name shows what ranks do."""

from switchtitan.distributed import initial_draws
from switchtitan.training import output_folder


def draw_in_small_blocks(largest, num_blocks):
    """Draws initial values in several blocks even of tiny tensors, in this process."""
    initial_draws._LARGEST_BLOCK, initial_draws._NUM_BLOCKS = largest, num_blocks


def wait_for_shared_folders(seconds):
    """Sets how long a rank waits, in this process, to see a folder that another has made."""
    output_folder._VISIBLE_WITHIN_S = seconds


def exchanged_plans(optimizer):
    """Returns what counts the plans that a SwitchLoRA optimizer has exchanged, in `history`."""
    return optimizer._exchange
