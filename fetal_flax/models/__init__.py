"""The networks: pure Flax NNX code that knows nothing of data or training."""
