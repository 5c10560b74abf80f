"""Networks for other runtimes: files that Python, C++, JavaScript and others run without JAX.

`to_file` writes one and measures it; `onnx_model` returns the ONNX model alone. What ONNX needs
comes with `pip install 'fetal_flax[onnx]'`. As of the package, names are imported when they are
first used: the command line reads `settings` and need not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fetal_flax.export.comparison import Comparison
    from fetal_flax.export.export import ExportReport, to_file
    from fetal_flax.export.onnx_network import metadata, onnx_model
    from fetal_flax.export.settings import ExportSettings

_HOMES = {
    "Comparison": "comparison",
    "ExportReport": "export",
    "ExportSettings": "settings",
    "metadata": "onnx_network",
    "onnx_model": "onnx_network",
    "to_file": "export",
}

__all__ = ["Comparison", "ExportReport", "ExportSettings", "metadata", "onnx_model", "to_file"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fetal_flax.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fetal_flax.export.{_HOMES[name]}"), name)
