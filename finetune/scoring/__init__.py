"""Evaluation: metrics, alignment, evaluators, sources of predictions, intervals and caveats."""
