"""Photon: federated LLM pre-training. Text stays with its owner; only model updates travel."""

__version__ = "0.1.0"
