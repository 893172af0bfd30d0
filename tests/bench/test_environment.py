import re

import stepbatch
from stepbatch.bench.environment import environment


def test_versions_are_those_installed() -> None:
    found = environment(["pytest", "no-such-package"])
    assert re.fullmatch(r"\d+\.\d+.*", found["pytest"])
    assert "no-such-package" not in found
    assert found["stepbatch"] == stepbatch.__version__
    assert found["cores"] >= 1
    assert found["cpu"]
