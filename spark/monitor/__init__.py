"""How good the features are: measures, probes and panels, during a run and after it."""
