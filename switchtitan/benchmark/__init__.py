"""What a training step costs: times of several configurations side by side, and, without the
hardware, bytes sent between ranks, memory and arithmetic."""
