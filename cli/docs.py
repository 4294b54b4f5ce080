"""Writes docs/flags.md: python -m cli.docs."""

from pathlib import Path

from cli.flags import flags_page
from main_MAGIA_sel import FLAGS

if __name__ == "__main__":
    path = Path(__file__).parent.parent / "docs" / "flags.md"
    path.write_text(flags_page(FLAGS), encoding="utf-8")
    print(path)
