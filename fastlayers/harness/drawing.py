"""A drawing of a model: its layers in the order in which they run, with shapes, parameters, and which were swapped."""

import re

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

SWAPPED, KEPT = "#cfe5ee", "#eeeeee"


def layers(model, batch):
    """[(name, kind, output shape, parameters)] of the modules that run and call no other, as one example sees them."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    seen, running, callers, hooks = {}, [], set(), []

    def before(name):
        def hook(module, args):
            callers.update(running[-1:])
            running.append(name)

        return hook

    def after(name):
        def hook(module, args, output):
            running.pop()
            output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else ()
            seen[name] = (name, type(module).__name__, shape, sum(p.numel() for p in module.parameters()))

        return hook

    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    was_training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module in was_training:
            module.training = True
    return [layer for name, layer in seen.items() if name not in callers]


def stacked(found):
    """The layers with those of a stack in one row: [((encoder.layer.*.output, kind, shape, parameters), how often)]"""
    rows = {}
    for name, *rest in found:
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) or "(model)", *rest)
        rows[key] = rows.get(key, 0) + 1
    return list(rows.items())


def swapped_names(swaps):
    """The modules that swap_ changed; of a module that runs its children, those that run as one op."""
    names = set()
    for entry in swaps.swapped:
        children = entry.note.removesuffix(" in one op").replace(", ", "+").split("+")
        if entry.note.endswith(" in one op"):
            names |= {f"{entry.name}.{child}".lstrip(".") for child in children}
        else:
            names.add(entry.name)
    return {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names}


def draw(model, job, swaps, path):
    device = next(model.parameters()).device
    batch = {name: tensor[:1].to(device) for name, tensor in job.data.test.items()}
    rows = stacked(layers(model, batch))
    changed = swapped_names(swaps)
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    kind = model.__dict__.get("_swapped_from", type(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    axes.set(xlim=(0, 1), ylim=(len(rows) + 0.2, -1.1), title=f"{kind.__name__}, {total:,} parameters")
    for x, align, text in ((0.02, "left", "layer"), (0.78, "right", "output"), (0.98, "right", "parameters")):
        axes.text(x, -0.45, text, weight="bold", ha=align, va="center")
    for y, ((name, layer, shape, parameters), count) in enumerate(rows):
        ours = any(name == one or name.startswith(f"{one}.") for one in changed)
        box = {"facecolor": SWAPPED if ours else KEPT, "edgecolor": "none"}
        axes.add_patch(FancyBboxPatch((0.01, y + 0.1), 0.98, 0.66, boxstyle="round,pad=0,rounding_size=0.01", **box))
        times = f"  x {count}" if count > 1 else ""
        axes.text(0.02, y + 0.45, f"{name}  ({layer}){times}", fontsize=9, va="center", parse_math=False)
        sizes = " x ".join(map(str, shape[1:])) or "-"
        axes.text(0.78, y + 0.45, sizes, fontsize=9, ha="right", va="center")
        axes.text(0.98, y + 0.45, f"{parameters:,}" if parameters else "-", fontsize=9, ha="right", va="center")
    axes.text(0.02, -0.95, "blue: runs on fastlayers' kernels; one example", fontsize=8, color="#555555", va="center")
    figure.savefig(path, dpi=144)
