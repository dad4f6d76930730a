"""The contract kit: what a plugin must do, as pytest classes. A plugin's test file is one subclass and its fixtures::

    class TestMyTransport(TransportContract):
        @pytest.fixture
        def transport(self):
            return MyTransport()

        @pytest.fixture
        def address(self):
            return Address("127.0.0.1", 0, "mine")

Class attributes state what a plugin may decide for itself: sizes, tolerances. The kit needs pytest (`cake-core[testing]`).
"""

import pytest

_CHECKED = ("image", "image_rig", "text", "text_rig", "text_sampling", "transport", "transport_endings", "transport_rig")

# Before the modules are imported, so that a failing `assert` in them shows its values.
pytest.register_assert_rewrite(*(f"{__name__}.{name}" for name in _CHECKED))

from cake_core.testing.contracts.image import ImageBackendContract  # noqa: E402
from cake_core.testing.contracts.text import TextBackendContract  # noqa: E402
from cake_core.testing.contracts.transport import TransportContract  # noqa: E402

__all__ = ["ImageBackendContract", "TextBackendContract", "TransportContract"]
