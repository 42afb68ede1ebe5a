from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from fastmem import cli
from fastmem.registry import DecayConfig, ErrorType, Fix, FixRegistry, FixType, create_signature
from fastmem.registry.report import STRENGTH_BINS, _lifetime, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</div><script>document.body.innerHTML = 'gone'</script> & \"more\" <b>'"
COLOURS = {"strength": (42, 120, 214), "births": (26, 154, 108), "deaths": (217, 98, 43)}


@pytest.fixture(scope="module")
def registry():
    """Sixty epochs of registrations, with some successes, failures and misses."""
    made = FixRegistry()
    for epoch in range(60):
        for number in range(epoch % 7 + 1):
            error = create_signature(list(ErrorType)[number], f"task {epoch}.{number}", ["spatial"], epoch % 10 / 10)
            made.register(error, Fix(FixType.ADD_ELEMENTS, {f"part {number}": 0.5}))
            if epoch % 3 == 0:
                made.report_success(error)
                made.lookup(error)
        if epoch < 59:
            made.advance_epoch()
    nasty = create_signature(ErrorType.PARTIAL_DEFINITION, NASTY, [NASTY], 0.6)
    made.register(nasty, Fix(FixType.COMPLETE_DEFINITION, {NASTY: 1.0}, definition_supplement=NASTY))
    for _ in range(9):
        made.report_success(nasty)
    made.report_failure(nasty)
    made.lookup(create_signature(ErrorType.REMOVAL, "unknown", [], 0.5))
    return made


def chromium(*arguments) -> str:
    if CHROMIUM is None:
        pytest.skip("no chromium (Debian: chromium)")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--force-device-scale-factor=1", "--virtual-time-budget=2000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_of(dom: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", dom.split("</style>")[1])).split())


def test_the_page_shows_the_numbers(registry, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report(registry), encoding="utf-8")
    dom = chromium(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri())
    text = text_of(dom)
    stats = registry.get_stats()
    assert f"Fixes {stats['total_entries']:,} " in text
    assert f"Hit rate {100 * stats['hit_rate']:.1f} % {stats['hits']} of {stats['hits'] + 1} lookups" in text
    assert f"Epoch {stats['current_epoch']} " in text
    strengths = sorted(entry.strength for entry in registry.iter_entries())
    assert f"Median strength {(strengths[len(strengths) // 2] + strengths[(len(strengths) - 1) // 2]) / 2:.2f}" in text
    assert NASTY in text and "gone" in dom and "<script>document" not in dom  # as text, in a page that is still there
    assert "“" + NASTY in text
    assert re.search(r"Strength 0\.9\d Helped 9 Failed 1 Last used 0 Gone in \d+", row_text(dom))
    assert not re.search(r"(src|href)=|url\(|@import|https?:", dom)


def row_text(dom: str) -> str:
    """The first row of the hottest fixes, each number after its name."""
    row = dom.split('class="hot"')[1].split("<tbody>")[1].split("</tr>")[0]
    return text_of("</style>" + re.sub(r'<td data-name="([^"]*)">', r" \1 ", row))


MEASURE = """<script>
const boxes = {};
for (const chart of document.querySelectorAll(".chart"))
  boxes[chart.className.split(" ")[1]] = {
    svg: chart.querySelector("svg").getBoundingClientRect().toJSON(),
    bars: [...chart.querySelectorAll("rect")].map(bar => bar.getBoundingClientRect().toJSON()),
  };
boxes.page = [document.documentElement.scrollWidth, innerWidth];
document.body.innerHTML = "<pre>" + JSON.stringify(boxes) + "</pre>";
</script>"""


@pytest.mark.parametrize("width", [1120, 520])
def test_the_bars_are_drawn_where_the_numbers_say(registry, tmp_path, width):
    """Pixels of a screenshot: each bar has its colour up to a height in proportion to its count, and none above."""
    image = pytest.importorskip("matplotlib.image", reason="needs matplotlib to read a PNG")
    page, measured, shot = (tmp_path / name for name in ("report.html", "measured.html", "report.png"))
    text = report(registry)
    page.write_text(text, encoding="utf-8")
    measured.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    options = (f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},3000")
    boxes = json.loads(re.search(r"<pre>(.*)</pre>", chromium(*options, "--dump-dom", measured.as_uri()))[1])
    chromium(*options, f"--screenshot={shot}", page.as_uri())
    pixels = (image.imread(shot)[..., :3] * 255).round().astype(int)
    assert pixels.shape[1] == width
    assert boxes["page"][0] <= boxes["page"][1]  # nothing is wider than the screen
    assert len({tuple(pixel) for pixel in pixels[::10, ::10].reshape(-1, 3).tolist()}) > 10

    entries = list(registry.iter_entries())
    epoch = registry.current_epoch
    strengths = [0] * STRENGTH_BINS
    births, deaths = [0] * 30, [0] * 60  # two epochs to a bar
    for entry in entries:
        strengths[min(STRENGTH_BINS - 1, int(entry.strength * STRENGTH_BINS))] += 1
        births[entry.creation_epoch // 2] += 1
        life, strength, rule = 0, entry.strength, registry.decay_config
        while strength >= rule.min_strength:
            strength = max(0.0, strength * rule.exponential_rate - rule.linear_rate)
            life += 1
        deaths[(epoch + life) // 5 - (epoch + 1) // 5] += 1  # five to a bar: they are up to a hundred epochs ahead
    while not deaths[-1]:
        deaths.pop()
    for name, counts in {"strength": strengths, "births": births, "deaths": deaths}.items():
        svg, drawn = boxes[name]["svg"], [n for n, count in enumerate(counts) if count]
        assert len(boxes[name]["bars"]) == len(drawn), name
        heights = {n: box["height"] for n, box in zip(drawn, boxes[name]["bars"], strict=True)}
        tallest = max(drawn, key=counts.__getitem__)
        for n, box in zip(drawn, boxes[name]["bars"], strict=True):
            assert heights[n] == pytest.approx(heights[tallest] * counts[n] / counts[tallest], abs=0.6)
            middle = round(svg["left"] + svg["width"] * (n + 0.5) / len(counts))
            assert box["left"] < middle < box["right"]
            bottom, top = svg["bottom"], svg["bottom"] - box["height"]
            inside, above = round((bottom + top) / 2), round(top) - 3
            if box["height"] >= 4:
                assert tuple(pixels[inside, middle]) == COLOURS[name], (name, n)
            assert tuple(pixels[above, middle]) != COLOURS[name], (name, n)


@pytest.mark.parametrize(
    "rule", [{}, {"exponential_rate": 0.5, "linear_rate": 0.0}, {"exponential_rate": 1.0, "linear_rate": 0.01}]
)
def test_forecasts_of_deaths_come_true(rule):
    """To the epoch, but for strengths that meet the minimum exactly, which rounding may move by one."""
    made = FixRegistry(decay_config=DecayConfig(**rule))
    for number in range(40):
        error = create_signature(ErrorType.REMOVAL, str(number), [], 0.5)
        made.register(error, Fix(FixType.ADD_ELEMENTS))
        for _ in range(number % 5):
            made.report_failure(error)
        if number % 2:
            made.advance_epoch()
    lifetime = _lifetime(made.decay_config)
    expected = {text: made.current_epoch + lifetime(entry.strength) for text, entry in made.entries.items()}
    assert expected
    slack = 1 if rule.get("exponential_rate") == 1.0 else 0
    while len(made):
        before = set(made.entries)
        made.advance_epoch()
        for text in before - set(made.entries):
            assert abs(expected[text] - made.current_epoch) <= slack


def test_what_never_dies_is_said_so():
    for rule in ({"min_strength": 0.0}, {"exponential_rate": 1.0, "linear_rate": 0.0}, {"exponential_rate": 1 - 1e-9}):
        made = FixRegistry(decay_config=DecayConfig(**{"linear_rate": 0.0} | rule))
        made.register(create_signature(ErrorType.REMOVAL, "x", [], 0.5), Fix(FixType.ADD_ELEMENTS))
        assert " 1 never will, or not within 100,000 epochs" in report(made)


def test_one_epoch_and_gone():
    made = FixRegistry(decay_config=DecayConfig(exponential_rate=0.0))
    made.register(create_signature(ErrorType.REMOVAL, "x", [], 0.5), Fix(FixType.ADD_ELEMENTS))
    assert "<title>epoch 1: 1</title>" in report(made)


def test_an_empty_registry_has_a_page():
    text = text_of(report(FixRegistry()))
    assert "Fixes 0" in text and "Hit rate \N{EN DASH}" in text and "No fix is held yet." in text


def test_the_command(registry, tmp_path, capsys):
    with FixRegistry(tmp_path / "fixes <1>.db") as file:
        file.register(create_signature(ErrorType.REMOVAL, "x", [], 0.5), Fix(FixType.ADD_ELEMENTS))
    out = tmp_path / "page.html"
    assert cli.main(["registry", "report", str(tmp_path / "fixes <1>.db"), "-o", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "fixes &lt;1&gt;.db" in text and "<1>" not in text
    assert cli.main(["registry", "report", str(tmp_path / "none.db"), "-o", str(tmp_path / "other.html")]) == 1
    assert not (tmp_path / "none.db").exists() and not (tmp_path / "other.html").exists()
