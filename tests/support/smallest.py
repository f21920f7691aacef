"""The smallest configuration without `[data]`."""

SMALLEST = """
[job]
name = "a"
output_dir = "{folder}"
[model]
name = "llama"
size = "9m"
[method]
name = "full_rank"
[optimizer]
name = "adamw"
lr = 1e-3
[training]
steps = 5
global_batch_size = 2
local_batch_size = 1
"""
"""A format: `folder` is the output folder."""
