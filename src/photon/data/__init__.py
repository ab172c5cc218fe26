"""Data Source: the text of one node and the deterministic, resumable stream of batches made of it."""
