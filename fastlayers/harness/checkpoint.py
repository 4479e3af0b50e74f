"""Checkpoints that lose nothing: a folder appears whole or not at all, and what was damaged later is found out.

checkpoints/step-00000042/
    fastlayers.safetensors   the model's parameters and buffers
    fastlayers.pt            optimizer, learning rate schedule, loss scale; readable with torch.load(weights_only=True)
    fastlayers.best.safetensors   the best parameters so far, with --patience
    pytorch.*                the same of the other model, with --compare
    state.json               the step, what was recorded so far, and the SHA-256 of every other file
"""

import hashlib
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from fastlayers.harness import UserError, distributed

KEPT = 2  # the newest, and the one before in case it gets damaged


class Damaged(Exception):
    pass


def save(folder, runs, record):
    """Write the runs and `record` (with its "step") as the newest checkpoint; every process has to call this."""
    states = {run.name: get_state_dict(run.model, run.optimizer, options=_whole()) for run in runs}
    if distributed.is_first():
        target = folder / "checkpoints" / f"step-{record['step']:08d}"
        _write(target, runs, states, record)
        for old in _newest_first(folder)[KEPT:]:
            shutil.rmtree(old)
    distributed.wait()


def whole_state(model):
    """The state_dict that one process alone would have; every process has to call this."""
    return get_model_state_dict(model, options=_whole())


def put_back(model, state):
    """Load what whole_state gave; every process has to call this."""
    several = distributed.processes() > 1
    options = StateDictOptions(full_state_dict=several, broadcast_from_rank0=several)
    set_model_state_dict(model, state, options=options)


def _whole():
    """The tensors as one process alone would have them."""
    several = distributed.processes() > 1
    return StateDictOptions(full_state_dict=several, cpu_offload=several)


def _write(target, runs, states, record):
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for run in runs:
        model, optimizer = states[run.name]
        save_file(unshared(model), partial / f"{run.name}.safetensors")
        rest = {"optimizer": optimizer, "scheduler": run.scheduler.state_dict(), "scaler": run.scaler.state_dict()}
        torch.save(rest, partial / f"{run.name}.pt")
        if run.best is not None:
            save_file(unshared(run.best), partial / f"{run.name}.best.safetensors")
    digests = {path.name: _digest(path) for path in sorted(partial.iterdir())}
    histories = {run.name: {key: getattr(run, key) for key in ("losses", "seconds", "evaluations")} for run in runs}
    (partial / "state.json").write_text(json.dumps({**record, "runs": histories, "sha256": digests}))
    for path in (*partial.iterdir(), partial):
        _to_disk(path)
    shutil.rmtree(target, ignore_errors=True)  # one that was damaged, and passed by
    partial.rename(target)
    _to_disk(target.parent)


def unshared(state):
    """Tied parameters as tensors of their own, which is what safetensors takes."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def _to_disk(path):
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _newest_first(folder):
    return sorted((folder / "checkpoints").glob("step-*"), reverse=True)


def load(folder, runs, warn):
    """Bring the runs to the newest whole checkpoint and return its record; damaged ones are named through `warn`.

    raises  UserError where there is none
    """
    for path in _newest_first(folder):
        try:
            record = _verified(path)
            for run in runs:
                _restore(path, run, record["runs"][run.name])
            return record
        except Damaged as damage:
            warn(f"checkpoint {path.name} is damaged ({damage}); going on from the one before")
    raise UserError(f"--resume: {folder} holds no whole checkpoint")


def _verified(path):
    """The record of a checkpoint in which every file is what was written."""
    try:
        record = json.loads((path / "state.json").read_text())
        digests = record.pop("sha256")
        record["step"], record["runs"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"state.json: {error}") from error
    for name, digest in digests.items():
        try:
            found = _digest(path / name)
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
        if found != digest:
            raise Damaged(f"{name} has changed since it was written")
    return record


def _restore(path, run, history):
    model = load_file(path / f"{run.name}.safetensors")
    rest = torch.load(path / f"{run.name}.pt", weights_only=True)
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=model,
        optim_state_dict=rest["optimizer"],
        options=StateDictOptions(full_state_dict=distributed.processes() > 1),
    )
    run.scheduler.load_state_dict(rest["scheduler"])
    run.scaler.load_state_dict(rest["scaler"])
    best = path / f"{run.name}.best.safetensors"
    run.best = load_file(best) if best.exists() else None
    for key, values in history.items():
        setattr(run, key, values)
