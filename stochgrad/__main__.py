"""``python -m stochgrad``: the versions and devices that a bug report needs."""

import platform
from importlib.metadata import PackageNotFoundError, version

import jax

import stochgrad

_PACKAGES = ("jax", "jaxlib", "numpy", "numpyro", "blackjax", "arviz", "xarray", "optax")


def main() -> None:
    """Print versions and devices."""
    print(f"stochgrad {stochgrad.__version__}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} is not installed")
    print(f"devices {jax.devices()}")


if __name__ == "__main__":
    main()
