"""LLM Node: one owner's training site."""
