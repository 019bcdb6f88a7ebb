"""Sampling: from logits, on the host or on the device, to tokens."""
