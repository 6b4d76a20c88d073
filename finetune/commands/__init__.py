"""What users call beside training, evaluation and prediction."""
