"""A model's shapes: its parameters, layers and activations, as transformers builds it from its configuration.

Building needs a process with torch and takes a few seconds, so ``hpc-rlhf prefetch`` does it, and the result is cached
below HF_HOME, beside its records.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hpc_rlhf import __version__, safe_path
from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.run.files import write_atomically
from hpc_rlhf.spec import hub
from hpc_rlhf.spec.job import FromScratch, JobSpec, ModelRef, ModelsSpec
from hpc_rlhf.spec.stages import PpoSpec
from hpc_rlhf.spec.stages.policy import PolicySpec
from hpc_rlhf.spec.training import LoraSpec

# Importing torch from a cold network file system can take minutes.
_SECONDS = 240

# Raised by a change of what is cached.
_FORMAT = 5

# The OPT models' configurations (arXiv 2205.01068, table 1) and shapes, to plan without the hub, and at once.
_OPT = Path(__file__).with_name("opt.json")


@dataclass(frozen=True)
class Linear:
    """Linear layers, or matrices of experts, that have the same name and sizes; the output head is not one of them.

    Attributes:
        passed: how many of them a token passes through, if they are experts.
    """

    name: str
    inputs: int
    outputs: int
    count: int
    passed: int | None = None


@dataclass(frozen=True)
class Architecture:
    """The shapes of a causal language model, as ``hpc_rlhf.train.models.shapes`` reports them.

    Attributes:
        parameters: all of them; what is tied counts once.
        head: parameters of an output head that is not tied to the embeddings.
        inside: parameters inside the blocks that tensor parallelism divides.
        largest: parameters of the largest matrix.
        layers: number of blocks.
        hidden: width.
        inner: width of the MLP.
        chunked: parameters of the MLPs that ``chunked_mlp`` computes again; 0 if it refuses the model.
        vocabulary: tokens that the head distinguishes.
        plain_head: the logits are what the head computes, so that tensor parallelism can split it.
        kv: numbers that one token leaves in the KV cache, in all layers.
        kept: by the bytes of a number, what all blocks keep of a token for the backward pass, in bytes: what
            tensor parallelism leaves whole, and what it shards.
        kept_in_mlps: the part of that which ``chunked_mlp`` does not keep.
    """

    parameters: int
    head: int
    inside: int
    largest: int
    linears: tuple[Linear, ...]
    layers: int
    hidden: int
    inner: int
    chunked: int
    vocabulary: int
    plain_head: bool
    kv: int
    kept: Mapping[int, tuple[float, float]]
    kept_in_mlps: Mapping[int, tuple[float, float]]

    @property
    def scored(self) -> int:
        """Its parameters with a score head instead of an output head."""
        return self.parameters - self.head + self.hidden

    @property
    def columns(self) -> int:
        """Linear layers of a block whose outputs tensor parallelism splits: all but the last of attention and of the
        MLP."""
        return max(2, sum(each.count for each in self.linears if each.passed is None) // self.layers - 2)

    def head_ways(self, ways: int) -> int:
        """Ranks that share the output head, of ``ways`` ranks that share layers: 1 if it is not split."""
        return ways if self.plain_head and self.vocabulary % ways == 0 else 1

    def attention(self, longest: int) -> int:
        """Operations per token of causal attention in a forward pass over sequences of ``longest`` tokens.

        A token attends to half of them on average, and each costs four operations per number of the width.
        """
        return 2 * self.layers * self.hidden * longest

    def adapted(self, lora: LoraSpec) -> list[Linear]:
        """The layers that get adapters."""
        return [
            layer
            for layer in self.linears
            if (lora.targets is None or layer.name in lora.targets) and (lora.experts or layer.passed is None)
        ]

    def adapters(self, lora: LoraSpec | None) -> int:
        """Parameters of its low-rank adapters."""
        if lora is None:
            return 0
        return sum(lora.rank * (each.inputs + each.outputs) * each.count for each in self.adapted(lora))


def architecture(models: ModelsSpec, role: str) -> Architecture:
    """The shapes of one of a run's models: made from scratch, in a folder, or in the hub's cache.

    Args:
        role: actor or reward, which is the actor's where the spec names no other.

    Raises:
        HpcRlhfError: its configuration is not here, or transformers cannot build it.
    """
    refs = {name: ref for name, ref in models if ref is not None}
    role = role if role in refs else "actor"
    config = _config(refs.pop(role), f"models.{role}")
    configs = [config]
    for name, ref in refs.items():  # one process for all of a run's models
        try:
            configs.append(_config(ref, f"models.{name}"))
        except HpcRlhfError:
            continue
    shapes = architectures(configs)[0]
    if isinstance(shapes, str):
        raise HpcRlhfError(f"the model cannot be built from its configuration: {shapes}", where=f"models.{role}")
    return shapes


def judges(spec: JobSpec, stage: PolicySpec) -> list[Architecture]:
    """The shapes of the reward models that score a stage's responses."""
    own = [None] if stage.rewards is None else [item.own_model for item in stage.rewards if item.kind == "model"]
    named = [spec.models if model is None else spec.models.model_copy(update={"reward": model}) for model in own]
    return [architecture(models, "reward") for models in named]


def critic_body(spec: JobSpec, stage: PpoSpec) -> Architecture:
    """The shape of a critic: that of the reward model that it starts from, or else of the actor."""
    return architecture(spec.models, "actor" if "reward" in stage.unneeded else "reward")


_known: dict[str, Architecture | str] = {}


def architectures(configs: Sequence[Mapping[str, object]]) -> list[Architecture | str]:
    """The shapes of models, from memory, the cache or transformers, or why a model cannot be built."""
    keys = [json.dumps(config, sort_keys=True) for config in configs]
    for key in keys:
        if key not in _known and (cached := _read_cache(key)) is not None:
            _known[key] = cached
    new = list(dict.fromkeys(key for key in keys if key not in _known))
    if new:
        for key, shapes in zip(new, _measure(new), strict=True):
            if "error" in shapes:
                _known[key] = shapes["error"]
            else:
                _known[key] = _from_json(shapes)
                _write_cache(key, shapes)
    return [_known[key] for key in keys]


def _measure(configs: Sequence[str]) -> list[dict[str, Any]]:
    command = safe_path.module("hpc_rlhf.train.models.shapes")
    try:
        text = f"[{','.join(configs)}]"
        process = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS)
        shapes: list[dict[str, object]] = json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        return [{"error": f"transformers did not load within {_SECONDS} s"}] * len(configs)
    except ValueError:
        reason = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        return [{"error": f"transformers did not load ({reason})"}] * len(configs)
    return shapes


def _from_json(shapes: Mapping[str, Any]) -> Architecture:
    linears = tuple(Linear(*layer) for layer in shapes["linears"])
    kept = {
        name: {int(size): (whole, sharded) for size, (whole, sharded) in shapes[name].items()}
        for name in ("kept", "kept_in_mlps")
    }
    return Architecture(**{**shapes, "linears": linears, **kept})


def _cache_file(config: str) -> Path:
    try:
        versions = f"{__version__} {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:  # _measure reports it
        versions = __version__
    key = f"{versions} {_FORMAT} {config}"
    return hub.cache() / "hpc-rlhf/shapes" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read_cache(config: str) -> Architecture | None:
    try:
        return _from_json(json.loads(_cache_file(config).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_cache(config: str, shapes: Mapping[str, object]) -> None:
    path = _cache_file(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(shapes))
    except OSError:  # they are read again next time
        pass


def _config(ref: ModelRef, where: str) -> Mapping[str, object]:
    """What a model's config.json holds."""
    if isinstance(ref, FromScratch):
        return ref.from_scratch
    path = Path(ref) / "config.json"
    if not path.is_absolute():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(ref, "config.json", cache_dir=hub.folder("model"))
        if not isinstance(cached, str):
            return _opt(ref, where)
        path = Path(cached)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HpcRlhfError(f"{path} cannot be read ({error})", where=where) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise HpcRlhfError(f"{path} is not a model's configuration: it has no model_type", where=where)
    return config


def _opt(name: str, where: str) -> Mapping[str, object]:
    """The configuration of an OPT model, whose shapes are known from then on.

    Raises:
        HpcRlhfError: it is not one.
    """
    models = json.loads(_OPT.read_text(encoding="utf-8"))
    if name not in models:
        raise HpcRlhfError(
            f"the configuration of {name} is not in the hub cache",
            where=where,
            hint="fetch it with hpc-rlhf prefetch, on a machine with network access",
        )
    config: Mapping[str, object] = models[name]["config"]
    _known[json.dumps(config, sort_keys=True)] = _from_json(models[name]["shapes"])
    return config
