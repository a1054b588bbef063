"""``python -m tests.models.table``: tries every family, and writes docs/models.md.

Each tiny model is compared with transformers (checks.py), and goes through SFT with LoRA, reward model, PPO and eval,
a step each. Two processes take an hour, because a stage takes seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.launch.local.environment import free_port
from hpc_rlhf.rank import exit_after
from hpc_rlhf.spec import model_checks
from hpc_rlhf.spec.load import read_spec
from hpc_rlhf.spec.stages.eval import EvalSpec
from tests.models.checks import Outcome, check
from tests.models.families import FAMILIES, Family
from tests.train.ranks import rank_environment
from tests.train.stages import make_run, tiny_spec

PAGE = Path(__file__).parents[2] / "docs/models.md"
PROCESSES = 2
STEP = {"max_steps": 1, "micro_batch": 4, "global_batch": 4}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {**STEP, "lora": {"rank": 2}},
    "reward": STEP,
    "ppo": {**STEP, "warmup": 0.1},
}

INTRODUCTION = """# Models

Made by `make models`, which tries a tiny model of each family, with random weights, in float32 on a CPU.

**works**: log-probabilities of sequences of unlike lengths, rewards, gradients, and greedy responses that run together
are those of transformers for one sequence at a time, to 1e-4, in training mode with `dropout: 0`; so are those of the
exported model, and those with adapters are those of the model that they are merged into. Then it goes through SFT with
`lora`, reward model, PPO and eval.

**refused**: `check` or, where the table says so, the start of the stage prints this sentence, and nothing is trained.

sequences: how they go through the model together. *packed*: one after another, without padding. *padded*: in rows with
padding, in architectures whose layers cannot tell sequences in a row apart. *one by one*: in those that padding
disturbs as well.

Families of the same kind in other sizes work alike. A model with code of its own (`trust_remote_code`) is not loaded.
"""


def chain(run: Any, world: Any) -> str:
    """Run all stages; what went wrong, or the sentence of a refusal."""
    from hpc_rlhf.train.entry import Attempt
    from hpc_rlhf.train.runtime.stop_signals import StopFlag

    spec = read_spec(run.job_yaml)
    for stage in spec.stage_names:
        attempt = Attempt(run, stage, StopFlag())
        attempt.name = f"{run.path.name}-{stage}"
        try:
            attempt.train(spec, world)
        except HpcRlhfError as error:
            return f"{stage} refused: {error}"
        except Exception:
            return f"{stage}: {traceback.format_exc()}"
    return ""


def attempt(name: str, family: Family, world: Any, folder: Path) -> Outcome:
    """Everything that is tried with a family."""
    outcome = check(family, folder)
    spec = tiny_spec(folder / "run", 1, **STAGES)
    data = spec.data.model_copy(update={"max_prompt_tokens": 32})
    models = spec.models.model_copy(update={"actor": str(folder / "model")})
    stages = spec.stages.model_copy(update={"eval": EvalSpec(micro_batch=4, prompts=4, precision="fp32")})
    spec = spec.model_copy(update={"data": data, "models": models, "stages": stages})
    if problem := next(model_checks.problems(spec), None):  # as check does
        outcome.refused, outcome.facts["at"] = f"{problem[1]} ({problem[2]})", "check"
        return outcome
    if outcome.refused:
        outcome.facts["at"] = "the start"
    else:
        failure = chain(make_run(spec), world)
        if failure:
            outcome.wrong["stages"] = failure
    return outcome


def shard(names: list[str]) -> None:
    """Try families in this process, and print an outcome each, as JSON."""
    from hpc_rlhf.train.runtime import world as worlds
    from hpc_rlhf.train.runtime.launcher import launcher_ranks

    world = worlds.join(launcher_ranks()[1])
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = attempt(name, FAMILIES[name], world, Path(folder))
            except Exception:
                outcome = Outcome(wrong={"all": traceback.format_exc()})
        print(json.dumps([name, asdict(outcome)]), flush=True)


def row(name: str, outcome: Outcome) -> str:
    family = FAMILIES[name]
    if outcome.refused:
        sentence = re.sub(r"\s+", " ", outcome.refused.partition("\n")[0]).replace("|", "\\|")
        where = "" if outcome.facts["at"] == "check" else " (at the start of the stage)"
        return f"| {family.known} | `{name}` | refused{where}: {sentence} | |"
    notes = "" if outcome.facts.get("recomputes", True) else ", without `activation_checkpointing`"
    return f"| {family.known} | `{name}` | works{notes} | {outcome.facts['rows']} |"


def write_page(outcomes: dict[str, Outcome]) -> None:
    works = sum(not outcome.refused for outcome in outcomes.values())
    lines = [
        INTRODUCTION,
        f"{len(outcomes)} families: {works} work, {len(outcomes) - works} are refused.",
        "",
        "| models | family | result | sequences |",
        "|---|---|---|---|",
        *(row(name, outcomes[name]) for name in FAMILIES if name in outcomes),
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    names = sys.argv[1:] or list(FAMILIES)
    shards = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.models.table", "--shard", *names[number::PROCESSES]],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=rank_environment(1, free_port())[0],
        )
        for number in range(min(PROCESSES, len(names)))
    ]  # fmt: skip
    outcomes: dict[str, Outcome] = {}
    for process in shards:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("["):
                name, fields = json.loads(line)
                outcomes[name] = Outcome(**fields)
                print(name, outcomes[name], flush=True)
    wrong = {name: outcomes[name].wrong for name in outcomes if outcomes[name].wrong and not outcomes[name].refused}
    for name, failures in wrong.items():
        for what, why in failures.items():
            print(f"{name}: {what}: {why}", file=sys.stderr)
    missing = set(names) - outcomes.keys()
    if wrong or missing:
        sys.exit(f"{len(wrong)} families neither work nor are refused; {len(missing)} were not tried")
    if not sys.argv[1:]:
        write_page(outcomes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--shard"]:
        exit_after(lambda: shard(sys.argv[2:]))
    main()
