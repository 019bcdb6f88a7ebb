"""Weights from a checkpoint, packed in the formats of a graph, a slice at a time."""
