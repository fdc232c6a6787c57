import sys

from edgecolbert_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
