"""The page of a report in a real browser: it draws everything, asks nobody, obeys clicks and keys, and runs nothing foreign."""

import copy
import csv
import io
import shutil
from contextlib import contextmanager

import pytest
from outside import needs

from sdpctl.report.page import MOST_BYTES, page

CHROMIUM = shutil.which("chromium")

pytestmark = needs("chromium")

HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'>\u2028{{7*7}}"
SEGMENTS = ["stem", *(f"layer{i}" for i in range(1, 8)), "head"]


def row(number, **values):
    known = {
        "series": "net.eval",
        "network": "net",
        "kind": "evaluation",
        "row": number,
        "instance": "full" if number == 0 else f"layer{number % 7 + 1}@0.{number}",
        "cascade": False,
        "macs": 1_000_000 - 7_000 * number,
        "params": 5_000,
        "relative": 1 - 0.007 * number,
        "top1": 90 - (number * 37 % 50) / 10,
        "top5": 99.0,
        "loss": 0.3 + number / 1000,
        "front": number % 3 == 0,
        "images": 1000,
        "split": "test",
    }
    return known | values


def document(instances=12, trials=30, names=("cat", "dog", "fox"), name="net"):
    """Return the document of a network with a search."""
    rows = [row(number, network=name, series=f"{name}.eval") for number in range(instances)]
    profile = [
        {
            "instance": each["instance"],
            "macs": [each["macs"] // len(SEGMENTS)] * len(SEGMENTS),
            "maps": [[16, 32, 32]] * 4 + [[32, 8 + each["row"] % 8, 8]] * 4 + [[len(names)]],
        }
        for each in rows
    ]
    series = {"series": f"{name}.eval", "network": name, "kind": "evaluation"}
    scored = [
        {
            "instance": f"layer1@0.{number}",
            "macs": 400_000 + number,
            "runs": ["tpe.0"] if number % 2 else ["random.0", "tpe.0"],
            "reward": 50 + number * 29 % 40,
            "top1": 50 + number * 29 % 40,
        }
        for number in range(trials)
    ]
    return {
        "title": name,
        "networks": [
            {
                "name": name,
                "arch": "resnet20",
                "dataset": "toys",
                "image_size": 32,
                "instances": f"{instances} instances",
                "evaluated": True,
                "points": SEGMENTS[:-1],
                "epochs": [
                    {"epoch": e, "loss": 2 / e, "accuracy": 10.0 * e, "validation": {"full": 8.0 * e}} for e in (1, 2, 3)
                ],
                "segments": SEGMENTS,
                "profile": profile,
                "lineage": [{"tag": name, "kind": "checkpoint", "digest": "sha256:" + "0" * 64, "subject": None}],
                "recipes": [{"of": name, "text": f"name: {name}\n"}],
            }
        ],
        "series": [f"{name}.eval"],
        "rows": rows,
        "classes": [
            series
            | {
                "names": list(names),
                "images": [10] * len(names),
                "top1": {str(each["row"]): [each["top1"]] * len(names) for each in rows},
            }
        ],
        "predictions": [
            series
            | {
                "names": list(names),
                "confusions": {str(each["row"]): [[0, 1, 3]] for each in rows},
                "cheapest": rows[-1]["instance"],
                "images": [
                    {
                        "image": 7,
                        "label": 0,
                        "predicted": 1,
                        "instance": "full",
                        "relative": 1.0,
                        "picture": "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=",
                    }
                ],
            }
        ],
        "searches": [
            {
                "series": f"{name}.search",
                "network": name,
                "kind": "search",
                "budget": 500_000,
                "images": 100,
                "trials": scored,
                "winners": [],
                "learned": [],
            }
        ],
        "versions": {"sdpctl": "0.1.0"},
    }


def together(*documents):
    """Return one document of several networks."""
    joined = copy.deepcopy(documents[0])
    for other in documents[1:]:
        for key in ("networks", "series", "rows", "classes", "predictions", "searches"):
            joined[key] += copy.deepcopy(other[key])
    for number, each in enumerate(joined["rows"]):
        each["row"] = number
    at = {each["series"]: each["row"] for each in reversed(joined["rows"])}
    for table in joined["classes"]:
        table["top1"] = {str(int(key) + at[table["series"]]): values for key, values in table["top1"].items()}
    for table in joined["predictions"]:
        table["confusions"] = {str(int(key) + at[table["series"]]): values for key, values in table["confusions"].items()}
    return joined


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """Open a document as a page; nothing may be asked of a network, and nothing but what is expected written to the console."""

    @contextmanager
    def show(content, *, expected=(), **options):
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_bytes(page(content))
        context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
        tab = context.new_page()
        noise, asked = [], []
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector("html[data-drawn]", timeout=30_000)
        yield tab
        assert len(noise) == len(expected), noise
        assert all(start in text for start, text in zip(expected, noise, strict=True)), noise
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        context.close()

    return show


CONTENT = document(instances=50)
for _row in CONTENT["rows"][:5]:
    _row["latency"] = 1.5 + _row["row"]


@pytest.fixture(scope="module")
def shared(opened):
    with opened(CONTENT, permissions=["clipboard-read", "clipboard-write"]) as tab:
        yield tab


@pytest.fixture
def tab(shared):
    """The page of `CONTENT`, which several tests share: nothing is filtered, and the table is sorted by MACs."""
    yield shared
    shared.emulate_media(media="screen", color_scheme="light")
    shared.set_viewport_size({"width": 1200, "height": 800})
    shared.get_by_label("Filter the rows").fill("")
    shared.get_by_label("Pareto-optimal only").uncheck()
    for _ in range(2):
        if shared.locator("#table th[aria-sort=ascending]").all_inner_texts() != ["MACs"]:
            shared.locator("#table th").nth(1).get_by_role("button").click()


def marks(tab, place, name):
    return tab.locator(f"{place} .{name}_marks > *").count()


def column(tab, number):
    return [text.removeprefix("*").strip() for text in tab.locator(f"#table tbody tr > :nth-child({number})").all_inner_texts()]


def test_every_chart_has_its_marks(tab):
    content = CONTENT
    assert marks(tab, "#front", "instances") == len(content["rows"])
    assert marks(tab, "#front", "pareto") == 1
    assert marks(tab, "#strip", "segments") == len(content["rows"]) * len(SEGMENTS)
    sides = [[shape[1] if len(shape) == 3 else 1 for shape in each["maps"]] for each in content["networks"][0]["profile"]]
    changes = sum(1 + sum(a != b for a, b in zip(each[1:], each, strict=False)) for each in sides)
    assert marks(tab, "#strip", "sizes") == changes
    assert marks(tab, "#spent", "spent") == 2 * len(SEGMENTS)
    assert tab.locator("#loss .mark-symbol.role-mark path").count() == 3
    assert tab.locator("#accuracy .mark-symbol.role-mark path").count() == 6
    assert marks(tab, ".trials", "trials") == 30
    assert marks(tab, ".trials", "budget") == 1
    asked = sum(len(trial["runs"]) for trial in content["searches"][0]["trials"])
    assert tab.locator(".progress .mark-symbol.role-mark path").count() == asked
    assert marks(tab, ".classes", "accuracies") == 2 * 3
    assert tab.locator("#table tbody tr").count() == len(content["rows"])
    assert tab.locator(".pictures img").count() == 1


def test_several_networks_are_shown_over_one_another_with_a_legend(opened):
    content = together(document(name="a"), document(name="b"), document(name="c"))
    with opened(content) as tab:
        assert marks(tab, "#front", "instances") == 36
        assert tab.locator("#front .role-legend-label text").all_text_contents() == ["a.eval", "b.eval", "c.eval"]
        assert (
            len(set(tab.locator("#front .instances_marks path").evaluate_all("m => m.map(p => p.getAttribute('fill'))"))) == 3
        )
        assert tab.locator("#shrinks select option").all_inner_texts() == ["a", "b", "c"]
        tab.locator("#shrinks select").select_option("b")
        tab.wait_for_function("() => document.querySelector('#strip').ariaLabel.includes('of b')")


def test_a_click_on_a_mark_shows_its_row_and_hovering_says_what_it_is(tab):
    mark = tab.locator("#front .instances_marks path").nth(41)
    mark.hover(force=True)
    tip = tab.locator("#tip").inner_text()
    assert tip.splitlines()[0] == "layer7@0.41"
    assert "713 k MACs (71.3 % of full)" in tip
    assert "top-1 88.30 %" in tip
    mark.click(force=True)
    chosen = tab.locator("#table tr[aria-selected=true]")
    assert chosen.get_attribute("id") == "row-41"
    tab.wait_for_function("""() => { const box = document.querySelector('#row-41').getBoundingClientRect();
        return box.top >= 0 && box.bottom <= innerHeight; }""")
    tab.wait_for_function("() => document.querySelector('#spent').ariaLabel.includes('layer7@0.41')")


def test_keys_go_through_the_marks(tab):
    content = CONTENT
    tab.locator("#front").focus()
    tab.keyboard.press("End")
    tab.keyboard.press("Home")
    cheapest = min(content["rows"], key=lambda each: each["macs"])
    assert tab.locator("#table tr[aria-selected=true]").get_attribute("id") == f"row-{cheapest['row']}"
    assert tab.locator("#tip").inner_text().startswith(cheapest["instance"])
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.textContent") == cheapest["instance"]


def test_sort_filter_and_copy(tab):
    content = CONTENT
    macs = sorted(each["macs"] for each in content["rows"])
    assert column(tab, 2) == [f"{each:,}" for each in macs]
    tab.get_by_role("button", name="MACs").click()
    assert column(tab, 2) == [f"{each:,}" for each in reversed(macs)]
    tab.get_by_role("button", name="top-1 %").click()
    assert column(tab, 6) == [f"{each:.2f}" for each in sorted((each["top1"] for each in content["rows"]), reverse=True)]
    assert tab.locator("th[aria-sort=descending]").inner_text() == "top-1 %"
    tab.get_by_label("Filter the rows").fill("LAYER2")
    kept = [each for each in content["rows"] if "layer2" in each["instance"]]
    assert sorted(column(tab, 1)) == sorted(each["instance"] for each in kept)
    tab.get_by_role("button", name="Copy as CSV").click()
    tab.wait_for_function("() => document.querySelector('#instances [role=status]').textContent.startsWith('Copied')")
    copied = list(csv.DictReader(io.StringIO(tab.evaluate("navigator.clipboard.readText()"))))
    assert {(each["instance"], int(each["macs"])) for each in copied} == {(each["instance"], each["macs"]) for each in kept}
    tab.get_by_label("Filter the rows").fill("")
    tab.get_by_label("Pareto-optimal only").check()
    assert len(column(tab, 1)) == sum(each["front"] for each in content["rows"])


def test_the_axis_is_chosen(tab):
    content = CONTENT
    tab.locator("#axis").select_option("params")
    tab.wait_for_function("() => document.querySelector('#front .role-axis-title text').textContent === 'parameters'")
    assert marks(tab, "#front", "instances") == len(content["rows"])
    tab.locator("#axis").select_option("latency")
    tab.wait_for_function("() => document.querySelectorAll('#front .instances_marks path').length === 5")
    tab.locator("#axis").select_option("macs")
    tab.wait_for_function("() => document.querySelector('#front .role-axis-title text').textContent === 'MACs per image'")


def test_hostile_names_are_text_and_the_policy_forbids_other_scripts(opened):
    content = document(names=(HOSTILE, f"{HOSTILE}2", "fox"))
    content["title"] = HOSTILE
    network = content["networks"][0]
    network |= {"arch": HOSTILE, "dataset": HOSTILE, "recipes": [{"of": HOSTILE, "text": HOSTILE}]}
    network["lineage"][0]["tag"] = HOSTILE
    network["name"] = HOSTILE
    for each in [*content["rows"], *content["classes"], *content["predictions"], *content["searches"]]:
        each |= {"network": HOSTILE, "series": HOSTILE}
    content["series"] = [HOSTILE]
    content["rows"][3]["instance"] = network["profile"][3]["instance"] = HOSTILE
    content["searches"][0]["trials"][0] |= {"instance": HOSTILE, "runs": [HOSTILE]}
    with opened(content, expected=["Executing inline script violates"]) as tab:
        tab.locator("#front .instances_marks path").nth(3).hover(force=True)
        assert tab.locator("#tip").inner_text().startswith("</script><script>")
        assert tab.evaluate("window.stolen") is None
        assert tab.locator("script").count() == 3
        assert tab.locator("img").count() == 1
        assert HOSTILE.split("\u2028")[0] in tab.locator("#page").inner_text()
        assert tab.evaluate("document.querySelector('meta[http-equiv]').content").startswith("default-src 'none'; ")
        refused = tab.evaluate("""() => new Promise((done) => {
            document.addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective));
            const script = document.createElement('script'); script.textContent = 'window.stolen = 3';
            document.body.append(script); })""")
        assert refused == "script-src-elem"
        assert tab.evaluate("window.stolen") is None


@pytest.mark.parametrize(("scheme", "ink"), [("light", "rgb(27, 36, 48)"), ("dark", "rgb(231, 236, 243)")])
def test_nothing_is_wider_than_a_telephone(tab, scheme, ink):
    tab.emulate_media(color_scheme=scheme)
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.wait_for_function("() => document.querySelector('#front svg').getBoundingClientRect().width < 390")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.evaluate("getComputedStyle(document.querySelector('#front .role-axis-title text')).fill") == ink


def test_a_dark_page_prints_on_white(tab):
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 28)"
    tab.emulate_media(media="print", color_scheme="dark")
    colours = "[document.body, document.querySelector('#cost')].map((e) => getComputedStyle(e).backgroundColor)"
    assert tab.evaluate(colours) == ["rgb(255, 255, 255)"] * 2
    assert tab.evaluate("getComputedStyle(document.querySelector('#front .role-axis-title text')).fill") == "rgb(17, 24, 32)"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_many_instances_and_trials_are_all_drawn_in_a_small_file(opened):
    content = document(instances=135, trials=2000)
    assert len(page(content)) < MOST_BYTES
    with opened(content) as tab:
        assert marks(tab, "#front", "instances") == 135
        assert marks(tab, ".trials", "trials") == 2000
        assert tab.locator("#table tbody tr").count() == 135


def test_parts_have_names_for_a_screen_reader(tab):
    assert tab.locator("section:not([aria-labelledby])").count() == 0
    assert tab.locator(".chart:not([role=figure][aria-label])").count() == 0
    assert tab.locator("table:not(:has(caption))").count() == 0
    assert tab.locator("thead th:not([scope=col])").count() == 0
    assert tab.get_by_role("figure", name="Chart of MACs per image against top-1 accuracy").count() == 1
    label = tab.locator("#front .instances_marks path").first.get_attribute("aria-label")
    assert label.startswith("full")
