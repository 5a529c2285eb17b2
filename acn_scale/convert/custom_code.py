"""The code that goes with a network which Transformers does not know: our models' own source, in one file."""

import ast
from pathlib import Path

CODE_NAME = "modeling_acn_scale.py"
HERE = Path(__file__).parent
MODELS = HERE.parent / "models"
# In an order in which each needs only those before it.
BASE = ["tokens", "connectivity", "trunk", "base", "layers", "patches", "initial_weights"]
PARTS = [*BASE, "classifier", "vit", "mixer", "bert", "__init__"]
SOURCES = (*(MODELS / f"{name}.py" for name in PARTS), HERE / "transformers_classes.py")
HEADER = '''"""Networks of acn_scale for Transformers, made from its source. Needs PyTorch and Transformers only."""

from __future__ import annotations
'''


def custom_code() -> str:
    """One module that needs neither acn_scale nor anything else but PyTorch and Transformers."""
    imports, bodies = [], []
    for path in SOURCES:
        text = path.read_text()
        for node in ast.parse(text).body:
            segment = _with_decorators(text, node)
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not segment.startswith("from acn_scale"):
                    imports.append(segment)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                bodies.append(segment)
    return "\n".join([HEADER, *dict.fromkeys(imports), ""]) + "\n" + "\n\n\n".join(bodies) + "\n"


def _with_decorators(text: str, node: ast.stmt) -> str:
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
