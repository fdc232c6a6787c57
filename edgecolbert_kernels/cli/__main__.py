import sys

from edgecolbert_kernels.cli.main import main

sys.exit(main())
