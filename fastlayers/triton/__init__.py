"""The ops as Triton kernels. Nothing here is imported before a call asks for the triton backend."""
