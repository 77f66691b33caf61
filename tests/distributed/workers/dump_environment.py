"""Writes the environment it was started with to FOLDER/environment<RANK>.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

file = Path(sys.argv[1]) / f"environment{os.environ.get('RANK', '0')}.json"
file.write_text(json.dumps(dict(os.environ)))
