"""Constrained decoding: token masks from JSON schemas, regular expressions and grammars."""
