"""A profile over the sequence length and its report: one HTML file that holds its pictures and needs no network."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastattn.profiling.plot import write_sweep_plot
from fastattn.profiling.sweep_table import HEADER, Measurement, cells, ordered, summary, table

RECORD, PAGE, PICTURE = "sweep.json", "sweep.html", "profile.png"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
    "th:nth-child(2),td:nth-child(2){text-align:left}tr.absent td{color:#a33}img{max-width:100%}"
    ".scroll{overflow-x:auto}footer{color:#666;font-size:13px}"
)


@dataclass(frozen=True)
class Profile:
    """What ``profile`` measured, with device, versions and date. ``print`` shows the table and the summary."""

    title: str
    environment: dict[str, Any]
    measurements: list[Measurement]
    interrupted: bool = False

    def __add__(self, other: Profile) -> Profile:
        """Both in one table: a model before and after ``patch``."""
        if not isinstance(other, Profile):
            return NotImplemented
        return Profile(
            self.title,
            self.environment,
            [*self.measurements, *other.measurements],
            self.interrupted or other.interrupted,
        )

    def __str__(self) -> str:
        lines = [self.title, self.environment["device"], table(self.measurements)]
        lines += summary(self.measurements)
        return "\n".join([*lines, "stopped early"] if self.interrupted else lines)

    def write(self, out: Path) -> list[Path]:
        """Write ``sweep.json``, ``sweep.html`` and, where matplotlib is, ``profile.png`` to the folder ``out``.

        The page holds its pictures and loads nothing from elsewhere. Returns the paths.
        """
        out.mkdir(parents=True, exist_ok=True)
        record = asdict(self)
        (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        return [out / RECORD, *_write_page(self, out)]


def _write_page(profile: Profile, out: Path) -> list[Path]:
    """Write ``sweep.html`` to the folder ``out``, and ``profile.png`` where matplotlib is and something ran.

    Returns the paths.
    """
    written = []
    if any(row.seconds is not None for row in profile.measurements):
        if importlib.util.find_spec("matplotlib") is None:
            print("no plot: matplotlib is not installed")
        else:
            title = f"{profile.title}, {profile.environment['device']}"
            write_sweep_plot(profile.measurements, out / PICTURE, title)
            written.append(out / PICTURE)
    (out / PAGE).write_text(_page(profile, written), encoding="utf-8")
    return [out / PAGE, *written]


def _page(profile: Profile, pictures: list[Path]) -> str:
    """The text of the page; ``pictures`` are PNG files, which become part of it."""
    environment = profile.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rows = "".join(
        f"<tr{' class=absent' if row.seconds is None else ''}>{''.join(map(_cell, cells(row)))}</tr>\n"
        for row in ordered(profile.measurements)
    )
    images = "".join(
        f'<img alt="{html.escape(profile.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">\n'
        for picture in pictures
    )
    lines = summary(profile.measurements) + (["stopped early"] if profile.interrupted else [])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(profile.title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{html.escape(profile.title)}</h1>\n<p>{html.escape(environment['device'])}</p>\n"
        f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>\n{images}"
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in HEADER)}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
        "<p>Times are medians of calls taken in turns; memory is the peak of a call beyond the parameters and the "
        "batch; the difference is the largest one from the first implementation's output, as a share of its largest "
        "entry.</p>\n"
        f"<footer>{environment['date']}, {html.escape(versions)}, {environment['threads']} threads</footer>\n"
        "</body></html>\n"
    )


def _cell(text: str) -> str:
    return f"<td>{html.escape(text)}</td>"
