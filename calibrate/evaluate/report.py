# SPDX-License-Identifier: Apache-2.0
"""The report's files: JSON with every number and setting, Markdown tables, and the HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calibrate.evaluate.page import html_page
from calibrate.evaluate.tables import markdown


def write_report(result: dict[str, Any], out: Path) -> str:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``out``; returns what to print."""
    out.mkdir(parents=True, exist_ok=True)
    result = json.loads(json.dumps(result, default=str))
    (out / "report.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = "\n".join(markdown(result)) + "\n"
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(html_page(result), encoding="utf-8")
    return f"{text}\nWritten: {out / 'report.json'}, report.md, report.html"
