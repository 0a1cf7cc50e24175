"""``python -m mergekit_ot`` is ``mergeot``."""

from __future__ import annotations

from mergekit_ot.cli.app import main

if __name__ == "__main__":
    main()
