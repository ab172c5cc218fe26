"""Fabric: how tasks reach nodes and replies come back."""
