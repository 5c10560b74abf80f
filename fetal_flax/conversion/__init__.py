"""PyTorch checkpoints: reading them without PyTorch, and transferring them by name."""
