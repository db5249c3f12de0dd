"""Tests of files that are replaced as a whole."""

import os

import pytest

from tinydrop_kernels.predict.whole_file import replacing


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_earlier_file(tmp_path, error):
    path = tmp_path / "page.html"
    path.write_text("earlier")
    with pytest.raises(error), replacing(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["page.html"]


def test_the_file_appears_at_the_end(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    with replacing(tmp_path / "link") as part:
        part.write_text("whole")
        assert not (tmp_path / "page.html").exists()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "page.html").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == ["link", "page.html"]
