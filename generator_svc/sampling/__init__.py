"""From logits to tokens, on the host or from what the device found out about a row."""
