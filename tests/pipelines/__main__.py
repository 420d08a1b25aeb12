import sys

from pipelines.table import main

sys.exit(main())
