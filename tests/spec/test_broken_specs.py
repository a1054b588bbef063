"""Every kind of mistake in a spec is reported in plain words with its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rlhf.errors import SpecError
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.sweep import load_any
from tests.spec.texts import GOOD, problems_in, write

# Changes that break the good spec, and the resulting problem: (name, old text, new text, place and message).
BROKEN = [
    ("unknown field", "partition: gpu", "partiton: gpu", "4:3: slurm.partiton: is not a field (did you mean "
                                                         "partition?)"),
    ("unknown field, half a "
     "name", "lr: 1e-4", "clip: 1", "17:5: stages.sft.clip: is not a field (did you mean clip_grad?)"),
    ("another tool's name for a "
     "field", "lr: 1e-4", "learning_rate: 1e-4", "17:5: stages.sft.learning_rate: is not a field (did you mean lr?)"),
    ("unknown top-level field", "name: good", "name: good\nsede: 1", "2:1: sede: is not a field (did you mean seed?)"),
    ("missing top-level "
     "field", "name: good\n", "", "1:1: name: is missing (Name of the run; Slurm jobs are called name.stage)"),
    ("missing field", "  actor: facebook/opt-125m\n", "", "11:1: models.actor: is missing"),
    ("number for text", "partition: gpu", "partition: 1.5", "4:14: slurm.partition: must be text, not 1.5 "
                                                            "(put it in quotes)"),
    ("yes read as true", "partition: gpu", "partition: yes", "4:14: slurm.partition: must be text, not true "
                                                             "(put it in quotes)"),
    ("text for a number", "lr: 1e-4", "lr: fast", "17:9: stages.sft.lr: must be a number, not 'fast'"),
    ("fraction for a whole "
     "number", "gpus_per_node: 2", "gpus_per_node: 2.5", "5:18: slurm.gpus_per_node: must be a whole number, not 2.5"),
    ("true for a whole "
     "number", "gpus_per_node: "
               "2", "gpus_per_node: true", "5:18: slurm.gpus_per_node: must be a whole number, not true"),
    ("out of range", "gpus_per_node: 2", "gpus_per_node: -1", "5:18: slurm.gpus_per_node: must be at least 0, not -1"),
    ("not finite", "lr: 1e-4", "lr: 1e999", "17:9: stages.sft.lr: must be a finite number"),
    ("one of several "
     "words", "format: prompt-chosen-rejected", "format: mesages", "9:40: data.sources.0.format: must be "
                                                                   "'prompt-chosen-rejected', 'hh', "
                                                                   "'messages', 'instruction', 'text' or 'prompt', "
                                                                   "not 'mesages' (did you mean messages?)"),
    ("mapping for a "
     "list", "sources:\n    - {path: Dahoas/rm-static, format: prompt-chosen-rejected}\n    - demo: "
             "300", "sources: {demo: 300}", "8:3: data.sources: must be a list, not a mapping"),
    ("text for a mapping", "reward: {}", "reward: on please", "19:11: stages.reward: must be a mapping of "
                                                              "fields, not 'on please'"),
    ("empty list", "sources:\n    - {path: Dahoas/rm-static, format: prompt-chosen-rejected}\n    - demo: "
                   "300", "sources: []", "8:3: data.sources: must not be empty"),
    ("rank of nothing", "lr: 1e-4", "lr: 1e-4\n    lora: {rank: "
                                    "0}", "18:18: stages.sft.lora.rank: must be at least 1, not 0"),
    ("neither kind of "
     "model", "actor: facebook/opt-125m", "actor: [a, b]", "12:3: models.actor: must be text or a mapping "
                                                           "of fields, not a list"),
    ("model made from nothing", "model_type: llama, ", "", "13:3: models.reward: from_scratch needs model_type"),
    ("part of a step", "lr: 1e-4", "lr: 1e-4\n    warmup: "
                                   "1.5", "18:13: stages.sft.warmup: must be a whole number of steps, or a fraction of "
                                          "all steps below 1, such as 0.1"),
    ("warm-up longer than the "
     "stage", "lr: 1e-4", "lr: 1e-4\n    warmup: 100\n    max_steps: "
                          "50", "18:13: stages.sft.warmup: is 100 steps, but the stage ends after max_steps: 50; a "
                                "fraction such as 0.1 always fits"),
    ("neither path nor demo", "demo: 300", "weight: 2", "10:7: data.sources.1: give exactly one of path, demo, "),
    ("batch that does not "
     "divide", "micro_batch: 4\n    "
               "slurm", "micro_batch: 4\n    global_batch: 30\n    "
                        "slurm", "22:19: stages.ppo.global_batch: ppo's global_batch 30 is not a multiple "
                                 "of 16 (micro_batch 4 x 4 ranks); use global_batch: 16 or global_batch: 32"),
    ("steered from "
     "nothing", "micro_batch: 4\n    "
                "slurm", "micro_batch: 4\n    kl_target: 6\n    kl_coef: 0\n    "
                         "slurm", "20:3: stages.ppo: kl_target needs a kl_coef above 0"),
    ("steered by a KL that nobody "
     "knows", "micro_batch: 4\n    slurm", "micro_batch: 4\n    kl_target: 6\n    top_p: 0.9\n    slurm",
     "22:16: stages.ppo.kl_target: needs top_p: 1 and top_k: 0"),
    ("compressed momenta of sharded "
     "weights", "lr: 1e-4", "lr: 1e-4\n    optimizer: onebit-adam\n    zero: "
                            "1", "16:3: stages.sft: onebit-adam needs zero: 0, because every rank "
                                 "compresses the momentum of all weights"),
    ("whole optimizer "
     "offloaded", "lr: 1e-4", "lr: 1e-4\n    offload_optimizer: "
                              "true", "16:3: stages.sft: offload_optimizer needs zero: 1 or higher"),
    ("whole weights "
     "offloaded", "lr: 1e-4", "lr: 1e-4\n    zero: 2\n    offload_params: "
                              "true", "16:3: stages.sft: offload_params needs zero: 3"),
    ("critic's weights "
     "offloaded", "micro_batch: 4\n    "
                  "slurm", "micro_batch: 4\n    zero: 3\n    critic: {zero: 1, offload_params: true}\n    "
                           "slurm", "20:3: stages.ppo: critic: offload_params needs zero: 3"),
    ("layers shared over "
     "nodes", "micro_batch: 4\n    "
              "slurm", "micro_batch: 4\n    tensor_parallel: 3\n    "
                       "slurm", "22:22: stages.ppo.tensor_parallel: ppo's tensor_parallel 3 does not divide "
                                "the 2 ranks of a node"),
    ("shards of cut "
     "layers", "lr: 1e-4", "lr: 1e-4\n    zero: 3\n    tensor_parallel: "
                           "2", "16:3: stages.sft: tensor_parallel needs zero: 0, 1 or 2"),
    ("compressed momenta of cut "
     "layers", "lr: 1e-4", "lr: 1e-4\n    optimizer: onebit-adam\n    tensor_parallel: "
                           "2", "16:3: stages.sft: tensor_parallel needs optimizer: adamw"),
    ("compressed momenta of parts of "
     "sequences", "lr: 1e-4", "lr: 1e-4\n    optimizer: onebit-adam\n    sequence_parallel: "
                              "2", "16:3: stages.sft: sequence_parallel needs optimizer: adamw"),
    ("sequences shared by a part of the "
     "ranks", "micro_batch: 4\n    "
              "slurm", "micro_batch: 4\n    sequence_parallel: 3\n    "
                       "slurm", "22:24: stages.ppo.sequence_parallel: ppo's sequence_parallel 3 does not divide "
                                "its 4 ranks; use sequence_parallel: 1 or 2 or 4"),
    ("critic both cut and "
     "sharded", "micro_batch: 4\n    "
                "slurm", "micro_batch: 4\n    tensor_parallel: 2\n    critic: {zero: 3}\n    "
                         "slurm", "20:3: stages.ppo: critic: tensor_parallel needs zero: 0, 1 or 2"),
    ("frozen models both cut and "
     "sharded", "micro_batch: 4\n    "
                "slurm", "micro_batch: 4\n    tensor_parallel: 2\n    offload_frozen: true\n    "
                         "slurm", "20:3: stages.ppo: offload_frozen needs tensor_parallel: 1"),
    ("no data for a "
     "stage", "data:\n", "data:\n  split: {ppo: 0}\n", "8:16: data.split.ppo: leaves the ppo stage without data"),
    ("owned sbatch "
     "option", "partition: gpu", "extra: {job-name: "
                                 "x}", "4:11: slurm.extra.job-name: hpc-rlhf owns sbatch's --job-name: use name"),
    ("short owned sbatch "
     "option", "partition: gpu", "extra: {p: x}", "4:11: slurm.extra.p: give the long name of an sbatch option"),
    ("sbatch option cut "
     "short", "partition: gpu", "extra: {depend: x}", "4:11: slurm.extra.depend: hpc-rlhf owns sbatch's --dependency"),
    ("time in words", '"12:00:00"', "a while", "6:9: slurm.time: 'a while' must be a time limit in Slurm's format"),
    ("no time to save", '"12:00:00"', "2", "3:1: slurm: time 2 is 120 s, but signal_seconds is 180 s"),
    ("no ranks", "gpus_per_node: 2", "gpus_per_node: 0", "3:1: slurm: gpus_per_node is 0, so ranks_per_node must set"),
    ("newline in a "
     "comment", "partition: gpu", 'comment: "a\\n#SBATCH '
                                  '--wrap=x"', "4:12: slurm.comment: 'a\\n#SBATCH --wrap=x' must be one line"),
    ("shell in a name", "name: good", "name: $(touch "
                                      "x)", "1:7: name: '$(touch x)' may hold only letters, digits and . _ -"),
    ("shell in an account", "partition: gpu", "account: nlp; rm -rf "
                                              "~", "4:12: slurm.account: 'nlp; rm -rf ~' may hold only"),
    ("leading dash", "partition: gpu", "partition: --wrap=x", "4:14: slurm.partition: '--wrap=x' may hold only"),
    ("run_dir that Slurm would fill "
     "in", "runs/good", "runs/100%j\\", "2:10: run_dir: must not contain % or \\, which have a meaning for Slurm"),
    ("run_dir that would end a "
     "mount", "runs/good\nslurm:", 'runs/a:b,c\nslurm:\n  container: {runtime: pyxis, image: '
                                   '/x.sqsh}', "2:10: run_dir: must not contain , or :, which"),
    ("run_dir too long", "runs/good", "a/" * 600, "2:10: run_dir: has more than 1024 characters"),
    ("unset variable", "runs/good", "${NO_SUCH_VARIABLE}/x", "2:10: run_dir: the variable NO_SUCH_VARIABLE is not set"),
    ("variable without braces", "runs/good", "$HOME/x", "2:10: run_dir: '$HOME/x' contains a $ that is not ${NAME}"),
    ("missing file", "path: Dahoas/rm-static", "path: ./rows.jsonl", "9:14: data.sources.0.path: there is "
                                                                     "no file or folder"),
    ("neither file nor hub "
     "id", "facebook/opt-125m", "out/sft/model", "12:10: models.actor: 'out/sft/model' is neither an "
                                                 "existing file or folder nor a hub id"),
    ("duplicate key", "  partition: "
                      "gpu", "  partition: gpu\n  nodes: 1\n  partition: "
                             "cpu", "6:3: the key 'partition' was already given (first at line 4)"),
    ("tab", "  partition: "
            "gpu", "\tpartition: "
                   "gpu", "4:1: is not YAML: found character that cannot start any token (indent with "
                          "spaces, not tabs"),
    ("unclosed bracket", "slurm: {nodes: "
                         "2}", "slurm: {nodes: 2", "23:1: is not YAML: did not find expected ',' or '}'"),
    ("control character", "partition: gpu", "partition: g\x1bpu", "4:15: contains the control character '\\x1b'"),
    ("tag", "partition: gpu", "partition: !!python/object:os.system "
                              "x", "4:14: the tag !!python/object:os.system is not allowed in a job spec"),
    ("second document", "stages:", "---\nstages:", "15:1: is not YAML: but found another document (a job "
                                                   "spec is one document"),
    ("unknown alias", "partition: gpu", "partition: *gpu", "4:14: is not YAML: found undefined alias"),
    ("alias of itself", "  sources:", "  sources: &a [*a]\n  other:", "8:16: the alias *a is inside its own value"),
    ("key that is no text", "partition: gpu", "12: gpu", "4:3: a key must be text (put it in quotes)"),
    ("base that is not "
     "there", "name: good", "extends: base.yaml", "1:10: extends: there is no file 'base.yaml' (it is "
                                                  "looked for in the folder of"),
    ("extends itself", "name: good", "extends: job.yaml", "1:10: extends: 'job.yaml' extends this file again"),
    ("no pairs", "format: prompt-chosen-rejected}\n    - demo: "
                 "300", "format: text}", "8:3: data.sources: none contains pairs of responses"),
    ("no stage", GOOD[GOOD.index("stages:") :], "stages: {sft: null}", "15:1: stages: set at least one stage"),
]  # fmt: skip


def test_good_spec_is_good(tmp_path: Path) -> None:
    assert load_spec(write(tmp_path, GOOD)).stages.ppo is not None


@pytest.mark.parametrize(("old", "new", "expected"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_problem_is_reported_with_its_place(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) == 1
    path = write(tmp_path, GOOD.replace(old, new))
    problems = [str(problem) for problem in problems_in(path)]
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}:{expected}"), problems


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ": is empty"),
        (b"# only a comment\n", ": is empty"),
        (b"- a\n- b\n", ":1:1: must be a mapping"),
        (b"just words\n", ":1:1: must be a mapping"),
        (b"name: a\nrun_dir: \xff\xfe\n", ":2:10: is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\x00\x00", ":1:1: contains the control character '\\x7f'"),
        (b"a: " + b"x" * (1 << 20), ": is larger than 1 MiB"),
        (b"[" * 100_000, ":1:41: is nested more than 40 levels deep"),
        (b"a: &a [x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 8)) for c in b"bcdefghi"), ":6:8: contains more than 50000 values with aliases expanded"),  # noqa: E501
        (b"a: &a {" + b"".join(b"k%d: 1," % i for i in range(10_000)) + b"}\n" + b"".join(b"m%d: {<<: *a}\n" % i for i in range(3000)), ":5:10: contains more than 50000 values with aliases expanded"),  # noqa: E501
    ],
    ids=["empty", "comment", "list", "words", "not-utf8", "binary", "large", "deep", "alias-bomb", "merge-bomb"],
)  # fmt: skip
def test_file_that_is_not_a_spec(tmp_path: Path, content: bytes, expected: str) -> None:
    path = write(tmp_path, content)
    (problem,) = problems_in(path)
    assert str(problem).startswith(f"{path}{expected}")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert str(problems_in(tmp_path / "none.yaml")[0]).endswith("none.yaml: cannot read it: No such file or directory")
    assert str(problems_in(tmp_path)[0]).endswith("cannot read it: Is a directory")


def test_all_problems_are_reported_in_file_order(tmp_path: Path) -> None:
    text = (
        GOOD.replace("runs/good", "${NOPE}/x")
        .replace("gpu\n", "[]\n")
        .replace("lr: 1e-4", "lr: no")
        .replace("nodes: 2", "nodes: 0")
    )
    path = write(tmp_path, text)
    assert [(problem.line, problem.path) for problem in problems_in(path)] == [
        (2, "run_dir"),
        (4, "slurm.partition"),
        (17, "stages.sft.lr"),
        (22, "stages.ppo.slurm.nodes"),
    ]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("name: good\n", ["run_dir", "data", "models", "stages"]),
        ("stages: {ppo: {lr: 1}}\n", ["name", "run_dir", "data", "models"]),
        ("name: good\ndata: {split: {sft: 1}}\nstages: {sft: {ptx: {}}}\nmodels: {}\n", ["run_dir", "data.sources", "models.actor"]),  # noqa: E501
        ("sweep: {stages.ppo.kl_coef: [0.1, 0.2]}\nstages: {ppo: {}}\n", ["name", "run_dir", "data", "models"]),
        ("extends: base.yaml\nmodels: {reward: facebook/opt-125m}\n", ["run_dir", "data", "stages", "models.actor"]),
    ],
    ids=["all-but-one", "beside-a-mistake", "inner", "sweep", "extends"],
)  # fmt: skip
def test_everything_missing_is_reported_at_once(tmp_path: Path, text: str, missing: list[str]) -> None:
    write(tmp_path, "name: base\n", "base.yaml")
    with pytest.raises(SpecError) as caught:
        load_any(write(tmp_path, text))
    assert [problem.path for problem in caught.value.problems if problem.what == "is missing"] == missing


def test_all_that_a_model_from_scratch_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("{model_type: llama, vocab_size: 512}", "{hidden_size: 8}"))
    (problem,) = problems_in(path)
    assert problem.what == "from_scratch needs model_type and vocab_size"


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("stages.ppo.zzz", "the nearest of 59 fields here are "),
        ("zzz", "the nearest of 13 fields here are "),
        ("stages.zzz", "the nearest of 8 fields here are sft, reward, pretrain"),
        ("kl_coef", "did you mean stages.ppo.kl_coef or stages.grpo.kl_coef?"),
        ("slurm.micro_batch", "did you mean stages.pretrain.micro_batch or stages.sft.micro_batch or stages.reward."),
        ("stages.sft.learningRate", "did you mean lr?"),
        ("stages.ppo.max_length", "did you mean data.max_prompt_tokens"),
    ],
)
def test_few_fields_are_suggested_for_an_unknown_one(tmp_path: Path, field: str, hint: str) -> None:
    (problem,) = problems_in(write(tmp_path, GOOD), f"{field}=1")
    assert problem.hint is not None
    assert problem.hint.startswith(hint)
    assert "nearest" not in hint or problem.hint.count(",") == 2


def test_number_of_reported_problems_is_limited(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "".join(f"k{i}: 1\n" for i in range(5000)))
    problems = problems_in(path)
    assert len(problems) == 501
    assert str(problems[-1]) == f"{path}: has more mistakes than these"


def test_problem_in_inherited_slurm_settings_is_reported_once(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("partition: gpu", "partition: 'a b'"))
    assert [problem.path for problem in problems_in(path)] == ["slurm.partition"]
    path = write(tmp_path, GOOD.replace('"12:00:00"', "1"))
    assert [problem.path for problem in problems_in(path)] == ["slurm"]


def test_stage_overrides_shared_slurm(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, GOOD))
    assert (spec.stage("ppo").slurm.nodes, spec.stage("ppo").slurm.partition) == (2, "gpu")
    assert spec.stage("sft").slurm == spec.slurm


def test_messages_have_no_control_characters(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("partition: gpu", '"\\e[31m\\nx": "\\e[32m"'))
    (problem,) = problems_in(path)
    assert str(problem).isprintable()


def test_check_prints_problems_and_exits_with_2(tmp_path: Path) -> None:
    good, bad = write(tmp_path, GOOD, "good.yaml"), write(tmp_path, GOOD.replace("gpu\n", "[]\n"), "bad.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "hpc_rlhf.cli", "check", str(good), str(bad)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout.splitlines() == [f"{good}: ok", f"{bad}:4:3: slurm.partition: must be text, not a list"]
    assert done.stderr == "1 of 2 specs cannot run\n"


def test_spec_error_has_one_line_per_problem(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path, GOOD), ["slurm.nodes=0", "seed=x"])
    assert len(str(caught.value).splitlines()) == 2
