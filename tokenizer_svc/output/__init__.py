"""From the generator's tokens to the events that callers see."""
