import base64
import hashlib
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.wan_sweep.made_up_events import write_main_sweep
from tests.wan_sweep.made_up_records import KNOBS, metrics_of, record, write_sweep
from wan_sweep.report import write_reports
from wan_sweep.report.markup import plain_table

BASE = {"t5": 3.0, "dit": 2.0, "vae": 4.0}
VOID = {"meta", "img", "br", "wbr"}
HOSTILE = """<script>alert("x")</script><img src=x onerror='alert(1)'> & "two" 'one' </pre></details>"""


class Outline(HTMLParser):
    """Collects elements with their attributes, and fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    assert not found._open
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_main_sweep(tmp_path_factory.mktemp("page"))
    write_reports(folder)
    return (folder / "report.html").read_text("utf-8")


def test_the_page_needs_no_other_file(page: str) -> None:
    found = outline(page)
    sources = [image["src"] or "" for image in found.named("img")]
    assert len(sources) == 6  # four of the sweep, two timelines
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert base64.b64decode(sources[0].partition(",")[2])[:4] == b"\x89PNG"
    assert not found.named("link")
    assert all((anchor["href"] or "").startswith("#job-") for anchor in found.named("a"))
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[\w+/=]+", "", page).partition("<body>")[2])


def test_only_the_pages_own_script_and_style_may_run(page: str) -> None:
    policy = next(meta["content"] for meta in outline(page).named("meta") if meta.get("http-equiv"))
    assert policy is not None
    for name, kind in (("page.js", "script"), ("page.css", "style")):
        source = files("wan_sweep.report").joinpath(name).read_text("utf-8")
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        assert f"<{kind}>{source}</{kind}>" in page
    assert policy.startswith("default-src 'none'")


def test_every_job_has_a_section_that_the_table_links_to(page: str) -> None:
    found = outline(page)
    sections = {details["id"] for details in found.named("details") if "id" in details}
    assert sections == {f"job-{number}" for number in range(1, 7)}
    assert {(anchor["href"] or "")[1:] for anchor in found.named("a")} == sections


def test_the_page_says_what_the_report_says(page: str) -> None:
    for words in (
        "Least memory: job 1 (fp16 offload=true), peak 6.00 GiB allocated",
        "Which configuration for which card",
        "8, 12 and 16 GiB: job 1",
        "Compared with job 1: jobs 3 and 4: PSNR 41.3 dB",
        "processes: warning: 1 other process uses the GPU. Stop it.",
        "575.57.08",
        "python -m wan_sweep -m precision=fp16,bf16,fp32 offload=true,false",
    ):
        assert words in page


def test_a_jobs_section_names_what_filled_the_device(page: str) -> None:
    section = page.partition('id="job-2"')[2].partition('id="job-3"')[0]
    assert "99.8" not in section  # everything here has a name
    for words in ("2.05 GiB", "12.4 %", "aten::_to_copy", "1x32760x12x64", "float64", "block 1&#x27;s self_attn"):
        assert words in section
    assert "<td>t5</td>" in section  # its weights in one line
    assert "63.8 %" in section
    assert "in smaller tensors" not in section
    oom = page.partition('id="job-5"')[2].partition('id="job-6"')[0]
    assert "Out of memory in denoise: 9.86 GiB" in oom
    assert "1.86 GiB were asked for in vain." in oom


def test_numbers_sort_as_numbers_and_what_is_missing_comes_last(page: str) -> None:
    table = page.partition('<table class="sortable">')[2].partition("</table>")[0]
    keys = re.findall(r'data-sort="([^"]*)"', table)
    columns = table.count("<th ")
    rows = [keys[start : start + columns] for start in range(0, len(keys), columns)]
    heads = [re.sub("<br>", " ", head) for head in re.findall(r'type="button">(.*?)</button>', table)]
    by_head = {head: [row[place] for row in rows] for place, head in enumerate(heads)}
    assert by_head["peak GiB"] == ["6.00", "16.58", "6.01", "16.59", "", ""]
    assert by_head["fidelity dB"] == ["Infinity", "Infinity", "41.3", "41.3", "", ""]
    assert by_head["step diff %"][:2] == ["0", "-3.1"]
    assert by_head["outcome"] == ["ok", "ok", "ok", "ok", "oom", "refused"]


def test_nothing_that_a_job_holds_becomes_markup(tmp_path: Path) -> None:
    made = record(
        1,
        {"prompt": HOSTILE},
        metrics_of(base=BASE, activation=41),
        knobs={**KNOBS, "prompt": HOSTILE, "description": HOSTILE},
        environment={"gpu": HOSTILE},
        warnings=[{"code": "x", "text": HOSTILE, "advice": HOSTILE}],
        idle_knobs={"t5_cpu": HOSTILE},
        checks=[{"name": HOSTILE, "state": "ok", "text": HOSTILE, "advice": ""}],
        fidelity={"reference": "", "reference_folder": "", "reason": HOSTILE},
        passes={"trace": {"outcome": "failed", "reason": HOSTILE}},
    )
    made["job"]["name"] = "1_hostile"
    made["sweep"]["name"] = HOSTILE
    other = record(2, {"prompt": "plain"}, outcome="failed", reason=HOSTILE)
    write_reports(write_sweep(tmp_path, made, other))
    page = (tmp_path / "report.html").read_text("utf-8")
    found = outline(page)
    assert len(found.named("script")) == 1
    assert all(set(image) == {"alt", "src"} for image in found.named("img"))
    assert "<script>alert" not in page


def test_a_sweep_without_numbers_has_a_page(tmp_path: Path) -> None:
    write_reports(write_sweep(tmp_path, record(1, {}, outcome="failed", reason="ValueError: broken")))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "failed: ValueError: broken" in page
    assert outline(page).named("img") == []


def test_an_interrupted_write_leaves_the_older_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(write_sweep(tmp_path, record(1, {}, metrics_of(base=BASE, activation=41))))
    before = (tmp_path / "report.html").read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_reports(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_long_texts_of_a_table_break_behind_dots() -> None:
    table = plain_table({"module": "long", "operation": ""}, [("decoder.upsamples.14", "aten::add.out")])
    assert '<td class="long">decoder.<wbr>upsamples.<wbr>14</td><td>aten::add.out</td>' in table
