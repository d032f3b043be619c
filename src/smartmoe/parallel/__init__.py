"""Parallelism applied from outside to a single-device model: tensor, pipeline, data."""
