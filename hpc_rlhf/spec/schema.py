"""The JSON Schema of a job spec as a person writes it."""

from __future__ import annotations

from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.layers import EXTENDS


def json_schema() -> dict[str, object]:
    """The schema of the models, and of `extends`, which is gone once a spec is loaded."""
    schema = JobSpec.model_json_schema()
    required = schema.pop("required")
    schema["properties"] = {
        EXTENDS: {
            "type": "string",
            "minLength": 1,
            "description": "Another spec, beside this one, that this one is laid over: mappings are merged, everything else is replaced.",
        },
        **schema["properties"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "hpc-rlhf job spec",
        "anyOf": [{"required": required}, {"required": [EXTENDS]}],  # what is extended may hold the rest
    }
