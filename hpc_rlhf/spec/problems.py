"""Turns pydantic's errors into plain messages, each at the place of the mistake in the user's file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hpc_rlhf.errors import Problem
from hpc_rlhf.spec.fields import PATTERN_WORDS, descriptions
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.yaml_source import Mark, Node

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
}
_SENTENCES = {
    "greater_than_equal": "must be at least {ge}, not {value}",
    "greater_than": "must be more than {gt}, not {value}",
    "less_than_equal": "must be at most {le}, not {value}",
    "less_than": "must be less than {lt}, not {value}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}, not {value}",
    "too_short": "must not be empty",
    "too_long": "has more than {max_length} entries",
    "string_too_short": "must not be empty",
    "string_too_long": "has more than {max_length} characters",
    "value_error": "{error}",
}
# Names of fields in other tools, such as DeepSpeed-Chat's scripts.
_ELSEWHERE = {
    "learning_rate": ("lr", "actor_lr", "critic_lr"),
    "num_train_epochs": ("epochs",), "num_epochs": ("epochs",),
    "batch_size": ("global_batch", "micro_batch"), "train_batch_size": ("global_batch",),
    "per_device_train_batch_size": ("micro_batch",), "gradient_accumulation_steps": ("global_batch",),
    "num_warmup_steps": ("warmup",), "warmup_steps": ("warmup",), "warmup_ratio": ("warmup",),
    "lr_scheduler_type": ("schedule",), "adam_epsilon": ("eps",),
    "zero_stage": ("zero",), "lora_dim": ("lora",), "gradient_checkpointing": ("activation_checkpointing",),
    "eval_steps": ("eval_every",), "eval_strategy": ("eval_every",),
    "load_best_model_at_end": ("keep_best",), "metric_for_best_model": ("keep_best",),
    "max_grad_norm": ("clip_grad",), "model_name_or_path": ("actor",),
    "max_length": ("max_prompt_tokens", "max_answer_tokens"),
}  # fmt: skip
_SUGGESTED, _LISTED = 3, 5  # fields suggested for an unknown one; up to how many are all listed
_MOST = 500  # errors reported; a hostile file could hold a hundred thousand


class _Error:
    """A pydantic error and its node in the user's tree."""

    def __init__(self, error: Any, root: Node) -> None:
        self.type: str = error["type"]
        self.context: dict[str, Any] = error.get("ctx", {})
        self.message: str = error["msg"]
        self.path: tuple[str | int, ...] = ()
        self.unions: set[tuple[str | int, ...]] = set()  # where pydantic tried several types
        self.node = root
        self.at_key = False
        for step in error["loc"]:
            below = _below(self.node, step)
            if below is not None:
                self.node = below
                self.path += (step,)
            elif step == "[key]":
                self.at_key = True
            elif self.type == "missing" and step == error["loc"][-1]:
                self.path += (step,)
            else:
                self.unions.add(self.path)

    @property
    def is_other_kind(self) -> bool:
        """Whether it is about a branch of a union that the user did not choose."""
        is_kind = self.type in _KINDS or (self.type == "literal_error" and isinstance(self.node.value, dict | list))
        return is_kind and self.path in self.unions

    @property
    def kind(self) -> str:
        """The kind of value that was expected; empty if the error is about something else."""
        return _KINDS.get(self.type) or self.context.get("expected", "")

    @property
    def mark(self) -> Mark:
        by_key = self.at_key or self.type == "extra_forbidden" or isinstance(self.node.value, dict | list)
        return self.node.place if by_key else self.node.mark

    def problem(self, kinds: list[str]) -> Problem:
        """The problem. `kinds` are the kinds of values that are allowed here, if the value is of another one."""
        value = self.node.value
        hint = None
        if self.type == "missing":
            what, hint = "is missing", _description(self.path)
        elif self.type == "extra_forbidden":
            what, hint = "is not a field", _close_fields(self.path)
        elif self.type in _KINDS or len(kinds) > 1:
            what = f"must be {' or '.join(kinds)}, not {_shown(value)}"
            hint = "put it in quotes" if "text" in kinds and isinstance(value, bool | int | float) else None
        elif self.type == "string_pattern_mismatch":
            what = f"{_shown(value)} {PATTERN_WORDS[self.context['pattern']]}"
        elif self.type in _SENTENCES:
            what = _SENTENCES[self.type].format(value=_shown(value), **self.context)
        else:
            what = self.message[0].lower() + self.message[1:]
        if self.type == "literal_error":
            close = get_close_matches(str(value), re.findall(r"[\w-]+", self.context["expected"]), 1)
            hint = f"did you mean {close[0]}?" if close else None
        return self.mark.problem(what, hint, ".".join(_shown_key(step) for step in self.path))


def problems_of(invalid: ValidationError, root: Node) -> list[Problem]:
    """The problems of a spec, without duplicates."""
    raw = invalid.errors(include_url=False, include_input=False)
    errors = [_Error(each, root) for each in raw[:_MOST]]
    # A list is also called too short if its entries have errors.
    errors = [error for error in errors if not (error.type == "too_short" and error.node.value)]
    problems: dict[tuple[Mark | str, str, str | int], Problem] = {}
    for error in errors:
        kinds = [error.kind]
        if error.is_other_kind:
            siblings = [other for other in errors if error.path in other.unions]
            if not all(other.is_other_kind and other.path == error.path for other in siblings):
                continue  # the user chose another branch, which reports the problem
            kinds = list(dict.fromkeys(other.kind for other in siblings))
        problem = error.problem(kinds)
        # Stages inherit slurm, with its problems. Fields that are missing have the place of their mapping in common.
        inherited = error.type == "value_error" and error.path[-1:] == ("slurm",)
        missing = error.path[-1] if error.type == "missing" else ""
        problems.setdefault(("slurm" if inherited else error.mark, problem.what, missing), problem)
    if len(raw) > _MOST:
        problems[root.mark, "", ""] = Mark(root.mark.source).problem("has more mistakes than these")
    return list(problems.values())


def _below(node: Node, step: str | int) -> Node | None:
    if isinstance(node.value, dict) and isinstance(step, str):
        return node.value.get(step)
    if isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
        return node.value[step]
    return None


def _close_fields(path: tuple[str | int, ...]) -> str | None:
    """Suggestions for an unknown field."""
    fields = _fields_at(path[:-1])
    wrong = str(path[-1]).replace("-", "_").lower()
    elsewhere = (names for name, names in _ELSEWHERE.items() if name.replace("_", "") == wrong.replace("_", ""))
    meant = next(elsewhere, ())
    close = [name for name in meant if name in fields]
    close = close or [name for name in fields if wrong in name.split("_")] or get_close_matches(wrong, fields, 1)
    close = close or [field for field in _all_fields() if field.split(".")[-1] in (wrong, *meant)]
    if close:
        return f"did you mean {' or '.join(close[:_SUGGESTED])}?"
    if len(fields) <= _LISTED:
        return f"the fields here are {', '.join(fields)}" if fields else None
    nearest = get_close_matches(wrong, fields, _SUGGESTED, cutoff=0)
    return f"the nearest of {len(fields)} fields here are {', '.join(nearest)}; hpc-rlhf schema has all"


@cache
def _all_fields() -> tuple[str, ...]:
    """The dotted paths of all fields of a spec."""

    def below(model: type[BaseModel], above: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield above + name
            if (inner := _model_in(field.annotation)) is not None:
                yield from below(inner, f"{above}{name}.")

    return tuple(below(JobSpec, ""))


def _description(path: tuple[str | int, ...]) -> str | None:
    """The first sentence of a field's description."""
    model = _model_at(path[:-1])
    words = descriptions(model).get(str(path[-1]), "").split() if model else []
    return " ".join(words).split(". ")[0].rstrip(".") or None


def _fields_at(path: tuple[str | int, ...]) -> dict[str, FieldInfo]:
    """The fields of the model at a path."""
    model = _model_at(path)
    return model.model_fields if model else {}


def _model_at(path: tuple[str | int, ...]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = JobSpec
    for step in path:
        if isinstance(step, str):  # the entries of a list have the model in its annotation
            field = model.model_fields.get(step) if model else None
            model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)


def _shown(value: object) -> str:
    """A value for a message: short, and without control characters."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _shown_key(step: str | int) -> str:
    text = str(step)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else text[:57] + "…"
