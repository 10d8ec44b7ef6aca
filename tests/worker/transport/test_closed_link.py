"""A link that is closed while another thread looks for its server: an error like any other, and no traceback."""

import pytest

from torch_ps.common.errors import Unreachable
from torch_ps.common.wire import address
from torch_ps.worker.transport.link import Link


def test_closed_link_answers_with_an_error_of_ours() -> None:
    link = Link(address.parse("127.0.0.1:1"))
    link.close()
    with pytest.raises(Unreachable, match=r"the connection to 127\.0\.0\.1:1 is closed here"):
        link.describe_once(1.0)
