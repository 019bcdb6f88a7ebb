"""Constrained decoding: JSON schemas, regular expressions and grammars to token masks."""
