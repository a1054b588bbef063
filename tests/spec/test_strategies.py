"""How the models of a stage are held in memory."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hpc_rlhf.spec.fields import seconds
from hpc_rlhf.spec.stages import DpoSpec, PpoSpec, SftSpec

EVERYTHING = {"zero": 3, "offload_optimizer": True, "offload_params": True, "activation_checkpointing": True}
LORA = {"rank": 4}


@pytest.mark.parametrize(
    ("critic", "expected"),
    [
        ({}, EVERYTHING),
        ({"zero": 2}, {**EVERYTHING, "zero": 2, "offload_params": False}),
        ({"zero": 0}, {"zero": 0, "offload_optimizer": False, "offload_params": False}),
        ({"offload_optimizer": False}, {**EVERYTHING, "offload_optimizer": False}),
        ({"activation_checkpointing": False}, {**EVERYTHING, "activation_checkpointing": False}),
    ],
)
def test_critic_inherits_unset_fields_from_the_actor(critic: dict[str, Any], expected: dict[str, Any]) -> None:
    made = PpoSpec.model_validate({**EVERYTHING, "lora": LORA, "critic": critic}).of_critic
    assert {name: getattr(made, name) for name in expected} == expected
    assert made.lora is None


def test_critic_has_its_own_adapters() -> None:
    spec = PpoSpec.model_validate({"lora": LORA, "critic": {"lora": {"rank": 8}}})
    assert spec.of_critic.lora is not None
    assert (spec.lora and spec.lora.rank, spec.of_critic.lora.rank) == (4, 8)


def test_frozen_models_use_their_counterparts_strategy_or_cpu_memory() -> None:
    def held(spec: PpoSpec | DpoSpec) -> dict[str, tuple[int, bool]]:
        strategies = spec.strategies.items()
        return {name: (each.zero, each.offload_params) for name, each in strategies}  # type: ignore[attr-defined]

    apart: dict[str, Any] = {"zero": 3, "critic": {"zero": 0}}
    whole = {"": (3, False), "critic": (0, False)}
    assert held(PpoSpec(**apart)) == {**whole, "ref": (3, False), "reward": (0, False)}
    assert held(PpoSpec(**apart, offload_frozen=True)) == {**whole, "ref": (3, True), "reward": (3, True)}
    assert held(DpoSpec(zero=1, offload_frozen=True)) == {"": (1, False), "ref": (3, True)}


def test_a_stage_with_one_model_has_one_strategy() -> None:
    spec = SftSpec(zero=2)
    assert spec.strategies == {"": spec}


@pytest.mark.parametrize("every", [1, 500, "auto", "90 s", "10 min", "1.5h"])
def test_checkpoint_every_takes_steps_durations_and_auto(every: int | str) -> None:
    assert SftSpec.model_validate({"checkpoint_every": every}).checkpoint_every == every


@pytest.mark.parametrize("every", [0, -1, 2**31, True, 1.5, "10 minutes", "often", "min", None])
def test_checkpoint_every_rejects_other_values(every: object) -> None:
    with pytest.raises(ValidationError, match="a number of steps, a duration such as 10 min, or auto"):
        SftSpec.model_validate({"checkpoint_every": every})


def test_duration_units() -> None:
    assert [seconds(span) for span in ("90 s", "10min", "1.5 h", "2 d")] == [90, 600, 5400, 172800]


@pytest.mark.parametrize(
    "fields",
    [
        {"zero": 2}, {"zero": 3}, {"zero": 0}, {"sequence_parallel": 2}, {"lora": LORA}, {"dropout": 0.1},
        {"offload_optimizer": True}, {"keep_best": "loss", "eval_every": 2},
        {"zero": 0, "precision": "fp32", "optimizer": "onebit-adam"},
    ],
)  # fmt: skip
def test_what_a_pipeline_cannot_do_is_refused(fields: dict[str, Any]) -> None:
    assert SftSpec.model_validate({"pipeline_parallel": 2, "zero": 1}).pipeline_stages == 2
    assert SftSpec.model_validate({"pipeline_parallel": 2, "precision": "fp32"}).pipeline_stages == 2
    with pytest.raises(ValidationError, match="pipeline_parallel needs"):
        SftSpec.model_validate({"pipeline_parallel": 2, "zero": 1, **fields})


def test_only_stages_that_learn_text_have_pipelines() -> None:
    with pytest.raises(ValidationError, match="pipeline_parallel"):
        DpoSpec.model_validate({"pipeline_parallel": 2})
