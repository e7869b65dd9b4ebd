"""From `method.name` to the method: each module of `methods/` that holds one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

from finetrainers import methods
from finetrainers.families.base import Family
from finetrainers.methods.base import Method
from finetrainers.objectives import Objective


def find_method(options: Any, family: Family, objective: Objective, *, dtype: torch.dtype) -> Method:
    """The method that `options.name` names, built on a family and an objective. The schema admits only known names."""
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    kinds = {kind.name: kind for kind in Method.__subclasses__()}
    return kinds[options.name](family, objective, options, dtype=dtype)
