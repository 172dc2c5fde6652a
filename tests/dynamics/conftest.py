"""These tests need the extra ``dynamics``."""

import pytest

pytest.importorskip("diffrax")
