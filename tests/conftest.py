"""What every test shares: checked signatures and eight devices.

The import hook must be in place before anything imports the package.
It makes each exported function check its arguments and its result
against the shapes and dtypes that its signature promises.
"""

import sys

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

assert not any(name.startswith("annotated_moe.") for name in sys.modules)
install_import_hook("annotated_moe", "beartype.beartype")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def any_types(monkeypatch):
    """As in use: the signatures' own checks are off."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Each compiled program holds memory maps, of which a process has 65,530.

    The programs of all test files are more than that, and the compiler, or who
    writes its cache, then dies of a segmentation fault.
    """
    yield
    jax.clear_caches()
