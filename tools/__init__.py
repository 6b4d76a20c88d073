"""For maintainers: benchmarks, studies, tables and the demo. Nothing imports them, no user needs them."""
