"""What the simulator raises."""


class SimulatorError(Exception):
    """A launch that a GPU would have let run wrong, or that cannot be simulated.

    kind: out_of_bounds, misaligned, uninitialised, async, race, divergence, barrier, deadlock, timeout, unsupported,
          trap or arguments; the message names kernel, PTX line, source line where known, block and thread
    """

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
