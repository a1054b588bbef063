"""What must stay the same from a round to the next, so that no round trains on prompts of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_rlhf.spec.job import JobSpec

# What decides, besides the text of a conversation, whether it is held out and can be asked.
_KEPT = ("held_out", "version", "max_prompt_tokens")
# What changes the text of a source's conversations.
_TEXT = ("format", "columns", "system", "few_shot")


def problems(spec: JobSpec, previous: JobSpec) -> Iterator[tuple[str, str, str]]:
    """For each problem the field of the spec, what is wrong and what to do.

    Args:
        previous: the spec of the run that this one follows.
    """
    if not previous.shares:
        yield "follows", "that run trains on no prompts, so there are none to ask again", "leave out follows"
    same = [("seed", spec.seed, previous.seed)]
    same += [(f"data.{name}", getattr(spec.data, name), getattr(previous.data, name)) for name in _KEPT]
    for field, now, then in same:
        if now != then:
            what = f"is {now}, but {then} in the run that this one follows, whose evaluation has the same prompts"
            yield field, what, f"set it to {then}, or leave out follows"
    sources = {source.name: source for source in previous.data.sources}
    for place, source in enumerate(spec.data.sources):
        if (before := sources.get(source.name)) is None:
            continue
        for name in _TEXT:
            if getattr(source, name) != getattr(before, name):
                what = "differs in the run that this one follows: prompts held out there could be trained on here"
                yield f"data.sources.{place}.{name}", what, "leave it as it is there, or leave out follows"
