"""Kinds of decomposition: the mathematics of tensors."""
