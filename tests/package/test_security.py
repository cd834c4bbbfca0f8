"""What the package must never contain, read from its syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import palate

FILES = sorted(Path(palate.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "torchvision", "timm", "open_clip", "hpsv2", "lpips"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "np.load",
    "numpy.load",
    "joblib.load",
}
LOADERS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}


def problems(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            tensors_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name in CALLS | LOADERS and not (name == "torch.load" and tensors_only):
                found.append(f"call {name}")
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    found.append("shell=")
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                    found.append("trust_remote_code=")
                if keyword.arg in ("allow_pickle", "use_safetensors") and ast.unparse(keyword.value) == str(
                    keyword.arg == "allow_pickle"
                ):
                    found.append(f"{keyword.arg}=")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append("except without a type")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_no_file_can_run_foreign_code(file):
    assert problems(ast.parse(file.read_text("utf-8"))) == []


@pytest.mark.parametrize("code", [
    "import pickle", "from torchvision import ops", "import timm.models", "eval('1')", "exec(x)", "torch.load(p)",
    "torch.load(p, weights_only=x)",
    "yaml.load(f)", "subprocess.run(c, shell=True)", "from_pretrained(x, trust_remote_code=True)",
    "try:\n  f()\nexcept:\n  pass", "__import__('os')", "os.system(x)", "np.load(f, allow_pickle=True)",
    "from_pretrained(x, use_safetensors=False)",
])  # fmt: skip
def test_the_reader_of_syntax_trees_sees(code):
    assert problems(ast.parse(code))


def test_files_were_read():
    assert {"loop.py", "checkpoint.py", "app.py", "srpo.py"} <= {file.name for file in FILES}
