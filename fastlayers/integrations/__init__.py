"""What swap_ knows about other people's modules."""
