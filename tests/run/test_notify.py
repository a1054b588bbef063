"""News of a run's end: posted once, retried, never with its secret URL in sight, never failing the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rlhf.errors import HpcRlhfError, SpecError
from hpc_rlhf.launch.changes import differences
from hpc_rlhf.launch.plan import make_plan
from hpc_rlhf.launch.prepare import claim, prepare
from hpc_rlhf.run import manifest, notify
from hpc_rlhf.run.layout import RunDir
from hpc_rlhf.spec.job import JobSpec
from hpc_rlhf.spec.load import load_spec
from hpc_rlhf.spec.notify import NotifySpec, WebhookSpec
from tests.hook import SECRET, Hook
from tests.launch.specs import make_spec


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    monkeypatch.setattr(notify, "_PAUSES", (0.01, 0.01))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Hook().listening() as server:
        yield server


def notifying(run_dir: Path, url: str = "${HOOK}", style: str = "json") -> tuple[JobSpec, RunDir]:
    spec = make_spec(run_dir)
    webhook = WebhookSpec.model_validate({"url": url, "style": style})
    return spec.model_copy(update={"notify": NotifySpec(webhook=webhook)}), RunDir(run_dir)


def test_a_run_posts_when_it_is_finished_and_when_it_stops(
    tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", hook.url)
    spec, run = notifying(tmp_path / "run")
    with claim(spec, "test"):
        prepare(spec, run)
    notify.send(run, "stopped", "ppo", "user error: no such file")
    for stage in spec.stage_names:
        run.stage(stage).model.mkdir(parents=True)
        manifest.write(run.stage(stage).model, {"step": 9})
        notify.send_if_finished(run, spec, stage)
    (path, stopped), (_, finished) = hook.posted  # once for all stages
    assert path == SECRET
    assert isinstance(stopped.pop("time"), float)
    assert stopped == {
        "event": "stopped",
        "run": "demo",
        "run_dir": str(run.path),
        "stage": "ppo",
        "message": "user error: no such file",
        "text": f"hpc-rlhf: demo stopped in ppo and needs your help: user error: no such file\n{run.path}",
    }
    assert (finished["event"], finished["stage"]) == ("finished", "ppo")
    for path in (path for path in run.path.rglob("*") if path.is_file()):
        assert b"very-secret" not in path.read_bytes(), path


def test_slack_gets_only_a_text(tmp_path: Path, hook: Hook) -> None:
    secret = tmp_path / "hook"
    secret.write_text(f"{hook.url}\n")
    secret.chmod(0o600)
    spec, run = notifying(tmp_path / "run", str(secret), "slack")
    with claim(spec, "test"):
        prepare(spec, run)
    notify.send(run, "budget spent", "sft", "requeued 100 times")
    text = f"hpc-rlhf: demo stopped in sft: no requeues are left: requeued 100 times\n{run.path}"
    assert hook.posted == [(SECRET, {"text": text})]


@pytest.mark.parametrize(
    ("answers", "tries", "reason"),
    [
        ([503, 429], 3, ""),
        ([503] * 3, 3, "the server answered 503"),
        ([404], 1, "the server answered 404"),
        (None, 0, "refused"),
    ],
    ids=["again", "in-vain", "never", "nobody-there"],
)
def test_temporary_errors_are_retried_and_nothing_is_raised(
    tmp_path: Path,
    hook: Hook,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answers: list[int] | None,
    tries: int,
    reason: str,
) -> None:
    hook.answers = answers or []
    monkeypatch.setenv("HOOK", hook.url if answers else f"http://127.0.0.1:1{SECRET}")
    spec, run = notifying(tmp_path / "run")
    with claim(spec, "test"):
        prepare(spec, run)
    notify.send(run, "stopped", "sft", "why")
    assert len(hook.posted) == tries
    message = capsys.readouterr().err
    assert reason in message
    assert ("could not be reached" in message) == bool(reason)
    assert "very-secret" not in message
    run.job_yaml.unlink()
    notify.send(run, "stopped", "sft", "why")  # even then


def test_a_missing_or_exposed_url_is_refused_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.write_text("https://chat/very-secret")
    shared.chmod(0o640)
    monkeypatch.setenv("HOOK", "very-secret")
    for url, what in (
        ("${NO_HOOK}", "the variable NO_HOOK is not set"),
        (str(tmp_path / "no"), "cannot read .*: No such file"),
        (str(shared), "others can read"),
        ("${HOOK}", r"\$\{HOOK\} does not contain an http or https URL"),
    ):
        spec, run = notifying(tmp_path / "run", url)
        with claim(spec, "test"), pytest.raises(HpcRlhfError, match=what) as error:
            prepare(spec, run)
        assert "very-secret" not in str(error.value)


def test_a_spec_refuses_secrets(tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text("extends: tiny.yaml\n")
    (tmp_path / "tiny.yaml").write_text((Path(__file__).parents[2] / "jobs/tiny.yaml").read_text())
    secrets = {
        "notify.webhook.url": "https://chat/very-secret",
        "trackers.mlflow": "{experiment: e, tracking_uri: 'https://me:very-secret@host'}",
    }
    for path, value in secrets.items():
        with pytest.raises(SpecError, match=r"secret; put it|must not contain a user") as error:
            load_spec(spec, [f"{path}={value}"])
        assert "very-secret" not in str(error.value)
    loaded = load_spec(spec, ["notify.webhook.url=${HOOK}", "notify.mail=me@x.org", "trackers.wandb.project=p"])
    assert loaded.notify.webhook is not None
    assert loaded.notify.webhook.url == "${HOOK}"
    assert {path for path, _, _ in differences(load_spec(spec), loaded)} == {
        "notify.mail",
        "notify.webhook",
        "trackers.wandb",
    }


def test_only_the_last_stage_and_the_sentinels_send_mail(tmp_path: Path) -> None:
    from hpc_rlhf.launch.render import Templates

    spec = make_spec(tmp_path / "run").model_copy(update={"notify": NotifySpec(mail="me@x.org")})
    plan, templates = make_plan(spec), Templates()
    mails = {}
    for job in plan.jobs:
        texts = (templates.script(plan, job, "true"), templates.sentinel(plan, job))
        mails[job.stage] = [
            [line.removeprefix("#SBATCH --mail-") for line in text.splitlines() if "--mail-" in line] for text in texts
        ]
    fail = ["type=FAIL", "user=me@x.org"]
    assert mails == {"sft": [[], fail], "reward": [[], fail], "ppo": [["type=END", "user=me@x.org"], fail]}
