"""What a text shows of a checkpoint's activations, and how they are smoothed."""
