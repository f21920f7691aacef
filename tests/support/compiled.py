"""Names what torch.compile has compiled."""

from collections import Counter

from torch._dynamo.utils import get_compilation_metrics


def compiled_functions() -> Counter[str]:
    """Number of compilations of this process by the function's name, since metrics were cleared."""
    return Counter(entry.co_name for entry in get_compilation_metrics() if entry.co_name)


SWITCHLORA_COMPILED = {
    "forward": 1,  # all blocks
    "chunk_loss_and_gradient_": 1,
    "vector_coefficients": 1,
    "update_vectors_": 3,  # factors of several shapes
}
"""What tiny runs of SwitchLoRA compile with all keys of `[compile]`: one graph each."""
