"""API keys: who may call, what each may take, and how one stage shows its own to the next."""
