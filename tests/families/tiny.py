"""A tiny model folder for every variant and task of every family, so that the real loaders and the detection run."""

from __future__ import annotations

from tests.examples import mochi_model
from tests.families import cogvideox_models, hunyuan_models, ltx_models, wan_models
from tests.families.rows import Row

OURS: dict[str, Row] = {**cogvideox_models.ROWS, **hunyuan_models.ROWS, **ltx_models.ROWS, **wan_models.ROWS}
TINY: dict[str, Row] = {**OURS, **mochi_model.ROWS}
"""With the example of a family from outside the package, which keeps the same promises."""
