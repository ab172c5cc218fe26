"""Aggregator: holds the global model and runs the rounds."""
