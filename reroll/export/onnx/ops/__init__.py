"""Lower the ops of a graph to ONNX operators, one file for each family of them.

Every module of this folder is imported with it, and registers its lowerings.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
