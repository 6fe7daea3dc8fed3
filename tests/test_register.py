"""If these fail, `import heatssl` leaves timm without its models, depending on what else a program imports."""

import subprocess
import sys

import pytest

ORDERS = {
    "heatssl first": "import heatssl, timm",
    "timm first": "import timm, heatssl",
    "imported twice": "import heatssl; del sys.modules['heatssl'], sys.modules['heatssl.register']; import heatssl",
    "looked up before": "import heatssl; [importlib.util.find_spec('timm') for _ in 'ab']; import timm.layers",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_models_are_there_whoever_comes_first(order: str) -> None:
    """Libraries such as transformers ask for the spec of timm to learn whether it is installed."""
    program = f"""
import importlib.util, sys
{ORDERS[order]}
import timm
assert timm.is_model("gau_tiny_patch16_224")
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "heatssl.register"]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
