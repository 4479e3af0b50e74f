"""Attention forward in five steps, from the formula to the product's kernel: README.md beside this file."""
