"""Weights in and out: encoders, official checkpoints, ONNX graphs and the Hugging Face hub."""
