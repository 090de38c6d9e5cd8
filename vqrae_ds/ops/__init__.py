"""Kernels behind the models."""
