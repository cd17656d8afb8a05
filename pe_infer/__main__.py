"""``python -m pe_infer``."""

from pe_infer.cli import main

if __name__ == "__main__":
    main()
