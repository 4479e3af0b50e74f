"""What torch.autocast does to the arguments of an op."""

import torch


def autocast(first, *others):
    """The arguments as torch.nn.functional.linear sees them where `first` lies; unchanged outside of autocast."""
    device_type = first.device.type if isinstance(first, torch.Tensor) else "cpu"
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return (first, *others)
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(_cast(value, dtype) for value in (first, *others))


def _cast(value, dtype):
    is_cast = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if is_cast else value
