"""Each op in a few lines of plain torch: the specification, the oracle of the tests, and the fallback."""
