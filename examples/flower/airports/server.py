"""The server: chains and surrogates, no data."""

import jax
import numpy as np

from airports import task
from stochgrad.flower import server_app


def arguments(context):
    """What ``federate`` is to do."""
    config = context.run_config
    return {
        "kernel": task.kernel,
        "init": task.INIT,
        "key": jax.random.key(0),
        "clients": ["EWR", "JFK", "LGA"],
        "num_visits": int(config["visits"]),
        "num_chains": int(config["chains"]),
        "local_steps": int(config["steps"]),
        "thin": 20,
        "max_rounds": int(config["rounds"]),
        "timeout": 300.0,
        "checkpoint": f"{config['output']}.checkpoint.npz",
        "resume": True,
    }


def finish(draws, context):
    """Leave the draws in a file."""
    np.savez(str(context.run_config["output"]), w=draws.positions, **draws.stats)


app = server_app(finish, arguments)
