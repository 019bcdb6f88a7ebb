"""Benchmarks. Speed is measured here, never in a test."""
