"""Rollouts by vLLM where it is installed: the weight sync and generated tokens per second."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from hpc_rlhf.spec.cluster import SlurmSpec
from hpc_rlhf.spec.rollout import RolloutSpec
from hpc_rlhf.train.rollout.vllm.engine import VllmEngine
from hpc_rlhf.train.runtime.world import join, leave
from tests.gpu.scale import SCALES, new_model, rollout_request, seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--python", required=True)
    options = parser.parse_args()
    if not os.path.exists(options.python):
        print(f"skipped: vLLM is not installed, there is no {options.python}")
        return
    scale, world = SCALES[options.scale], join(1)
    model, request = new_model(scale, world, torch.bfloat16), rollout_request(scale)
    longest = max(map(len, request.prompts)) + scale.new_tokens
    spec = RolloutSpec(engine="vllm", python=options.python, max_num_seqs=scale.rows)
    with tempfile.TemporaryDirectory() as folder:
        engine = VllmEngine(model, world, spec, Path(folder), longest, "gpu-check", "gpu-check", SlurmSpec())
        engine.sync_weights(model)
        sync = seconds(lambda: engine.sync_weights(model), 2)
        rate = scale.prompts * scale.new_tokens / seconds(lambda: engine.generate(request), 2)
        engine.close()
    figures = {"rollout": {"vLLM": {"rate": rate, "sync_seconds": sync}}}
    (options.out / "vllm.json").write_text(json.dumps(figures))
    leave()
    print("generated with vLLM")


if __name__ == "__main__":
    main()
