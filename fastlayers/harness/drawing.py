"""A drawing of a model: its layers in the order in which they run, with shapes, parameters, and which were swapped."""

import re

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

SWAPPED, KEPT = "#cfe5ee", "#eeeeee"


def layers(model, batch, changed):
    """[(name, kind, output shape, parameters)] as one example sees them, of the modules that call no other, and of
    those in `changed` that do."""
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
    return [layer for name, layer in seen.items() if name not in callers or pattern(name) in changed]


def pattern(name):
    """The same for all layers of a stack: encoder.layer.*.output"""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def stacked(found):
    """The layers with those of a stack in one row: [((encoder.layer.*.output, kind, shape, parameters), how often)]"""
    rows = {}
    for name, *rest in found:
        key = (pattern(name) or "(model)", *rest)
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
    return {pattern(name) for name in names}


class Drawing:
    """What is to be drawn of a model, taken down before the model is cut into shards."""

    def __init__(self, model, example, swaps):
        """example: {model input or "labels": (1, ...)}"""
        self.kind = model.__dict__.get("_swapped_from", type(model)).__name__
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.swapped = swapped_names(swaps)
        self.rows = stacked(layers(model, example, self.swapped))

    def save(self, path):
        figure = Figure(figsize=(9, 0.42 * len(self.rows) + 1.2), layout="constrained")
        axes = figure.subplots()
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(len(self.rows) + 0.2, -1.1), title=f"{self.kind}, {self.parameters:,} parameters")
        for x, align, text in ((0.02, "left", "layer"), (0.78, "right", "output"), (0.98, "right", "parameters")):
            axes.text(x, -0.45, text, weight="bold", ha=align, va="center")
        for y, row in enumerate(self.rows):
            self._row(axes, y, *row)
        note = "blue: runs on fastlayers' kernels; one example"
        axes.text(0.02, -0.95, note, fontsize=8, color="#555555", va="center")
        figure.savefig(path, dpi=144)

    def _row(self, axes, y, layer, count):
        name, kind, shape, parameters = layer
        ours = any(name == one or name.startswith(f"{one}.") for one in self.swapped)
        box = {"facecolor": SWAPPED if ours else KEPT, "edgecolor": "none"}
        axes.add_patch(FancyBboxPatch((0.01, y + 0.1), 0.98, 0.66, boxstyle="round,pad=0,rounding_size=0.01", **box))
        times = f"  x {count}" if count > 1 else ""
        says = (0.02, "left", f"{name}  ({kind}){times}"), (0.78, "right", " x ".join(map(str, shape[1:])) or "-")
        for x, align, text in (*says, (0.98, "right", f"{parameters:,}" if parameters else "-")):
            axes.text(x, y + 0.45, text, fontsize=9, ha=align, va="center", parse_math=False)
