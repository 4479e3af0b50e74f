"""setuptools' build backend, plus the build requirements that depend on the machine.

torch is a build requirement only where its headers are not already in the target environment, and NVIDIA's
compiler only where the torch there (or the one pip is about to install) can use it and no nvcc is found.
"""

import os
import platform

import native
from setuptools.build_meta import *  # noqa: F403 (a PEP 517 backend is this module's namespace)

TORCH_HEADERS = "torch==2.13.*"
NVIDIA_COMPILER = [
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
    "nvidia-nvvm",
]


def _machine_requirements():
    root = native.torch_root()
    requirements = [] if root else [TORCH_HEADERS]
    cuda_torch = root is None or "+cpu" not in native.torch_version(root)
    wanted = os.environ.get("FASTLAYERS_BUILD_CUDA") != "0" and platform.system() == "Linux"
    if wanted and cuda_torch and native.find_nvcc() is None:
        requirements += NVIDIA_COMPILER
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return _machine_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _machine_requirements()
