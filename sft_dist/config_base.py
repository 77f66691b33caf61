"""What the parts of the recipe's tree are made of."""

from __future__ import annotations

import os.path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1)]
Location = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
# A name in dotted keys, so without dots.
SOURCE_NAME = "^[A-Za-z0-9_-]+$"
SourceName = Annotated[str, Field(pattern=SOURCE_NAME)]
NAMED = Field(json_schema_extra={"additionalProperties": False, "minProperties": 1})
# numpy takes no larger seed.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """What all sections share: unknown keys are refused and every field carries its description."""

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )
