"""Write docs/results.md, the tables of results in other pages, and two figures: python -m bench.docs."""

from pathlib import Path

from bench import decision, epsilons
from bench.results_page import PAGES, results_page, with_tables

if __name__ == "__main__":
    root = Path(__file__).parent.parent
    page = root / "docs" / "results.md"
    page.write_text(results_page(), encoding="utf-8")
    print(page)
    for other in PAGES:
        other = root / other
        other.write_text(with_tables(other.read_text(encoding="utf-8")), encoding="utf-8")
        print(other)
    decision.draw()
    epsilons.draw()
