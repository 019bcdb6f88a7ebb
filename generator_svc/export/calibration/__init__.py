"""Activation statistics of a checkpoint on a calibration text, and smoothing."""
