"""Turns tools and response constraints into the decoding constraint sent to the generator."""
