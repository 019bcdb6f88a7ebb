"""API keys: who may call, with which limits, and the key that one stage presents to the next."""
