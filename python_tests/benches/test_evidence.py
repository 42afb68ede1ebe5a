"""The README shows no number that is not in a committed results file."""

from benches import _evidence


def test_readme_tables_are_those_of_the_committed_results():
    text = _evidence.README.read_text()
    assert _evidence.filled(text) == text, "run `python -m benches evidence`"
