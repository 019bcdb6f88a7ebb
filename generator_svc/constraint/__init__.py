"""Constrained decoding: from JSON schemas, regular expressions and grammars to token masks."""
