"""Compression inside a Lightning trainer."""
