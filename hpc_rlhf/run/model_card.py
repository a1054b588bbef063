"""The model card of a chat model: what it was made from, and how, for the people who load it.

Local paths stay out of it: a card is for others. The same run gives the same card after any interruption.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hpc_rlhf import __version__
from hpc_rlhf.run.format import number
from hpc_rlhf.run.masking import mask_all
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.job import FromScratch, JobSpec
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.stages import POLICIES, kind_of

NAME = "README.md"
# Fields of a stage that say where it ran, not what it learned.
_OF_THE_MACHINE = {"slurm", "micro_batch", "checkpoint_every", "mttf", "keep_checkpoints", "rollout"}


def model_card(
    spec: JobSpec, model: str, metrics: Mapping[str, Mapping[str, Any]], evaluation: str = "", where: str = "PATH"
) -> str:
    """The card in Markdown, with metadata that the hub reads.

    Args:
        model: a chat model of the run, such as ppo or ema.
        metrics: the metrics of the finished stages, by stage.
        evaluation: the results of the run's evaluation, in Markdown.
        where: what to load the model by, in the example.
    """
    lineage = list(_lineage(spec, POLICIES[model].name))
    sources = {source.name: source for source in _sources(spec, lineage)}
    base = spec.models.actor
    on_hub = [name for name in sources if _is_on_hub(sources[name])]
    licence = None if isinstance(base, FromScratch) else _licence(hub.snapshot(base) or Path(base))
    facts = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hpc-rlhf", *lineage],
        "base_model": base if isinstance(base, str) and not os.path.isabs(base) else None,
        "license": licence,
        "datasets": on_hub or None,
    }
    metadata = yaml.safe_dump({name: fact for name, fact in facts.items() if fact}, sort_keys=False)
    parts = [
        f"---\n{metadata}---\n\n# {spec.name}: {model}",
        f"{_origin(base)} Trained with hpc-rlhf {__version__}: {' → '.join(kind_of(s).title for s in lineage)}.",
        f"## Use\n\n```python\n{_EXAMPLE.format(where=where)}```",
        "## Training\n\n" + "\n\n".join(_stage(spec, name, metrics.get(name, {})) for name in lineage),
        "## Data\n\n" + table(("source", "format", "weight", "license"), map(_source_row, sources.values())),
        *([f"## Evaluation\n\n{evaluation}"] if evaluation else []),
    ]
    return "\n\n".join(parts) + "\n"


_EXAMPLE = """\
from transformers import pipeline

chat = pipeline("text-generation", model="{where}")
print(chat([{{"role": "user", "content": "Hello!"}}], max_new_tokens=256)[0]["generated_text"][-1]["content"])
"""


def _lineage(spec: JobSpec, stage: str) -> Iterator[str]:
    """A stage after all those that it depends on, each once."""
    seen: dict[str, None] = {}

    def visit(name: str) -> None:
        for need in spec.needs(name):
            visit(need)
        seen[name] = None

    visit(stage)
    return iter(seen)


def _sources(spec: JobSpec, lineage: list[str]) -> Iterator[SourceSpec]:
    for field, source in spec.sources.items():
        if field.startswith("data.") or field.split(".")[1] in lineage:
            yield source


def _is_on_hub(source: SourceSpec) -> bool:
    return source.path is not None and not os.path.isabs(source.path)


def _origin(base: str | FromScratch) -> str:
    if isinstance(base, FromScratch):
        return f"A chat model from scratch ({base.from_scratch.get('model_type', 'transformers')})."
    name = Path(base).name if os.path.isabs(base) else f"[{base}](https://huggingface.co/{base})"
    return f"A chat model made from {name}."


def _stage(spec: JobSpec, name: str, metrics: Mapping[str, Any]) -> str:
    """A stage's settings that are not the defaults, and its results."""
    fields = spec.stage(name).model_dump(mode="json", exclude_defaults=True, exclude=_OF_THE_MACHINE)
    fields = {field: value for field, value in fields.items() if field not in kind_of(name).sources}
    settings = yaml.safe_dump(_without_paths(mask_all(fields)), sort_keys=False) if fields else "# the defaults\n"
    numbers = ((key, value) for key, value in metrics.items() if isinstance(value, int | float))
    results = ", ".join(f"{key} {number(value)}" for key, value in numbers)
    text = f"### {kind_of(name).title}\n\n```yaml\n{settings}```"
    return f"{text}\n\nResults: {results}." if results else text


def _without_paths(value: Any) -> Any:
    """Settings with the names of files in place of their paths."""
    if isinstance(value, Mapping):
        return {name: _without_paths(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(each) for each in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _source_row(source: SourceSpec) -> tuple[str, ...]:
    name = source.name if source.path is None or _is_on_hub(source) else Path(source.path).name
    licence = _licence(Path(source.path)) if source.path is not None else "generated"
    return name, source.row_format, f"{source.weight:g}", licence or "unknown"


def _licence(folder: Path) -> str | None:
    """The license that the card in a folder names, if there is one."""
    try:
        _, metadata, _ = (folder / NAME).read_text(encoding="utf-8").split("---\n", 2)
        licence = yaml.safe_load(metadata)["license"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
