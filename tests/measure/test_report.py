import base64
import gzip
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from cache4diffusion.measure import MeasureError, Results, paired_interval, write_report
from cache4diffusion.measure.report import best_method, headline


@pytest.fixture(scope="module")
def page(made_up, tmp_path_factory):
    return write_report(*made_up, tmp_path_factory.mktemp("report") / "new" / "report.html").read_text(encoding="utf-8")


def own(page):
    """The page without plotly's library."""
    return re.sub(r'<script id="plotly".*?</script>', "", page, count=1, flags=re.DOTALL)


def test_the_page_is_below_8_mb_and_asks_nobody(page):
    assert len(page.encode()) < 8_000_000
    packed = re.search(r'<script id="plotly"[^>]*>(.*?)</script>', page, re.DOTALL)[1]
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(packed))[:200]
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", own(page))
    assert "@import" not in own(page)
    assert "cdn." not in own(page)


def test_every_row_stands_with_its_fidelity(page, made_up):
    for row in made_up[0].rows:
        assert re.search(rf'{row.name}</span><span class="badge {row.fidelity}"', page), row.name


def test_the_conditions_strips_and_notes_are_there(page, made_up):
    assert made_up[0].conditions.caption() in page
    strip = made_up[0].row("toca").strip
    cells = re.search(rf'title="{strip}">(.*?)</div>', page)[1]
    assert re.findall(r'class="(\w)', cells) == [letter.lower() for letter in strip]
    assert "coefficients not fitted to this denoiser" in page
    assert "uncached run's after each step, over the first 2 captions. Click" in page


def test_captions_cannot_break_out_of_the_page(page):
    assert "<dark>" not in own(page)


def test_the_embedded_json_is_the_results(page, made_up):
    text = re.search(r'<script id="results" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert Results.from_dict(json.loads(text)) == made_up[0]


def test_images_shrink_until_they_fit(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr("cache4diffusion.measure.report.IMAGE_BUDGET", 80_000)
    results, images, captions = made_up
    some = {name: images[name][:2] for name in ("uncached", "fora")}
    text = write_report(results, some, captions[:2], tmp_path / "r.html").read_text(encoding="utf-8")
    assert sum(map(len, re.findall(r"data:image/png;base64,([\w+/]+)", text))) * 3 / 4 <= 80_000
    monkeypatch.setattr("cache4diffusion.measure.report.IMAGE_BUDGET", 100)
    with pytest.raises(MeasureError, match="give fewer captions or rows"):
        write_report(results, some, captions[:2], tmp_path / "r.html")


def test_a_report_needs_neither_images_nor_accuracy_nor_methods(made_up, tmp_path):
    fields = ("accuracy", "accuracy_difference", "accuracy_difference_interval", "accuracy_by_family", "error_per_step")
    rows = [row.model_copy(update=dict.fromkeys(fields)) for row in made_up[0].rows]
    bare = Results(conditions=made_up[0].conditions, rows=rows)
    assert (
        "Images"
        not in own(write_report(bare, {}, [], tmp_path / "r.html").read_text(encoding="utf-8")).split("<script")[0]
    )
    write_report(Results(conditions=bare.conditions, rows=rows[:1]), {}, [], tmp_path / "r.html")


def test_large_images_keep_their_shape(made_up, tmp_path):
    wide = [Image.new("RGB", (1600, 400), "red")]
    write_report(made_up[0], {"uncached": wide, "fora": wide}, ["red"], tmp_path / "r.html", title="Mine")
    assert "<h1>Mine</h1>" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("images", "words"), [({"nobody": []}, "no such row"), ({"uncached": []}, "0 images of 'uncached' for 8 captions")]
)
def test_images_that_do_not_match_are_refused(made_up, tmp_path, images, words):
    with pytest.raises(MeasureError, match=words):
        write_report(made_up[0], images, made_up[2], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def with_methods(results, **changes):
    """The same results, every method's row changed."""
    rows = [row if row.kind != "method" else row.model_copy(update=changes) for row in results.rows]
    return Results(conditions=results.conditions, rows=rows)


def test_the_headline_claims_only_what_the_intervals_allow(made_up):
    results = made_up[0]
    assert best_method(results).name == "taylorseer"  # taylorseer-lite is faster, but may lose 5.6 points
    said = headline(results)
    assert said.startswith("taylorseer (fidelity: code) samples with 3.7× fewer FLOPs, 3.3× faster, and its")  # noqa: RUF001
    assert "than 16 steps without caching, which cost no less, on 97\xa0% of the captions." in said
    slow = Results(
        conditions=results.conditions, rows=[r.model_copy(update={"latency_speedup": 0.9}) for r in results.rows]
    )
    assert "though not faster here (0.90×)" in headline(slow)  # noqa: RUF001


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"accuracy_difference_interval": [-0.05, 0.01]},
            "Of 7: 7 may lose more than 3 points of accuracy, for all that",
        ),
        ({"psnr_wins": 0.72}, "7 came closer to the uncached image than fewer steps that cost no less on too few"),
        ({"psnr_wins": 1.0, "psnr_wins_interval": [0.34, 1.0]}, "7 came closer to the uncached image than"),
        ({"psnr_wins": None, "accuracy_difference_interval": None}, "7 had neither a judge nor fewer steps"),
        ({"flops_speedup": 0.9}, "7 saved nothing"),
    ],
)
def test_without_a_finding_the_headline_says_why(made_up, changes, words):
    doubtful = with_methods(made_up[0], **changes)
    assert best_method(doubtful) is None
    assert headline(doubtful).startswith("No method is shown here to keep the quality. Of 7: ")
    assert words in headline(doubtful)


def test_too_few_captions_are_named_as_the_reason(made_up):
    few = with_methods(made_up[0], accuracy_difference_interval=[-0.11, 0.11])
    few.conditions = few.conditions.model_copy(update={"captions": 32})
    assert "Below 125 captions no method can be shown to lose less than 3 points." in headline(few)
    assert paired_interval([1] * 124, [1] * 124)[0] <= -0.03 < paired_interval([1] * 125, [1] * 125)[0]
    assert "captions no method" not in headline(with_methods(made_up[0], accuracy_difference_interval=[-0.11, 0.11]))


def test_every_column_is_explained(page):
    text = own(page)
    columns = [re.sub("<[^>]*>", " ", cell) for cell in re.findall(r'<th scope="col">(.*?)</th>', text)]
    explained = " ".join(re.findall(r"<dt>(.*?)</dt>", text)).lower()
    for column in columns:
        words = " ".join(re.sub(r"[↑↓,]|dB|points|\d+ % interval|in PSNR", "", column).lower().split())
        assert words == "method" or words in explained or words in explained.replace(" ", "  "), column
    assert "expected" in text


def test_the_page_can_be_used_with_the_keyboard(page):
    text = own(page)
    assert text.count('tabindex="0" role="region"') == text.count('class="card scroll"') == 2
    assert ".compare:focus-within" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_the_page_parses(page, tmp_path):
    script = re.findall(r"<script>(.*?)</script>", own(page), re.DOTALL)[-1]
    (tmp_path / "page.js").write_text(script, encoding="utf-8")
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)
