"""`fastlayers info`: what was built, and which backends can run here and why the others cannot."""

import importlib.util
import json
import platform
from pathlib import Path

import torch

import fastlayers
from fastlayers import _native, backends

# One call per op, small enough to cost nothing; its facts decide which backends would serve it.
_SAMPLE_CALLS = {
    "attention": lambda: ((torch.zeros(1, 1, 1, 64),) * 3, {}),
    "varlen_attention": lambda: ((torch.zeros(1, 1, 64),) * 3, {}),
    "decode_attention": lambda: ((torch.zeros(1, 1, 1, 64),) * 3, {}),
    "linear_act": lambda: ((torch.zeros(256, 64), torch.zeros(1, 64)), {}),
    "gated_linear_act": lambda: ((torch.zeros(256, 64), torch.zeros(1, 64), torch.zeros(1, 64)), {}),
    "adam_step": lambda: (([torch.zeros(1)],) * 4, {}),
    "grad_norm": lambda: (([torch.zeros(1)],), {}),
}


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")


def run(args):
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def collect():
    """Everything that `fastlayers info` shows, as plain data."""
    return {
        "fastlayers": fastlayers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "library": {"error": _native.error, **_native.build_info()},
        "cpu": {
            "name": cpu_name(),
            "threads": torch.get_num_threads(),
            "isa": _native.cpu_isa,
        },
        "gpus": gpus(),
        "forced_backend": backends._forced,
        "ops": {op: {name: why_not(op, name) for name in backends.NAMES} for op in sorted(backends._reasons)},
    }


def cpu_name():
    """The processor's own name where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpus():
    """Each CUDA device that torch sees: its name, architecture, and whether the library has code for it."""
    if not torch.cuda.is_available():
        return []
    archs = _native.build_info().get("cuda_archs", [])
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(
            {
                "name": torch.cuda.get_device_name(index),
                "arch": f"sm_{major}{minor}",
                "code": code_for(archs, major, minor),
            }
        )
    return found


def code_for(archs, major, minor):
    """Which of the compiled architectures a device of capability (major, minor) would run, or None.

    Machine code runs on the same major architecture from its minor upwards, PTX on every newer one, and code for
    an architecture with a letter ("90a") on that one alone.
    """
    best = None
    for arch in archs:
        number = arch.removesuffix("+PTX")
        if not number.isdigit():
            if number[:-1] == f"{major}{minor}":
                return number
            continue
        built = int(number[:-1]), int(number[-1])
        if built[0] == major and built[1] <= minor:
            best = number
        elif arch != number and built <= (major, minor) and best is None:
            best = f"{number} (PTX)"
    return best


def machine_reason(backend):
    """Why no op at all can run on this backend on this machine, or None."""
    if backend == "cpu":
        return backends.native_reason({"device": "cpu", "dtype": torch.float32})
    if backend == "reference":
        return None
    if backend in ("cuda", "cublas") and _native.error:
        return _native.error
    if backend in ("cuda", "cublas") and not _native.build_info().get("nvcc"):
        return "the library was built without CUDA; install nvcc 12.4 or newer and reinstall fastlayers"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def why_not(op, backend):
    """Why a plain float32 call of `op` cannot run on `backend` on this machine, or None where it can."""
    if backend != "reference" and backend not in backends._reasons[op]:
        return "no kernel yet"
    reason = machine_reason(backend)
    if reason or backend == "reference":
        return reason
    args, kwargs = _SAMPLE_CALLS[op]()
    facts = {**backends._facts[op](*args, **kwargs), "device": "cpu" if backend == "cpu" else "cuda"}
    return backends.why_not(op, backend, facts)


def as_text(facts):
    library, cpu = facts["library"], facts["cpu"]
    lines = [
        f"fastlayers {facts['fastlayers']}, torch {facts['torch']}, Python {facts['python']}, {facts['platform']}",
        "",
    ]
    if library["error"]:
        lines.append(f"library   not in use: {library['error']}")
    else:
        lines += [
            f"library   compiled by {library['compiler']}",
            f"          stable ABI of torch {library['stable_abi_floor']}, headers of torch {library['torch_headers']}",
            f"CUDA      {_cuda_line(library)}",
        ]
    compiled = ", ".join(library.get("cpu_isas", [])) or "none"
    lines.append(
        f"CPU       {cpu['name']}, {cpu['threads']} threads; kernels run as {cpu['isa']} (compiled: {compiled})"
    )
    for gpu in facts["gpus"]:
        code = f"runs the code for {gpu['code']}" if gpu["code"] else "the library has no code for it"
        lines.append(f"GPU       {gpu['name']}, {gpu['arch']}; {code}")
    if not facts["gpus"]:
        lines.append(f"GPU       none: {machine_reason('triton')}")
    if facts["forced_backend"]:
        lines.append(f"forced    every call is served by {facts['forced_backend']} (FASTLAYERS_BACKEND or use_backend)")
    return "\n".join([*lines, "", *_backend_table(facts["ops"])])


def _cuda_line(library):
    if not library["nvcc"]:
        return "not compiled"
    return f"nvcc {library['nvcc']}, architectures {' '.join(library['cuda_archs'])}"


def _backend_table(ops):
    """Rows of op against backend, "yes" or a number that stands for a reason listed below."""
    reasons = list(dict.fromkeys(reason for row in ops.values() for reason in row.values() if reason))
    width = max(map(len, ops), default=0) + 2
    lines = ["op".ljust(width) + "".join(name.ljust(11) for name in backends.NAMES)]
    for op, row in ops.items():
        cells = (f"no ({reasons.index(reason) + 1})" if reason else "yes" for reason in row.values())
        lines.append(op.ljust(width) + "".join(cell.ljust(11) for cell in cells).rstrip())
    return [*lines, *(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))]
