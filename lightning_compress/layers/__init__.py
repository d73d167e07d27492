"""Layers that can be factorised, and what they become."""
