"""``python -m limner``, and so ``accelerate launch -m limner``, is the ``limner`` command."""

from limner.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
