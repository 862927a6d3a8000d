"""Run the ``limner`` command as ``python -m limner``, or under ``accelerate launch -m limner``."""

from limner.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
