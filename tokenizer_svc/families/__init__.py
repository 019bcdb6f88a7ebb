"""How models of different families write their reasoning and their tool calls."""
