"""What a number means nothing without: the machine, its state, the versions, the commit, the command."""

import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import fastlayers
from fastlayers import _native
from fastlayers.benchmarks import others
from fastlayers.info import cpu_name


def describe(setting):
    """One text or number per fact; "" where there is none."""
    on_gpu = setting.device == "cuda"
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": _native.cpu_isa,
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "driver": driver() if on_gpu else "",
        "cuda": (torch.version.cuda or "") if on_gpu else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": sys.version.split()[0],
        "fastlayers": fastlayers.__version__,
        "others": ", ".join(others.versions()),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["fastlayers", *sys.argv[1:]]),
    }


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit():
    """The commit of the source tree that is running, with -dirty where it was changed since; "" for a wheel."""
    source = Path(fastlayers.__file__).parent.parent
    if not (source / ".git").exists():
        return ""
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _nvml():
    """pynvml (of NVIDIA's nvidia-ml-py), ready to be asked, or None: an extra that nobody has to install."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:  # not installed, or no driver
        return None


def driver():
    nvml = _nvml()
    return str(nvml.nvmlSystemGetDriverVersion()) if nvml else ""


def gpu_state(setting):
    """{"gpu_clock_mhz", "gpu_temperature_c", "gpu_power_w"} of the GPU in use, each "" where NVML does not tell."""
    state = {"gpu_clock_mhz": "", "gpu_temperature_c": "", "gpu_power_w": ""}
    nvml = _nvml() if setting.device == "cuda" else None
    if nvml is None:
        return state
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
    questions = {
        "gpu_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "gpu_temperature_c": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "gpu_power_w": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    }
    for name, ask in questions.items():
        try:
            state[name] = ask(nvml.nvmlDeviceGetHandleByUUID(uuid))
        except Exception:  # virtual GPUs do not tell everything
            state[name] = ""
    return state
