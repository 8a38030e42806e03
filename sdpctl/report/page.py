"""The page of a report, and its chart as a picture.

The page is one file. A content security policy allows its two scripts and its style sheet by their hashes, and nothing else: no
request, no other script. Everything that the store says stands in a third script element as JSON, which a browser does not
execute; the page's own script shows it as text. Vega's expressions run in its interpreter, since the policy forbids `eval`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdpctl.errors import IntegrityError, ResourceError, UsageError
from sdpctl.report import charts
from sdpctl.report.settings import ReportFormat
from sdpctl.untrusted import load_json, printable

MOST_BYTES = 2 * 2**20
"""The size in bytes above which a user is told that a page is large."""

PICTURE_SCALE = 2
"""Pixels of a PNG for each unit of a drawing."""

_FOLDER = Path(__file__).parent

_SHELL = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript><p>This page draws its charts and tables with JavaScript, which is switched off in this browser.</p></noscript>
<div id="page"></div>
<script type="application/json" id="document">{document}</script>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def require_library() -> str:
    """Return the version of the package that draws charts.

    Raises:
        ResourceError: if the package is not installed.
    """
    try:
        return version("vl-convert-python")
    except PackageNotFoundError as error:
        raise ResourceError(
            "a report needs the package vl-convert-python, which is not installed: pip install 'sdpctl[report]'"
        ) from error


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and their embedding as one script."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def library_versions() -> dict[str, str]:
    """Return the versions of the JavaScript libraries in a page."""
    import vl_convert

    return {"Vega": vl_convert.get_vega_version(), "Vega-Lite": vl_convert.get_vegalite_versions()[-1]}


def page(document: Mapping[str, Any]) -> bytes:
    """Return the page of a document as HTML.

    Args:
        document: the document that `stages/report.py` gathers.
    """
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    library = _library()
    policy = (
        f"default-src 'none'; script-src {_hashed(library)} {_hashed(script)}; style-src {_hashed(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    content = _SHELL.format(
        policy=policy,
        title=escape(printable(f"{document['title']} - sdpctl")),
        style=style,
        document=embedded(dict(document) | {"axes": charts.AXES, "colours": charts.COLOURS, "charts": _templates(document)}),
        library=library,
        script=script,
    )
    return content.encode()


def with_latencies(content: bytes, tables: Sequence[Mapping[str, float]]) -> bytes:
    """Return a page with latencies, which a stored page never has.

    Args:
        content: a page.
        tables: milliseconds per image by the text of an instance, for each network of the page in order.

    Raises:
        IntegrityError: if the content is not a page.
        UsageError: if there are more tables than networks, or a table has no instance of its network.
    """
    found = re.search(rb'<script type="application/json" id="document">(.*?)</script>', content, re.DOTALL)
    try:
        document = load_json(found[1] if found else b"")
        names = [network["name"] for network in document["networks"]]
        if len(tables) > len(names):
            raise UsageError(f"--latency: the page shows {len(names)} networks, but {len(tables)} tables are given")
        for name, table in zip(names, tables, strict=False):
            rows = [row for row in document["rows"] if row["network"] == name and row["instance"] in table]
            if not rows:
                raise UsageError(f"--latency: no instance of {printable(name)} is in its table of latencies")
            for row in rows:
                row["latency"] = table[row["instance"]]
        return page(document)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"the stored page cannot be understood ({error}); make it again with --force") from error


def embedded(value: object) -> str:
    """Return JSON that cannot end the script element that it stands in, and that is valid JavaScript too."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hashed(script: str) -> str:
    """Return the source expression of a content security policy that allows exactly this script or style sheet."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _templates(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the charts of the page, without their rows."""
    names = [network["name"] for network in document["networks"]]
    return {
        "front": {cost: charts.front(document["series"], cost) for cost in charts.AXES},
        "strip": charts.strip(),
        "spent": charts.spent(),
        "loss": charts.curve("training loss", names, x=("epoch", "epoch")),
        "accuracy": charts.curve("accuracy, %", charts.accuracy_lines(document["networks"]), x=("epoch", "epoch")),
        "classes": charts.classes(),
        "trials": [charts.trials(charts.runs(search["trials"]), search["budget"]) for search in document["searches"]],
        "progress": [_rise(charts.runs(search["trials"])) for search in document["searches"]],
    }


def _rise(runs: Sequence[str]) -> charts.Spec:
    """Return the chart of how the best reward of each run of a search rose."""
    return charts.curve("best reward so far", runs, x=("evaluations", "networks scored"), kind="step-after")


def picture(document: Mapping[str, Any], form: ReportFormat) -> bytes:
    """Return the chart of cost against accuracy as PNG or SVG.

    Args:
        document: the document that `stages/report.py` gathers.
        form: `png` or `svg`.
    """
    import vl_convert

    spec = charts.with_data(charts.front(document["series"]) | {"width": 640}, rows=document["rows"])
    spec["config"] = spec["config"] | {"background": "white", "padding": 12}
    if form == "svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    return bytes(vl_convert.vegalite_to_png(spec, scale=PICTURE_SCALE))
