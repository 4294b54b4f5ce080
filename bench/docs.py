"""Writes docs/results.md, and the README's table of results: python -m bench.docs."""

from pathlib import Path

from bench.results_page import results_page, with_table

if __name__ == "__main__":
    root = Path(__file__).parent.parent
    page, readme = root / "docs" / "results.md", root / "README.md"
    page.write_text(results_page(), encoding="utf-8")
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print(page, readme, sep="\n")
