"""An airport: its rows are in the file that its node's configuration names."""

import numpy as np

from airports import task
from stochgrad import federated
from stochgrad.flower import client_app


def posterior(context):
    """This airport's part of the posterior."""
    with np.load(str(context.node_config["data"])) as file:
        rows = (file["x"], file["late"])
    return federated.posterior(task.log_prior, task.log_likelihood, [rows], batch_size=task.BATCH)


app = client_app(posterior, task.kernel, task.INIT)
