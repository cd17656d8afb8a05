"""``python -m pe_infer``."""

from pe_infer.cli import main

main()
