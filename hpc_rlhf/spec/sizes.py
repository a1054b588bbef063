"""Sizes that training and its DeepSpeed configs use, and estimates count with."""

from __future__ import annotations

# Matrices have a multiple of this many rows: kernels are fastest there, and a CPU compiles and keeps one for
# every height.
ALIGNED = 64
# Float32 logits held at a time: 64 MiB keep a GPU busy; 8 MiB a CPU's matrix kernels, near its cache.
LOGITS = {"cuda": 16 * 2**20, "cpu": 2 * 2**20}
# But at least those of this many tokens: each chunk reads the head's weight and adds to its gradient, which takes
# longer than the products of a few tokens.
HEAD_ROWS = {"cuda": 512, "cpu": 256}

# Tokens that an MLP takes at a time under chunked_mlp: enough to keep a GPU busy.
MLP_TOKENS = 4096

# Responses generated at a time, at most, where memory is not short.
ROWS = 64
# The most held-out rows, and in PPO the most prompts, that an evaluation during training uses. The standard error of an
# accuracy is then 1.6 %, and that of a mean reward a sixteenth of the rewards' standard deviation.
EVALUATED_ROWS, EVALUATED_PROMPTS = 1024, 256
# Shares of a GPU's memory that a rollout may take: for gathered weights, and for keys and values.
WEIGHTS_SHARE, CACHE_SHARE = 0.5, 0.2

# Numbers in the buffer through which ZeRO reduces gradients, and parameters that ZeRO 3 keeps gathered at a time.
BUCKET, LIVE = 200_000_000, 30_000_000


def head_rows(device: str, vocabulary: int) -> int:
    """The tokens whose logits an output head of that many columns holds at a time, on a type of device."""
    kind = "cpu" if device == "cpu" else "cuda"
    return max(HEAD_ROWS[kind], LOGITS[kind] // vocabulary // ALIGNED * ALIGNED)
