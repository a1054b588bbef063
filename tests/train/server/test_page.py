"""The page of a server in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from hpc_rlhf.run import feedback
from hpc_rlhf.run.feedback import Vote
from hpc_rlhf.train.chat import load_models
from hpc_rlhf.train.server.voting import Voting
from tests import chromium
from tests.train.server.running import TOKEN, Scripted, serving, small_model

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.slow]

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> &amp; \u202e"
TEXTS = {"sft": "Snow is white.\n\nIce is blue.", HOSTILE: f"White. {HOSTILE}"}
MANIFESTS = dict.fromkeys(TEXTS, "5" * 64)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.started() as browser:
        yield browser


@pytest.fixture(scope="module")
def models() -> dict[str, Scripted]:
    return {name: Scripted(text) for name, text in TEXTS.items()}


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "feedback"


@pytest.fixture(scope="module")
def base(models: dict[str, Scripted], votes: Path) -> Iterator[str]:
    with serving(models, Voting(votes, MANIFESTS, record_user=True)) as base:
        yield base


class Tab:
    """The page in a tab; ``wrong`` collects what must not happen there."""

    def __init__(self, page: Page, base: str) -> None:
        self.page, self.wrong = page, list[str]()
        page.on("console", lambda message: self.wrong.append(message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (self.wrong.append("a script ran"), dialog.dismiss()))
        page.on("request", lambda each: None if each.url.startswith((base, "data:")) else self.wrong.append(each.url))
        page.goto(f"{base}/#{TOKEN}")
        expect(page.locator("#message")).to_be_focused()

    def send(self, text: str) -> None:
        self.page.fill("#message", text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> None:
        """Send a message, and wait for the whole response."""
        turns = self.page.locator("#turns > li")
        before = turns.count()
        self.send(text)
        expect(turns).to_have_count(before + 2)
        expect(self.page.locator("[aria-busy=true]")).to_have_count(0)

    def vote(self, choice: str) -> None:
        self.page.locator(f"[data-vote={choice}]").last.click()
        expect(self.page.get_by_text("Saved. Thank you.").last).to_be_visible()

    @property
    def texts(self) -> list[str]:
        return self.page.locator("#turns .text").all_inner_texts()

    def close(self) -> None:
        self.page.context.close()
        assert self.wrong == []


@pytest.fixture
def tab(browser: Browser, base: str) -> Iterator[Tab]:
    tab = Tab(browser.new_context(viewport={"width": 1000, "height": 800}).new_page(), base)
    yield tab
    tab.close()


def stored(votes: Path) -> list[Vote]:
    return [vote for _, vote in feedback.read(votes) if vote is not None]


def choose_sft(tab: Tab) -> None:
    tab.page.click("#toggle-settings")
    tab.page.select_option("#model-choice", "sft")


def test_a_response_streams_and_a_vote_with_its_settings_is_stored(tab: Tab, votes: Path) -> None:
    choose_sft(tab)
    tab.page.fill("#system", "Be brief.")
    tab.page.fill("#temperature", "0.5")
    tab.page.fill("#seed", "7")
    tab.page.fill("#user", "Eve")
    tab.ask("What colour is snow?")
    assert tab.texts == ["What colour is snow?", TEXTS["sft"]]
    tab.vote("up")
    tab.page.get_by_label("Comment (optional)").fill("True.")
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_text("Your comment: True.")).to_be_visible()
    tab.ask("And ice?")
    tab.page.locator("[data-vote=down]").first.click()
    expect(tab.page.locator("[data-vote=down]").first).to_have_attribute("aria-pressed", "true")
    expect(tab.page.get_by_text("Saved. Thank you.").first).to_be_visible()
    vote = stored(votes)[-1]
    assert (vote.vote, vote.comment, vote.user, vote.models[0].name) == ("down", "True.", "Eve", "sft")
    assert vote.sampling.model_dump() == {"temperature": 0.5, "top_p": 1, "max_tokens": 1024, "seed": 7}
    assert [(each.role, each.content) for each in vote.messages] == [
        ("system", "Be brief."), ("user", "What colour is snow?"),
    ]  # fmt: skip
    assert vote.responses == [TEXTS["sft"]]


def test_text_of_users_and_models_stays_text(tab: Tab) -> None:
    tab.ask(HOSTILE)
    assert tab.texts == [HOSTILE, TEXTS[HOSTILE]]
    expect(tab.page.locator("#model")).to_have_text(HOSTILE)
    tab.vote("up")
    tab.page.get_by_label("Comment (optional)").fill(HOSTILE)
    tab.page.keyboard.press("Enter")
    expect(tab.page.get_by_text(f"Your comment: {HOSTILE}")).to_be_visible()
    tab.page.reload()
    expect(tab.page.get_by_text(f"Your comment: {HOSTILE}")).to_be_visible()
    assert tab.page.locator("#turns img, #turns script").count() == 0


def test_a_response_can_be_stopped_and_generated_again(
    tab: Tab, models: dict[str, Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_sft(tab)
    monkeypatch.setattr(models["sft"], "pause", 0.2)
    tab.send("Hi")
    expect(tab.page.locator(".reply .text")).to_contain_text("Sn")
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator(".note", has_text="Stopped.")).to_be_visible()
    assert tab.texts[1] in TEXTS["sft"]
    assert tab.texts[1] != TEXTS["sft"]
    assert tab.page.locator("[data-vote]").count() == 0, "half a response is not voted on"
    monkeypatch.setattr(models["sft"], "pause", 0.0)
    tab.page.get_by_role("button", name="Regenerate").click()
    expect(tab.page.locator("[data-vote=up]")).to_be_visible()
    assert tab.texts == ["Hi", TEXTS["sft"]]
    assert models["sft"].live == []


def test_an_edited_message_replaces_what_followed(tab: Tab, models: dict[str, Scripted]) -> None:
    choose_sft(tab)
    tab.ask("One")
    tab.ask("Two")
    tab.page.get_by_role("button", name="Edit your message").first.click()
    expect(tab.page.get_by_role("textbox", name="Edit your message")).to_be_focused()
    tab.page.get_by_role("textbox", name="Edit your message").fill("Three")
    tab.page.get_by_role("button", name="Send again").click()
    expect(tab.page.locator("[data-vote=up]")).to_have_count(1)
    assert tab.texts == ["Three", TEXTS["sft"]]
    assert models["sft"].asked[-1] == [("human", "Three")]


def test_a_comparison_is_blind_until_the_vote_and_goes_on_with_the_better_response(
    tab: Tab, votes: Path, models: dict[str, Scripted]
) -> None:
    tab.page.get_by_role("button", name="Compare").click()
    tab.ask("What colour is snow?")
    assert "sft" not in tab.page.locator("#turns").inner_text()
    tab.send("Ice?")
    expect(tab.page.get_by_text("Choose the better response first")).to_be_visible()
    left, right = tab.texts[1:]
    tab.vote("right")
    vote = stored(votes)[-1]
    assert (vote.kind, vote.vote, vote.responses) == ("pair", "right", [left, right])
    assert [TEXTS[each.name] for each in vote.models] == [left, right]
    expect(tab.page.locator(".preferred .who")).to_have_text(f"Response B: {vote.models[1].name}, preferred")
    tab.ask("Ice?")
    expected = [("human", "What colour is snow?"), ("assistant", right), ("human", "Ice?")]
    assert models["sft"].asked[-1] == models[HOSTILE].asked[-1] == expected
    tab.vote("both_bad")
    tab.ask("Water?")
    assert models["sft"].asked[-1] == [*expected[:2], ("human", "Water?")], "without what nobody answered well"


def test_one_model_is_compared_with_itself(browser: Browser, tmp_path: Path) -> None:
    """Its two responses have seeds of their own, and differ."""
    models = load_models({"ppo": small_model(tmp_path / "ppo")}, None)
    with serving(models, Voting(tmp_path / "feedback", {"ppo": "5" * 64}, False), twice=True) as base:
        tab = Tab(browser.new_context().new_page(), base)
        expect(tab.page.locator("#modes")).to_be_visible()
        tab.page.get_by_role("button", name="Compare").click()
        expect(tab.page.get_by_text("ppo answers your message twice")).to_be_visible()
        tab.ask("What colour is snow?")
        left, right = tab.texts[1:]
        assert left != right
        tab.vote("left")
        tab.close()
    (vote,) = stored(tmp_path / "feedback")
    assert (vote.kind, [each.name for each in vote.models], vote.responses) == ("pair", ["ppo", "ppo"], [left, right])


def test_the_sides_of_a_comparison_are_shuffled(tab: Tab) -> None:
    tab.page.get_by_role("button", name="Compare").click()
    seen = set()
    for _ in range(40):
        tab.ask("Hi")
        seen.add(tab.texts[1])
        if len(seen) == 2:
            return
        tab.page.get_by_role("button", name="New chat").click()
    raise AssertionError("one model was always on the left")


def test_a_reload_keeps_the_conversation_and_another_tab_has_its_own(tab: Tab, base: str) -> None:
    assert "#" not in tab.page.url, "the token does not stay in the history"
    tab.ask("First tab")
    tab.vote("up")
    second = Tab(tab.page.context.new_page(), base)
    expect(second.page.locator("#turns li")).to_have_count(0)
    second.ask("Second tab")
    tab.page.reload()
    expect(tab.page.locator("[data-vote=up]")).to_have_attribute("aria-pressed", "true")
    assert tab.texts[0] == "First tab"
    tab.ask("On it goes")
    assert (len(tab.texts), second.texts[0]) == (4, "Second tab")
    assert second.wrong == []


def test_a_wrong_token_is_asked_for_again(browser: Browser, base: str) -> None:
    page = browser.new_page()
    page.goto(f"{base}/#wrong")
    expect(page.get_by_text("The server does not accept this token.")).to_be_visible()
    expect(page.get_by_label("Token", exact=True)).to_be_focused()
    page.keyboard.type(TOKEN)
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1600])
def test_the_page_fits_and_is_accessible(browser: Browser, base: str, width: int, theme: Any) -> None:
    context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=theme)
    tab = Tab(context.new_page(), base)
    check = [chromium.serious_violations(tab.page)]
    tab.page.click("#toggle-settings")
    for mode in ("Chat", "Compare"):
        tab.page.get_by_role("button", name=mode, exact=True).click()
        tab.ask("W" * 200)
        tab.vote("up" if mode == "Chat" else "left")
        check.append(chromium.serious_violations(tab.page))
        overflow = "document.documentElement.scrollWidth > innerWidth || scroller.scrollWidth > scroller.clientWidth"
        assert not tab.page.evaluate(overflow)
    assert check == [[], [], []]
    tab.close()


def test_everything_can_be_done_with_the_keyboard_in_order(tab: Tab) -> None:
    choose_sft(tab)
    tab.page.click("#toggle-settings")
    tab.ask("Hi")
    expect(tab.page.locator("#announcer")).to_contain_text("Snow is white.")
    tab.page.locator("#new").focus()
    order = []
    for _ in range(9):
        tab.page.keyboard.press("Tab")
        order.append(tab.page.evaluate("(at => at.ariaLabel || at.innerText.trim() || at.id)(document.activeElement)"))
    assert order == [
        "Settings", "Theme: system", "Conversation", "Edit your message", "Good response", "Bad response",
        "Regenerate", "message", "Send",
    ]  # fmt: skip
