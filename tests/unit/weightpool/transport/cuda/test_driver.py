"""The driver as `cuda-bindings` offers it: what is passed to it, what is made of its answers."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda.bindings import driver as cuda

from sidp_sgl.weightpool.transport.cuda import driver as module
from sidp_sgl.weightpool.transport.cuda.driver import CudaDriver, CudaError
from tests.support.fake_cuda import FakeCuda

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class Checked:
    """`cuda.bindings.driver` without a GPU: it converts the arguments, as it does before it asks
    the driver, which is not there; then a fake answers."""

    def __init__(self, fake: Any) -> None:
        self._fake = fake
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            with pytest.raises(RuntimeError, match="driver library"):
                getattr(cuda, name)(*arguments)
            self.asked.add(name)
            return getattr(self._fake, name)(*arguments)

        return call


@without_gpu
def test_the_bindings_take_every_call() -> None:
    fake = FakeCuda(num_devices=2)
    checked = Checked(fake.api)
    CudaDriver.__init__(fake, 0, checked)
    assert (fake.device_count(), fake.uuid(1)) == (2, "01" * 16)
    assert fake.can_access_peer(1) and fake.has_peer_atomics(1)
    handle, size = fake.create(5)
    assert size == 2 << 20
    imported = fake.import_fd(fake.export_fd(handle))
    address = fake.map(imported, size)
    stream, event = fake.create_stream(), fake.create_event()
    fake.record(event, stream)
    fake.wait(stream, event)
    assert fake.register_host(address, size) == address
    fake.write_value(stream, address + 8, 2**40 + 1)
    fake.copy(address, address + 8, 8, stream)
    fake.synchronize()
    assert fake.is_reached(event) and not fake.is_capturing(stream)
    assert int(fake.tensor(address, 8).view(torch.int64)) == 2**40 + 1
    fake.unregister_host(address)
    fake.unmap(address, size)
    for each in (handle, imported):
        fake.release(each)
    fake.destroy_event(event)
    fake.destroy_stream(stream)
    assert fake.live == []
    source = Path(module.__file__).read_text()
    assert checked.asked == set(re.findall(r"api\.(cu\w+)", source)), "every call was tried"


@pytest.mark.parametrize("attribute", module.NEEDED, ids=lambda attribute: attribute.name[20:50])
def test_a_gpu_that_lacks_something_is_refused_in_one_line(attribute: Any) -> None:
    with pytest.raises(CudaError) as raised:
        FakeCuda(device=1, num_devices=2, lacks={attribute})
    line = str(raised.value)
    assert line.startswith(f"GPU 1 or its driver has no {module.NEEDED[attribute]}, which --sidp")
    assert "update the driver" in line and "\n" not in line


def test_work_that_has_failed_is_an_error() -> None:
    driver = FakeCuda()
    stream = driver.create_stream()
    driver.enqueue(stream, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(CudaError, match=r"GPU 0 has failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        driver.synchronize()


@without_gpu
def test_without_a_gpu_the_driver_says_so() -> None:
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        CudaDriver.of_pytorch()
