"""Report, comparisons, learning curves: what pages hold, that they run in a browser, paired differences."""

import contextlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import PICTURES, SAMPLES, run, sample, write

from evaluation import compare, curves, plots, report

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
    assert page.links == [] and page.count["img"] == len(PICTURES) and page.count["script"] == 1
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
    browser, again, few = report.Browser(), report.Browser(), report.Browser()
    for row in rows:
        browser.add(row)
    found = browser.samples()
    ids = {s["id"] for s in found}
    assert browser.total == 600 and len(found) == 48 == 6 * len(ids)
    for row in reversed(rows):
        again.add(row)
    assert again.samples() == found  # the order of the file does not choose
    few.add(sample(response="a" * 30_000 + "b" * 30_000))
    (text,) = (s["response"] for s in few.samples())
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
    assert found["pictures"] == ["side_by_side.png", "models.png"]
    assert (tmp_path / "both" / "models.png").stat().st_size > 10_000
    page = Page(tmp_path / "both" / "report.html")
    assert page.links == [] and page.count["img"] == 2 and "script" not in page.count
    assert "+12.5% [+12.5%, +12.5%]" in capsys.readouterr().out


def test_only_problems_that_both_have_are_compared(tmp_path):
    a = evaluation(tmp_path, "a", [sample(id=i, correct=i < 3) for i in range(6)])
    rows = [sample(id=i, correct=True) for i in range(2, 9)]
    b = evaluation(tmp_path, "b", rows + [sample(id=0, budget=99), sample(id=0, source="t")])
    assert compared(a, b, out=tmp_path / "both") == 0
    with open(tmp_path / "both" / "compare.json") as f:
        found = json.load(f)
    # The second one's name is taken: it goes by its path.
    assert list(found["models"]) == ["eval", str(b)] and list(found["datasets"]) == ["s"]
    (cell,) = found["datasets"]["s"]["budgets"].values()
    # Problems 2 to 5: one of four right in A, all in B.
    assert cell["problems"] == 4 and cell["difference"][str(b)]["accuracy"]["value"] == 0.75


def test_comparisons_that_make_no_sense(tmp_path, capsys):
    a = evaluation(tmp_path, "a", [sample()])
    b = evaluation(tmp_path, "b", [sample(source="other")])
    c = evaluation(tmp_path, "c", [sample(problem="the same id, another problem")])
    (tmp_path / "old").mkdir()
    for words, folders in {
        "two finished evaluations": [a],
        "no data set and budget is in all": [a, b],
        "samples.jsonl cannot be read": [a, tmp_path / "old"],
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


def test_violins_of_several_models_share_their_axes(tmp_path, monkeypatch):
    """Before: 4 budgets, answers of 50 tokens; after: 6 budgets that are met; one picture, equal scales."""
    rng, seen, real = np.random.default_rng(0), [], plots.canvas

    def spread(asked, of):
        return [sample(id=i, budget=b, length=int(n)) for b in asked for i, n in enumerate(of(b))]

    @contextlib.contextmanager
    def watched(*args, **more):
        with real(*args, **more) as axes:
            yield axes
            seen.append([(ax.get_xlim(), ax.get_ylim(), ax.get_xscale()) for ax in np.atleast_1d(axes)])

    a = evaluation(tmp_path, "a", spread([16, 32, 48, 64], lambda b: rng.normal(50, 5, 30)))
    b = evaluation(tmp_path, "b", spread([16, 32, 48, 64, 96, 128], lambda b: rng.normal(b, 1, 30)))
    monkeypatch.setattr(plots, "canvas", watched)
    assert compared(f"before={a}", f"after={b}", out=tmp_path / "both") == 0
    with open(tmp_path / "both" / "compare.json") as f:
        assert json.load(f)["pictures"] == ["side_by_side.png", "models.png"]
    before, after = seen[0]
    assert before == after and before[0][1] > 128 and before[1][1] > 128
    assert (tmp_path / "both" / "side_by_side.png").stat().st_size > 10_000


def test_curves_of_three_models_in_one_picture(tmp_path):
    figures = {"accuracy": 0.5, "mean_length": 90, "ci": {"accuracy": [0.4, 0.6]}}
    cells = {"100": figures, "none": figures | {"mean_length": 3000}}
    curves = {"s$": {f"model {i}": cells for i in range(3)}, "t": {f"model {i}": cells for i in range(3)}}
    lengths = {name: dict.fromkeys(models, {}) for name, models in curves.items()}
    paths = plots.draw_models(curves, lengths, str(tmp_path))
    assert [p.rsplit("/", 1)[1] for p in paths] == ["models_s_.png", "models_t.png"]
    assert plots.error_bar(figures, "accuracy") == pytest.approx((10, 10))
    assert plots.error_bar({"accuracy": 0.5}, "accuracy") == (0, 0)


# ------------------------------------------------------------------------------------------------------------
# Learning curves


def write_run(folder, steps, tail=""):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "metrics.jsonl"), "w") as f:
        for step in steps:
            m = {"step": step, "reward": step / 10, "reward_correct": 0.5, "reward_length": step / 10 - 0.5}
            m |= {"reward_std": 0.1, "accuracy": 0.5, "length": 20.0, "abs_error": 0.5}
            cell = {"signed": -0.5, "abs": 0.5, "length": 20.0}
            f.write(json.dumps(m | {"error_by_budget": {"16": cell, "128-255": cell}}) + "\n")
        f.write(tail)
    return str(folder)


def test_watch_one_run_several_and_one_that_is_being_written(tmp_path, capsys):
    a = write_run(tmp_path / "a", range(30), tail='{"step": 30, "rew')
    b = write_run(tmp_path / "x" / "a", [0])
    assert curves.main([a]) == 0
    assert "a: step 30, reward +2.900, accuracy 50.0%, length error 50.0%" in capsys.readouterr().out
    assert curves.main([a, b, "--out", str(tmp_path / "both")]) == 0
    from matplotlib.image import imread

    for path in (tmp_path / "a" / "curves.png", tmp_path / "both" / "curves.png"):
        pixels = imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 900 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert not [p for p in (tmp_path / "a").iterdir() if p.suffix == ".tmp"]
    # What cannot be drawn is said in one line, and no picture is left.
    empty = write_run(tmp_path / "empty", [], tail='{"step": 0')
    for bad, words in ((empty, "no step"), (str(tmp_path), "--out folder")):
        assert curves.main([bad]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not os.path.exists(f"{bad}/curves.png")
    assert curves.main([a, "--out", "/proc/none"]) == 2 and "/proc/none" in capsys.readouterr().err
    assert curves.main([]) == 2 and "FOLDER" in capsys.readouterr().err


def test_what_the_curves_show(tmp_path):
    steps = curves.read_metrics(write_run(tmp_path, [0, 1, 2, 1, 3]))  # resumed: step 1 was taken twice
    assert [s["step"] for s in steps] == [0, 1, 2, 3]
    x, y = curves.series(steps, "error_by_budget/16/length")
    assert x.tolist() == [1, 2, 3, 4] and y.tolist() == [20.0] * 4
    assert len(curves.series(steps, "error_by_budget/99/length")[0]) == 0
    assert curves.smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1.0, 2.0, 4.0, 6.0]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.integers(0, 60))
def test_smoothing_stays_between_the_extremes(values, width):
    line = curves.smooth(np.array(values), width)
    assert len(line) == len(values) and line[0] == pytest.approx(values[0], abs=1e-9)
    assert min(values) - 1e-6 <= line.min() and line.max() <= max(values) + 1e-6
    if width <= 1:
        assert line == pytest.approx(values, abs=1e-6)
