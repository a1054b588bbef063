"""The types of a spec's fields, with their checks."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, TypeVar

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # a third of pydantic's start-up time

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    create_model,
)  # fmt: skip
from pydantic_core import CoreSchema

from hpc_rlhf.slurm.sbatch import OWNED_OF_SENTINELS, refuse_owned
from hpc_rlhf.spec.gpus import known_gpu

_NO_CONTROLS = r"^[^\x00-\x1f\x7f\x85\u2028\u2029]*$"
_NAME = r"^[A-Za-z0-9._-]+$"
# Values passed to Slurm. Characters with a meaning in a shell are excluded, except those that Slurm's node
# lists and constraints need; the scripts quote the values.
_SLURM_VALUE = r"^[A-Za-z0-9_.][A-Za-z0-9_.,:/=+@%&|*()\[\]-]*$"
_SLURM_TIME = r"^([0-9]{1,9}(:[0-9]{2}){0,2}|[0-9]{1,6}-[0-9]{1,2}(:[0-9]{2}){0,2})$"
_SLURM_MEMORY = r"^[0-9]{1,12}[KMGT]?$"

AUTO = "auto"  # where a stage says so, `launch/auto.py` chooses the value
DURATION = r"^[0-9]{1,9}(\.[0-9]{1,9})? ?(s|min|h|d)$"

# The messages for values that do not match.
PATTERN_WORDS = {
    _NO_CONTROLS: "must be one line without control characters",
    _NAME: "may hold only letters, digits and . _ -",
    _SLURM_VALUE: "may hold only letters, digits and _ . , : / = + @ % & | * ( ) [ ] -, "
    "and start with a letter, digit, _ or .",
    _SLURM_TIME: "must be a time limit in Slurm's format: minutes, H:MM:SS or D-HH:MM:SS",
    _SLURM_MEMORY: "must be a size such as 900G",
    DURATION: "must be a duration such as 90 s, 10 min, 4 h or 2 d",
}

# Text that ends up in a shell script or a `#SBATCH` line: no control characters anywhere.
FreeText = Annotated[str, StringConstraints(pattern=_NO_CONTROLS, max_length=4096)]
# YAML reads an account or a time limit that consists of digits as a number.
_NumberAsText = BeforeValidator(lambda raw: str(raw) if type(raw) is int else raw)
Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=128), _NumberAsText]
SlurmValue = Annotated[str, StringConstraints(pattern=_SLURM_VALUE, max_length=1024), _NumberAsText]
SlurmTime = Annotated[str, StringConstraints(pattern=_SLURM_TIME), _NumberAsText]
SlurmMemory = Annotated[str, StringConstraints(pattern=_SLURM_MEMORY), _NumberAsText]
Gpu = Annotated[str, _NumberAsText, AfterValidator(known_gpu)]
SbatchOption = Annotated[str, AfterValidator(refuse_owned)]
SentinelOption = Annotated[str, AfterValidator(partial(refuse_owned, owned=OWNED_OF_SENTINELS))]
Duration = Annotated[str, StringConstraints(pattern=DURATION)]
PathText = Annotated[FreeText, StringConstraints(min_length=1, max_length=1024)]
Command = Annotated[FreeText, StringConstraints(min_length=1)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_TOP_P = "Sample from the smallest set of tokens with this total probability; 1 samples from all tokens."
TopP = Annotated[float, Field(gt=0, le=1, description=_TOP_P)]
TopK = Annotated[int, Field(ge=0, description="Sample from the k most likely tokens; 0 samples from all tokens.")]


class Model(BaseModel):
    """A part of a spec. The string below a field documents it, as a description in its `Field` does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, text in descriptions(cls).items():
            properties[name]["description"] = text
        return schema


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What documents each field of a model: the description in its `Field`, or the string below it.

    Pydantic can read these strings itself (``use_attribute_docstrings``), but then every command pays for it.
    """
    texts: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, Model) and base is not Model:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(tree, ast.ClassDef)
            for node, below in pairwise(tree.body):
                if (
                    isinstance(node, ast.AnnAssign)
                    and isinstance(node.target, ast.Name)
                    and isinstance(below, ast.Expr)
                ):
                    texts[node.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    given = {name: info.description for name, info in model.model_fields.items() if info.description}
    return {name: text for name, text in (texts | given).items() if name in model.model_fields}


_M = TypeVar("_M", bound=Model)


def add_fields(fields: Mapping[str, Any]) -> Callable[[type[_M]], type[_M]]:
    """A class decorator that adds fields, each a type and its `Field`, to a model."""

    def add(base: type[_M]) -> type[_M]:
        return create_model(base.__name__, __base__=base, __doc__=base.__doc__, __module__=base.__module__, **fields)

    return add


def seconds(duration: str) -> float:
    """A ``Duration`` in seconds."""
    number = duration.rstrip("smindh ")
    return float(number) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[duration[len(number) :].strip()]
