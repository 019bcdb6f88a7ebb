"""Runs a plan on the device: input arrays, slot memory, logits buffers, CUDA graphs."""
