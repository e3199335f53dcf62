"""``python -m monai_unetq.cli``, the command where its script is not on the path."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
