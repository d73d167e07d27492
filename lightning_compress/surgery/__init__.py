"""Puts factorised layers in, repairs them, takes them out and stores them."""
