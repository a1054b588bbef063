"""Memory and time of rollouts by vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.estimate.parameters import Architecture
from hpc_rlhf.spec.rollout import RolloutSpec

# vLLM 0.32's default limit of concurrent responses on an A100. Later GPUs with 70 GiB or more get 1,024, so their
# estimate is too high if there are more than 256.
_MAX_NUM_SEQS = 256
# Share of a GPU's memory for the activations of a prefill and captured graphs; the rest of gpu_memory holds weights and
# keys and values.
_ACTIVATIONS = 0.03
# Share of a data sheet's bandwidth that decoding reaches. vLLM 0.23 generated 75 tokens per second with an 8B model and
# one request on an A100, which is 77 % (johnmusgrave.com/p/vllm-throughput-latency-sweep-on).
_BANDWIDTH_SHARE = 0.7
# Seconds between two steps of a busy server: scheduling, sampling and output. With it, an 8B model on an H100 makes
# 13,900 tokens per second for 256 requests of 600 tokens; 12,500 were published (morphllm.com/vllm-benchmarks).
_SCHEDULING = 3e-3
# Seconds of an all-reduce of small tensors inside a node. There are two in each layer.
_ALL_REDUCE = 15e-6
# Bytes per second of a TCP connection to a node of vLLM's own: 20 Gbit/s, assumed.
_CONNECTION = 2.5e9
ASSUMPTIONS = (
    f"vLLM: {_BANDWIDTH_SHARE:.0%} of the memory bandwidth while decoding, {_SCHEDULING * 1e3:.0f} ms between two "
    f"tokens, {_ALL_REDUCE * 1e6:.0f} us per all-reduce; weights pass through the host's memory before each rollout, "
    f"and to other nodes at {_CONNECTION / 1e9:.1f} GB/s"
)


@dataclass(frozen=True)
class Served:
    """An actor in vLLM servers, each with ``rollout.tensor_parallel`` GPUs on one node.

    Attributes:
        item: bytes per weight, and per number in the KV cache.
        memory: bytes of a GPU; None if unknown.
        where: the field of the spec with its settings.
    """

    body: Architecture
    item: int
    rollout: RolloutSpec
    memory: float | None
    where: str

    @property
    def ways(self) -> int:
        return self.rollout.tensor_parallel

    @property
    def weights(self) -> float:
        """Bytes of weights on each GPU."""
        return self.item * self.body.parameters / self.ways

    def cache(self, longest: int) -> float | None:
        """Bytes for keys and values on each GPU; None if its memory is unknown.

        Raises:
            HpcRlhfError: there is no room for a response with a prompt, of ``longest`` tokens together.
        """
        if self.memory is None:
            return None
        share = self.rollout.memory_share * self.memory
        needed = self.weights + _ACTIVATIONS * self.memory + self._row(longest)
        if share < needed:
            raise HpcRlhfError(
                f"gives vLLM {share / 2**30:.1f} GiB on each GPU, but its weights and one response need "
                f"{needed / 2**30:.1f} GiB",
                where=f"{self.where}.gpu_memory",
                hint="raise it, or raise rollout.tensor_parallel",
            )
        return share - self.weights - _ACTIVATIONS * self.memory

    def _row(self, tokens: float) -> float:
        """Bytes on each GPU of the keys and values of some tokens."""
        return self.item * self.body.kv * tokens / self.ways

    def decoding(self, lengths: tuple[int, int], responses: int, group: int, flops: float, bandwidth: float) -> float:
        """Seconds in which a server generates ``responses`` responses, ``group`` of them to each prompt.

        Each step reads the weights and the keys and values of all rows. As soon as a response ends, the next begins.
        A prompt passes through the model once, however many responses it gets.

        Args:
            lengths: tokens of a prompt and of a response.
            flops: operations that a GPU is assumed to reach per second.
            bandwidth: bytes per second of a GPU's memory, by its data sheet.
        """
        prompt, answer = lengths
        rows = min(self.rollout.max_num_seqs or _MAX_NUM_SEQS, responses)
        cache = self.cache(prompt + answer)
        if cache is not None:
            rows = max(1, min(rows, int(cache / self._row(prompt + answer))))
        reads = (self.weights + rows * self._row(prompt + answer / 2)) / bandwidth / _BANDWIDTH_SHARE
        work = 2 * self.body.parameters * rows / self.ways / flops
        reduces = 2 * self.body.layers * _ALL_REDUCE if self.ways > 1 else 0.0
        token = max(reads, work) + reduces + _SCHEDULING
        passed = 2 * self.body.parameters + self.body.attention(prompt)
        prefill = passed * prompt * responses / group / self.ways / flops
        return responses / rows * answer * token + prefill

    def syncing(self, gathered: float, link: float, bus: float) -> float:
        """Seconds in which the servers get new weights: one rank of each server gathers all of them and copies them to
        the host's memory, from where each GPU of the server takes its part, on another node after they were sent there.

        Args:
            gathered: the share of the weights that this rank lacks.
            link, bus: bytes per second between GPUs, and between a GPU and the host.
        """
        whole = self.item * self.body.parameters
        sent = whole / _CONNECTION if self.rollout.own_nodes else 0.0
        return gathered * whole / link + whole / bus + sent + self.weights / bus
