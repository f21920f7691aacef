"""torch.compile of the model's blocks, from outside."""

from switchtitan.contracts import LanguageModel


def compile_blocks(model: LanguageModel) -> None:
    """Compiles every block in place, whole and for fixed shapes. Equal blocks share one graph: compile time does not grow with
    depth. Call after activation checkpointing and before sharding.
    """
    for block in model.blocks().values():
        block.compile(fullgraph=True, dynamic=False)
