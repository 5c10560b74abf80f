"""Fetal-head segmentation and head circumference on HC18 in JAX/Flax."""
