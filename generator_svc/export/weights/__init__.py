"""Writes weights from a checkpoint into the data file of a graph, a slice at a time."""
