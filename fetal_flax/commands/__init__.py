"""The `fetal-flax` command: `main.py` parses and answers errors, each command has its own file.

Commands import what they need when they run: `--help` should not wait for JAX.
"""
