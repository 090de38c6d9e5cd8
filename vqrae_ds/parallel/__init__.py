"""Tensor parallelism: process groups, the plan of slices, and the layers that hold one slice."""
