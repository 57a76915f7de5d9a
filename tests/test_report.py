"""report.html and --compare: what the page holds, that it runs in a real browser, and paired differences."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from test_evaluate import SAMPLES, run, sample, write

from evaluation import compare, metrics, plots, report

HOSTILE = (
    "</script><script>document.title='taken'</script><!--CONTENT--><!--END--> /*DATA*/[] \u2028 <b>x</b>"
)


class Page(HTMLParser):
    """Counts the elements, keeps what is fetched from elsewhere and the text of scripts."""

    def __init__(self, path):
        super().__init__()
        self.count, self.links, self.script, self.inside = {}, [], "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [
            v for k, v in attrs if k in ("src", "href") and not v.startswith("data:image/png;base64,")
        ]
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        self.script += text if self.inside else ""

    def samples(self):
        return json.JSONDecoder().raw_decode(self.script.split("DATA = ", 1)[1])[0]


def test_page_is_whole_and_needs_nothing_else(tmp_path):
    assert run("--samples", SAMPLES, "--out", tmp_path / "out", "--trained-budgets", "16") == 0
    page = Page(tmp_path / "out" / "report.html")
    assert page.links == [] and page.count["img"] == len(plots.PICTURES) and page.count["script"] == 1
    assert "link" not in page.count and "@import" not in (tmp_path / "out" / "report.html").read_text()
    rows = [json.loads(line) for line in open(SAMPLES)]
    found = page.samples()
    assert len(found) == len(rows) == 18
    key = ("id", "budget", "sample", "response", "correct", "length")
    assert {tuple(s[k] for k in key) for s in found} == {tuple(s[k] for k in key) for s in rows}


def test_texts_of_models_and_users_stay_texts(tmp_path):
    rows = [sample(id=HOSTILE, source=HOSTILE, response=HOSTILE, problem=HOSTILE, prompt=HOSTILE)]
    assert run("--samples", write(tmp_path / "s.jsonl", rows), "--out", tmp_path / "out") == 0
    page = Page(tmp_path / "out" / "report.html")
    assert page.count["script"] == 1 and page.count.get("b") is None
    assert page.samples()[0]["response"] == HOSTILE


def test_browser_of_samples_keeps_whole_problems(monkeypatch):
    monkeypatch.setattr(report, "SHOWN", 50)
    rows = [sample(id=i, budget=b, sample=k) for k in range(2) for b in (8, 16, 32) for i in range(100)]
    kept = []
    for row in rows:
        report.pick(kept, row)
    found = report.picked(kept, len(rows))
    ids = {s["id"] for s in found}
    assert len(kept) == 50 and len(found) == 48 == 6 * len(ids)
    again = []
    for row in reversed(rows):
        report.pick(again, row)
    assert report.picked(again, len(rows)) == found  # the order of the file does not choose
    assert len(report.picked(kept[:3], 3)) == 3
    report.pick(kept := [], sample(response="a" * 30_000 + "b" * 30_000))
    text = kept[0][-1]["response"]
    assert text.startswith("aaa") and text.endswith("bbb") and "40000 characters left out" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLICKS = """<script>
  const set = (id, value) => { get(id).value = value; get(id).oninput(); };
  const state = () => body.rows.length + '|' + get('count').textContent;
  const seen = [state()];
  set('verdict', 'wrong'); seen.push(state());
  set('budget', '16'); seen.push(state());
  set('end', 'cut off'); seen.push(state(), get('one').textContent.includes('cut off at the cap'));
  set('end', ''); set('verdict', ''); set('fit', 'too short'); seen.push(state());
  set('fit', ''); set('text', 'add 1 2 3'); seen.push(state());
  set('text', ''); set('order', 'longest first'); seen.push(body.rows[0].cells[2].textContent);
  body.rows[5].click(); seen.push(document.querySelector('#list .on') === body.rows[5]);
  set('text', 'nothing like this'); seen.push(state());
  document.title = JSON.stringify(seen);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_filters_in_a_real_browser(tmp_path):
    assert run("--samples", SAMPLES, "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "clicked.html").write_text(page.replace("</body>", CLICKS), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    command = [CHROMIUM, *flags, f"file://{tmp_path / 'clicked.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])
    # 6 of 18 are wrong, 3 of them at budget 16, one of these cut off. Lengths there: 16 16 14 18 20 12.
    assert seen[:4] == ["18|18 shown", "6|6 shown", "3|3 shown", "1|1 shown"] and seen[4] is True
    assert seen[5:] == ["2|2 shown", "2|2 shown", "20 cut", True, "0|0 shown"]


# ------------------------------------------------------------------------------------------------------------
# Comparison


def compared(*folders, out) -> int:
    return compare.main([*map(str, folders), "--out", str(out)])


def evaluation(tmp_path, name, rows):
    out = tmp_path / name / "eval"
    assert run("--samples", write(tmp_path / f"{name}.jsonl", rows), "--out", out) == 0
    return out


def test_differences_are_paired(tmp_path, capsys):
    # 40 problems, 8 samples each: problem i is solved with chance i/40; B solves one more sample of each.
    def rows(more, length):
        counts = [min(8, i * 8 // 40 + more) for i in range(40)]
        every = [(i, k, k < c) for i, c in enumerate(counts) for k in range(8)]
        first = [sample(id=i, sample=k, correct=ok, budget=100, length=length) for i, k, ok in every]
        return first + [r | {"budget": 200, "length": 2 * r["length"]} for r in first]

    a, b = evaluation(tmp_path, "a", rows(0, 100)), evaluation(tmp_path, "b", rows(1, 110))
    assert compared(a, f"mine={b}", out=tmp_path / "both") == 0
    with open(tmp_path / "both" / "compare.json") as f:
        found = json.load(f)
    assert list(found["models"]) == ["eval", "mine"]
    part = found["datasets"]["s"]
    cell = part["budgets"]["100"]
    assert cell["problems"] == 40 and set(part["budgets"]) == {"100", "200"}
    gap = cell["difference"]["mine"]
    # The same difference on every problem has an interval of width zero, however hard the problems.
    assert gap["accuracy"]["value"] == pytest.approx(1 / 8)
    assert gap["accuracy"]["ci"] == pytest.approx([1 / 8, 1 / 8], abs=1e-6)
    low, high = cell["figures"]["mine"]["ci"]["accuracy"]
    assert high - low > 0.1
    assert gap["mean_length"]["value"] == 10 and gap["abs_error"]["value"] == pytest.approx(0.1)
    # Both curves are flat: the area is the accuracy, over the lengths that both reach.
    assert (part["area"]["low"], part["area"]["high"]) == (110, 200)
    assert part["area_difference"]["mine"]["value"] == pytest.approx(1 / 8)
    assert part["area_difference"]["mine"]["ci"] == pytest.approx([1 / 8, 1 / 8], abs=1e-6)
    assert found["pictures"] == ["models.png"]
    assert (tmp_path / "both" / "models.png").stat().st_size > 10_000
    page = Page(tmp_path / "both" / "report.html")
    assert page.links == [] and page.count["img"] == 1 and "script" not in page.count
    assert "+12.5% [+12.5%, +12.5%]" in capsys.readouterr().out


def test_only_problems_that_both_have_are_compared(tmp_path):
    a = evaluation(tmp_path, "a", [sample(id=i, correct=i < 3) for i in range(6)])
    rows = [sample(id=i, correct=True) for i in range(2, 9)]
    b = evaluation(tmp_path, "b", rows + [sample(id=0, budget=99), sample(id=0, source="t")])
    assert compared(a, b, out=tmp_path / "both") == 0
    with open(tmp_path / "both" / "compare.json") as f:
        found = json.load(f)
    assert list(found["models"]) == ["a/eval", "b/eval"] and list(found["datasets"]) == ["s"]
    (cell,) = found["datasets"]["s"]["budgets"].values()
    # Problems 2 to 5: one of four right in A, all in B.
    assert cell["problems"] == 4 and cell["difference"]["b/eval"]["accuracy"]["value"] == 0.75


def test_comparisons_that_make_no_sense(tmp_path, capsys):
    a = evaluation(tmp_path, "a", [sample()])
    b = evaluation(tmp_path, "b", [sample(source="other")])
    c = evaluation(tmp_path, "c", [sample(problem="the same id, another problem")])
    (tmp_path / "old").mkdir()
    for words, folders in {
        "two finished evaluations": [a],
        "no data set and budget is in all": [a, b],
        "holds no problems.jsonl": [a, tmp_path / "old"],
        "names 'x' twice": [f"x={a}", f"x={b}"],
        "another problem": [a, c],
        "no such folder": [a, tmp_path / "nowhere"],
    }.items():
        capsys.readouterr()
        assert compared(*folders, out=tmp_path / "both") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "both").exists(), error
    # An evaluation is no place for a comparison.
    assert compared(a, b, out=a) == 2
    assert json.loads((a / "results.json").read_text())["datasets"]


def test_curves_of_three_models_in_one_picture(tmp_path):
    figures = metrics.jsonable({"accuracy": 0.5, "mean_length": 90, "ci": {"accuracy": [0.4, 0.6]}})
    sets = {"s$": {"100": figures, "none": figures | {"mean_length": 3000}}, "t": {"100": figures}}
    paths = plots.draw_models({f"model {i}": sets for i in range(3)}, str(tmp_path))
    assert [p.rsplit("/", 1)[1] for p in paths] == ["models_s_.png", "models_t.png"]
    assert plots.error_bar(figures, "accuracy", 50.0) == pytest.approx((10, 10))
    assert (
        plots.error_bar({}, "accuracy", 50.0) == (0, 0) and np.isfinite(plots.error_bar({}, "x", 1.0)).all()
    )
