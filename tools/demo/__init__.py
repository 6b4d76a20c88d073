"""A demonstration on rendered rooms: `python -m tools.demo`."""
