"""The page of a mesh in a browser: each cell is where it belongs and has the colour that it shall have."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from browser import Scheme
from mesh_views import change, mesh
from numpy.typing import NDArray

from udptun.commands.mesh import page
from udptun.commands.mesh.matrix import Mesh
from udptun.commands.mesh.problems import notes_of, problems_of

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(browser.PROGRAM is None, reason="chromium is not installed"),
]

MEASURE = """<script>
const cells = [...document.querySelectorAll("table.matrix td, .key, .verdict")].map(cell => {
  const at = cell.getBoundingClientRect(), style = getComputedStyle(cell);
  return [cell.className, Math.round(at.x + scrollX), Math.round(at.y + scrollY), Math.round(at.width),
          Math.round(at.height), style.backgroundColor, cell.innerText];
});
const wide = document.documentElement.scrollWidth, high = document.documentElement.scrollHeight;
const measured = document.createElement("pre");
measured.id = "measured";
measured.textContent = JSON.stringify({cells, wide, high});
document.body.append(measured);
</script>"""
SIZES = {3: (1100, 800), 200: (1500, 2000)}


def fault(start: int, end: int, said: dict[str, Any]) -> None:
    if (start, end) == (3, 1) or end == 77:
        change(said, "dead")
    elif {start, end} == {1, 2}:
        said.update(probes_sent=40, probes_lost=12)
    elif start == 180:
        said["path_mtu"] = 1372
    elif end == 120:
        change(said, "unknown")


def render(it: Mesh, chosen: str) -> str:
    text = page.render(it, problems_of(it), notes_of(it))
    return text.replace(" checked>", ">").replace(f'id="by-{chosen}"', f'id="by-{chosen}" checked')


def measured(text: str, file: Path, size: tuple[int, int], scheme: Scheme) -> Any:
    """Where the page's cells are, and their colours, as a script says that is not a part of it."""
    file.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", MEASURE + "</body>"))
    found = re.search(r'<pre id="measured">(.*?)</pre>', browser.tree(file, size, scheme), re.DOTALL)
    assert found is not None
    return json.loads(html.unescape(found[1]))


def colour(text: str) -> tuple[int, ...]:
    """Of `rgb(1, 2, 3)`."""
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def shown_at(pixels: NDArray[np.uint8], cells: list[list[Any]]) -> NDArray[np.int_]:
    """The pixel a quarter into each cell, where there is no text."""
    _, x, y, width, height = (np.array(column) for column in list(zip(*cells, strict=True))[:5])
    return pixels[y + height // 4, x + width // 4].astype(int)


@pytest.mark.parametrize(
    ("n_hosts", "chosen", "scheme"),
    [
        *((3, chosen, scheme) for chosen in ("rtt", "loss", "mtu") for scheme in ("light", "dark")),
        *((200, "rtt", "light"), (200, "mtu", "dark")),
    ],
)
def test_every_cell_is_in_its_row_and_column_and_has_its_colour(
    n_hosts: int, chosen: str, scheme: Scheme, tmp_path: Path
) -> None:
    size = SIZES[n_hosts]
    text = render(mesh(n_hosts, fault, {77}), chosen)
    shown = tmp_path / "mesh.html"
    shown.write_text(text)
    pixels = browser.picture(shown, size, scheme, tmp_path / "mesh.png")
    assert pixels.shape == (size[1], size[0], 3)
    found = measured(text, tmp_path / "measured.html", size, scheme)
    assert found["wide"] <= size[0]
    cells = [cell for cell in found["cells"] if "key" not in cell[0] and "verdict" not in cell[0]]
    assert len(cells) == n_hosts**2
    rows = [cells[i : i + n_hosts] for i in range(0, len(cells), n_hosts)]
    for row in rows:
        assert len({cell[2] for cell in row}) == 1
        assert [cell[1] for cell in row] == sorted({cell[1] for cell in row})
    assert [row[0][2] for row in rows] == sorted({row[0][2] for row in rows})
    # What is far down is in a part of the page that scrolls.
    visible = [cell for cell in cells if cell[2] + cell[4] < size[1] * 0.9]
    assert len(visible) > n_hosts**2 // 2
    # Text and rings are of other colours, and so are hatched cells and those whose colour lets the box through.
    plain = [cell for cell in visible if re.fullmatch(r"(s\d )?(l\d )?(m\d)?|dead", cell[0])]
    assert plain
    assert np.abs(shown_at(pixels, plain) - np.array([colour(cell[5]) for cell in plain])).max() <= 2
    kinds = {cell[0]: colour(cell[5]) for cell in plain}
    assert kinds["dead"] not in [its for kind, its in kinds.items() if kind != "dead"]
    if chosen == "rtt":
        steps = {kind.split()[0]: its for kind, its in kinds.items() if kind.startswith("s")}
        assert len(set(steps.values())) == len(steps)
        assert len(steps) == (1 if n_hosts == 3 else 6)
    legend = [cell for cell in found["cells"] if cell[0].startswith("key") and cell[3]]
    assert {colour(cell[5]) for cell in legend} >= {its for kind, its in kinds.items() if kind}
    back = pixels[2, 2].astype(int)
    assert (back.sum() > 600) == (scheme == "light")
    assert {cell[6] for cell in cells if cell[0] == "dead"} == ({"dead"} if n_hosts == 3 else {""})


def test_a_script_that_got_into_the_page_would_not_run(tmp_path: Path) -> None:
    it = mesh(3)
    text = page.render(it, [], ["a note"])
    evil = tmp_path / "evil.html"
    evil.write_text(text.replace("a note", "a note<script>document.title = 'changed'</script><b onclick='1'>b</b>"))
    assert "<title>udptun mesh: all is well, 6 ways are alive</title>" in browser.tree(evil)
    evil.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", evil.read_text()))
    assert "<title>changed</title>" in browser.tree(evil)
