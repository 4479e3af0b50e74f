import pytest
import torch

from tests.backends import device_of, dtypes_of


@pytest.fixture(autouse=True)
def device(request):
    """A test with a parameter `backend` makes its tensors on that backend's device."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    needs_products = request.node.get_closest_marker("tensor_cores") and parameters.get("dtype") == torch.bfloat16
    if needs_products and torch.bfloat16 not in dtypes_of(parameters["backend"]):
        pytest.skip("the tensor cores of this GPU have no bfloat16")
    with device_of(parameters.get("backend")):
        yield
