"""Weights from other formats to safetensors: ZeRO checkpoints, official encoders."""
