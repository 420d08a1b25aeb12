"""``python -m cache4diffusion`` is ``c4d``."""

from cache4diffusion.cli import main

if __name__ == "__main__":
    main()
