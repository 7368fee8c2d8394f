"""The report and the terminal table, on made-up results."""

from __future__ import annotations

import copy
import io
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tinycomp.eval import report, table
from tinycomp.eval.plots import layer_table
from tinycomp.eval.report import print_table, write_report

PROJECTIONS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
LAYERS = 30
LINEAR, OTHER, DENSE_BYTES = 106_168_320, 28_346_688, 538_060_032
# name, method, ratio, kept, perplexity, decode tokens/s relative to dense; invented for this test
INVENTED = [
    ("CUR 0.9", "CUR", 0.9, 0.8994, 37.9, 1.05),
    ("CUR 0.6", "CUR", 0.6, 0.5991, 1002.0, 1.42),
    ("SWSC 0.9", "SWSC", 0.9, 0.8987, 151.0, 0.93),
    ("SWSC 0.6", "SWSC", 0.6, 0.5999, 4.1e6, 1.31),
    ("SVD 0.9", "SVD", 0.9, 0.8999, 29.9, 1.04),
    ("SVD 0.6", "SVD", 0.6, 0.5998, 104.0, 1.44),
    ("WidthPrune 0.9", "WidthPrune", 0.9, 0.9007, 26.2, 1.09),
    ("WidthPrune 0.6", "WidthPrune", 0.6, 0.6003, 58.0, 1.55),
    ("int8", "Rounding", None, 1.0, 24.12, 1.8),
]


def _records(method: str, kept: float) -> list[dict]:
    out = []
    for layer in range(LAYERS):
        for index, (name, (rows, columns)) in enumerate(PROJECTIONS.items()):
            share = min(1.0, max(0.05, kept + 0.35 * math.sin(0.4 * layer + index) * (1 - kept)))
            out.append(
                {
                    "path": f"model.layers.{layer}.{name}",
                    "method": method,
                    "shape": [rows, columns],
                    "size_before": rows * columns,
                    "size_after": int(share * rows * columns),
                    "bits_after": 16 * int(share * rows * columns),
                    "relative_error": 0.02 + (1 - share) * (0.3 + 0.1 * math.cos(0.7 * layer) + 0.05 * index),
                    "predicted_loss": 0.001,
                }
            )
    return out


def _compression(name: str, method: str, ratio: float, kept: float) -> dict:
    return {
        "name": name,
        "methods": [{"method": method, "seed": 0}],
        "ratio_requested": ratio,
        "ratio_achieved": kept,
        "targeted_parameters": LINEAR,
        "parameters_before": LINEAR + OTHER,
        "parameters_after": int(LINEAR * kept) + OTHER,
        "seconds": 41.2,
        "peak_memory_bytes": 2_140_000_000,
        "records": _records(method, kept),
        "skipped": [
            {"path": "model.embed_tokens", "reason": "embedding (ignored by default)", "parameters": 28_311_552},
            *(
                {"path": f"model.layers.{i}.input_layernorm", "reason": "norm (ignored by default)", "parameters": 576}
                for i in range(LAYERS)
            ),
        ],
        "fallbacks": ["model.layers.29.mlp.down_proj: Cholesky failed, solved by eigendecomposition"],
        "allocation": "global budget by predicted loss",
        "fingerprint": "6f2c9d0b41aa77e3",
    }


def sample_results() -> dict:
    rows = [
        {
            "name": "dense", "method": "dense", "ratio": 1.0, "achieved_ratio": 1.0, "parameters": LINEAR + OTHER,
            "linear_parameters": LINEAR, "bytes_disk": DENSE_BYTES + 31_000, "bytes_memory": DENSE_BYTES,
            "flops_per_token": 269_028_864, "prefill_tokens_s": 412.7, "decode_tokens_s": 21.3, "perplexity": 23.98,
            "compress_seconds": None, "peak_memory_bytes": None, "plain": True, "note": "",
        }
    ]  # fmt: skip
    for name, method, ratio, kept, perplexity, faster in INVENTED:
        size = int(LINEAR * kept) + OTHER
        stored = size * 4 if method != "Rounding" else LINEAR + OTHER * 4
        rows.append(
            {
                "name": name, "method": method, "ratio": ratio, "achieved_ratio": kept, "parameters": size,
                "linear_parameters": size - OTHER, "bytes_disk": stored + 52_000, "bytes_memory": stored,
                "flops_per_token": 2 * size, "prefill_tokens_s": 412.7 * faster**0.7, "decode_tokens_s": 21.3 * faster,
                "perplexity": perplexity, "compress_seconds": 41.2, "peak_memory_bytes": 2_140_000_000,
                "plain": method == "WidthPrune", "note": "",
            }
        )  # fmt: skip
    compressions = [_compression(n, m, r, k) for n, m, r, k, _, _ in INVENTED if r is not None and m != "WidthPrune"]
    return {
        "title": "SmolLM2-135M-Instruct: invented numbers",
        "model": "SmolLM2-135M-Instruct (Llama, 30 layers, fp32)",
        "machine": {
            "cpu": "Intel(R) Xeon(R) Processor @ 2.50GHz", "cores": 2, "threads": 2, "memory_gb": 25.3,
            "load_average": 0.84, "stream_gb_s": 21.8, "gemm_gf_s": 290.2, "torch": "2.13.0", "python": "3.11.7",
        },
        "protocol": {"name": "ppl/sotu-2013-2014/512/512/token", "hash": "e436aed55e7a4f35"},
        "command": "tinycomp demo --out demo_out",
        "rows": rows,
        "compressions": compressions,
        "notes": ["Every compression is one-shot: nothing was trained afterwards."],
    }  # fmt: skip


class Page(HTMLParser):
    """Visible text, tags that stay open, and everything the page would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.fetched, self.cells = "", [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    paths = write_report(folder / "deep" / "er", sample_results())
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def test_report_files_are_the_ones_returned(written):
    assert list(written)[:2] == ["report.md", "report.html"]
    assert set(written) == {
        "report.md",
        "report.html",
        *(f"report-{n}.svg" for n in ("quality", "speed", "error", "kept")),
    }


def test_html_is_well_formed_and_fetches_nothing(written):
    page = Page(written["report.html"])
    assert page.open == []
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert "<script" not in written["report.html"]
    assert written["report.html"].count("<svg") == 4


def test_every_row_and_number_is_in_both_pages(written):
    results = sample_results()
    page = Page(written["report.html"])
    for row in results["rows"]:
        (line,) = [x for x in written["report.md"].splitlines() if x.startswith(f"| {row['name']} |")]
        for column in table.COLUMNS:
            assert table.text(row, column) in line
            assert any(cell.startswith(table.text(row, column)) for cell in page.cells)
        assert any(cell.startswith(row["name"]) for cell in page.cells)


def test_header_names_protocol_machine_and_command(written):
    for text in (written["report.md"], Page(written["report.html"]).text):
        for wanted in ("ppl/sotu-2013-2014/512/512/token", "e436aed55e7a4f35", "Xeon", "load 0.84", "290.2 GFLOP/s"):
            assert wanted in text
        assert "tinycomp demo --out demo_out" in text


def test_coverage_lists_skips_fallbacks_and_worst_layers(written):
    text = Page(written["report.html"]).text
    assert "embedding (ignored by default)" in text
    assert f"and {LAYERS - report.LISTED_SKIPS} more" in text
    assert "Cholesky failed" in text
    worst = max(_records("CUR", 0.5991), key=lambda r: r["relative_error"])
    assert worst["path"] in text
    assert text.index("embedding (ignored by default)") < text.index("norm (ignored by default)")


def test_plots_take_the_page_colours_and_files_do_not(written):
    html = written["report.html"]
    assert "currentColor" in html
    assert "#010203" not in html
    assert "currentColor" not in written["report-quality.svg"]
    assert written["report-quality.svg"].index('fill="white"') < written["report-quality.svg"].index("<g")


def test_plot_ids_do_not_collide_on_one_page(written):
    ids = re.findall(r'\bid="([^"]+)"', written["report.html"])
    assert len(ids) == len(set(ids)) > 10
    assert set(re.findall(r'(?:href="|url\()#([\w.]+)', written["report.html"])) <= set(ids)


def test_same_results_give_the_same_bytes(written, tmp_path):
    again = {path.name: path.read_text(encoding="utf-8") for path in write_report(tmp_path, sample_results())}
    assert again == written


def test_text_is_escaped(tmp_path):
    results = sample_results()
    results["rows"][1]["name"] = "<b>&x"
    results["title"] = "<script>alert(1)</script>"
    results["compressions"] = []
    html = write_report(tmp_path, results)[1].read_text(encoding="utf-8")
    assert "<script>" not in html
    assert "&lt;b&gt;&amp;x" in html


def test_without_matplotlib_the_page_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="matplotlib"):
        paths = write_report(tmp_path, sample_results())
    assert [path.name for path in paths] == ["report.md", "report.html"]
    for path in paths:
        assert "tinycomp[report]" in path.read_text(encoding="utf-8")
    assert "<svg" not in paths[1].read_text(encoding="utf-8")


def test_missing_values_are_dashes_and_missing_columns_go(tmp_path):
    results = {
        "title": "sizes only",
        "rows": [{"name": "a", "method": "dense", "parameters": 10}, {"name": "b", "method": "CUR"}],
    }
    markdown, html = (path.read_text(encoding="utf-8") for path in write_report(tmp_path, results))
    assert "| b | – |" in markdown
    assert "perpl." not in markdown
    assert "No plots" in html


def test_broken_numbers_do_not_break_the_page(tmp_path):
    results = sample_results()
    results["compressions"] = results["compressions"][:1]
    results["rows"][1]["perplexity"] = math.nan
    results["rows"][2]["perplexity"] = math.inf
    for index, value in enumerate((math.nan, math.inf, 0.0)):
        results["compressions"][0]["records"][index]["relative_error"] = value
    markdown, html = (path.read_text(encoding="utf-8") for path in write_report(tmp_path, results)[:2])
    assert "the model is broken: CUR 0.9" in markdown
    assert "∞" in markdown
    assert html.count("<svg") == 4


def test_report_refuses_results_without_rows(tmp_path):
    with pytest.raises(ValueError, match="rows"):
        write_report(tmp_path / "none", {"title": "x", "rows": []})
    assert not (tmp_path / "none").exists()


def test_best_is_among_the_compressed_rows_only():
    rows = sample_results()["rows"]
    marked = table.best(rows)
    names = {row["name"]: index for index, row in enumerate(rows)}
    assert (names["int8"], "perplexity") in marked  # dense is better, but no result of a compression
    assert (names["int8"], "bytes_disk") in marked
    assert not any(index == names["dense"] for index, _ in marked)
    assert table.best(rows[:2]) == set()


def test_front_and_remarks():
    rows = [
        {"name": "dense", "method": "dense", "bytes_disk": 100, "perplexity": 10.0, "decode_tokens_s": 10.0},
        {"name": "good", "method": "A", "bytes_disk": 50, "perplexity": 12.0, "decode_tokens_s": 9.0},
        {"name": "bad", "method": "A", "bytes_disk": 60, "perplexity": 13.0, "decode_tokens_s": 12.0},
        {"name": "tiny", "method": "B", "bytes_disk": 10, "perplexity": 99.0, "flags": ["decode above the limit"]},
    ]
    assert [rows[i]["name"] for i in table.front(rows)] == ["tiny", "good", "dense"]
    said = table.remarks(rows)
    assert [line for line in said if "good" in line and line.endswith(": bad.")]
    assert [line for line in said if "slower than dense" in line and "good (0.90 times)" in line]
    assert "tiny: decode above the limit." in said
    assert len(said) == 3


@pytest.mark.parametrize(
    ("value", "written_as"),
    [(23.983907, "23.98"), (0.05, "0.05000"), (150.96, "151.0"), (11243, "11,243"), (2.4e6, "2.4e6"), (0.0, "0"),
     (1.5e12, "1.5e12"), (9.99999, "10.00"), (math.inf, "∞"), (math.nan, "NaN")],
)  # fmt: skip
def test_significant(value, written_as):
    assert table.significant(value) == written_as


@pytest.mark.parametrize("width", [80, 120, 140])
def test_terminal_table_fits_and_shows_every_number(width):
    results = copy.deepcopy(sample_results())
    results["rows"][1]["name"] = "Magnitude then Rounding to 8 bits"
    results["rows"][1]["prefill_tokens_s"] = 12345.6
    stream = io.StringIO()
    print_table(results, Console(file=stream, width=width, force_terminal=False))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in stream.getvalue()
    assert "12,345.6" in stream.getvalue()
    for row in results["rows"][2:]:
        (line,) = [x for x in lines if x.startswith(row["name"] + " ")]
        assert line.split()[-len(table.COLUMNS) :] == [table.text(row, c) for c in table.COLUMNS]
    assert "ppl/sotu-2013-2014/512/512/token" in stream.getvalue()


def test_layer_table_names_projections_by_their_shortest_unique_end():
    def paths(*names):
        return [{"path": name} for name in names]

    bert = paths(
        "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.output.dense", "encoder.layer.1.output.dense"
    )
    assert set(layer_table(bert)) == {"query", "attention.output.dense", "output.dense"}
    assert list(layer_table(bert)["output.dense"]) == [1]
    t5 = paths("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.2.layer.0.SelfAttention.q")
    assert set(layer_table(t5)) == {"encoder q", "decoder q"}
    assert layer_table(paths("lm_head")) == {}
