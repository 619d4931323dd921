"""The committed picture of the parallel block is what its script draws."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

matplotlib = pytest.importorskip("matplotlib")
from benchmarks import draw_block  # noqa: E402


def words(svg: str) -> list[str]:
    """The picture's texts: each is drawn as paths, with itself as a comment."""
    return re.findall(r"<!-- (.+?) -->", svg)


def test_the_picture_is_what_the_script_draws(tmp_path):
    committed = draw_block.PICTURE.read_text()
    draw_block.main(tmp_path / "a.svg")
    draw_block.main(tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(committed)
    assert drawn == (tmp_path / "b.svg").read_text()
    assert words(drawn) == words(committed) and "SwiGLU" in words(committed)
    if f"Matplotlib v{matplotlib.__version__}," in committed:  # other versions write other bytes
        assert drawn == committed
