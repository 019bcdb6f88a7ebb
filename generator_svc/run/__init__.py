"""Execution of plans on the device: input arrays, slot memory, logits buffers, CUDA graphs."""
