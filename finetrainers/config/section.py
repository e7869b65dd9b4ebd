"""What every group of options is."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.config import JsonDict

FREE: JsonDict = {"resume": "free"}
"""Marks an option that may change between a run and its resumption without changing a number of it."""


class Section(BaseModel):
    """A group of options: frozen, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `checkpoint.every: yes` as every step.
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("it takes no yes or no")
        return value
