"""Recipes that train the same model on plain PyTorch and on fastlayers, and prove that the two agree."""


class UserError(ValueError):
    """What was asked for cannot be done with the given options, files or installation; the message says why."""
