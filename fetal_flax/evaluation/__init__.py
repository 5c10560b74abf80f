"""Metrics, reports and pictures of segmentations."""
