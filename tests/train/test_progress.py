"""The progress lines in the log of rank 0."""

from __future__ import annotations

from hpc_rlhf.train.progress import ProgressLog


class Stage:
    """A stage that takes some seconds for each step, and what it says."""

    def __init__(self, name: str, total: int, seconds: float) -> None:
        self.total, self.seconds, self.now = total, seconds, 1000.0
        self.lines: list[str] = []
        self.log = ProgressLog(name, lambda stage, text: self.lines.append(text), lambda: self.now)

    def train(self, first: int, last: int, **values: float | None) -> None:
        for step in range(first, last + 1):
            self.now += self.seconds
            self.log.note(step, self.total, "train", values)


def test_the_first_step_every_tenth_and_the_last_have_a_line() -> None:
    stage = Stage("sft", 4000, 0.25)
    stage.train(1, 4000, loss=2.125, lr=1e-4)
    assert len(stage.lines) == 1 + 10 + 10  # a minute after each tenth is another line
    assert stage.lines[0] == "step 1/4,000, loss 2.12"
    assert stage.lines[-1] == "step 4,000/4,000, loss 2.12, 4 steps/s"
    assert "step 400/4,000, loss 2.12, 4 steps/s, 15 min 0 s left" in stage.lines


def test_slow_steps_all_have_a_line_with_the_time_left() -> None:
    stage = Stage("ppo", 300, 90.0)
    stage.train(121, 123, reward=1.0, kl=None, actor_lr=1e-6)
    assert stage.lines == [
        "step 121/300, reward 1, kl -",
        "step 122/300, reward 1, kl -, 90 s per step, 4 h 27 min left",
        "step 123/300, reward 1, kl -, 90 s per step, 4 h 25 min left",
    ]


def test_the_pace_is_that_of_the_latest_steps() -> None:
    stage = Stage("sft", 10_000, 100.0)
    stage.train(1, 10, loss=1.0)
    stage.seconds = 0.5
    stage.train(11, 1000, loss=1.0)
    assert stage.lines[-1].endswith("2 steps/s, 1 h 15 min left")


def test_every_evaluation_has_a_line_with_all_its_metrics() -> None:
    stage = Stage("reward", 100, 0.1)
    stage.train(1, 10, loss=0.5, accuracy=0.75)
    stage.log.note(10, 100, "eval", {"accuracy": 0.7, "loss": 0.6, "margin": None, "best_step": 5})
    stage.train(11, 12, loss=0.5, accuracy=0.75)
    assert stage.lines[-1] == "step 10/100, held out, accuracy 0.7, loss 0.6, margin -, best_step 5"


def test_the_evaluation_of_several_models_is_no_series_of_steps() -> None:
    stage = Stage("eval", 3, 0.0)
    for number, values in enumerate(({"sft_perplexity": 7.5}, {"ppo_perplexity": None}, {"reward_accuracy": 0.8}), 1):
        stage.log.note(number, 3, "eval", values)
    assert stage.lines == [
        "model 1/3, sft_perplexity 7.5",
        "model 2/3, ppo_perplexity -",
        "model 3/3, reward_accuracy 0.8",
    ]
