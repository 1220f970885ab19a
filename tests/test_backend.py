"""Backends: choice, copies, and what they say of themselves. Failing CuPys: test_train_script."""

from __future__ import annotations

import importlib
import math
import os

import array_api_compat
import numpy as np
import pytest

from npbn import backend
from npbn.errors import BackendError
from npbn.models import LeNet

AVAILABLE = [pytest.param(backend.get_backend("numpy"), id="numpy")]
try:
    AVAILABLE.append(pytest.param(backend.get_backend("cupy"), id="cupy"))
except BackendError:
    pass  # no GPU here

every_backend = pytest.mark.parametrize("device", AVAILABLE)


def test_names():
    with pytest.raises(ValueError, match="expected a backend of auto, numpy, cupy, got 'torch'"):
        backend.get_backend("torch")


def test_auto_is_a_gpu_if_there_is_a_usable_one():
    chosen = backend.get_backend("auto")
    assert chosen.name == ("cupy" if len(AVAILABLE) == 2 else "numpy")
    assert bool(chosen.note) == (chosen.name == "numpy")


@pytest.mark.parametrize(("given", "expected"), [(None, ""), ("cub", "cub")])
def test_cupy_compiles_no_kernels_of_cub_unless_asked(given, expected, monkeypatch):
    """Whether or not CuPy can be used here: the variable counts when it is imported."""
    monkeypatch.delenv("CUPY_ACCELERATORS", raising=False)
    if given is not None:
        monkeypatch.setenv("CUPY_ACCELERATORS", given)
    backend.get_backend("auto")
    assert os.environ["CUPY_ACCELERATORS"] == expected


@every_backend
def test_description(device):
    name = {"numpy": "NumPy", "cupy": "CuPy"}[device.name]
    version = importlib.import_module(device.name).__version__
    assert device.description.startswith(f"{name} {version}")
    assert " on " in device.description


@every_backend
def test_there_and_back(device, rng):
    host = rng.normal(size=(3, 2))
    array = device.asarray(host, "float32")
    assert array_api_compat.is_cupy_array(array) == (device.name == "cupy")
    device.synchronize()
    back = backend.to_numpy(array)
    np.testing.assert_array_equal(back, host.astype(np.float32))
    back[...] = 0
    assert float(array[0, 0]) != 0  # a copy


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_moves_with_its_state(device, dtype, rng):
    model = LeNet(generator=rng)
    before = model.state_dict()
    model.to(device, dtype)
    for parameter in model.parameters().values():
        assert str(parameter.data.dtype) == dtype
        assert array_api_compat.is_cupy_array(parameter.data) == (device.name == "cupy")
    y = model.forward(device.asarray(rng.random((2, 1, 28, 28)), dtype))
    assert str(y.dtype) == dtype
    host = LeNet()
    host.load_state_dict(model.state_dict())
    for name, value in host.state_dict().items():
        if "moving" not in name:
            np.testing.assert_array_equal(value, before[name])


def test_keeping_freed_memory_changes_no_result(rng):
    """That it helps is seen by the benchmark; here, that it can be called, and twice."""
    backend.keep_freed_memory()
    backend.keep_freed_memory()
    assert np.ones(10_000_000).sum() == 10_000_000


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000"}, 3.0),  # a container's own is mounted
        (
            "5:memory:/a\n4:cpu,cpuacct:/a\n0::/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"}, math.inf),
        ("0::/\n", {"cpu.max": "what is this"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("", {"cpu.max": "100000 100000"}, math.inf),
    ],
)
def test_the_quota_of_control_groups(groups, files, expected, tmp_path):
    """Of versions 1 and 2, and the least of a group and those around it."""
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert backend.cpu_quota(tmp_path / "cgroup", tmp_path / "mounted") == expected


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert backend.cpu_quota(tmp_path / "none", tmp_path) == math.inf


@pytest.mark.parametrize(
    ("quota", "expected"), [(math.inf, 3), (0.2, 1), (1.5, 2), (2.0, 2), (64.0, 3)]
)
def test_the_cpus_that_may_be_used(quota, expected, monkeypatch):
    monkeypatch.setattr(backend.os, "sched_getaffinity", lambda _: {1, 5, 6}, raising=False)
    monkeypatch.setattr(backend, "cpu_quota", lambda *_: quota)
    assert backend.usable_cpus() == expected
