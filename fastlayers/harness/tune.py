"""`fastlayers tune RECIPE`: search for the options with which a recipe does best, with Optuna."""

import argparse
import importlib
import warnings
from dataclasses import fields
from pathlib import Path

from fastlayers.harness import UserError, train

METRICS = {"test_loss": "minimize", "accuracy": "maximize", "macro_f1": "maximize", "perplexity": "minimize"}


class Tune:
    """The subcommand of one recipe: takes the recipe's own options, which hold for all trials, and some more."""

    def __init__(self, recipe, module):
        self.recipe, self.module = recipe, module

    def add_arguments(self, parser):
        self.kind = importlib.import_module(self.module)
        self.kind.add_arguments(parser)
        add = parser.add_argument
        add("--trials", type=int, default=20, metavar="N", help="runs in all, with those of before (default: 20)")
        add("--sampler", choices=["bayesian", "random", "grid"], default="bayesian", help="(default: bayesian)")
        help = (
            "lr=1e-4:1e-2:log (a range), batch_size=16,32 (a choice); may be repeated (default: lr around its default)"
        )
        add("--search", action="append", type=dimension, metavar="SPEC", help=help)
        add(
            "--metric", choices=METRICS, default="test_loss", help="what is best, on held-out data (default: test_loss)"
        )
        add("--no-pruning", action="store_true", help="let trials that are worse than half of the others go on")

    def run(self, args):
        names = {field.name for field in fields(self.kind.Config)}
        space = dict(args.search or [default_search(self.kind.Config, args)])
        for name in space:
            if name not in names:
                raise UserError(f"--search {name}: the recipe has no such option; it has {', '.join(sorted(names))}")
        if args.compare or args.resume:
            raise UserError("tune: --compare and --resume are options of train; a study goes on by itself")
        folder = Path(args.out or Path("runs") / f"tune-{self.recipe}")
        study = open_study(folder, self.recipe, args, space)
        while len(finished(study)) < args.trials and not exhausted(study, args, space):
            study.optimize(lambda trial: self.trial(trial, args, space, folder), n_trials=1)
        show(study, self.recipe, folder, args)
        return 0

    def trial(self, trial, args, space, folder):
        """One run of the recipe; returns what it reached."""
        import optuna

        from fastlayers.harness import session

        chosen = {name: suggest(trial, name, wanted) for name, wanted in space.items()}
        here = argparse.Namespace(**{**vars(args), **chosen, "out": str(folder / f"trial-{trial.number:04d}")})
        seen = []

        def watch(found):
            if args.metric not in found:
                raise UserError(f"--metric {args.metric}: the recipe's are {', '.join(set(found) - {'step'})}")
            seen.append(found[args.metric])
            trial.report(seen[-1], step=len(seen))
            if trial.should_prune():
                raise optuna.TrialPruned

        with session.watched_by(watch):
            self.kind.run(here)
        return (min if METRICS[args.metric] == "minimize" else max)(seen)


COMMANDS = {name: (Tune(name, module), summary, extra) for name, (module, summary, extra) in train.COMMANDS.items()}


def dimension(text):
    """(name, ("range", low, high, log) or ("choice", values)) from name=low:high[:log] or name=a,b,c."""
    name, _, wanted = text.partition("=")
    name = name.strip().replace("-", "_")
    try:
        if ":" in wanted:
            low, high, *scale = wanted.split(":")
            if scale not in ([], ["log"]):
                raise ValueError
            low, high = number(low), number(high)
            if not low < high or (scale and low <= 0):
                raise ValueError
            return name, ("range", low, high, bool(scale))
        return name, ("choice", [value(one) for one in wanted.split(",")])
    except (ValueError, TypeError):
        message = f"wanted name=low:high, name=low:high:log or name=a,b,c, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def number(text):
    return int(text) if text.strip().lstrip("-").isdigit() else float(text)


def value(text):
    if not text:
        raise ValueError
    try:
        return number(text)
    except ValueError:
        return text.strip()


def default_search(kind, args):
    rate = args.lr or 1e-3
    return "lr", ("range", rate / 10, rate * 10, True)


def suggest(trial, name, wanted):
    if wanted[0] == "choice":
        return trial.suggest_categorical(name, wanted[1])
    _, low, high, log = wanted
    whole = isinstance(low, int) and isinstance(high, int)
    return (trial.suggest_int if whole else trial.suggest_float)(name, low, high, log=log)


def open_study(folder, recipe, args, space):
    """The study in folder/study.db, begun now or before; what was running when its process died counts as failed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name=recipe,
        load_if_exists=True,
        direction=METRICS[args.metric],
        pruner=optuna.pruners.NopPruner() if args.no_pruning else optuna.pruners.MedianPruner(),
    )
    study.sampler = make_sampler(args, space, args.seed + len(study.trials))  # other draws than before
    before = study.user_attrs.setdefault("metric", args.metric)
    if before != args.metric:
        raise UserError(f"--metric {args.metric}: the study in {folder} goes by {before}")
    study.set_user_attr("metric", args.metric)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def make_sampler(args, space, seed):
    import optuna

    if args.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if args.sampler == "bayesian":
        return optuna.samplers.TPESampler(seed=seed)
    for name, wanted in space.items():
        if wanted[0] != "choice":
            raise UserError(f"--sampler grid: wanted a choice for {name}, such as {name}=a,b,c, got a range")
    return optuna.samplers.GridSampler({name: wanted[1] for name, wanted in space.items()}, seed=seed)


def finished(study):
    from optuna.trial import TrialState

    return study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])


def exhausted(study, args, space):
    """Whether every point of the grid was tried."""
    if args.sampler != "grid":
        return False
    points = 1
    for _, values in space.values():
        points *= len(values)
    return len({tuple(sorted(trial.params.items())) for trial in finished(study)}) >= points


def show(study, recipe, folder, args):
    """The best trials as a table, the command that trains with the best options, and Optuna's plots."""
    from optuna.trial import TrialState
    from rich.table import Table

    from fastlayers.harness import report

    done = study.get_trials(states=[TrialState.COMPLETE])
    pruned = len(finished(study)) - len(done)
    table = Table(title=f"{len(done)} trials, {pruned} more stopped early", title_justify="left")
    names = list(done[0].params) if done else []
    for column in ("trial", args.metric, *names):
        table.add_column(column, justify="right")
    for trial in sorted(done, key=lambda trial: trial.value, reverse=METRICS[args.metric] == "maximize")[:10]:
        values = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in trial.params.values())
        table.add_row(str(trial.number), f"{trial.value:.4g}", *values)
    report.console.print(table)
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in study.best_params.items())
    report.say("best", f"fastlayers train {recipe} {options}")
    for name in plot(study, folder):
        report.say("plot", f"{folder / name}")


def plot(study, folder):
    """Writes Optuna's plots of the study; returns their names."""
    import matplotlib
    from optuna.visualization import matplotlib as draw

    matplotlib.use("agg")
    pictures = {"history": draw.plot_optimization_history, "slice": draw.plot_slice}
    pictures |= {"intermediate": draw.plot_intermediate_values}
    if len(study.best_params) > 1 and len(finished(study)) > 2:
        pictures |= {"importances": draw.plot_param_importances, "contour": draw.plot_contour}
    for name, function in pictures.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes = function(study)
        first = axes if hasattr(axes, "figure") else axes.flat[0]
        first.figure.savefig(folder / f"{name}.png", dpi=144, bbox_inches="tight")
    return [f"{name}.png" for name in pictures]
