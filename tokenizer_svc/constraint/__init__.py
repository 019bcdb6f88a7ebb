"""From tools and response constraints to the decoding constraint sent to the generator."""
