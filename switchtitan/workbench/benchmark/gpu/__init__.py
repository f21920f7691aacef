"""What a training step runs on a GPU, found without one: its compiled kernels and their launches.

A child process loads a CUDA device that does nothing (`device`), lets torch compile for it
(`torch_inside`), and takes steps on fake tensors, whose launches it records (`record`)."""
