"""From the generator's tokens to what a caller sees."""
