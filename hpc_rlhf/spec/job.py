"""The job spec as frozen models: every field with its type, default and documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from hpc_rlhf.spec.auto import Autos
from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.data import DataSpec
from hpc_rlhf.spec.fields import Model, Name, PathText, Positive
from hpc_rlhf.spec.inheritance import inherit
from hpc_rlhf.spec.layers import EXTENDS
from hpc_rlhf.spec.notify import NotifySpec, TrackersSpec
from hpc_rlhf.spec.rewards import RewardItem
from hpc_rlhf.spec.source import SourceSpec
from hpc_rlhf.spec.space import SweepSpec
from hpc_rlhf.spec.stages import EVALUATION, POLICIES, STAGE_KINDS, STAGE_NAMES, Data, EvalSpec, StagesSpec, kind_of
from hpc_rlhf.spec.training import StageSpec
from hpc_rlhf.spec.yaml_source import Node


class FromScratch(Model):
    """A new model with random weights instead of a pretrained one."""

    from_scratch: dict[str, int | float | bool | str]
    """The model's configuration: model_type (llama, opt, gpt2, qwen3, …) and the fields of that architecture. A BPE
    tokenizer with vocab_size entries is trained on the data."""

    @model_validator(mode="after")
    def _check_fields(self) -> FromScratch:
        if missing := [key for key in ("model_type", "vocab_size") if key not in self.from_scratch]:
            raise ValueError(f"from_scratch needs {' and '.join(missing)}")
        if not isinstance(self.from_scratch["vocab_size"], int) or self.from_scratch["vocab_size"] < 270:
            raise ValueError("vocab_size must be a whole number of at least 270: the 256 bytes and the special tokens")
        return self


ModelRef = PathText | FromScratch


class ModelsSpec(Model):
    """The models that the stages start from."""

    actor: ModelRef
    """Hub id or local folder of the language model to turn into a chat model, or {from_scratch: …}. Write a folder as a
    path, such as ./my-model: without a slash at its start, or ./, it is a hub id."""
    reward: ModelRef | None = None
    """The same for the reward model and the critic; defaults to the actor. It must have the actor's tokenizer. A
    finished reward model (a sequence classification model with one label) keeps its head: the reward stage trains it
    further, and without that stage PPO and the evaluation score with it as it is."""


# Stages that take nothing from ``data``.
_NEED_NO_DATA = {kind.name for kind in STAGE_KINDS if kind.data is Data.DOCUMENTS}


class JobSpec(Model):
    """A complete run: data, models, stages and where they run."""

    name: Name = Field(description="Name of the run; Slurm jobs are called name.stage.")
    run_dir: PathText
    """Folder for everything that the run writes, on a file system that all nodes share. In this and all other paths of
    a spec, ${VAR} and ${VAR:-default} are expanded, and a relative path starts at the folder of the file that it is
    written in; with --set, at the working directory."""
    share: Literal["nobody", "group"] = "nobody"
    """Who else may read the run. With group, the run directory's group may, so that its members can use status, logs,
    chat, compare, report --out and --reuse; only you can change the run. Its group is that of the folder in which it is
    created if that folder has the set-group-ID bit (chmod g+s), and otherwise your own. With group, the folders above
    run_dir may be writable by a group of yours or belong to a member of it. You then trust its members: they could
    replace the run."""
    follows: PathText | None = None
    """The run of which this is the next round, as hpc-rlhf next writes it. The evaluation then asks the prompts of the
    first round's, so that rounds can be compared; that needs the same seed, data.held_out, data.version and
    data.max_prompt_tokens, and that sources of both have the same prompts."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=1234, description="Seed of all random numbers.")
    slurm: SlurmSpec = Field(default=SlurmSpec(), description="Slurm settings of all stages.")
    data: DataSpec = Field(description="Training data of all stages but pretraining; pretraining alone needs none.")
    models: ModelsSpec = Field(description="Models to start from.")
    stages: StagesSpec = Field(description="Stages to run.")
    trackers: TrackersSpec = TrackersSpec()
    """Where metrics are logged in addition to metrics.jsonl and TensorBoard."""
    notify: NotifySpec = NotifySpec()
    """Who is notified when the run has finished or needs the user."""
    sweep: SweepSpec | None = None
    """Several runs, with the values that each takes: {stages.ppo.kl_coef: [0.02, 0.1], seed: [1, 2, 3]} makes six."""
    sweep_limit: Positive | None = None
    """How many runs of a sweep may have running jobs at the same time; null sets no limit. Use it to leave room for
    others, or to see the first results before the last runs start. In a search, this is the size of a wave; null
    makes waves of 4 with tpe, and otherwise one of all."""

    _autos: Autos = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        fields = inherit(Node.of(raw)).plain()
        stages = fields.get("stages") if isinstance(fields, dict) else None
        if isinstance(stages, dict) and {name for name, stage in stages.items() if stage is not None} <= _NEED_NO_DATA:
            return {"data": {"sources": ()}, **fields}
        return fields

    @property
    def autos(self) -> Autos:
        """The fields set to auto, whose values are still to be chosen."""
        return self._autos

    def with_autos(self, autos: Autos) -> JobSpec:
        """A copy with these fields still to be chosen."""
        marked = self.model_copy()
        marked._autos = autos
        return marked

    def with_stages(self, **changes: Mapping[str, Any]) -> JobSpec:
        """A copy with other fields in some stages. They are not validated."""
        stages = {name: self.stage(name).model_copy(update=dict(fields)) for name, fields in changes.items()}
        return self.model_copy(update={"stages": self.stages.model_copy(update=stages)})

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages of the run, each after its inputs."""
        return tuple(name for name in STAGE_NAMES if getattr(self.stages, name) is not None)

    @property
    def trained(self) -> tuple[str, ...]:
        """The stages of the run that train."""
        return tuple(name for name in self.stage_names if kind_of(name).trains)

    @property
    def shares(self) -> dict[str, float]:
        """The relative shares of the prompts, by the stages of the run that train on them."""
        return {name: getattr(self.data.split, name) for name in self.trained if kind_of(name).data.is_shared}

    def longest(self, name: str) -> int:
        """Tokens of the longest sequence in a stage."""
        together = self.data.max_prompt_tokens + self.data.max_answer_tokens
        return int(getattr(self.stage(name), "sequence_length", together))

    def held_out(self, name: str) -> float:
        """The fraction of its data that a stage holds out."""
        return float(getattr(self.stage(name), "held_out", self.data.held_out))

    @property
    def sources(self) -> dict[str, SourceSpec]:
        """All data sources that the stages read, by the field of the spec that holds each."""
        fields: dict[str, Any] = {"data.sources": self.data.sources}
        for stage in self.stage_names:
            fields |= {f"stages.{stage}.{name}": getattr(self.stage(stage), name) for name in kind_of(stage).sources}
        named: dict[str, SourceSpec] = {}
        for path, value in fields.items():
            if isinstance(value, tuple):
                named |= {f"{path}.{place}": source for place, source in enumerate(value)}
            elif value is not None:
                named[path] = value
        return named

    @property
    def policies(self) -> dict[str, str]:
        """The chat models that the run makes, in order, each with the stage that makes it."""
        return {
            model: kind.name
            for model, kind in POLICIES.items()
            if kind.name in self.stage_names and (model != kind.average or getattr(self.stage(kind.name), "ema", False))
        }

    @property
    def judge(self) -> str | None:
        """The stage that trains the run's reward model, if any."""
        return next((name for name in self.stage_names if kind_of(name).makes == "reward model"), None)

    @property
    def finished_reward(self) -> str | None:
        """The reward model that the run is given, if it trains none."""
        return self.models.reward if self.judge is None and isinstance(self.models.reward, str) else None

    @property
    def uses_reward_model(self) -> bool:
        """Whether a stage trains or uses a reward model."""
        return any("reward" in set(kind_of(name).models) - self.stage(name).unneeded for name in self.stage_names)

    @property
    def rewards(self) -> dict[str, tuple[RewardItem, ...]]:
        """The rewards of each stage that has some."""
        named = {name: getattr(self.stage(name), "rewards", None) for name in self.stage_names}
        return {name: rewards for name, rewards in named.items() if rewards}

    @property
    def uses_columns(self) -> bool:
        """Whether a stage has rewards, which may need the further columns of the data."""
        return bool(self.rewards)

    @property
    def evaluation(self) -> EvalSpec | None:
        evaluation: EvalSpec | None = getattr(self.stages, EVALUATION.name)
        return evaluation

    @property
    def evaluated_rewards(self) -> tuple[RewardItem, ...]:
        """The rewards by which the evaluation judges responses. It asks the run's reward model anyway."""
        stages = (EVALUATION.name, *self.trained)
        rewards = next((self.rewards[name] for name in stages if name in self.rewards), ())
        return tuple(item for item in rewards if not item.asks_run_model)

    def stage(self, name: str) -> StageSpec:
        spec = getattr(self.stages, name)
        assert isinstance(spec, StageSpec), name
        return spec

    def needs(self, name: str) -> tuple[str, ...]:
        """The stages whose artifacts a stage starts from: of those that make an actor, the last."""
        kind = kind_of(name)
        if not kind.trains:
            return self.trained
        unneeded = set(self.stage(name).unneeded)
        if kind.makes == "reward model" and self.models.reward is not None:
            unneeded |= {need for need in kind.inputs if kind_of(need).makes_actor}
        needs = [need for need in kind.inputs if need in self.stage_names and need not in unneeded]
        actors = [need for need in needs if kind_of(need).makes_actor]
        return tuple(need for need in needs if need not in actors[:-1])


def json_schema() -> dict[str, object]:
    """The JSON Schema of a spec as users write it: with `extends`, which is resolved while loading."""
    schema = JobSpec.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        for field in model["properties"].values():
            field["description"] = " ".join(field["description"].split())
    required = [name for name in schema.pop("required") if name != "data"]  # see _NEED_NO_DATA
    extends = {
        "type": "string",
        "minLength": 1,
        "description": "Another spec, relative to this one, to merge this one over: mappings are merged, everything "
        "else is replaced.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "hpc-rlhf job spec",
        "properties": {EXTENDS: extends, **schema["properties"]},
        "anyOf": [{"required": required}, {"required": [EXTENDS]}],  # the extended spec may contain the rest
    }
