"""swap_ puts fused layers into an existing model in place; unswap_ takes them out again."""


class SwapReport:
    """What swap_ replaced, what it left, and why."""


def swap_(model, *, filter_fn=None, strict=False):
    raise NotImplementedError


def unswap_(model):
    raise NotImplementedError
