"""transformers' Trainer with DeepSpeed on packed text: documents follow each other and are cut to full sequences, as in
its run_clm.py, so attention crosses documents.

AdamW is fused. DeepSpeed keeps float32 weights beside those in bfloat16, as our side does. The sequences are those of
our side.
"""

from __future__ import annotations

from argparse import Namespace

from tests.benchmarks import workload
from tests.benchmarks.deepspeed_chat import _join
from tests.benchmarks.measure import Clock, Result, main
from tests.benchmarks.trl_trainers import _arguments, _model, _Ticks

# What DeepSpeed takes from the Trainer's arguments.
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def pretrain(options: Namespace) -> Result:
    import datasets
    from transformers import Trainer, TrainingArguments

    _join()
    rows = [row["ids"] for row in workload.rows(options.work, "pretrain")]
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    clock = Clock()
    at_once = workload.micro_batch("pretrain", options.samples, options.ranks)
    arguments = _arguments(
        options, per_device_train_batch_size=at_once,
        gradient_accumulation_steps=options.samples // options.ranks // at_once, bf16=workload.precision() == "bf16",
        deepspeed={**dict.fromkeys(AUTO, "auto"), "zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}},
    )  # fmt: skip
    trainer = Trainer(
        _model(options, "AutoModelForCausalLM", "model"), TrainingArguments(**arguments), train_dataset=data,
        callbacks=[_Ticks(clock)],
    )  # fmt: skip
    loss = trainer.train().training_loss
    samples = options.samples * (options.steps - options.warm_up)
    tokens = samples * workload.LONGEST // options.ranks
    return clock.result(options.warm_up, samples, tokens, workload.dtype(), loss=loss)


if __name__ == "__main__":
    main({"pretrain": pretrain})
