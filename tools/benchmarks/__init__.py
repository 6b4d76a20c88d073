"""Parts of `tools/benchmark.py`: who is compared, that they agree, and what a step costs in time, memory and FLOPs."""
