"""What the command imports before it knows what to do."""

import json
import subprocess
import sys

from distributed.test_step_counts import UNUSED


def test_help_imports_nothing_heavy() -> None:
    code = "import json, sys\nfrom facetrain.cli import main\nmain(['--help'])\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "deepspeed", "cv2", "jsonargparse", "yaml", *UNUSED}
    assert heavy & set(json.loads(done.stdout.splitlines()[-1])) == set()
