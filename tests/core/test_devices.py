"""Several devices, and several processes."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.core import worker
from tests.helpers import run_on_devices

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np, stochgrad, sys
from tests.core import worker

def run(mesh, num_chains, gradient=lambda target: target):
    kernel = stochgrad.sghmc(gradient(worker.target(mesh=mesh)), 0.005, 30.0)
    draws = stochgrad.sample(
        jax.random.key(0), kernel, init=jnp.zeros(3), num_samples=100, num_chains=num_chains
    )
    return draws.positions

assert len(jax.devices()) == 4
mesh = lambda *shape: jax.sharding.Mesh(
    np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("chain", "data")
)
worst = 0.0
plain = lambda target: target
cases = (1, (1, 2), plain), (2, (2, 2), stochgrad.svrg)
for chains, shape, gradient in cases:
    one, many = run(None, chains, gradient), run(mesh(*shape), chains, gradient)
    worst = max(worst, float(np.abs(one - many).max()))
assert worst < 1e-5, worst
"""


@pytest.mark.slow
def test_data_spread_over_devices_give_the_draws_of_one():
    """Draws of some tenths in size agree to 1e-5: sums are taken in another order."""
    run_on_devices(4, SCRIPT)


@pytest.mark.slow
def test_two_processes_give_the_draws_of_one_and_one_goes_on_from_two(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {
        "store": str(tmp_path / "draws.zarr"),
        "checkpoint": str(tmp_path / "state"),
        "address": address,
    }
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                worker.__file__,
                json.dumps({**options, "process": i, "out": f"{tmp_path}/{i}.npy"}),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for i in (0, 1):
        np.testing.assert_array_equal(np.load(tmp_path / f"{i}.npy"), worker.run().positions)
    longer = worker.run(450, store=options["store"], checkpoint=options["checkpoint"], resume=True)
    np.testing.assert_array_equal(longer.positions, worker.run(450).positions)


def test_a_mesh_that_does_not_fit_is_refused():
    device = np.array(jax.devices()[:1])
    with pytest.raises(ValueError, match="mesh must have an axis 'data'"):
        worker.target(mesh=jax.sharding.Mesh(device, ("rows",)))
    mesh = jax.sharding.Mesh(device.reshape(1, 1), ("chain", "data"))
    with pytest.raises(ValueError, match="a mesh needs layout='blocks'"):
        worker.target(mesh=mesh, layout="rows")
