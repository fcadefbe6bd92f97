"""Flax models whose parameter trees carry diffusers' names."""
