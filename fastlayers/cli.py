"""The `fastlayers` command: a table of subcommands.

Each names a module (or holds an object) with add_arguments(parser) and run(args) -> exit status, or with a COMMANDS
table of its own, or both, and the extra of the package that it needs, if any.
"""

import argparse
import importlib
import sys

import fastlayers
from fastlayers.harness import UserError

COMMANDS = {
    "info": ("fastlayers.info", "what was built, and which backends can run on this machine", None),
    "verify": ("fastlayers.verify", "check every op, dtype and option against PyTorch on this machine", None),
    "train": ("fastlayers.harness.train", "train a recipe, on fastlayers or beside plain PyTorch", None),
    "tune": ("fastlayers.harness.tune", "search for the options with which a recipe does best", "demo"),
    "bench": ("fastlayers.bench", "measure fastlayers against PyTorch on this machine", "bench"),
}


def add_commands(parser, commands, arguments):
    """Add one subparser a command; only the module of the one that `arguments` starts with is imported."""
    parsers = parser.add_subparsers(metavar=" | ".join(commands), required=True)
    for name, (module, summary, extra) in commands.items():
        command = parsers.add_parser(name, help=summary, description=summary)
        if arguments[:1] == [name]:
            module = import_command(name, module, extra)
            if (arguments[1:2] and arguments[1] in getattr(module, "COMMANDS", ())) or not hasattr(module, "run"):
                add_commands(command, module.COMMANDS, arguments[1:])
            else:
                module.add_arguments(command)
                command.set_defaults(run=module.run)


def import_command(name, module, extra):
    if not isinstance(module, str):
        return module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = error.name.split(".")[0]
        if extra is None or package == "fastlayers":
            raise
        raise UserError(f'{name} needs {package}: pip install "fastlayers[{extra}]"') from error


def parse(arguments):
    parser = argparse.ArgumentParser(prog="fastlayers", description=fastlayers.__doc__)
    parser.add_argument("--version", action="version", version=f"fastlayers {fastlayers.__version__}")
    add_commands(parser, COMMANDS, arguments)
    return parser.parse_args(arguments)


def main(arguments=None):
    try:
        args = parse(sys.argv[1:] if arguments is None else list(arguments))
        return args.run(args)
    except UserError as error:
        print(f"fastlayers: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
