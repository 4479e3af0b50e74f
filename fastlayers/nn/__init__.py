"""Drop-in modules: each owns its parameters and calls one op."""
