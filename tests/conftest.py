import pytest

from tests.backends import device_of


@pytest.fixture(autouse=True)
def device(request):
    """A test with a parameter `backend` makes its tensors on that backend's device."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with device_of(parameters.get("backend")):
        yield
