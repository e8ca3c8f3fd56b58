"""`make fuzz`."""

from __future__ import annotations

import sys

from api_fuzz import main

sys.exit(main())
