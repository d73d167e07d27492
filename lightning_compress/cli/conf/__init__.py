"""Hydra groups of the application alone: engines of its sweeps."""
