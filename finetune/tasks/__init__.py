"""Depth training as a task of the engine."""
