"""What users call beside pretraining: export, probe, prepare and report."""
