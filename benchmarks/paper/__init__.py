"""The questions of the paper (arXiv 2411.02908), measured again: `python -m benchmarks.paper`."""
