"""setuptools' build backend, plus the build requirements that depend on the machine.

torch is a build requirement only where the target environment has none that is new enough, and NVIDIA's compiler
only where the torch there (or the one pip is about to install) can use it and no nvcc is found. What this machine
lacks is said here, before pip downloads anything.
"""

import os
import platform

import native
from setuptools.build_meta import *  # noqa: F403 (a PEP 517 backend is this module's namespace)

TORCH = "torch>=2.10"
# CUDA 13.0 of the 13 series runs beside every torch for CUDA 13 and needs the oldest driver among them.
NVIDIA_COMPILER = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-nvvm==13.0.*",
]


def _machine_requirements():
    if platform.system() != "Linux":
        return []
    native.compiler()
    native.cuda_archs()
    torch = native.find_torch()
    usable = torch is not None and torch.new_enough
    requirements = [] if usable else [TORCH]
    cuda_torch = torch.cuda is not None and int(torch.cuda.split(".")[0]) >= 13 if usable else True
    wanted = os.environ.get("FASTLAYERS_BUILD_CUDA", "")
    if (wanted == "1" or (wanted == "" and cuda_torch)) and native.find_nvcc() is None:
        return requirements + NVIDIA_COMPILER
    native.check_nvcc()
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return _machine_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _machine_requirements()
