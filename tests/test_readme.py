"""The README's Python blocks run, in order, as one program."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 7
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["params"]["w"].core.shape == namespace["capacity"]["w"]
    assert float(namespace["value"]) > 0
    assert 0.79 < namespace["summary"].convolutions.compression < 0.82
    assert namespace["program"](namespace["images"]).shape == (16, 10)
