"""Every fastlayers command in README.md and docs/ is one that the command line takes, and every picture is there."""

import re
import shlex
from pathlib import Path

import pytest

from fastlayers import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [part.strip() for line in lines for part in re.split(r"&&|#", line)]
    commands = [shlex.split(command)[1:] for command in commands if command.startswith("fastlayers ")]
    assert commands
    for command in commands:
        cli.parse(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_pages_are_there(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link
