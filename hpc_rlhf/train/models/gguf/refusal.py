"""Why a model cannot become a GGUF file."""

from __future__ import annotations

from hpc_rlhf.errors import HpcRlhfError


def refused(what: str) -> HpcRlhfError:
    """The error that a model cannot be exported, because of ``what``."""
    hint = "hpc-rlhf push uploads any model, in Hugging Face's format"
    return HpcRlhfError(f"this model cannot be exported to GGUF: {what}", hint=hint)
