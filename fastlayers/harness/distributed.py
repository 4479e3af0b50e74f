"""Several processes, as torchrun starts them: each computes its share of every batch."""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastlayers.harness import UserError


def start(config):
    """Join the other processes, where there are any; returns this process's device."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu") if accelerator is None else torch.device(accelerator.type, local)
    if device.type != "cpu":
        torch.accelerator.set_device_index(local)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else None)
    _check(config)
    return device


def _check(config):
    if processes() == 1:
        return
    if config.compare:
        raise UserError("--compare trains two models in one process; torchrun started several")
    if config.batch_size % (processes() * config.accumulate):
        raise UserError(
            f"--batch-size {config.batch_size}: {processes()} processes with --accumulate {config.accumulate} "
            f"want a multiple of {processes() * config.accumulate}"
        )
    if config.parallel == "fsdp" and config.dtype == "float16":
        raise UserError("--parallel fsdp scales no losses, which float16 needs; bfloat16 needs none")


def finish():
    if dist.is_initialized():
        dist.destroy_process_group()


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this process writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def wrap(model, config):
    """The module to call: the model itself (under fsdp its parameters are shards), or one that averages gradients."""
    if processes() == 1:
        return model
    if config.parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model)
    return DistributedDataParallel(model)


def no_sync(forward):
    """Within, gradients add up in this process; under fsdp they are averaged each time, which is as right."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def share(indices):
    """This process's part of a batch."""
    return indices if processes() == 1 else indices.chunk(processes())[dist.get_rank()]


def mean(value):
    """Over all processes."""
    if processes() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= processes()
    return value


def wait():
    if dist.is_initialized():
        dist.barrier()
