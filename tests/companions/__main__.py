import sys

from companions.table import main

sys.exit(main())
