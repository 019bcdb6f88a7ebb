"""Benchmarks. Speed is looked at here, never in a test."""
