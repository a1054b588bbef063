"""The JSON Schema of a job spec as users write it."""

from __future__ import annotations

from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.layers import EXTENDS


def json_schema() -> dict[str, object]:
    """The schema of the models plus `extends`, which is resolved while loading."""
    schema = JobSpec.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        for field in model["properties"].values():
            field["description"] = " ".join(field["description"].split())
    required = schema.pop("required")
    schema["properties"] = {
        EXTENDS: {
            "type": "string",
            "minLength": 1,
            "description": "Another spec, relative to this one, to merge this one over: mappings are merged, "
            "everything else is replaced.",
        },
        **schema["properties"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "hpc-rlhf job spec",
        "anyOf": [{"required": required}, {"required": [EXTENDS]}],  # the extended spec may contain the rest
    }
