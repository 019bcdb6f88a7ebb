"""Turns the generator's tokens into the events that callers see."""
