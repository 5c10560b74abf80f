"""Comparison with PyTorch: the reference networks, the measurement and the report.

The one room that imports torch and torchvision (`pip install -e '.[parity]'`); nothing imports it
but the command line's `parity`, tests and benchmarks.
"""
