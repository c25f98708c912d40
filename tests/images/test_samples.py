"""tools/samples.py copies the photographs of installed packages into a folder."""

from commands import assert_one_line_error

from detector.images import samples


def test_every_photograph_is_copied_whole_and_a_second_run_changes_nothing(script, tmp_path):
    for _ in range(2):
        result = script("tools.samples")
        assert result.returncode == 0, result.stderr
        copied = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
        assert copied == {path.name: path.read_bytes() for path in samples.installed_photos()}
        assert {"china.jpg", "flower.jpg", "grace_hopper.jpg"} <= copied.keys()
        assert result.stdout.startswith(f"samples: {len(copied)} photographs (china.jpg, ")


def test_a_place_that_cannot_be_written_is_one_line(script, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = script("tools.samples", "--output_dir", "file/samples")
    assert_one_line_error(result, "--output_dir file/samples", "cannot be written")


def test_without_any_photograph_one_line_says_what_to_install(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(skimage=None, sklearn=None, matplotlib=None)\n"
    )
    result = script("tools.samples", "--output_dir", "photographs", PYTHONPATH=str(tmp_path))
    assert_one_line_error(
        result, "no installed package carries a photograph", "pip install -r requirements-serve.txt"
    )
    assert not (tmp_path / "photographs").exists()
