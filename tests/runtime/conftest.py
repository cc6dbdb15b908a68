"""What the tests of the kernels run on."""

from collections.abc import Iterator

import pytest

from tests.runtime.host_device import HostDevice, OpenDevice, compiler
from uc3d_rt import cuda_device
from uc3d_rt.device import Device, Scope


@pytest.fixture(scope="session", params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """The kernels compiled as plain C++ or, with `make test-gpu`, a GPU."""
    if request.param == "cuda":
        from uc3d_rt.cuda_device import CudaDevice

        with CudaDevice() as found:
            yield found
    elif compiler() is None:
        pytest.skip("no C++ compiler")
    else:
        yield HostDevice(tmp_path_factory.mktemp("kernels") / "kernels.so")


@pytest.fixture
def device(machine: Device) -> Iterator[Device]:
    """The same, all memory taken of it given back after the test."""
    with Scope(machine) as scope:
        yield scope


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[OpenDevice]:
    """Those that pipelines opened, in the place of GPUs."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    OpenDevice.library_path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    OpenDevice.opened, OpenDevice.limit = [], 2**40
    monkeypatch.setattr(cuda_device, "CudaDevice", OpenDevice)
    monkeypatch.setattr(cuda_device, "cuda_driver", lambda ordinal: None)
    return OpenDevice.opened
